"""What each Ray Train worker runs: one share of one training after another.

Ray has initialised torch.distributed before it calls us; `fit` finds it and makes one batch of all
workers' shares. A worker lives as long as its pool (`orchestration.runners.worker_pool`):
processes, imports and the process group are there for the next trial. Nothing else is: data, model
and optimizer are made anew, and all that is drawn depends on the configuration's seed, so a trial
comes to the same numbers whichever trials its workers have trained before.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import get_context, get_preemption_info
from ray.train.collective import broadcast_from_rank_zero
from ray.util import get_current_placement_group

from cpfean.errors import StoppedError
from cpfean.last_words import leave_last_words
from cpfean.threads import allot
from orchestration.runners.messages import Begun, Message, Note
from orchestration.runners.training import Abandoned, train


def work(job: dict[str, Any]) -> None:
    """Trains what the pool's mailbox hands out, until it closes; called in every worker.

    Args:
        job: "mailbox" of the pool, address for "last_words", its "pool" name, "cache_dir" on this
            node, "cpus" for this worker, and whether nobody takes the machine away ("is_local").
    """
    import torch  # the driver, which imports this too, does without
    from ray.train.torch import get_device

    from cpfean.processes import partners_watched

    allot(job["cpus"])
    host = ray.util.get_node_ip_address()
    rank = get_context().get_world_rank()
    leave_last_words(job["last_words"], rank=rank)
    group = get_current_placement_group()
    begun = Begun(
        workers=get_context().get_world_size(),
        placement_group="" if group is None else group.id.hex(),
        pool=job["pool"],
    )
    mailbox = job["mailbox"]
    mailbox.arrived.remote(rank, host)
    told_to_stop = threading.Event()
    threading.Thread(target=_listen, args=(mailbox, told_to_stop), daemon=True).start()

    def is_to_stop() -> bool:
        # Ray tells of a host that will be taken away, if it is so that hosts may go.
        may_go = not job["is_local"]
        return told_to_stop.is_set() or (may_go and get_preemption_info() is not None)

    number = 0
    while (given := ray.get(mailbox.order.remote(after=number))) is not None:
        number, order = given
        team = _Workers(mailbox, number, is_first=rank == 0)
        team.tell(begun)
        try:
            with suppress(Abandoned), partners_watched(where=host), _warnings_told(team.tell):
                train(
                    order,
                    team,
                    cache_dir=Path(job["cache_dir"]),
                    device=get_device(),
                    is_to_stop=is_to_stop,
                )
        except StoppedError:
            # Another worker may have heard of it first; if nobody does, a host is taken away.
            if not told_to_stop.wait(1.0):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if rank == 0:
        ray.get(mailbox.gone.remote())


def _listen(mailbox: Any, told_to_stop: threading.Event) -> None:
    """Waits in a thread of its own for the end of all orders."""
    while not told_to_stop.is_set():
        try:
            ray.get(mailbox.told_to_stop.remote())
        except ray.exceptions.ActorUnavailableError:
            time.sleep(1.0)  # the way to it is broken for a moment
            continue
        except ray.exceptions.RayError:
            pass  # without a mailbox there are no orders either
        told_to_stop.set()


class _Workers:
    """The workers of a pool as a team; the mailbox takes their messages and says how to go on."""

    def __init__(self, mailbox: Any, number: int, *, is_first: bool) -> None:
        self.is_first = is_first
        self._mailbox = mailbox
        self._number = number

    def tell(self, message: Message) -> None:
        if self.is_first:
            self._mailbox.tell.remote(self._number, message)

    def agree(self, value: Any) -> Any:
        return broadcast_from_rank_zero(value)

    def is_wanted(self, epoch: int) -> bool:
        return bool(ray.get(self._mailbox.verdict.remote(self._number, epoch)))


@contextmanager
def _warnings_told(tell: Callable[[Message], None]) -> Iterator[None]:
    """What is logged as a warning reaches the user, who does not look into workers' logs."""
    handler = _Notes(tell)
    logger = logging.getLogger("cpfean")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, tell: Callable[[Message], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(Note(line=record.getMessage()))
