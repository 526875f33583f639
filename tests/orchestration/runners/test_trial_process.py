"""The process that looks after a trial's workers, with pools that do what a script says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from cpfean.errors import LostPartnerError, NoMemoryError, ServiceError, StoppedError
from orchestration.cluster.capacity import Resources
from orchestration.runners.messages import Begun, Epoch, Failed, Message, Note, Order, Resumed
from orchestration.runners.trial_process import MESSAGE, TrialProcess
from orchestration.runners.worker_pool import PoolOptions
from tests.orchestration.runners.failures import failure, taken_away
from tests.orchestration.samples import history


class Pools:
    """Makes pools that come to what a script says; what is no message is raised."""

    def __init__(self, script: tuple[Any, ...]) -> None:
        self.script = list(script)
        self.listener = self
        self.orders: list[Order] = []
        self.made = 0

    def __call__(self, options: PoolOptions, *, name: str) -> Any:
        self.made += 1
        return self

    def train(self, order: Order) -> None:
        self.orders.append(order)

    def go_on(self, epoch: int) -> None: ...

    def message(self) -> Message:
        now = self.script.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    def hosts(self) -> dict[int, str]:
        return {0: "10.0.0.1", 1: "10.0.0.2"}

    def culprits(self, gone: list[int], *, waiting: list[int]) -> list[int]:
        # The first one is always among those that were aborted.
        return sorted(set(gone) - {0}) or sorted({0, 1} - set(waiting))[:1]

    def close(self, *, seconds: float) -> None: ...


class Trained:
    """What was told of trials, one after another in one process."""

    def __init__(
        self,
        folder: Path,
        *script: Any,
        free: dict[str, float] | None = None,
        steps: int = 100,
    ) -> None:
        self.pools = Pools(script)
        self.pauses: list[float] = []
        self.results: list[dict[str, Any]] = []
        options = PoolOptions(
            resources=Resources(workers=2, cpus=1, use_gpu=False, concurrent=1),
            cache_dir="",
            storage=str(folder),
            is_local=False,
            silence=60,
        )
        one = TrialProcess.__new__(TrialProcess)
        one.config = {"number": 3, "config": "{}", "folder": f"{folder}/s-003", "test": False}
        one.setup(
            one.config,
            options,
            make_pool=self.pools,
            available=lambda: free or {},
            pause=self.pauses.append,
        )
        while self.pools.script and len(self.results) < steps:
            self.results.append(one.step())
            if self.results[-1]["done"]:
                one.reset_config(one.config)

    @property
    def told(self) -> list[Message | None]:
        return [result.get(MESSAGE) for result in self.results]

    @property
    def notes(self) -> list[str]:
        return [message.line for message in self.told if isinstance(message, Note)]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    # The process sets it, and it is to be gone afterwards.
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "60")
    return lambda *script, **how: Trained(tmp_path, *script, **how)


def epoch(number: int, *, ended: bool = False) -> Epoch:
    return Epoch(history=tuple(history(*[1.0] * number)), checkpoint="", ended=ended)


def test_a_lost_worker_is_named_and_the_trial_tried_again_three_times(
    trained: Callable[..., Trained],
) -> None:
    lost = failure(LostPartnerError("waited"), WorkerHealthCheckFailedError("x", RayActorError()))
    came = trained(epoch(4), lost, lost, epoch(5), lost, lost)
    assert came.told[:5] == [
        epoch(4),
        Note(line="worker lost (rank 1 on 10.0.0.2), fenced; retry 1/3 from epoch 4."),
        Note(line="worker lost (rank 1 on 10.0.0.2), fenced; retry 2/3 from epoch 4."),
        epoch(5),
        Note(line="worker lost (rank 1 on 10.0.0.2), fenced; retry 3/3 from epoch 5."),
    ]
    assert isinstance(came.told[5], Failed)
    assert came.told[5].failure == "infra"
    assert [result["done"] for result in came.results] == [False] * 5 + [True]
    assert [order.attempt for order in came.pools.orders] == [1, 2, 3, 4]


def test_a_silent_node_is_told_from_a_lost_worker(trained: Callable[..., Trained]) -> None:
    came = trained(epoch(1), failure(WorkerHealthCheckTimeoutError("silent")))
    assert came.notes == ["node silent 60 s (rank 0 on 10.0.0.1), fenced; retry 1/3 from epoch 1."]


def test_of_several_that_are_gone_the_one_is_named_that_the_others_ended_because_of(
    trained: Callable[..., Trained],
) -> None:
    gone = [WorkerHealthCheckFailedError("x", RayActorError()) for _ in range(2)]
    came = trained(epoch(1), failure(*gone))
    assert came.notes == ["worker lost (rank 1 on 10.0.0.2), fenced; retry 1/3 from epoch 1."]


def test_preemptions_do_not_use_up_the_retries(trained: Callable[..., Trained]) -> None:
    stopped = failure(StoppedError("told to stop, saved at step 3 of epoch 2."))
    away = failure(WorkerHealthCheckFailedError("gone", taken_away()))
    lost = failure(LostPartnerError("waited"))
    resumed = Resumed(epoch=1, checkpoint="a")
    came = trained(*[stopped] * 5, resumed, away, *[lost] * 3, epoch(2, ended=True))
    assert came.notes[0] == (
        "preempted: told to stop, saved at step 3 of epoch 2. It goes on there."
    )
    assert came.notes[5] == "preempted; goes on from epoch 1."
    # The other one has waited for it.
    assert came.notes[8] == "worker lost (rank 1 on 10.0.0.2), fenced; retry 3/3 from epoch 1."
    assert came.told[-1] == epoch(2, ended=True)
    assert came.results[-1]["done"]
    assert came.pools.made == 10


def test_a_disk_that_refuses_is_told_and_tried_again_also_where_the_driver_meets_it(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    full = ServiceError("/d/epoch-0002: disk full: 0 B free, 9 MB needed. Free some.")
    here = ServiceError("/d/attempt: disk full: 0 B free, 1 B needed. Free some.")
    came = trained(epoch(1), failure(full), here, here, here, epoch(2), epoch(3, ended=True))
    assert came.notes == [
        "/d/epoch-0002: disk full: 0 B free, 9 MB needed. Free some; retry 1/3 from epoch 1.",
        "/d/attempt: disk full: 0 B free, 1 B needed. Free some; retry 2/3 from epoch 1.",
        "/d/attempt: disk full: 0 B free, 1 B needed. Free some; retry 3/3 from epoch 1.",
    ]
    assert came.pauses == [2.0, 4.0, 6.0]
    # The last line is what the user sees, and by which failures are alike.
    assert came.told[4] == Failed(
        failure="infra",
        message=f"It began with: {str(full).rstrip('.')}.\n{here}",
    )


def test_a_folder_of_checkpoints_that_cannot_be_made_is_tried_again(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    (tmp_path / "s-003").write_text("a file where a folder should be", encoding="utf-8")
    came = trained(epoch(1), steps=4)
    assert len(came.notes) == 3
    assert "s-003: cannot be written" in came.notes[0]
    assert came.pauses == [2.0, 4.0, 6.0]
    assert isinstance(came.told[3], Failed)


def test_workers_that_are_waited_for_are_no_failure(trained: Callable[..., Trained]) -> None:
    came = trained(*[failure(WorkerGroupStartupTimeoutError(2))] * 5, epoch(1, ended=True))
    assert came.results[:5] == [{"done": False}] * 5
    assert came.results[5]["done"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (failure(NoMemoryError("out of memory")), "oom"),
        (failure(ZeroDivisionError()), "bug"),
        (ZeroDivisionError("in this very process"), "bug"),
    ],
)
def test_what_no_repetition_mends_is_not_repeated(
    trained: Callable[..., Trained], error: Exception, expected: str
) -> None:
    came = trained(error)
    (told,) = came.told
    assert isinstance(told, Failed)
    assert (told.failure, came.results[0]["done"], came.pools.made) == (expected, True, 1)


@pytest.mark.parametrize(("free", "pools"), [({"CPU": 1.0}, 2), ({"CPU": 0.5}, 1), ({}, 1)])
def test_a_smaller_pool_is_replaced_before_the_next_trial_if_there_is_room(
    trained: Callable[..., Trained], free: dict[str, float], pools: int
) -> None:
    end = epoch(1, ended=True)
    came = trained(Begun(workers=1), end, end, free=free)
    assert [result["done"] for result in came.results] == [False, True, True]
    assert came.pools.made == pools
