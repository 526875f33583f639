"""What a study does as trials come and go; the hooks are called by hand, without Ray."""

import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import TrialScheduler

from cpfean.config import ExperimentConfig
from cpfean.errors import CpfeanError
from orchestration.cluster import nodes
from orchestration.cluster.capacity import Cluster, Node, Room
from orchestration.cluster.doctor import versions
from orchestration.proposals.search import Range, SearchSpace
from orchestration.runners.tuner import EarlyStopping, _Halving
from orchestration.settings import ServiceError, Settings
from orchestration.study import study as study_module
from orchestration.study.budget import SPENT, Budget, Price, Prices
from orchestration.study.conclusion import StudyResult, best_of, closing_lines, summary
from orchestration.study.plan import StudyPlan, TrialPlan, num_open
from orchestration.study.records import RunFolder
from orchestration.study.study import StudyError, _Study, reopen_failed
from tests.orchestration.samples import TINY, history, record

SPACE = SearchSpace(name="s", question="?", parameters={"loss.margin": Range(0.1, 0.4)})


class NoTracker:
    """Takes everything, like a tracker that is away; keeps what it is told of the whole."""

    first = ""

    def __init__(self) -> None:
        self.parent: list[tuple[str, dict[str, float], dict[str, str]]] = []

    def start(self) -> None: ...

    def update(self, record: Any) -> None: ...

    def update_study(
        self, state: str, metrics: dict[str, float], tags: dict[str, str] | None = None
    ) -> None:
        self.parent.append((state, metrics, tags or {}))

    def keep_files(self, files: list[Path], record: Any = None) -> None: ...

    def close(self, *, seconds: float = 60.0) -> bool:
        return True


class Driven(_Study):
    """A study whose Tune is the test."""

    interrupted = False

    def _interrupt_tune(self) -> None:
        self.interrupted = True

    @property
    def error(self) -> CpfeanError | None:
        return self._error


def study(
    tmp_path: Path,
    *,
    trials: int = 4,
    fixed: bool = False,
    budget: Budget | None = None,
    allow_drift: bool = False,
    address: str | None = None,
) -> tuple[Driven, list[str]]:
    plans = tuple(
        TrialPlan(name=f"t{n}", overrides={"seed": n}, config=TINY.with_overrides({"seed": n}))
        for n in range(trials)
    )
    plan = StudyPlan(
        kind="sweep",
        name="s",
        base=TINY,
        workers=1,
        data_folder=tmp_path,
        data_fingerprint="0",
        trials=trials,
        space=None if fixed else SPACE,
        fixed=plans if fixed else (),
        budget=budget or Budget(),
        allow_drift=allow_drift,
    )
    folder = RunFolder(tmp_path / "s")
    if not folder.identity_file.exists():
        folder.create(plan.identity(), commit="at the start")
    said: list[str] = []
    where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="", address=address)
    tracker: Any = NoTracker()
    driven = Driven(plan, where, folder, tracker, said.append)
    driven._prepare()
    return driven, said


def report(driven: Driven, number: int, *rsums: float, ended: bool = False) -> None:
    driven.reported(number, {"history": history(*rsums), "ended": ended})


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def begin(driven: Driven) -> int:
    record = driven.next_trial()
    assert record is not None
    driven.started(record.number)
    return record.number


def proposed(tmp_path: Path) -> dict[int, str]:
    """What Optuna was told of each trial."""
    optuna_study = optuna.load_study(
        study_name="s", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}"
    )
    return {trial.user_attrs["number"]: trial.state.name for trial in optuna_study.trials}


def test_a_restart_runs_what_was_cut_off_first_and_then_only_what_is_missing(
    tmp_path: Path,
) -> None:
    first, _ = study(tmp_path)
    finished, pruned, cut_off = (begin(first) for _ in range(3))
    report(first, finished, 10.0, 20.0, ended=True)
    first.ended(finished, pruned=False)
    report(first, pruned, 5.0)
    first.ended(pruned, pruned=True)
    report(first, cut_off, 7.0)

    second, said = study(tmp_path)
    assert "2 settled" in said[0]
    again = second.next_trial()
    assert again is not None
    assert (again.number, again.epochs) == (cut_off, 1)
    new = second.next_trial()
    assert new is not None
    assert new.number == 3
    assert second.next_trial() is None
    states = {record.number: record.state for record in RunFolder(tmp_path / "s").records()}
    assert (states[finished], states[pruned]) == ("finished", "pruned")


def test_an_epoch_that_is_reported_again_counts_once(tmp_path: Path) -> None:
    driven, said = study(tmp_path)
    number = begin(driven)
    report(driven, number, 10.0)
    report(driven, number, 10.0)
    report(driven, number, 10.0, 30.0, ended=True)
    driven.ended(number, pruned=False)
    (record,) = RunFolder(tmp_path / "s").records()
    assert [row["epoch"] for row in record.history] == [1, 2]
    assert sum("epoch 1/" in line for line in said) == 1


def test_a_trial_that_ends_without_reaching_its_end_has_failed(tmp_path: Path) -> None:
    driven, _ = study(tmp_path)
    number = begin(driven)
    report(driven, number, 10.0)
    driven.ended(number, pruned=False)
    (record,) = RunFolder(tmp_path / "s").records()
    assert (record.state, record.failure) == ("failed", "infra")


def test_a_trial_whose_process_is_lost_is_run_again_three_times(tmp_path: Path) -> None:
    driven, said = study(tmp_path, trials=2)
    number = begin(driven)
    report(driven, number, 10.0)
    for retry in (1, 2, 3):
        driven.lost(number, "the actor died")
        assert said[-1] == f"trial-000: its process was lost; retry {retry}/3."
        (record,) = RunFolder(tmp_path / "s").records()
        assert record.state == "interrupted"  # and no RUNNING run, if nothing more is begun
        assert begin(driven) == number  # before what is new
    driven.lost(number, "the actor died")
    (record,) = RunFolder(tmp_path / "s").records()
    assert (record.state, record.failure, record.epochs) == ("failed", "infra", 1)
    assert begin(driven) == 1
    assert driven.next_trial() is None


def test_three_first_failures_alike_stop_the_sweep_and_say_why(tmp_path: Path) -> None:
    driven, _ = study(tmp_path, trials=6)
    for _ in range(3):
        assert not driven.interrupted
        driven.failed(begin(driven), "diverged", "step 4\nthe loss is nan")
    assert driven.interrupted
    assert isinstance(driven.error, StudyError)
    assert "the loss is nan" in str(driven.error)


def diverged(step: int, rate: float) -> str:
    return f"the loss is nan at step {step} of epoch 1: learning rates [{rate}], gradient norm nan."


def test_failures_are_alike_whatever_the_numbers_in_their_messages(tmp_path: Path) -> None:
    driven, _ = study(tmp_path, trials=6)
    for step, rate in ((20, 0.1), (4, 1e-05), (111, 3.0)):
        driven.failed(begin(driven), "diverged", diverged(step, rate))
    assert driven.interrupted
    assert driven.error is not None
    assert driven.error.exit_code == 4


def test_a_trial_that_diverged_is_told_as_failed_and_is_neither_best_nor_run_again(
    tmp_path: Path,
) -> None:
    driven, _ = study(tmp_path, trials=3)
    bad = begin(driven)
    report(driven, bad, 500.0)  # before the loss was not a number any more
    driven.failed(bad, "diverged", diverged(20, 0.1))
    good = begin(driven)
    report(driven, good, 10.0, 20.0, ended=True)
    driven.ended(good, pruned=False)
    assert proposed(tmp_path) == {bad: "FAIL", good: "COMPLETE"}

    again, _ = study(tmp_path, trials=3)
    new = begin(again)
    assert new not in (bad, good)
    assert again.next_trial() is None
    best = best_of(RunFolder(tmp_path / "s").records())
    assert best is not None
    assert best.number == good


def test_a_study_without_anything_but_failures_says_so_and_exits_with_4(tmp_path: Path) -> None:
    driven, _ = study(tmp_path, trials=2)
    for step in (20, 40):
        driven.failed(begin(driven), "diverged", diverged(step, 0.1))
    assert not driven.interrupted  # fewer than three tell nothing
    assert driven.next_trial() is None
    tracker: Any = KeepsFiles()
    driven._tracker = tracker
    result = driven._conclude()
    assert (result.best, result.exit_code) == (None, 4)
    where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="")
    closing = "\n".join(closing_lines(result, where))
    assert "none: no trial finished" in closing
    assert "2 diverged; to run them once more:\n" in closing
    assert "sweep.py --resume --retry-failed --name s" in closing.splitlines()[-3]


def test_a_trial_that_failed_is_run_once_more_if_that_is_asked_for(tmp_path: Path) -> None:
    driven, _ = study(tmp_path, trials=2)
    failed = begin(driven)
    report(driven, failed, 10.0)
    driven.failed(failed, "infra", "disk full")
    good = begin(driven)
    report(driven, good, 10.0, 20.0, ended=True)
    driven.ended(good, pruned=False)

    asked: Any = SimpleNamespace(retry_failed=False)
    said: list[str] = []
    reopen_failed(asked, RunFolder(tmp_path / "s"), said.append)
    again, _ = study(tmp_path, trials=2)
    assert again.next_trial() is None  # it is settled until somebody asks
    asked.retry_failed = True
    assert num_open(driven._plan, driven._settings) == 0
    assert num_open(replace(driven._plan, retry_failed=True), driven._settings) == 1
    reopen_failed(asked, RunFolder(tmp_path / "s"), said.append)
    assert said == ["1 trial(s) that failed are run once more."]
    again, _ = study(tmp_path, trials=2)
    assert begin(again) == failed
    assert again.next_trial() is None
    report(again, failed, 10.0, 30.0, ended=True)
    again.ended(failed, pruned=False)
    record = RunFolder(tmp_path / "s").records()[failed]
    assert (record.state, record.failure, record.message) == ("finished", "", "")
    # Optuna keeps the failure, and knows what came of it.
    assert proposed(tmp_path) == {failed: "COMPLETE", good: "COMPLETE"}
    once_more, _ = study(tmp_path, trials=2)
    assert once_more.next_trial() is None
    kept = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}")
    assert [trial.state.name for trial in kept.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_trial_that_was_stopped_early_is_told_as_pruned_and_its_early_luck_does_not_make_it_best(
    tmp_path: Path,
) -> None:
    driven, said = study(tmp_path, trials=3)
    halving = _Halving(EarlyStopping(grace=2, epochs=4), [])
    curves = ((10.0, 20.0, 30.0, 40.0), (300.0, 5.0, 6.0, 7.0), (10.0, 25.0, 30.0, 50.0))
    for curve in curves:
        number = begin(driven)
        trial: Any = SimpleNamespace(trial_id=str(number), config={"number": number})
        halving.on_trial_add(None, trial)
        for epoch, rsum in enumerate(curve, start=1):
            report(driven, number, *curve[:epoch], ended=epoch == 4)
            news = {"epoch": epoch, "val/rsum": rsum, "ended": epoch == 4}
            if halving.on_trial_result(None, trial, news) == TrialScheduler.STOP:
                break
        driven.ended(number, pruned=trial.trial_id in halving.stopped)
    assert proposed(tmp_path) == {0: "COMPLETE", 1: "PRUNED", 2: "COMPLETE"}
    assert "trial-001: stopped after epoch 2, behind the others." in said
    records = RunFolder(tmp_path / "s").records()
    best = best_of(records)
    assert best is not None
    assert (best.number, best.best_rsum) == (2, 50.0)
    tracker = NoTracker()
    driven._tracker = tracker
    driven._close("interrupted")
    ((state, metrics, _),) = tracker.parent
    assert (state, metrics["best/val_rsum"]) == ("interrupted", 50.0)


def test_a_study_that_is_told_to_stop_does_not_wait_for_a_ray_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, said = study(tmp_path)
    report(driven, begin(driven), 10.0)
    tracker = NoTracker()
    driven._tracker = tracker
    left = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("orchestration.study.study._STOP_SECONDS", 0.01)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)  # a Tune that does not end
    try:
        driven._stop(signal.SIGTERM)
        assert left.wait(timeout=30)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert driven.interrupted
    assert codes == [128 + signal.SIGTERM]
    assert [state for state, _, _ in tracker.parent] == ["interrupted"]
    assert [record.state for record in RunFolder(tmp_path / "s").records()] == ["interrupted"]
    assert said[-1].startswith("Stopped; continue with:\n")
    assert said[-1].endswith("sweep.py --resume --name s")


def test_what_is_not_a_number_is_never_best() -> None:
    nan = record(0, float("nan"), state="finished")
    assert best_of([nan]) is None
    good, inf = record(1, 5.0, state="finished"), record(2, float("inf"), 4.0, state="finished")
    assert best_of([nan, good, inf]) == good


@pytest.mark.parametrize(
    ("answer", "drift"),
    [
        (versions() | {"torch": "1.0"}, f"three: torch 1.0 there, {versions()['torch']} here"),
        ("no module", "three does not tell its versions: no module"),
    ],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_nodes_that_come_later_with_other_versions_are_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, answer: Any, drift: str
) -> None:
    nodes: dict[str, Any] = {"one": versions(), "two": versions()}

    def ask(storage: object, *, known: set[str]) -> dict[str, Any]:
        return {host: answer for host, answer in nodes.items() if host not in known}

    monkeypatch.setattr("orchestration.study.study.ask_nodes", ask)
    driven, said = study(tmp_path, trials=3, allow_drift=allowed)
    driven._look_at_nodes()
    assert said == []
    first = begin(driven)
    driven.begun(first, "crew")
    assert driven.error is None
    nodes["three"] = answer
    driven.begun(first, "crew")
    driven.begun(first, "crew")
    if not allowed:
        assert driven.interrupted
        assert isinstance(driven.error, ServiceError)
        assert drift in str(driven.error)
        driven.ended(first, pruned=False)  # as Tune does when it is to stop
        assert not RunFolder(tmp_path / "s").records()[0].settled
    else:
        assert driven.error is None
        second = begin(driven)
        assert [r.drift for r in RunFolder(tmp_path / "s").records()] == ["", drift]
        tracker = NoTracker()
        driven._tracker = tracker
        driven._close("failed")
        ((state, _, tags),) = tracker.parent
        assert (state, tags["cpfean.drift"]) == ("failed", drift)
        assert second != first


@pytest.mark.parametrize("tune_ends", [True, False])
def test_a_head_that_is_lost_ends_the_study_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune_ends: bool
) -> None:
    monkeypatch.setattr("orchestration.study.study._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("orchestration.study.study._STOP_SECONDS", 0.01)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        driven, said = study(tmp_path, address=address)
        first, second = begin(driven), begin(driven)
        driven.failed(first, "infra", "the worker was lost")  # which happens
        watch = threading.Thread(target=driven._watch_head)
        watch.start()
        for _ in range(3):
            head.accept()[0].close()
        assert watch.is_alive()
        assert not driven.interrupted
    driven.failed(second, "infra", "the worker was lost")
    if tune_ends:
        driven._left_cluster.set()
    else:
        driven._tracker = NoTracker()  # type: ignore[assignment]
    watch.join(timeout=60)
    assert not watch.is_alive()
    assert driven.interrupted
    assert isinstance(driven.error, ServiceError)
    for words in (address, "sweep.py --resume --name s"):
        assert words in str(driven.error)
    states = [record.state for record in RunFolder(tmp_path / "s").records()]
    assert states == ["failed", "running" if tune_ends else "interrupted"]
    assert codes == ([] if tune_ends else [5])
    assert (str(driven.error) in said) != tune_ends


@pytest.mark.parametrize("messages", [("a", "b", "a"), ("a", "a", None)])
def test_one_bad_trial_never_stops_the_others(
    tmp_path: Path, messages: tuple[str | None, ...]
) -> None:
    driven, _ = study(tmp_path, trials=6)
    for message in messages:
        number = begin(driven)
        if message is None:
            report(driven, number, 10.0, 20.0, ended=True)
            driven.ended(number, pruned=False)
        else:
            driven.failed(number, "bug", message)
    assert not driven.interrupted


def test_a_duplicate_is_told_with_its_twin_and_many_are_counted(tmp_path: Path) -> None:
    driven, said = study(tmp_path)
    finish(driven, begin(driven))
    said.clear()
    proposals = driven._proposals
    assert proposals is not None
    draw = proposals._draw
    repeats = 0

    def repeat(trial: Any) -> dict[str, Any]:
        nonlocal repeats
        drawn = draw(trial)
        repeats -= 1
        return dict(driven._records[0].overrides) if repeats >= 0 else drawn

    proposals._draw = repeat  # type: ignore[method-assign]
    repeats = 2
    assert begin(driven) == 1
    assert said == ["a proposal was a duplicate of trial-000, not trained again."] * 2
    said.clear()
    repeats = 5
    assert begin(driven) == 2
    assert said == ["5 proposals were duplicates (5 of trial-000), not trained again."]


def test_fixed_trials_are_run_in_their_order(tmp_path: Path) -> None:
    driven, _ = study(tmp_path, trials=2, fixed=True)
    records = [driven.next_trial(), driven.next_trial(), driven.next_trial()]
    assert [record.name if record else None for record in records] == ["t0", "t1", None]


@pytest.mark.parametrize(
    ("happened", "patience"), [((), 600), (("begun",), 4 * 3600), (("begun", "reported"), 600)]
)
def test_without_news_a_study_gives_up_sooner_where_it_knows_what_to_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happened: tuple[str, ...], patience: int
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    driven, said = study(tmp_path)
    number = begin(driven)
    if "begun" in happened:
        driven.begun(number, "crew")
    if "reported" in happened:
        report(driven, number, 10.0)
    now = patience - 1.0
    driven.tick()
    assert not driven.interrupted
    assert "waiting for trial-000" in said[-1]
    now = patience + 1.0
    driven.tick()
    assert driven.interrupted
    assert "nothing has moved" in str(driven.error)


class KeepsFiles(NoTracker):
    """Takes note of files."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[list[Path], Any]] = []

    def keep_files(self, files: list[Path], record: Any = None) -> None:
        self.kept.append((files, record))


@pytest.mark.parametrize("broken", [False, True])
def test_a_sweep_has_pictures_of_its_best_trial_and_can_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    driven, said = study(tmp_path)
    tracker: Any = KeepsFiles()
    driven._tracker = tracker
    best = record(0, 10.0, state="finished", test={"rsum": 9.0})
    asked: dict[str, Any] = {}

    def draw(model: Path, config: ExperimentConfig, **where: Any) -> list[Path]:
        asked.update(where, model=model)
        if broken:
            raise RuntimeError("no paint left\nat all")
        return [Path("a.png")]

    monkeypatch.setattr("orchestration.pictures.queries.draw_study_pictures", draw)
    driven._test(best)
    assert asked["model"] == tmp_path / "s" / "best_model"
    assert asked["output"] == tmp_path / "s" / "pictures" / "trial-000"
    assert tracker.kept == [([] if broken else [Path("a.png")], best)]
    assert (said[-1:] == ["no pictures of trial-000: no paint left at all"]) == broken


def test_the_summary_tells_the_commit_at_the_start(
    tmp_path: Path,
) -> None:
    study(tmp_path)
    folder = RunFolder(tmp_path / "s")
    assert summary(StudyResult(folder=folder.path, records=()))["commit"] == "at the start"


def finish(driven: Driven, number: int) -> None:
    report(driven, number, 10.0, 20.0, ended=True)
    driven.ended(number, pruned=False)


def one_dollar_an_hour() -> Prices:
    return Prices(file=Path("p.toml"), nodes={"other": Price(dollars=1.0, on_demand=1.0)})


@pytest.mark.parametrize("limit", ["max_hours", "max_cost"])
def test_a_budget_that_is_used_up_begins_no_new_trial_and_lets_the_running_ones_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(Driven, "_test", lambda self, best: None)
    budget = Budget(**{limit: 0.1}, prices=one_dollar_an_hour())
    driven, said = study(tmp_path, budget=budget)
    driven.tick()
    first, second = begin(driven), begin(driven)
    now = 0.099 * 3600
    driven.tick()
    finish(driven, first)
    third = begin(driven)
    now = 0.101 * 3600
    driven.tick()
    assert not driven.interrupted
    assert driven.next_trial() is None
    assert f"--{limit.replace('_', '-')} 0.1 is used up" in said[-1]
    assert "1 trial(s) are not begun, 2 running go on" in said[-1]
    assert driven.next_trial() is None
    assert sum("is used up" in line for line in said) == 1
    finish(driven, second)
    finish(driven, third)
    result = driven._conclude()
    driven._close("finished")
    assert result.exit_code == 0
    told, line = result.used_up.splitlines()
    assert told.endswith("to go on with twice as much:")
    flag = f"--{limit.replace('_', '-')}"
    assert line.endswith(f"sweep.py --resume {flag} 0.201 --name s")
    assert [record.state for record in result.records] == ["finished"] * 3

    # The records and the tracker's parent tell of it; `--resume` without a name finds the study.
    assert read_json(tmp_path / "s" / "summary.json")["used_up"] == result.used_up
    assert RunFolder.newest_unfinished(tmp_path, "sweep").name == "s"
    (_, metrics, tags) = driven._tracker.parent[-1]
    assert metrics["study/hours"] == pytest.approx(0.101)
    assert metrics["study/cost"] == pytest.approx(0.101)
    assert "is used up" in tags["cpfean.used_up"]


def test_a_used_up_study_goes_on_with_a_larger_limit_and_counts_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(Driven, "_test", lambda self, best: None)
    first, _ = study(tmp_path, trials=2, budget=Budget(max_hours=1.0))
    finish(first, begin(first))
    cut_off = begin(first)
    report(first, cut_off, 5.0)
    now = 3600.0
    assert first.next_trial() is None  # both are begun: nothing is kept from anybody
    assert first._used_up == ""
    first._close("interrupted")
    assert read_json(tmp_path / "s" / SPENT)["seconds"] == 3600.0

    now = 1e6  # another process, another day
    second, said = study(tmp_path, trials=2, budget=Budget(max_hours=1.0))
    result = second.run()  # ends without Ray: no trial may be begun, the cut-off one neither
    assert "1 trial(s) are not begun" in said[-1]
    assert [record.state for record in result.records] == ["finished", "interrupted"]
    assert result.used_up

    third, _ = study(tmp_path, trials=2, budget=Budget(max_hours=1.5))
    now += 0.4 * 3600
    again = third.next_trial()
    assert again is not None
    assert again.number == cut_off
    third.started(cut_off)
    finish(third, cut_off)
    result = third._conclude()
    third._close("finished")
    assert result.used_up == ""
    assert third._tracker.parent[-1][2] == {"cpfean.used_up": "no"}
    assert third._tracker.parent[-1][1]["study/hours"] == pytest.approx(1.4)
    with pytest.raises(CpfeanError, match="nothing to resume"):
        RunFolder.newest_unfinished(tmp_path, "sweep")


@pytest.mark.parametrize(
    ("prices", "said_so_far", "at_the_end"),
    [
        (Prices(file=Path("p.toml"), nodes={}), "1.50 h]", "1.75 h"),
        (one_dollar_an_hour(), "1.50 h, $1.50]", "1.75 h, $1.75"),
    ],
)
def test_lines_tell_hours_and_where_they_are_known_dollars(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prices: Prices,
    said_so_far: str,
    at_the_end: str,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def test(self: Driven, best: Any) -> None:
        nonlocal now
        now += 0.25 * 3600

    monkeypatch.setattr(Driven, "_test", test)
    driven, said = study(tmp_path, trials=1, budget=Budget(prices=prices))
    driven._count()
    first = begin(driven)
    now = 1.5 * 3600
    report(driven, first, 10.0, 20.0, ended=True)
    assert f"ETA 0:00; {said_so_far}" in said[-1]
    driven.ended(first, pruned=False)
    where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="")
    assert f"spent           {at_the_end}" in closing_lines(driven._conclude(), where)


def test_dollars_that_lack_a_node_say_so_once(tmp_path: Path) -> None:
    driven, said = study(tmp_path, budget=Budget(prices=one_dollar_an_hour()))
    driven._nodes = lambda: ("other",)
    driven._count()
    assert said == []
    driven._nodes = lambda: ("other", "gpu-worker")
    driven._count()
    driven._count()
    assert said == ["p.toml has no price of gpu-worker: not counted."]
    driven._nodes = lambda: ("mine", "yours")  # no dollars come of these
    driven._count()
    assert len(said) == 1


def room(driven: Driven, *, workers: int, grows: bool | None) -> None:
    there = Room(workers=workers, cpus=1, use_gpu=False, nodes=[Node(cpus=2, gpus=0)], grows=grows)
    driven._room = lambda: there


@pytest.mark.parametrize(
    ("workers", "grows", "begun", "ends"),
    [
        (4, False, False, True),
        (4, None, False, False),  # nobody can tell
        (4, True, False, False),
        (2, False, False, False),  # others are in the way
        (4, False, True, False),  # a lost node may come back
    ],
)
def test_what_can_never_fit_is_told_with_its_numbers_after_a_minute_and_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    grows: bool | None,
    begun: bool,
    ends: bool,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    driven, said = study(tmp_path)
    room(driven, workers=workers, grows=grows)
    number = begin(driven)
    if begun:
        driven.begun(number, "crew")
    now = 59.0
    driven.tick()
    assert not driven.interrupted
    now = 61.0
    driven.tick()
    assert f"asked for: {workers} worker(s) of 1 CPU(s)" in said[-1]
    assert "1 node(s) with 2 CPUs and 0 GPUs, room for 2" in said[-1]
    assert driven.interrupted == ends
    if ends:
        assert driven.error is not None
        assert driven.error.exit_code == 5
        assert "Lower --workers" in str(driven.error)


def test_a_study_waits_for_the_workers_that_a_cluster_is_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, worker = Node(cpus=4, gpus=0), Node(cpus=4, gpus=1)
    coming = [(head,), (head, worker), (head, worker, worker)]

    def missing(there: int) -> str:
        return f"{there} of 2 worker(s) have joined" if there < 2 else ""

    def now(*, is_local: bool) -> Cluster:
        nodes = coming.pop(0)
        gpus = sum(node.gpus for node in nodes)
        return Cluster(cpus=8, gpus=gpus, is_local=is_local, nodes=nodes)

    monkeypatch.setattr(study_module, "missing_workers", missing)
    monkeypatch.setattr(nodes, "cluster_now", now)
    monkeypatch.setattr(study_module.time, "sleep", lambda seconds: None)
    driven, said = study(tmp_path)
    assert driven._with_its_workers(now(is_local=False)).gpus == 2
    assert said == ["0 of 2 worker(s) have joined: waiting for the others, ten minutes at most."]

    coming[:] = [(head,)] * 3
    moments = iter([0.0, 1.0, 601.0])
    monkeypatch.setattr(study_module.time, "monotonic", lambda: next(moments))
    assert driven._with_its_workers(now(is_local=False)).gpus == 0
    assert said[-1] == "0 of 2 worker(s) have joined: starting with what is there."
