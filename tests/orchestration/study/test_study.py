"""What a study does as trials come and go; a test is its runner, and there is no Ray."""

import json
import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import TrialScheduler

from cpfean.errors import CpfeanError, ServiceError
from cpfean.records.budget import SPENT, Budget, Price, Prices
from cpfean.records.run_folder import RunFolder, newest_unfinished
from cpfean.records.trial_record import TrialRecord
from experiments.outcome import closing_lines
from orchestration.cluster.capacity import Demand, Node
from orchestration.runners.messages import Begun, Epoch, Lost, Note, Resumed
from orchestration.runners.tune import Halving
from orchestration.settings import Settings
from orchestration.study.conclusion import StudyResult, best_of, summary
from orchestration.study.plan import num_open
from orchestration.study.stopping import Deadlines, Interrupted
from orchestration.study.trials import StudyError
from tests.orchestration.proposals.spaces import FOUR
from tests.orchestration.samples import history, record
from tests.orchestration.study.scripted import Driven, on_disk


def test_a_restart_runs_what_was_cut_off_first_and_then_only_what_is_missing(
    tmp_path: Path,
) -> None:
    first = Driven(tmp_path)
    finished, pruned, cut_off = (first.begin() for _ in range(3))
    first.finish(finished)
    first.report(pruned, 5.0)
    first.end(pruned, pruned=True)
    first.report(cut_off, 7.0)

    second = Driven(tmp_path)
    assert "2 settled" in second.said[0]
    again = second.next_trial()
    assert again is not None
    assert (again.number, again.epochs) == (cut_off, 1)
    new = second.next_trial()
    assert new is not None
    assert new.number == 3
    assert second.next_trial() is None
    states = {record.number: record.state for record in on_disk(tmp_path)}
    assert (states[finished], states[pruned]) == ("finished", "pruned")


def test_an_epoch_that_is_reported_again_counts_once(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    number = driven.begin()
    driven.report(number, 10.0)
    driven.report(number, 10.0)
    driven.report(number, 10.0, 30.0, ended=True)
    driven.end(number)
    (record,) = on_disk(tmp_path)
    assert [row["epoch"] for row in record.history] == [1, 2]
    assert sum("epoch 1/" in line for line in driven.said) == 1


def test_a_trial_that_ends_without_reaching_its_end_has_failed(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    number = driven.begin()
    driven.report(number, 10.0)
    driven.end(number)
    (record,) = on_disk(tmp_path)
    assert (record.state, record.failure) == ("failed", "infra")


def test_a_trial_that_is_tested_at_its_end_has_both(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    number = driven.begin()
    driven.report(number, 10.0, 20.0)
    told = tuple(history(10.0, 20.0))
    driven.tell(number, Epoch(history=told, checkpoint="a/b", ended=True, test={"rsum": 9.0}))
    driven.end(number)
    (record,) = on_disk(tmp_path)
    assert (record.state, record.epochs, record.checkpoint) == ("finished", 2, "a/b")
    assert record.test == {"rsum": 9.0}


def test_a_trial_that_only_had_to_be_tested_says_nothing_of_how_long_an_epoch_takes(
    tmp_path: Path,
) -> None:
    driven = Driven(tmp_path)
    driven.report(driven.begin(), 10.0)
    first, second = driven.begin(), driven.begin()
    told = tuple(history(10.0, 20.0))
    before = len(driven.said)
    driven.tell(first, Epoch(history=told, checkpoint="a/b", ended=True, test={"rsum": 9.0}))
    assert driven.said[before:] == []
    driven.report(second, 10.0)
    assert len(driven.said) == before + 1


def test_a_trial_whose_process_is_lost_is_run_again_three_times(tmp_path: Path) -> None:
    driven = Driven(tmp_path, trials=2)
    number = driven.begin()
    driven.report(number, 10.0)
    for retry in (1, 2, 3):
        driven.tell(number, Lost(message="the actor died"))
        assert driven.said[-1] == f"trial-000: its process was lost; retry {retry}/3."
        (record,) = on_disk(tmp_path)
        assert record.state == "interrupted"  # and no RUNNING run, if nothing more is begun
        assert driven.begin() == number  # before what is new
    driven.tell(number, Lost(message="the actor died"))
    (record,) = on_disk(tmp_path)
    assert (record.state, record.failure, record.epochs) == ("failed", "infra", 1)
    assert driven.begin() == 1
    assert driven.next_trial() is None


def diverged(step: int, rate: float) -> str:
    return f"the loss is nan at step {step} of epoch 1: learning rates [{rate}], gradient norm nan."


def test_three_first_failures_alike_stop_the_study_whatever_numbers_they_tell(
    tmp_path: Path,
) -> None:
    driven = Driven(tmp_path, trials=6)
    for step, rate in ((20, 0.1), (4, 1e-05), (111, 3.0)):
        assert not driven.stop.is_asked
        driven.fail(driven.begin(), "diverged", diverged(step, rate))
    assert driven.next_trial() is None
    with pytest.raises(StudyError, match="the loss is nan at step 111") as stopped:
        driven.stop.check()
    assert stopped.value.exit_code == 4


def test_a_trial_that_diverged_is_neither_best_nor_run_again(tmp_path: Path) -> None:
    driven = Driven(tmp_path, trials=3)
    bad = driven.begin()
    driven.report(bad, 500.0)  # before the loss was not a number any more
    driven.fail(bad, "diverged", diverged(20, 0.1))
    good = driven.begin()
    driven.finish(good)

    again = Driven(tmp_path, trials=3)
    new = again.begin()
    assert new not in (bad, good)
    assert again.next_trial() is None
    best = best_of(on_disk(tmp_path))
    assert best is not None
    assert best.number == good


def test_a_study_without_anything_but_failures_says_so_and_exits_with_4(tmp_path: Path) -> None:
    def script(study: Driven) -> None:
        for step in (20, 40):
            study.fail(study.begin(), "diverged", diverged(step, 0.1))
        assert not study.stop.is_asked  # fewer than three tell nothing
        assert study.next_trial() is None

    result = Driven(tmp_path, script, kind="sweep", trials=2, prepare=False).run()
    assert (result.best, result.exit_code) == (None, 4)
    where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="")
    closing = "\n".join(closing_lines(result, where))
    assert "none: no trial finished" in closing
    assert "2 diverged; to run them once more:\n" in closing
    assert "sweep.py --resume --retry-failed --name s" in closing.splitlines()[-3]


def test_a_trial_that_failed_is_run_once_more_if_that_is_asked_for(tmp_path: Path) -> None:
    driven = Driven(tmp_path, trials=2)
    failed = driven.begin()
    driven.report(failed, 10.0)
    driven.fail(failed, "infra", "disk full")
    good = driven.begin()
    driven.finish(good)

    folder = RunFolder(tmp_path / "s")
    again = Driven(tmp_path, trials=2)
    assert again.next_trial() is None  # it is settled until somebody asks
    assert num_open(again.plan, again.settings) == 0
    asking = Driven(tmp_path, trials=2, retry_failed=True)
    assert num_open(asking.plan, asking.settings) == 1
    assert folder.reopen_failed() == 1
    once_more = Driven(tmp_path, trials=2)
    assert once_more.begin() == failed
    assert once_more.next_trial() is None
    once_more.finish(failed, 10.0, 30.0)
    record = on_disk(tmp_path)[failed]
    assert (record.state, record.failure, record.message) == ("finished", "", "")
    assert Driven(tmp_path, trials=2).next_trial() is None


def test_a_trial_that_was_stopped_early_is_pruned_and_its_early_luck_does_not_make_it_best(
    tmp_path: Path,
) -> None:
    driven = Driven(tmp_path, trials=3)
    halving = Halving([], grace=2, epochs=4)
    for curve in ((10.0, 20.0, 30.0, 40.0), (90.0, 5.0), (10.0, 30.0, 40.0, 50.0)):
        number = driven.begin()
        trial: Any = type("T", (), {"trial_id": str(number), "config": {"number": number}})()
        halving.on_trial_add(None, trial)
        for epoch, rsum in enumerate(curve, start=1):
            driven.report(number, *curve[:epoch], ended=epoch == 4)
            news = {"epoch": epoch, "val/rsum": rsum, "ended": epoch == 4}
            if halving.on_trial_result(None, trial, news) == TrialScheduler.STOP:
                break
        driven.end(number, pruned=trial.trial_id in halving.stopped)
    assert "trial-001: stopped after epoch 2, behind the others." in driven.said
    records = on_disk(tmp_path)
    assert [record.state for record in records] == ["finished", "pruned", "finished"]
    best = best_of(records)
    assert best is not None
    assert (best.number, best.best_rsum) == (2, 50.0)


def test_what_is_not_a_number_is_never_best() -> None:
    nan = record(0, float("nan"), state="finished")
    assert best_of([nan]) is None
    good, inf = record(1, 5.0, state="finished"), record(2, float("inf"), 4.0, state="finished")
    assert best_of([nan, good, inf]) == good


@contextmanager
def work_that_does_not_end() -> Iterator[list[int]]:
    """A Tune that hangs: it hears of SIGUSR1 and goes on."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        yield heard
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_study_that_is_told_to_stop_does_not_wait_for_work_that_hangs(tmp_path: Path) -> None:
    driven = Driven(tmp_path, deadlines=Deadlines(saved=0.0, ended=0.01, closed=1.0))
    driven.report(driven.begin(), 10.0)
    has_left = threading.Event()
    driven.stop.end_process = lambda code: (driven.codes.append(code), has_left.set())[0]
    saved: list[float] = []

    def save(seconds: float) -> bool:
        saved.append(seconds)
        return False

    with work_that_does_not_end() as heard, driven.stop.listening(), driven.stop.at_work(save):
        os.kill(os.getpid(), signal.SIGTERM)
        assert has_left.wait(timeout=30)
        while not heard:
            signal.sigtimedwait([], 0.01)
    assert saved == [0.0]
    assert driven.codes == [128 + signal.SIGTERM]
    assert [state for state, _, _ in driven.tracker.parent] == ["interrupted"]
    assert [record.state for record in on_disk(tmp_path)] == ["interrupted"]
    assert driven.said[-1].startswith("Stopped; continue with:\n")
    assert driven.said[-1].endswith("run_ablations.py --resume --name s")


def test_what_is_stopped_where_nothing_is_trained_ends_at_once(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    driven.report(driven.begin(), 10.0)
    with pytest.raises(Interrupted) as stopped, driven.stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 128 + signal.SIGINT
    assert driven.next_trial() is None


def test_what_fails_because_the_study_is_stopped_has_not_failed(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    number = driven.begin()
    with pytest.raises(Interrupted), driven.stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    driven.fail(number, "infra", "the worker was lost")
    driven.end(number)
    assert [record.state for record in on_disk(tmp_path)] == ["running"]


def test_a_head_that_is_lost_ends_the_study_and_fails_no_trial(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    first, second, third = driven.begin(), driven.begin(), driven.begin()
    driven.fail(first, "infra", "the worker was lost")  # which happens
    assert not driven.stop.is_asked
    driven.runner.lost = ServiceError("the cluster is gone")
    driven.fail(second, "infra", "the worker was lost")
    driven.tell(third, Lost(message="the actor died"))
    assert driven.next_trial() is None
    with pytest.raises(ServiceError, match="the cluster is gone"):
        driven.stop.check()
    assert [record.state for record in on_disk(tmp_path)] == ["failed", "running", "running"]


def test_versions_of_nodes_that_differ_are_told_by_the_trials_that_begin_then(
    tmp_path: Path,
) -> None:
    def script(study: Driven) -> None:
        study.begin()
        study.differs("three: torch 1.0 there, 2.0 here")
        study.begin()
        study.stop.fail(ServiceError("enough"))

    driven = Driven(tmp_path, script, prepare=False)
    with pytest.raises(ServiceError, match="enough"):
        driven.run()
    assert [record.drift for record in on_disk(tmp_path)] == [
        "",
        "three: torch 1.0 there, 2.0 here",
    ]
    (state, _, tags) = driven.tracker.parent[-1]
    assert (state, tags["cpfean.drift"]) == ("failed", "three: torch 1.0 there, 2.0 here")


@pytest.mark.parametrize("messages", [("a", "b", "a"), ("a", "a", None)])
def test_one_bad_trial_never_stops_the_others(
    tmp_path: Path, messages: tuple[str | None, ...]
) -> None:
    driven = Driven(tmp_path, trials=6)
    for message in messages:
        number = driven.begin()
        if message is None:
            driven.finish(number)
        else:
            driven.fail(number, "bug", message)
    assert not driven.stop.is_asked


def test_a_duplicate_is_told_with_its_twin_and_many_are_counted(tmp_path: Path) -> None:
    driven = Driven(tmp_path, trials=9, space=FOUR)
    told_singly = 0
    for number in range(4):
        assert driven.begin() == number
        singly = [line for line in driven.said if line.startswith("a proposal was a duplicate of ")]
        assert all(line.endswith(", not trained again.") for line in singly)
        assert len(singly) <= 3
        told_singly += len(singly)
        driven.finish(number)
        driven.said.clear()
    assert told_singly > 0
    assert driven.next_trial() is None
    counted, exhausted = driven.said
    assert counted.startswith("50 proposals were duplicates (")
    each = re.findall(r"(\d+) of trial-00[0-3][,)]", counted)
    assert (len(each), sum(map(int, each))) == (4, 50)
    assert exhausted == "the search space has no more than 4 different configurations."


def exported(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    """What optuna-dashboard shows of the study."""
    return optuna.load_study(
        study_name="s", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}"
    ).trials


def test_the_search_is_shown_to_optuna_dashboard_at_the_end_and_when_it_is_resumed(
    tmp_path: Path,
) -> None:
    def half(study: Driven) -> None:
        study.finish(study.begin())
        pruned = study.begin()
        study.report(pruned, 5.0)
        study.end(pruned, pruned=True)
        study.fail(study.begin(), "diverged", "the loss is nan")
        study.begin()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Driven(tmp_path, half, prepare=False).run()
    assert not (tmp_path / "s" / "study.db").exists()
    (tmp_path / "s" / "study.db").write_bytes(b"damaged" * 200)  # nothing reads it
    resumed = Driven(tmp_path, lambda study: study.finish(study.begin()), prepare=False)
    resumed.prepare()
    states = ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.state.name for trial in exported(tmp_path)] == states
    assert exported(tmp_path)[0].user_attrs["name"] == "trial-000"
    resumed.run()
    assert [trial.state.name for trial in exported(tmp_path)] == [*states[:3], "COMPLETE"]
    (tmp_path / "s" / "study.db").unlink()
    (tmp_path / "s" / "study.db").mkdir()
    assert Driven(tmp_path).said[0].startswith("nothing new for optuna-dashboard: ")


def test_fixed_trials_are_run_in_their_order(tmp_path: Path) -> None:
    driven = Driven(tmp_path, trials=2, fixed=True)
    records = [driven.next_trial(), driven.next_trial(), driven.next_trial()]
    assert [record.name if record else None for record in records] == ["t0", "t1", None]


def test_what_workers_tell_reaches_the_user(tmp_path: Path) -> None:
    driven = Driven(tmp_path, workers=2)
    number = driven.begin()
    driven.tell(number, Begun(workers=2))
    assert driven.said == []
    driven.tell(number, Begun(workers=1))
    driven.tell(number, Begun(workers=1))
    driven.tell(number, Resumed(epoch=2, checkpoint="a/epoch-0002"))
    driven.tell(number, Note(line="a disk was slow."))
    assert driven.said == [
        "trial-000: trained by 1 of 2 workers; the batch is the same.",
        "trial-000: resuming from a/epoch-0002",
        "trial-000: a disk was slow.",
    ]


@pytest.mark.parametrize(
    ("happened", "patience"), [((), 600), (("begun",), 4 * 3600), (("begun", "reported"), 600)]
)
def test_without_news_a_study_gives_up_sooner_where_it_knows_what_to_expect(
    tmp_path: Path, happened: tuple[str, ...], patience: int
) -> None:
    driven = Driven(tmp_path)
    number = driven.begin()
    if "begun" in happened:
        driven.tell(number, Begun())
    if "reported" in happened:
        driven.report(number, 10.0)
    driven.clock.now = patience - 1.0
    driven.tick()
    assert "waiting for trial-000" in driven.said[-1]
    driven.clock.now = patience + 1.0
    with pytest.raises(ServiceError, match="nothing has moved"):
        driven.tick()


@pytest.mark.parametrize("broken", [False, True])
def test_a_sweep_has_pictures_of_its_best_trial_and_can_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    asked: dict[str, Any] = {}

    def draw(model: Path, config: Any, **where: Any) -> list[Path]:
        asked.update(where, model=model)
        if broken:
            raise RuntimeError("no paint left\nat all")
        return [Path("a.png")]

    def script(study: Driven) -> None:
        number = study.begin()
        told = tuple(history(10.0, 20.0))
        study.tell(number, Epoch(history=told, checkpoint="", ended=True, test={"rsum": 9.0}))
        study.end(number)

    monkeypatch.setattr("cpfean.analysis.pictures.queries.draw_study_pictures", draw)
    driven = Driven(tmp_path, script, kind="sweep", trials=1, prepare=False)
    driven.run()
    assert asked["model"] == tmp_path / "s" / "best_model"
    assert asked["output"] == tmp_path / "s" / "pictures" / "trial-000"
    ((files, best),) = driven.tracker.files
    pictures = [] if broken else [Path("a.png")]
    assert files == [*pictures, tmp_path / "s" / "best_model"]
    assert best is not None
    assert ("no pictures of trial-000: no paint left at all" in driven.said) == broken


@pytest.mark.parametrize("broken", [False, True])
def test_a_report_is_kept_with_the_whole_and_the_study_does_without_a_broken_one(
    tmp_path: Path, broken: bool
) -> None:
    def report(records: Sequence[TrialRecord]) -> list[Path]:
        if broken:
            raise OSError("no paint left")
        return [tmp_path / f"{len(records)}.md"]

    def script(study: Driven) -> None:
        study.finish(study.begin())

    driven = Driven(tmp_path, script, kind="ablations", trials=1, prepare=False, report=report)
    result = driven.run()
    assert result.best is not None
    assert (tmp_path / "s" / "summary.json").is_file()
    kept = [files for files, of in driven.tracker.files if of is None]
    assert kept == ([] if broken else [[tmp_path / "1.md"]])
    assert ("no report: no paint left" in driven.said) == broken
    assert result.has_report != broken


def test_the_summary_tells_the_commit_at_the_start(tmp_path: Path) -> None:
    Driven(tmp_path)
    folder = RunFolder(tmp_path / "s")
    assert summary(StudyResult(folder=folder.path, records=()))["commit"] == "at the start"


def one_dollar_an_hour() -> Prices:
    return Prices(file=Path("p.toml"), nodes={"other": Price(dollars=1.0, on_demand=1.0)})


@pytest.mark.parametrize("limit", ["max_hours", "max_cost"])
def test_a_budget_that_is_used_up_begins_no_new_trial_and_lets_the_running_ones_end(
    tmp_path: Path, limit: str
) -> None:
    def script(study: Driven) -> None:
        study.tick()
        first, second = study.begin(), study.begin()
        study.clock.now = 0.099 * 3600
        study.tick()
        study.finish(first)
        third = study.begin()
        study.clock.now = 0.101 * 3600
        study.tick()
        assert study.next_trial() is None
        assert f"--{limit.replace('_', '-')} 0.1 is used up" in study.said[-1]
        assert "1 trial(s) are not begun, 2 running go on" in study.said[-1]
        assert study.next_trial() is None
        assert sum("is used up" in line for line in study.said) == 1
        assert not study.stop.is_asked
        study.finish(second)
        study.finish(third)

    budget = Budget(**{limit: 0.1}, prices=one_dollar_an_hour())
    driven = Driven(tmp_path, script, budget=budget, prepare=False)
    result = driven.run()
    assert result.exit_code == 0
    told, line = result.used_up.splitlines()
    assert told.endswith("to go on with twice as much:")
    flag = f"--{limit.replace('_', '-')}"
    assert line.endswith(f"run_ablations.py --resume {flag} 0.201 --name s")
    assert [record.state for record in result.records] == ["finished"] * 3

    # The records and the tracker's parent tell of it; `--resume` without a name finds the study.
    summary = json.loads((tmp_path / "s" / "summary.json").read_text(encoding="utf-8"))
    assert summary["used_up"] == result.used_up
    assert newest_unfinished(tmp_path, "ablations").name == "s"
    (_, metrics, tags) = driven.tracker.parent[-1]
    assert metrics["study/hours"] == pytest.approx(0.101)
    assert metrics["study/cost"] == pytest.approx(0.101)
    assert "is used up" in tags["cpfean.used_up"]


def test_a_used_up_study_goes_on_with_a_larger_limit_and_counts_what_came_before(
    tmp_path: Path,
) -> None:
    def until_an_hour_is_over(study: Driven) -> None:
        study.finish(study.begin())
        study.report(study.begin(), 5.0)
        study.clock.now = 3600.0
        assert study.next_trial() is None  # both are begun: nothing is kept from anybody
        raise KeyboardInterrupt

    first = Driven(
        tmp_path, until_an_hour_is_over, trials=2, budget=Budget(max_hours=1.0), prepare=False
    )
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.tracker.parent[-1][2] == {"cpfean.used_up": "no"}
    spent = json.loads((tmp_path / "s" / SPENT).read_text(encoding="utf-8"))
    assert spent["seconds"] == 3600.0

    def never(study: Driven) -> None:
        raise AssertionError("no trial may be begun, the cut-off one neither")

    second = Driven(tmp_path, never, trials=2, budget=Budget(max_hours=1.0), prepare=False)
    result = second.run()
    assert "1 trial(s) are not begun" in second.said[-1]
    assert [record.state for record in result.records] == ["finished", "interrupted"]
    assert result.used_up

    def the_rest(study: Driven) -> None:
        study.clock.now = 0.4 * 3600
        cut_off = study.begin()
        assert cut_off == 1
        study.finish(cut_off)

    third = Driven(tmp_path, the_rest, trials=2, budget=Budget(max_hours=1.5), prepare=False)
    result = third.run()
    assert result.used_up == ""
    (_, metrics, tags) = third.tracker.parent[-1]
    assert tags == {"cpfean.used_up": "no"}
    assert metrics["study/hours"] == pytest.approx(1.4)
    with pytest.raises(CpfeanError, match="nothing to resume"):
        newest_unfinished(tmp_path, "ablations")


@pytest.mark.parametrize(
    ("prices", "said_so_far", "at_the_end"),
    [
        (Prices(file=Path("p.toml"), nodes={}), "1.50 h]", "1.75 h"),
        (one_dollar_an_hour(), "1.50 h, $1.50]", "1.75 h, $1.75"),
    ],
)
def test_lines_tell_hours_and_where_they_are_known_dollars(
    tmp_path: Path, prices: Prices, said_so_far: str, at_the_end: str
) -> None:
    def script(study: Driven) -> None:
        number = study.begin()
        study.clock.now = 1.5 * 3600
        study.report(number, 10.0, 20.0, ended=True)
        assert f"ETA 0:00; {said_so_far}" in study.said[-1]
        study.end(number)
        study.clock.now = 1.75 * 3600

    driven = Driven(tmp_path, script, trials=1, budget=Budget(prices=prices), prepare=False)
    where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="")
    assert f"spent           {at_the_end}" in closing_lines(driven.run(), where)


def test_dollars_that_lack_a_node_say_so_once(tmp_path: Path) -> None:
    driven = Driven(tmp_path, budget=Budget(prices=one_dollar_an_hour()))
    for seconds, types in enumerate(
        [("other",), ("other", "gpu-worker"), ("other", "gpu-worker"), ("mine", "yours")]
    ):
        driven.clock.now = 100.0 * seconds
        driven.runner.types = types
        driven.expect(is_local=True)
    # Of the last ones no dollars come at all.
    assert driven.said == ["p.toml has no price of gpu-worker: not counted."]


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
    tmp_path: Path, workers: int, grows: bool | None, begun: bool, ends: bool
) -> None:
    driven = Driven(tmp_path)
    driven.runner.there = Demand(
        workers=workers, cpus=1, use_gpu=False, nodes=[Node(cpus=2, gpus=0)], grows=grows
    )
    number = driven.begin()
    if begun:
        driven.tell(number, Begun())
    driven.clock.now = 59.0
    driven.tick()
    assert driven.said == []
    driven.clock.now = 61.0
    if ends:
        with pytest.raises(ServiceError, match="Lower --workers"):
            driven.tick()
    else:
        driven.tick()
    assert f"asked for: {workers} worker(s) of 1 CPU(s)" in driven.said[-1]
    assert "1 node(s) with 2 CPUs and 0 GPUs, room for 2" in driven.said[-1]


def test_the_time_until_the_first_workers_are_there_says_nothing_of_epochs(
    tmp_path: Path,
) -> None:
    driven = Driven(tmp_path, trials=1)
    number = driven.begin()
    driven.clock.now = 500.0
    driven.tell(number, Begun())
    driven.clock.now = 560.0
    driven.report(number, 10.0)
    assert "ETA 1:00" in driven.said[-1]
    assert math.isfinite(driven.records[0].best_rsum)
