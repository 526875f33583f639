"""Batches gathered ahead: the next ones are made while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

_AHEAD = 2  # one may take longer than a step without anybody waiting; more would cost memory only


class Pinnable(Protocol):
    """What can move to page-locked memory; all batches can."""

    def pin_memory(self) -> Any: ...


B = TypeVar("B", bound=Pinnable)


@contextmanager
def prefetched(batches: Iterable[B], *, pin: bool) -> Iterator[Iterator[B]]:
    """The batches in their order, two of them made ahead in a background thread.

    A thread is enough, and shares the mapped files and starts at once: gathering is copying, which
    does not hold Python's lock. What making a batch raises is raised where that batch is asked
    for. The thread has ended when the context is left, for whatever reason; of the batches not
    asked for at most the one being made is made to its end.

    Args:
        batches: an iterator that makes them one by one; it runs in the thread.
        pin: move each to page-locked memory, there too, for a copy to a GPU that does not block.
    """
    source = iter(batches)

    def make() -> B | None:
        batch = next(source, None)
        return batch.pin_memory() if pin and batch is not None else batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        ahead = deque(thread.submit(make) for _ in range(_AHEAD))

        def in_order() -> Iterator[B]:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(make))
                yield batch

        try:
            yield in_order()
        finally:
            thread.shutdown(cancel_futures=True)
