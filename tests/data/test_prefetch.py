"""Batches made ahead are the same ones in the same order, and their thread never outlives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cpfean.data.prefetch import prefetched


class Numbered:
    """A batch that knows its number, whether it was pinned, and by which thread it was made."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pinned = False
        self.thread = threading.current_thread()

    def pin_memory(self) -> Numbered:
        self.pinned = True
        assert threading.current_thread() is self.thread
        return self


class Source:
    """Makes batches, breaks at one of them if told to, and remembers how many were made."""

    def __init__(self, total: int, *, broken: int = -1) -> None:
        self.total = total
        self.broken = broken
        self.made = 0
        self.another = threading.Semaphore(0)

    def __iter__(self) -> Iterator[Numbered]:
        for number in range(self.total):
            if number == self.broken:
                raise ValueError(f"batch {number} is broken")
            self.made += 1
            self.another.release()
            yield Numbered(number)


def threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("total", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("pin", [True, False])
def test_batches_come_in_order_and_from_another_thread(total: int, pin: bool) -> None:
    with prefetched(Source(total), pin=pin) as batches:
        found = list(batches)
    assert [batch.number for batch in found] == list(range(total))
    assert all(batch.pinned == pin for batch in found)
    assert threading.current_thread() not in {batch.thread for batch in found}
    assert len({batch.thread for batch in found}) <= 1
    assert threads() == 0


def test_two_batches_are_made_ahead_and_no_more() -> None:
    source = Source(50)
    with prefetched(source, pin=False) as batches:
        for number in range(5):
            next(batches)
            # One was handed out; two more get made without being asked for.
            for _ in range(3 if number == 0 else 1):
                assert source.another.acquire(timeout=10)
            assert not source.another.acquire(timeout=0.02)
            assert source.made == number + 3


def test_error_is_raised_where_its_batch_is_asked_for() -> None:
    with prefetched(Source(50, broken=3), pin=False) as batches:
        assert [next(batches).number for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="batch 3 is broken"):
            next(batches)
    assert threads() == 0


def test_thread_ends_with_a_loop_that_breaks_off() -> None:
    source = Source(50)
    with prefetched(source, pin=False) as batches:
        for batch in batches:
            if batch.number == 4:
                break
        assert threads() == 1
    assert threads() == 0
    assert 5 <= source.made <= 7


def test_thread_ends_with_a_loop_that_raises() -> None:
    source = Source(50)

    def loop() -> None:
        with prefetched(source, pin=False) as batches:
            for batch in batches:
                1 // (4 - batch.number)

    with pytest.raises(ZeroDivisionError) as caught:
        loop()
    # The traceback still holds the loop's frame, and with it the iterator.
    assert caught.value.__traceback__ is not None
    assert threads() == 0
    assert 5 <= source.made <= 7
