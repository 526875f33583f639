"""How many threads a step of training is worth.

Another number of threads adds the same terms in another order. The last bits differ, hardest
negatives make more of that, and after some hundred steps it is another model: so the number is
chosen by the configuration where nobody has said one, and written down with every epoch.
"""

from __future__ import annotations

# It registers what is done around a fork. Where it is first imported while another thread is
# forking, half of that is done, and Python prints a traceback.
import concurrent.futures.thread  # noqa: F401
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cpfean.config import ExperimentConfig

# PyTorch gives a thread no fewer numbers than this of an elementwise operation (GRAIN_SIZE).
_GRAIN = 32_768
_VARIABLE = "OMP_NUM_THREADS"


def usable_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(config: ExperimentConfig, *, available: int, workers: int = 1) -> int:
    """Threads of one process for a configuration: all that are available, or one.

    A step goes over its regions and words many times, and at each operation the threads wait for
    the last of them. If the fragments of a step do not hold enough numbers for two threads, sharing
    them brings nothing; and where others use the processors too, each wait is for a thread that is
    not running. A pretrained text encoder is large enough always.

    Args:
        config: the experiment.
        available: threads that the process may have.
        workers: processes that share the batch.
    """
    text = config.model.text
    width = max(config.model.dim, text.scratch_dim)
    pairs = -(-config.optim.batch_size // workers)
    if text.encoder == "scratch" and pairs * config.data.num_regions * width < 2 * _GRAIN:
        return 1
    return available


@contextmanager
def threads_chosen(
    config: ExperimentConfig, *, workers: int = 1, available: int | None = None
) -> Iterator[int]:
    """Sets PyTorch's threads for a configuration, unless OMP_NUM_THREADS has; yields how many.

    Args:
        config, workers, available: as in `threads_for`; without a number, those there are now.
    """
    import torch

    before = torch.get_num_threads()
    if _VARIABLE not in os.environ:
        torch.set_num_threads(threads_for(config, available=available or before, workers=workers))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def allot(cpus: int) -> None:
    """Gives a process as many threads as it has processors, unless the user has said a number.

    Args:
        cpus: that whoever started this process has set aside for it; Ray also writes them to
            OMP_NUM_THREADS where that is not set, so only another number is the user's.
    """
    import torch

    if os.environ.get(_VARIABLE) == str(cpus):
        del os.environ[_VARIABLE]
    if _VARIABLE not in os.environ:
        torch.set_num_threads(cpus)
