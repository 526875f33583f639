"""What Tune is told of a study, and what a study is told by Tune; without starting Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cpfean.errors import ServiceError
from cpfean.records.trial_record import TrialRecord
from orchestration.runners.messages import Begun, Ended, Epoch, Failed, Lost
from orchestration.runners.trial_process import result_of
from orchestration.runners.tune import Callbacks, Halving, Source
from orchestration.study.stopping import Stop
from tests.orchestration.samples import history, record

RULE = {"grace": 2, "epochs": 4}


def judge(
    scheduler: Halving, trial: Any, *rsums: float, first_epoch: int = 1, epochs: int = 4
) -> int:
    """Feeds a trial's epochs; returns how many it was given before it was stopped."""
    for epoch, rsum in enumerate(rsums, start=first_epoch):
        result = {"epoch": epoch, "val/rsum": rsum, "ended": epoch == epochs}
        if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
            return epoch
    return epochs


def trial(scheduler: Halving, number: int) -> Any:
    started = SimpleNamespace(trial_id=f"id-{number}", config={"number": number})
    scheduler.on_trial_add(None, started)
    return started


class Study:
    """Hands out trials and keeps what it is told."""

    def __init__(self, waiting: list[TrialRecord], *, refuse: Exception | None = None) -> None:
        self.waiting = waiting
        self.refuse = refuse
        self.told: list[Any] = []
        self.stop = Stop(print)
        self.plan = SimpleNamespace(tests_all=False)
        self.folder = SimpleNamespace(path=Path("s"))

    def next_trial(self) -> TrialRecord | None:
        if self.refuse:
            raise self.refuse
        return self.waiting.pop(0) if self.waiting else None

    def checkpoints_of(self, number: int) -> str:
        return f"train/s-{number:03d}"

    def started(self, number: int) -> None:
        self.told.append((number, "started"))

    def tell(self, number: int, message: Any) -> None:
        self.told.append((number, message))

    def tick(self) -> None:
        self.told.append("tick")


def handing_out(waiting: list[TrialRecord]) -> Any:
    return Study(waiting)


def test_tune_is_told_that_nothing_is_left_only_when_nothing_runs_that_may_be_lost() -> None:
    lost = record(0)
    waiting = [lost]
    study = handing_out(waiting)
    source = Source(study)
    assert source.suggest("a")["number"] == 0
    assert source.suggest("b") is None
    source.on_trial_complete("a", error=True)
    waiting.append(lost)
    assert source.suggest("c")["number"] == 0
    source.on_trial_complete("c")
    assert source.suggest("d") == Searcher.FINISHED


def test_the_first_trial_starts_alone_until_it_has_workers_or_has_failed() -> None:
    waiting = [record(number) for number in range(3)]
    study = handing_out(waiting)
    source = Source(study, first_alone=True)
    assert source.suggest("a")["number"] == 0
    assert source.suggest("b") is None
    source.on_trial_complete("a", error=True)
    assert source.suggest("b")["number"] == 1
    assert source.suggest("c") is None
    source.begun()
    assert source.suggest("c")["number"] == 2


def test_what_is_behind_after_the_grace_is_stopped_and_the_rest_goes_on() -> None:
    scheduler = Halving([], **RULE)
    good, bad, better = (trial(scheduler, number) for number in range(3))
    assert judge(scheduler, good, 100, 200, 210, 220) == 4
    assert judge(scheduler, bad, 150, 120, 500, 500) == 2
    assert judge(scheduler, better, 0, 300, 310, 320) == 4
    assert scheduler.stopped == {bad.trial_id}


def test_a_trial_that_has_reached_its_end_is_finished_even_if_it_is_behind() -> None:
    scheduler = Halving([], grace=4, epochs=4)
    judge(scheduler, trial(scheduler, 0), 1, 1, 1, 400)
    assert judge(scheduler, trial(scheduler, 1), 1, 1, 1, 100) == 4
    assert not scheduler.stopped


def test_trials_of_an_earlier_driver_are_compared_with() -> None:
    past = [record(0, 100, 200, 210, 220, state="finished"), record(1, 90, state="interrupted")]
    scheduler = Halving(past, **RULE)
    assert judge(scheduler, trial(scheduler, 2), 150, 120) == 2
    resumed = trial(scheduler, 1)
    assert judge(scheduler, resumed, 250, 260, 270, first_epoch=2) == 4


def tune_trial(number: int, **fields: Any) -> Any:
    given = {"trial_id": f"id-{number}", "config": {"number": number}, "last_result": {}}
    return SimpleNamespace(**given | {"error_file": None} | fields)


def test_messages_are_passed_on_in_their_order_and_the_end_is_told_once() -> None:
    study: Any = Study([])
    came: list[str] = []
    callbacks = Callbacks(study, SimpleNamespace(stopped={"id-1"}), begun=[lambda: came.append("")])
    begun = Begun(workers=2, pool="pool-1")
    epoch = Epoch(history=tuple(history(10.0)), checkpoint="a", ended=False)
    for number in (0, 1):
        one = tune_trial(number)
        callbacks.on_trial_start(0, [], one)
        for message in (begun, epoch):
            callbacks.on_trial_result(0, [], one, result_of(message))
        callbacks.on_trial_result(0, [], one, {"done": False})  # workers are waited for
        callbacks.on_trial_complete(0, [], one)
    callbacks.on_step_end(0, [])
    expected: list[Any] = []
    for number in (0, 1):
        expected += [(number, "started"), (number, begun), (number, epoch)]
        expected.append((number, Ended(pruned=number == 1)))
    assert study.told == [*expected, "tick"]
    assert len(came) == 2


def test_a_trial_that_failed_is_told_of_once_and_has_not_ended_well() -> None:
    study: Any = Study([])
    callbacks = Callbacks(study, None)
    failed = Failed(failure="oom", message="no memory")
    result = result_of(failed)
    assert result["done"]
    one = tune_trial(0, last_result=result)
    callbacks.on_trial_result(0, [], one, result)
    callbacks.on_trial_complete(0, [], one)
    assert study.told == [(0, failed)]


def test_a_process_that_is_gone_is_lost_unless_memory_was_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "error.txt"
    study: Any = Study([])
    callbacks = Callbacks(study, None)
    no_memory = "Task was killed due to the node running low on memory."
    for number, text in enumerate(
        (
            "The actor died\nunexpectedly.",
            no_memory,
            "ray::TrialProcess()\nZeroDivisionError",
        )
    ):
        file.write_text(f"Failure # 1 (occurred at ...)\n{text}\n", encoding="utf-8")
        callbacks.on_trial_error(0, [], tune_trial(number, error_file=str(file)))
    callbacks.on_trial_error(0, [], tune_trial(3))
    assert study.told == [
        (0, Lost(message="The actor died\nunexpectedly.")),
        (
            1,
            Failed(failure="oom", message=no_memory),
        ),
        (2, Failed(failure="bug", message="ray::TrialProcess()\nZeroDivisionError")),
        (3, Lost(message="no error was left behind")),
    ]


def test_an_error_of_the_study_stops_it_and_does_not_reach_tune() -> None:
    full = ServiceError("disk full")
    study: Any = Study([], refuse=full)
    assert Source(study).suggest("a") == Searcher.FINISHED
    assert study.stop.error is full


def test_a_trial_is_handed_to_its_process_as_plain_data() -> None:
    given = Source(Study([record(3)])).suggest("a")  # type: ignore[arg-type]
    assert given["number"] == 3
    assert isinstance(given["config"], str)
    assert (given["folder"], given["test"]) == ("train/s-003", False)
