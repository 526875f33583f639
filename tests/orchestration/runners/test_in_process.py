"""One training in this process: records, tracking, resume."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cpfean.config import ExperimentConfig
from cpfean.data.sources import resolve_data
from cpfean.data.split import data_fingerprint
from cpfean.errors import ConfigError, NoMemoryError, ServiceError
from cpfean.json_files import RecordError
from cpfean.records.budget import SPENT
from cpfean.records.run_folder import RunFolder
from cpfean.training import loop
from orchestration.settings import Settings
from orchestration.study.conclusion import StudyResult
from orchestration.study.plan import StudyPlan, TrialPlan
from orchestration.study.stopping import Interrupted
from orchestration.tracking.stores import open_store
from tests.orchestration.samples import TINY, run_here


def plan_of(config: ExperimentConfig, where: Settings, name: str) -> StudyPlan:
    folder = resolve_data(config.data, cache_dir=where.cache_dir)
    return StudyPlan(
        kind="train",
        name=name,
        base=config,
        trials=1,
        workers=0,
        fixed=(TrialPlan(name=name, overrides={}, config=config),),
        data_folder=folder,
        data_fingerprint=data_fingerprint(folder),
    )


def stop_after_the_first_epoch(line: str) -> None:
    if "epoch 1/" in line:
        raise KeyboardInterrupt


def curve(result: StudyResult) -> list[float]:
    return [row["val/rsum"] for row in result.records[0].history]


def test_a_training_that_was_stopped_goes_on_as_if_nothing_had_happened(where: Settings) -> None:
    plan = plan_of(TINY, where, "stopped")
    open_store(where.tracking_uri)

    with pytest.raises(KeyboardInterrupt):
        run_here(plan, where, resume=False, say=stop_after_the_first_epoch)
    client, experiment = open_store(where.tracking_uri)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.tags["cpfean.state"]) == ("KILLED", "interrupted")

    resumed = run_here(plan, where, resume=True, say=print)
    undisturbed = run_here(plan_of(TINY, where, "whole"), where, resume=False, say=print)
    assert curve(resumed) == curve(undisturbed)
    assert resumed.test == undisturbed.test

    again = run_here(plan, where, resume=True, say=print)  # there is nothing left to do
    assert curve(again) == curve(resumed)
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["cpfean.state"]) == ("FINISHED", "finished")
    points = MlflowClient(where.tracking_uri).get_metric_history(run.info.run_id, "val/rsum")
    assert [point.step for point in points] == [1, 2]
    assert [point.value for point in points] == curve(resumed)
    assert run.data.metrics["test/rsum"] == resumed.test["rsum"]
    assert len(client.search_runs([experiment])) == 2

    kept = sorted(path.name for path in (resumed.folder / "train" / "stopped-000").iterdir())
    assert kept == ["epoch-0001", "epoch-0002"]
    best = ExperimentConfig.from_toml(resumed.folder / "best_config.toml")
    assert best == TINY
    summary = json.loads((resumed.folder / "summary.json").read_text())
    assert summary["test"]["rsum"] == resumed.test["rsum"]
    other = plan_of(TINY.with_overrides({"loss.margin": 0.3}), where, "stopped")
    with pytest.raises(ConfigError, match=r"0\.2 then, 0\.3 now"):
        run_here(other, where, resume=True, say=print)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_training_and_leaves_it_to_be_resumed(
    where: Settings, number: signal.Signals
) -> None:
    plan = plan_of(TINY, where, "stopped")
    open_store(where.tracking_uri)  # to make it may take longer than a stop
    said: list[str] = []

    def stop_after_the_first_epoch(line: str) -> None:
        said.append(line)
        if "epoch 1/" in line:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        run_here(plan, where, resume=False, say=stop_after_the_first_epoch)
    assert stopped.value.exit_code == 128 + number
    assert said[-2].startswith("stopping")
    assert said[-1].startswith("Stopped; continue with:\n")
    assert said[-1].endswith("train.py --resume --name stopped")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    client, experiment = open_store(where.tracking_uri)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.tags["cpfean.state"]) == ("KILLED", "interrupted")
    (record,) = RunFolder(where.output / "stopped").records()
    assert (record.state, record.epochs) == ("interrupted", 1)
    assert run_here(plan, where, resume=True, say=print).records[0].epochs == 2


def test_a_signal_in_the_middle_of_an_epoch_costs_none_of_its_steps(
    where: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY.with_overrides({"optim.batch_size": 10})
    plan = plan_of(config, where, "stopped")
    open_store(where.tracking_uri)
    find_gradients = loop.find_gradients

    def with_a_signal(*words: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.undo()
        return find_gradients(*words, **named)

    monkeypatch.setattr(loop, "find_gradients", with_a_signal)  # in the first step
    with pytest.raises(Interrupted) as stopped:
        run_here(plan, where, resume=False, say=print)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    folder = RunFolder(where.output / "stopped")
    (record,) = folder.records()
    assert (record.state, record.epochs) == ("interrupted", 0)
    saved = [path.name for path in (folder.path / "train" / "stopped-000").glob("epoch-*")]
    assert saved == ["epoch-0000-000001"]
    resumed = run_here(plan, where, resume=True, say=print)
    undisturbed = run_here(plan_of(config, where, "whole"), where, resume=False, say=print)
    assert curve(resumed) == curve(undisturbed)
    assert resumed.test == undisturbed.test


def test_a_signal_after_the_last_step_is_heard_too(where: Settings) -> None:
    plan = plan_of(TINY, where, "stopped")
    open_store(where.tracking_uri)

    def stop_after_the_last_epoch(line: str) -> None:
        if "epoch 2/2" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_here(plan, where, resume=False, say=stop_after_the_last_epoch)
    (record,) = RunFolder(where.output / "stopped").records()
    assert (record.state, record.epochs, record.test) == ("interrupted", 2, {})
    assert run_here(plan, where, resume=True, say=print).test


def test_a_signal_in_a_step_that_takes_too_long_ends_the_training_where_it_is(
    where: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(where.tracking_uri)

    def hang(line: str) -> None:
        if "epoch 1/" in line:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        run_here(plan_of(TINY, where, "stopped"), where, resume=False, say=hang)
    assert time.monotonic() - began < 30
    (record,) = RunFolder(where.output / "stopped").records()
    assert (record.state, record.epochs) == ("interrupted", 1)


def stopped(plan: StudyPlan, where: Settings) -> None:
    """Trains one epoch of two, and has it stopped."""
    with pytest.raises(KeyboardInterrupt):
        run_here(plan, where, resume=False, say=stop_after_the_first_epoch)


def test_data_that_moved_are_read_from_where_they_are_and_others_are_refused(
    where: Settings, tmp_path: Path
) -> None:
    generated = resolve_data(TINY.data, cache_dir=where.cache_dir)
    old, new, other = tmp_path / "old", tmp_path / "new", tmp_path / "other"
    shutil.copytree(generated, old)
    shutil.copytree(generated, other)
    captions = (other / "train_caps.txt").read_text(encoding="utf-8").splitlines()
    (other / "train_caps.txt").write_text("\n".join(reversed(captions)) + "\n", encoding="utf-8")

    def plan(folder: Path) -> StudyPlan:
        return plan_of(TINY.with_overrides({"data.path": str(folder)}), where, "moved")

    stopped(plan(old), where)
    shutil.move(old, new)
    with pytest.raises(ConfigError, match="data_fingerprint"):
        run_here(plan(other), where, resume=True, say=print)
    said: list[str] = []
    (record,) = run_here(plan(new), where, resume=True, say=said.append).records
    assert said[0] == f"the data is now read from {new}; it was in {old}."
    assert any(": resuming from " in line for line in said)
    assert (record.epochs, record.experiment.data.path) == (2, str(new))
    best = ExperimentConfig.from_toml(where.output / "moved" / "best_config.toml")
    assert best.data.path == str(new)
    said.clear()
    run_here(plan(new), where, resume=True, say=said.append)
    assert not any("now read from" in line for line in said)
    client, experiment = open_store(where.tracking_uri)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "val/rsum")) == 2


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_folder_that_moved_is_resumed_where_it_is(
    where: Settings, tmp_path: Path, epochs: int
) -> None:
    """With an epoch to go, and with all but the test done."""

    def stop(line: str) -> None:
        if f"epoch {epochs}/" in line:
            raise KeyboardInterrupt

    plan = plan_of(TINY, where, "a")
    with pytest.raises(KeyboardInterrupt):
        run_here(plan, where, resume=False, say=stop)
    elsewhere = replace(where, output=tmp_path / "elsewhere")
    where.output.rename(elsewhere.output)
    (elsewhere.output / "a").rename(elsewhere.output / "b")
    said: list[str] = []
    renamed = replace(plan, name="b")
    result = run_here(renamed, elsewhere, resume=True, say=said.append)
    assert any(": resuming from " in line for line in said) == (epochs == 1)
    (record,) = result.records
    assert (record.state, record.epochs) == ("finished", 2)
    assert record.checkpoint == str(elsewhere.output / "b" / "train" / "a-000" / "epoch-0002")
    assert result.test
    assert not where.output.exists()


def test_a_result_that_cannot_be_read_ends_nothing_before_it_is_told(where: Settings) -> None:
    plan = plan_of(TINY, where, "a")
    stopped(plan, where)
    (where.output / "a" / SPENT).write_text("[]")
    said: list[str] = []
    with pytest.raises(RecordError, match=SPENT):
        run_here(plan, where, resume=True, say=said.append)
    assert said == []
    (record,) = RunFolder(where.output / "a").records()
    assert record.epochs == 1


def test_a_training_goes_on_under_other_versions_only_if_allowed_and_tells(
    where: Settings,
) -> None:
    results = where.output / "results"
    plan = replace(plan_of(TINY, where, "drifted"), results=results)
    open_store(where.tracking_uri)

    with pytest.raises(KeyboardInterrupt):
        run_here(plan, where, resume=False, say=stop_after_the_first_epoch)
    file = RunFolder(where.output / plan.name).identity_file
    started = json.loads(file.read_text())
    started["versions"]["torch"] = "9.9"
    file.write_text(json.dumps(started))
    with pytest.raises(ConfigError, match=r"torch 9\.9 then, .* now"):
        run_here(plan, where, resume=True, say=print)
    allowed = replace(plan, allow_drift=True)
    (record,) = run_here(allowed, where, resume=True, say=print).records
    assert (record.state, record.epochs) == ("finished", 2)
    assert record.drift.startswith("torch 9.9 then, ")
    client, experiment = open_store(where.tracking_uri)
    (run,) = client.search_runs([experiment])
    assert run.data.tags["cpfean.drift"] == record.drift
    assert not results.exists()  # it is a result of neither


@pytest.mark.parametrize(
    ("error", "failure", "message"),
    [
        (RuntimeError("the plug was pulled"), "bug", "RuntimeError: the plug was pulled"),
        (NoMemoryError("batches of 40 do not fit"), "oom", "batches of 40 do not fit"),
        (ServiceError("disk full"), "infra", "disk full"),
    ],
)
def test_a_failed_training_is_recorded_with_its_reason(
    where: Settings, error: Exception, failure: str, message: str
) -> None:
    def fail(line: str) -> None:
        if "epoch 1/" in line:
            raise error

    with pytest.raises(type(error)):
        run_here(plan_of(TINY, where, "failed"), where, resume=False, say=fail)
    client, experiment = open_store(where.tracking_uri)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FAILED"
    assert run.data.tags["cpfean.failure"] == failure
    assert run.data.tags["cpfean.message"] == message
