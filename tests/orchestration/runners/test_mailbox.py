"""Where workers take their orders and leave their messages, without Ray."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from orchestration.runners.mailbox import Mailbox
from orchestration.runners.messages import Note, Order


def order(name: str = "") -> Order:
    return Order(config={}, folder=name, attempt=1, test=False)


async def soon(waiting: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Started, and so far that it waits."""
    task = asyncio.create_task(waiting)
    await asyncio.sleep(0.01)
    assert not task.done()
    return task


def test_an_order_is_waited_for_and_every_worker_gets_it_once() -> None:
    async def script() -> None:
        mailbox = Mailbox()
        workers = [await soon(mailbox.order(after=0)) for _ in range(2)]
        await mailbox.give(order("a"))
        assert [await worker for worker in workers] == [(1, order("a"))] * 2
        idle = await soon(mailbox.order(after=1))
        await mailbox.arrived(1, "10.0.0.2")
        assert await mailbox.hosts() == {1: "10.0.0.2"}
        await mailbox.close()
        assert await idle is None

    asyncio.run(script())


def test_after_an_epoch_the_workers_wait_to_hear_whether_to_go_on() -> None:
    async def script() -> None:
        mailbox = Mailbox()
        await mailbox.give(order())
        await mailbox.tell(1, Note(line="1"))
        assert await mailbox.message() == Note(line="1")
        verdict = await soon(mailbox.verdict(1, 1))
        await mailbox.go_on(0)  # an answer to something earlier
        assert not verdict.done()
        await mailbox.go_on(1)
        assert await verdict

    asyncio.run(script())


@pytest.mark.parametrize("how", ["the next trial", "the end"])
def test_a_trial_that_is_not_wanted_any_more_is_given_up(how: str) -> None:
    async def script() -> None:
        mailbox = Mailbox()
        await mailbox.give(order())
        verdict = await soon(mailbox.verdict(1, 3))
        await (mailbox.give(order()) if how == "the next trial" else mailbox.close())
        assert not await verdict

    asyncio.run(script())


def test_who_stops_a_pool_waits_until_workers_that_are_there_have_gone() -> None:
    async def script() -> None:
        idle = Mailbox()
        await idle.stop()  # nobody has come yet
        mailbox = Mailbox()
        await mailbox.arrived(0, "10.0.0.1")
        await mailbox.give(order())
        told = await soon(mailbox.told_to_stop())
        stopping = await soon(mailbox.stop())
        await told
        assert await mailbox.order(after=0) is None
        assert not stopping.done()
        await mailbox.gone()
        await stopping

    asyncio.run(script())


def test_what_a_trial_left_behind_is_not_taken_for_news_of_the_next() -> None:
    async def script() -> None:
        mailbox = Mailbox()
        await mailbox.give(order())
        await mailbox.tell(1, Note(line="1"))
        await mailbox.give(order())
        await mailbox.tell(1, Note(line="2"))
        await mailbox.tell(2, Note(line="7"))
        assert await mailbox.message() == Note(line="7")

    asyncio.run(script())
