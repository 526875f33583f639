"""The rules around Ray, without starting it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from torch.distributed import DistBackendError

from cpfean.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LostPartnerError,
    NoMemoryError,
    StoppedError,
)
from orchestration.runners import tuner
from orchestration.runners.ray_errors import classify, lost_ranks
from orchestration.runners.tuner import (
    EarlyStopping,
    _Halving,
    _Source,
    _Trial,
)
from orchestration.settings import ServiceError
from orchestration.storage.checkpoints import CheckpointFolder
from orchestration.study.records import TrialRecord
from tests.orchestration.samples import record

RULE = EarlyStopping(grace=2, epochs=4)


def judge(
    scheduler: _Halving, trial: Any, *rsums: float, first_epoch: int = 1, epochs: int = 4
) -> int:
    """Feeds a trial's epochs; returns how many it was given before it was stopped."""
    for epoch, rsum in enumerate(rsums, start=first_epoch):
        result = {"epoch": epoch, "val/rsum": rsum, "ended": epoch == epochs}
        if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
            return epoch
    return epochs


def trial(scheduler: _Halving, number: int) -> Any:
    started = SimpleNamespace(trial_id=f"id-{number}", config={"number": number})
    scheduler.on_trial_add(None, started)
    return started


def test_tune_is_told_that_nothing_is_left_only_when_nothing_runs_that_may_be_lost() -> None:
    lost = record(0)
    waiting = [lost]
    hooks: Any = SimpleNamespace(next_trial=lambda: waiting.pop(0) if waiting else None)
    source = _Source(hooks)
    assert source.suggest("a")["number"] == 0
    assert source.suggest("b") is None
    source.on_trial_complete("a", error=True)
    waiting.append(lost)
    assert source.suggest("c")["number"] == 0
    source.on_trial_complete("c")
    assert source.suggest("d") == Searcher.FINISHED


def test_the_first_trial_starts_alone_until_it_has_workers_or_has_failed() -> None:
    waiting = [record(number) for number in range(3)]
    hooks: Any = SimpleNamespace(next_trial=lambda: waiting.pop(0) if waiting else None)
    source = _Source(hooks, first_alone=True)
    assert source.suggest("a")["number"] == 0
    assert source.suggest("b") is None
    source.on_trial_complete("a", error=True)
    assert source.suggest("b")["number"] == 1
    assert source.suggest("c") is None
    source.begun()
    assert source.suggest("c")["number"] == 2


def test_what_is_behind_after_the_grace_is_stopped_and_the_rest_goes_on() -> None:
    scheduler = _Halving(RULE, [])
    good, bad, better = (trial(scheduler, number) for number in range(3))
    assert judge(scheduler, good, 100, 200, 210, 220) == 4
    assert judge(scheduler, bad, 150, 120, 500, 500) == 2
    assert judge(scheduler, better, 0, 300, 310, 320) == 4
    assert scheduler.stopped == {bad.trial_id}


def test_a_trial_that_has_reached_its_end_is_finished_even_if_it_is_behind() -> None:
    scheduler = _Halving(EarlyStopping(grace=4, epochs=4), [])
    judge(scheduler, trial(scheduler, 0), 1, 1, 1, 400)
    assert judge(scheduler, trial(scheduler, 1), 1, 1, 1, 100) == 4
    assert not scheduler.stopped


def test_trials_of_an_earlier_driver_are_compared_with() -> None:
    past = [record(0, 100, 200, 210, 220, state="finished"), record(1, 90, state="interrupted")]
    scheduler = _Halving(RULE, past)
    assert judge(scheduler, trial(scheduler, 2), 150, 120) == 2
    resumed = trial(scheduler, 1)
    assert judge(scheduler, resumed, 250, 260, 270, first_epoch=2) == 4


def failure(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("workers failed", dict(enumerate(errors)))


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def taken_away() -> RayActorError:
    error = RayActorError()
    error._preempted = True
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DivergedError("the loss is nan"), "diverged"),
        (DataError("row 3"), "data"),
        (ConfigError("margin"), "config"),
        (CheckpointError("damaged"), "config"),
        (ServiceError("disk full"), "infra"),
        (OutOfMemoryError("node"), "oom"),
        (MemoryError(), "oom"),
        (NoMemoryError("out of memory in epoch 1"), "oom"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom"),
        (StoppedError("told to stop, saved at step 3 of epoch 2."), "preempted"),
        (taken_away(), "preempted"),
        (WorkerHealthCheckFailedError("gone", taken_away()), "preempted"),
        (WorkerHealthCheckFailedError("gone", RayActorError()), "infra"),
        (WorkerHealthCheckTimeoutError("silent"), "infra"),
        (LostPartnerError("rank 0 of 2 on 10.0.0.1"), "infra"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RayActorError(), "infra"),
        (ConnectionResetError("peer"), "infra"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: reset by peer"), "infra"),
        (DistBackendError("NCCL communicator was aborted"), "infra"),
        (ZeroDivisionError("division by zero"), "bug"),
        (chained(RuntimeError("in worker"), DataError("row 3")), "data"),
    ],
)
def test_a_failure_is_classified_by_its_cause(error: Exception, expected: str) -> None:
    assert classify(failure(error))[0] == expected
    # Of several workers one has the cause; the others lose their partner.
    if expected in ("diverged", "data", "oom", "bug"):
        assert classify(failure(RayActorError(), error))[0] == expected
        assert str(error.__cause__ or error) in classify(failure(RayActorError(), error))[1]
    # Who waited in vain for the one that failed says nothing of why.
    waited = LostPartnerError("rank 0 of 2 on 10.0.0.1: connection closed by peer")
    found, message = classify(failure(waited, error))
    assert found == expected
    assert isinstance(error, LostPartnerError) or "closed by peer" not in message


def test_ranks_that_are_silent_are_told_from_those_that_are_gone() -> None:
    silent = WorkerHealthCheckTimeoutError("silent")
    gone = WorkerHealthCheckFailedError("gone", RayActorError())
    assert lost_ranks(failure(LostPartnerError("waited"), silent, gone)) == ([1], [2])
    assert lost_ranks(RayActorError()) == ([], [])


class ScriptedCrew:
    """A crew that fails as the script says; a dictionary is news."""

    script: tuple[Any, ...] = ()
    given: tuple[dict[str, Any], ...] = ()
    made = 0

    def __init__(self, job: dict[str, Any], *, name: str) -> None:
        self.name = name
        type(self).made += 1

    def train(self, trial: dict[str, Any]) -> None:
        type(self).given += (trial,)

    def go_on(self, epoch: int) -> None: ...

    def news(self) -> dict[str, Any]:
        now, *rest = self.script
        type(self).script = tuple(rest)
        if isinstance(now, Exception):
            raise now
        return now

    def hosts(self) -> dict[int, str]:
        return {0: "10.0.0.1", 1: "10.0.0.2"}

    def close(self, *, seconds: float) -> None: ...


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """What a trial tells while its crews come to what a script says."""
    monkeypatch.setattr(tuner, "Crew", ScriptedCrew)
    # Is set by `_Trial`, and is to be gone afterwards.
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "60")

    def train(*script: Any) -> list[dict[str, Any]]:
        ScriptedCrew.script, ScriptedCrew.given, ScriptedCrew.made = script, (), 0
        one: Any = object.__new__(_Trial)
        one.config = {"number": 3, "config": "{}"}
        one.setup(
            one.config,
            {
                "is_local": False,
                "workers": 2,
                "min_workers": 2,
                "cpus": 1,
                "use_gpu": False,
                "silence": 60,
                "run_name": "s",
                "storage": str(tmp_path),
                "test": False,
            },
        )
        told: list[dict[str, Any]] = []
        while ScriptedCrew.script:
            told.append(one.step())
            if told[-1]["done"]:
                one.reset_config(one.config)
        return told

    return train


def epoch(number: int, **more: Any) -> dict[str, Any]:
    return {"epoch": number, **more}


def test_a_lost_worker_is_named_and_the_trial_tried_again_three_times(
    trained: Callable[..., list[dict]],
) -> None:
    lost = failure(LostPartnerError("waited"), WorkerHealthCheckFailedError("x", RayActorError()))
    told = trained(epoch(4), lost, lost, epoch(5), lost, lost)
    assert [news.get("note") for news in told[:5]] == [
        None,
        "worker lost (rank 1 on 10.0.0.2), fenced; retry 1/3 from epoch 4.",
        "worker lost (rank 1 on 10.0.0.2), fenced; retry 2/3 from epoch 4.",
        None,
        "worker lost (rank 1 on 10.0.0.2), fenced; retry 3/3 from epoch 5.",
    ]
    assert (told[5]["failure"], told[5]["done"]) == ("infra", True)
    assert [trial["attempt"] for trial in ScriptedCrew.given] == [1, 2, 3, 4]


def test_a_silent_node_is_told_from_a_lost_worker(trained: Callable[..., list[dict]]) -> None:
    _, note = trained(epoch(1), failure(WorkerHealthCheckTimeoutError("silent")))
    expected = "node silent 60 s (rank 0 on 10.0.0.1), fenced; retry 1/3 from epoch 1."
    assert note["note"] == expected


def test_preemptions_do_not_use_up_the_retries(trained: Callable[..., list[dict]]) -> None:
    stopped = failure(StoppedError("told to stop, saved at step 3 of epoch 2."))
    away = failure(WorkerHealthCheckFailedError("gone", taken_away()))
    lost = failure(LostPartnerError("waited"))
    told = trained(*[stopped] * 5, {"resumed": 1}, away, *[lost] * 3, epoch(2, ended=True))
    notes = [news.get("note", "") for news in told]
    assert notes[0] == ("preempted: told to stop, saved at step 3 of epoch 2. It goes on there.")
    assert notes[6] == "preempted; goes on from epoch 1."
    # The other one has waited for it.
    assert notes[9] == "worker lost (rank 1 on 10.0.0.2), fenced; retry 3/3 from epoch 1."
    assert told[-1]["done"]
    assert "failure" not in told[-1]
    assert ScriptedCrew.made == 10


def test_a_disk_that_refuses_is_told_and_tried_again_also_where_the_driver_meets_it(
    trained: Callable[..., list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(tuner.time, "sleep", pauses.append)
    full = ServiceError("/d/epoch-0002: disk full: 0 B free, 9 MB needed. Free some.")
    new_attempt = CheckpointFolder.new_attempt
    refusals = [ServiceError("/d/attempt: disk full: 0 B free, 1 B needed. Free some.")] * 3

    def refused_from_the_second_on(folder: CheckpointFolder) -> int:
        if ScriptedCrew.given and refusals:
            raise refusals.pop()
        return new_attempt(folder)

    monkeypatch.setattr(CheckpointFolder, "new_attempt", refused_from_the_second_on)
    told = trained(epoch(1), failure(full), epoch(2), epoch(3, ended=True))
    # The third refusal is one too many.
    notes = [news.get("note", "") for news in told[1:4]]
    assert notes == [
        "/d/epoch-0002: disk full: 0 B free, 9 MB needed. Free some; retry 1/3 from epoch 1.",
        "/d/attempt: disk full: 0 B free, 1 B needed. Free some; retry 2/3 from epoch 1.",
        "/d/attempt: disk full: 0 B free, 1 B needed. Free some; retry 3/3 from epoch 1.",
    ]
    assert pauses == [2.0, 4.0, 6.0]
    assert (told[4]["failure"], told[4]["done"]) == ("infra", True)
    # The last line is what the user sees, and by which failures are alike.
    assert told[4]["message"] == (
        f"It began with: {full}\n/d/attempt: disk full: 0 B free, 1 B needed. Free some."
    )


def test_workers_that_are_waited_for_are_no_failure(trained: Callable[..., list[dict]]) -> None:
    told = trained(*[failure(WorkerGroupStartupTimeoutError(2))] * 5, epoch(1, ended=True))
    assert told[:5] == [{"done": False}] * 5
    assert told[5]["done"]


def test_what_no_repetition_mends_is_not_repeated(trained: Callable[..., list[dict]]) -> None:
    for error, expected in ((NoMemoryError("out of memory"), "oom"), (ZeroDivisionError(), "bug")):
        (told,) = trained(failure(error))
        assert (told["failure"], told["done"], ScriptedCrew.made) == (expected, True, 1)


def test_another_number_of_workers_is_told_once(trained: Callable[..., list[dict]]) -> None:
    told = trained(
        {"begun": True, "workers": 2},
        failure(LostPartnerError("waited")),
        {"begun": True, "workers": 1},
        epoch(1),
    )
    notes = [news.get("note", "") for news in told]
    assert notes[0] == notes[3] == ""
    assert notes[2] == "trained by 1 of 2 workers; the batch is the same."


def test_a_record_knows_when_it_is_for_good() -> None:
    states = ("waiting", "running", "interrupted", "finished", "pruned", "failed")
    settled = [TrialRecord(number=0, name="", state=state).settled for state in states]
    assert settled == [False, False, False, True, True, True]


@pytest.mark.parametrize(("free", "crews"), [({"CPU": 1.0}, 2), ({"CPU": 0.5}, 1), ({}, 1)])
def test_a_smaller_crew_is_replaced_before_the_next_trial_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
    trained: Callable[..., list[dict]],
    free: dict[str, float],
    crews: int,
) -> None:
    monkeypatch.setattr(tuner.ray, "available_resources", lambda: free)
    end = epoch(1, ended=True)
    told = trained({"begun": True, "workers": 1}, end, end)
    assert [news["done"] for news in told] == [False, True, True]
    assert ScriptedCrew.made == crews
