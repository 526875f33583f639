"""The post of a crew: where its workers take their orders and leave their news.

Alone in its file: a process that is a post needs nothing else, and starts a second earlier without.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Post:
    """Between the process that asks for trials and the workers that train them; an actor."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._number = 0
        self._trial: dict[str, Any] = {}
        self._allowed = 0
        self._closed = False
        self._gone = False
        self._hosts: dict[int, str] = {}

    async def give(self, trial: dict[str, Any]) -> None:
        """A new trial; the one before it is abandoned if it is not at its end."""
        async with self._changed:
            self._number += 1
            self._trial = trial
            self._allowed = 0
            self._news = asyncio.Queue()
            self._changed.notify_all()

    async def go_on(self, epoch: int) -> None:
        """What follows that epoch is wanted."""
        async with self._changed:
            self._allowed = max(self._allowed, epoch)
            self._changed.notify_all()

    async def news(self) -> dict[str, Any]:
        """The next thing that is told of the trial; waits for it."""
        return await self._news.get()

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

    async def order(self, *, after: int) -> tuple[int, dict[str, Any]] | None:
        """For workers: number and trial that follow that number; None at the end; waits."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._number > after)
            return None if self._closed else (self._number, self._trial)

    async def verdict(self, number: int, epoch: int) -> bool:
        """For workers: whether the trial of that number goes on after that epoch; waits."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closed or self._number > number or self._allowed >= epoch
            )
            return not self._closed and self._number == number

    async def tell(self, number: int, news: dict[str, Any]) -> None:
        """For the first worker."""
        if number == self._number:
            await self._news.put(news)
