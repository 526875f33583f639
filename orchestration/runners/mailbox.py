"""Where the workers of a pool take their orders and leave their messages.

Alone in its file: a process that is a mailbox needs nothing else, and starts a second earlier so.
"""

from __future__ import annotations

import asyncio

from orchestration.runners.messages import Message, Order


class Mailbox:
    """Between the process that asks for trials and the workers that train them; an actor."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._number = 0
        self._order: Order | None = None
        self._allowed = 0
        self._closed = False
        self._gone = False
        self._hosts: dict[int, str] = {}

    async def give(self, order: Order) -> None:
        """A new trial; the one before it is abandoned if it is not at its end."""
        async with self._changed:
            self._number += 1
            self._order = order
            self._allowed = 0
            self._messages = asyncio.Queue()
            self._changed.notify_all()

    async def go_on(self, epoch: int) -> None:
        """What follows that epoch is wanted."""
        async with self._changed:
            self._allowed = max(self._allowed, epoch)
            self._changed.notify_all()

    async def message(self) -> Message:
        """The next thing that is told of the trial; waits for it."""
        return await self._messages.get()

    async def close(self) -> None:
        """No more trials; what is underway is saved where it is."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def stop(self) -> None:
        """Closes, and waits until workers that are there have saved and gone."""
        await self.close()
        async with self._changed:
            await self._changed.wait_for(lambda: self._gone or not self._hosts)

    async def hosts(self) -> dict[int, str]:
        """Where each worker is, by rank."""
        return self._hosts

    async def arrived(self, rank: int, host: str) -> None:
        """For workers: where they are."""
        self._hosts[rank] = host

    async def told_to_stop(self) -> None:
        """For workers: waits until nothing more is wanted of them."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed)

    async def gone(self) -> None:
        """For the first worker: it has saved what there was and takes no more orders."""
        async with self._changed:
            self._gone = True
            self._changed.notify_all()

    async def order(self, *, after: int) -> tuple[int, Order | None] | None:
        """For workers: number and order that follow that number; None at the end; waits."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._number > after)
            return None if self._closed else (self._number, self._order)

    async def verdict(self, number: int, epoch: int) -> bool:
        """For workers: whether the trial of that number goes on after that epoch; waits."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closed or self._number > number or self._allowed >= epoch
            )
            return not self._closed and self._number == number

    async def tell(self, number: int, message: Message) -> None:
        """For the first worker: news of the trial of that number; of an earlier one nobody asks."""
        if number == self._number:
            await self._messages.put(message)
