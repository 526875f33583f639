"""Batches on the processors or GPUs of this machine, by threads of this process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

from cpfean.extraction.batches import Batch, Extractor, extract_batch, one_thread, packed

READERS = 8  # threads that read photographs for a GPU, which would wait for one

Made = tuple[Batch, bytes]


def devices_here(workers: int) -> list[torch.device]:
    """Where so many workers compute: on a GPU each, or on this machine's processors."""
    if torch.cuda.is_available():
        return [torch.device("cuda", number) for number in range(workers)]
    return [torch.device("cpu")] * workers


def extract_here(
    batches: Iterable[Batch],
    make_extractor: Callable[[torch.device], Extractor],
    *,
    workers: int,
) -> Iterator[Made]:
    """Gives each batch, packed, as soon as it is done, in whatever order.

    Each worker is a thread with an extractor of its own, and torch computes with one thread in
    each: models and decoders leave Python's lock alone while they work. Between two results torch
    has one thread for the caller too.

    Raises:
        CpfeanError: as `extract_batch`, or what making an extractor raises.
    """
    devices = devices_here(workers)
    free: queue.SimpleQueue[tuple[Extractor, int]] = queue.SimpleQueue()

    def made(batch: Batch) -> Made:
        worker = free.get()
        try:
            extractor, readers = worker
            return batch, packed(extract_batch(extractor, batch, readers=readers))
        finally:
            free.put(worker)

    with one_thread():
        for device in devices:  # one after the other: models are not made in two threads at once
            free.put((make_extractor(device), 1 if device.type == "cpu" else READERS))
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
