"""Batches on the processors or GPUs of this machine, by threads of this process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

from cpfean.errors import ConfigError
from cpfean.extraction.batches import READERS, Batch, Extractor, extract_batch, one_thread, packed

Made = tuple[Batch, bytes]


class Threads:
    """Runs batches in threads of this process, each with an extractor of its own.

    Torch computes with one thread in each: models and decoders leave Python's lock alone while they
    work, so that the workers do not wait for each other.

    Args:
        make_extractor: makes the extractor of a worker.
        workers: on a GPU each, or on a processor where there is none.

    Raises:
        ConfigError: more workers than GPUs.
    """

    def __init__(
        self, make_extractor: Callable[[torch.device], Extractor], *, workers: int
    ) -> None:
        gpus = torch.cuda.device_count()
        self._make = make_extractor
        self._workers = workers
        self.device = "cuda" if gpus else "cpu"
        if gpus and self._workers > gpus:
            raise ConfigError(f"--workers {workers}: this machine has {gpus} GPU(s).")

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Made]:
        """Gives each batch, packed, as soon as it is done, in whatever order.

        Raises:
            CpfeanError: as `extract_batch`, or what making an extractor raises.
        """
        free: queue.SimpleQueue[tuple[Extractor, int]] = queue.SimpleQueue()
        workers = min(self._workers, len(batches))

        def made(batch: Batch) -> Made:
            worker = free.get()
            try:
                extractor, readers = worker
                return batch, packed(extract_batch(extractor, batch, readers=readers))
            finally:
                free.put(worker)

        with one_thread():
            for number in range(workers):  # in turn: models are not made in two threads at once
                if self.device == "cuda":
                    free.put((self._make(torch.device("cuda", number)), READERS))
                else:
                    free.put((self._make(torch.device("cpu")), 1))
            # The number is one of each thread, besides one for those that are yet to come: what
            # multiplies matrices does not ask for the latter.
            pool = ThreadPoolExecutor(
                workers, "extraction", initializer=torch.set_num_threads, initargs=(1,)
            )
            try:
                running: set[Future[Made]] = set()
                for batch in batches:
                    running.add(pool.submit(made, batch))
                    if len(running) > workers:  # one more than can run, so that none waits for us
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        yield from (one.result() for one in done)
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (one.result() for one in done)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
