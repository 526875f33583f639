"""Methods tuned alike and run on the same seeds; here in this process, without Ray."""

import csv
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from cpfean.analysis.statistics import FULL, compare
from cpfean.config import ExperimentConfig
from cpfean.data.sources import resolve_data
from cpfean.data.split import data_fingerprint
from cpfean.errors import ConfigError
from cpfean.records.budget import Budget
from cpfean.records.run_folder import RunFolder, newest_unfinished
from cpfean.records.trial_record import TUNING
from cpfean.training.setup import evaluate_checkpoint
from experiments.outcome import closing_lines
from orchestration.proposals.optuna_study import spread_points
from orchestration.proposals.search_space import Choice, Range, SearchSpace
from orchestration.runners.in_process import InProcess
from orchestration.settings import Settings
from orchestration.study.comparison import (
    compare_methods,
    compare_variants,
    seed_runs,
    tuned,
    tuning_study,
)
from orchestration.study.plan import StudyPlan
from orchestration.study.variants import Ablation, Method
from orchestration.tracking.stores import open_store
from tests.orchestration.samples import TINY, record

COMMON = {"optim.learning_rate": Range(1e-4, 1e-2, log=True)}
METHODS = (
    Method(
        name=FULL,
        source="here",
        overrides={},
        knobs={"model.alignment.global_weight": Range(0.3, 0.7, step=0.1)},
    ),
    Method(
        name="pooled",
        source="there",
        overrides={"model.alignment.global_weight": 1.0},
        knobs={"data.region_dropout": Choice((0.0, 0.2, 0.4))},
    ),
)
FAST = TINY.with_overrides({"optim.epochs": 1})


def plan_of(
    where: Settings, name: str, base: ExperimentConfig = FAST, budget: Budget | None = None
) -> StudyPlan:
    folder = resolve_data(base.data, cache_dir=where.cache_dir)
    return StudyPlan(
        kind="comparison",
        name=name,
        base=base,
        trials=0,
        workers=1,
        data_folder=folder,
        data_fingerprint=data_fingerprint(folder),
        results=where.output / "results",
        budget=budget or Budget(),
    )


def compared(
    where: Settings,
    name: str,
    say: Callable[[str], None] = print,
    budget: Budget | None = None,
    **given,
):
    arguments = {"points": 2, "seeds": range(1, 3), "resume": False} | given
    return compare_methods(
        plan_of(where, name, budget=budget),
        METHODS,
        COMMON,
        settings=where,
        runner=InProcess(),
        say=say,
        **arguments,
    )


@pytest.mark.parametrize("chosen", [False, True])
def test_points_that_failed_are_tried_again_until_what_is_compared_has_been_chosen(
    where: Settings, chosen: bool
) -> None:
    plan = replace(plan_of(where, "c"), retry_failed=True)
    if chosen:
        RunFolder(where.output / "c").create({"kind": "comparison"})
    asked: list[StudyPlan] = []

    class Looks(InProcess):
        def check(self, plan: StudyPlan) -> None:
            asked.append(plan)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        compare_methods(
            plan,
            METHODS,
            COMMON,
            points=2,
            seeds=[1],
            settings=where,
            resume=True,
            runner=Looks(),
            say=print,
        )
    assert [plan.retry_failed for plan in asked] == [not chosen]


def test_points_are_inside_the_space_spread_and_always_the_same() -> None:
    space = SearchSpace(
        name="s",
        question="?",
        parameters={
            "optim.learning_rate": Range(1e-4, 1e-2, log=True),
            "loss.margin": Range(0.1, 0.3, step=0.05),
            "data.num_regions": Choice((12, 24, 36)),
        },
    )
    points = spread_points(space, 8, seed=3)
    assert points == spread_points(space, 8, seed=3)
    assert points[:4] == spread_points(space, 4, seed=3)
    assert points != spread_points(space, 8, seed=4)
    for point in points:
        assert all(point[path] in values for path, values in space.parameters.items())
    # A Sobol sequence of eight has one point in each eighth of a coordinate's range.
    rates = sorted(float(point["optim.learning_rate"]) for point in points)
    assert all(1e-4 * 10 ** (i / 4) <= r <= 1e-4 * 10 ** ((i + 1) / 4) for i, r in enumerate(rates))


def test_every_method_gets_the_same_budget_and_starts_as_it_stands(where: Settings) -> None:
    comparison = plan_of(where, "c")
    plans = tuning_study(comparison, METHODS, COMMON, points=3).fixed
    assert [plan.name for plan in plans] == [
        f"{name}/point-0{point}" for name in (FULL, "pooled") for point in range(3)
    ]
    assert plans[0].config == FAST
    assert all(plan.config.model.alignment.global_weight == 1.0 for plan in plans[3:])
    alone = tuning_study(comparison, METHODS[1:], COMMON, points=3).fixed
    assert alone == plans[3:]  # whoever else is compared


def test_the_best_on_dev_is_chosen_and_a_method_without_a_trial_is_refused() -> None:
    margins = {"loss.margin": 0.1}, {"loss.margin": 0.3}
    records = [
        record(0, 50.0, name="full/point-00", overrides=margins[0], state="finished"),
        record(1, 70.0, 60.0, name="full/point-01", overrides=margins[1], state="finished"),
        record(2, 90.0, name="full/point-02", state="failed"),
    ]
    assert tuned(METHODS[:1], records)[0].overrides == margins[1]
    with pytest.raises(ConfigError, match="no trial of 'pooled' finished"):
        tuned(METHODS, records)


def test_a_comparison_run_twice_gives_the_same_numbers_and_trains_once(where: Settings) -> None:
    first, chosen = compared(where, "first")
    assert [variant.name for variant in chosen] == [FULL, "pooled"]
    assert all(trial.test and not trial.reused for trial in first.records)

    lines: list[str] = []
    second, again = compared(where, "second", say=lines.append)
    assert again == chosen
    assert all(trial.reused for trial in second.records)
    assert not any("epoch" in line for line in lines)
    assert compare(seed_runs(second.records)) == compare(seed_runs(first.records))
    report = where.output / "second" / "report"
    assert (report / "table.md").read_text() == (first.folder / "report" / "table.md").read_text()

    # Tuning is never shown the test split; what is reported never uses the seed of the tuning.
    tuning = [row for row in _runs(where) if row.data.tags["cpfean.kind"] == "tuning"]
    assert len(tuning) == 2 * (1 + 4)
    assert not any(name.startswith("test/") for run in tuning for name in run.data.metrics)
    assert {trial.experiment.seed for trial in first.records} == {1, 2}
    assert {run.info.status for run in _runs(where)} == {"FINISHED"}

    # The table and the pictures are with the parent run.
    client = MlflowClient(where.tracking_uri)
    (parent,) = (
        run
        for run in _runs(where)
        if run.data.tags["cpfean.role"] == "parent" and run.info.run_name == "first"
    )
    kept = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"table.md", "table.tex", "runs.csv", "differences.png", "epochs.png"} <= kept


def test_the_saved_model_has_the_rsum_of_the_table(where: Settings) -> None:
    variants = [Ablation(name=FULL, question="?", overrides={})]
    plan = plan_of(where, "one")
    result = compare_variants(
        plan, variants, seeds=[4], settings=where, resume=False, runner=InProcess(), say=print
    )
    (trial,) = result.records
    best_model = result.folder / "best_model"
    for model in (best_model, Path(trial.checkpoint)):
        metrics = evaluate_checkpoint(
            model,
            data_folder=plan.data_folder,
            split="test",
            protocol="full",
            cache_dir=where.cache_dir,
            device=torch.device("cpu"),
            num_regions=8,
        )
        with (result.folder / "report" / "runs.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert float(row["test_rsum"]) == pytest.approx(metrics.rsum, abs=0.005)
        assert metrics.rsum == trial.test["rsum"]
    assert f"model           {best_model}" in closing_lines(result, where)

    # What is known from elsewhere has its numbers here, and its weights elsewhere.
    shutil.rmtree(trial.checkpoint)
    known = compare_variants(
        plan_of(where, "known"),
        variants,
        seeds=[4],
        settings=where,
        resume=False,
        runner=InProcess(),
        say=print,
    )
    assert known.test == result.test
    assert "model           not on this machine" in closing_lines(known, where)


@pytest.mark.long
def test_a_comparison_that_was_stopped_goes_on_where_it_was(where: Settings) -> None:
    def stop_in_the_last_run(line: str) -> None:
        if "pooled/seed-2  epoch 1/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(where, "stopped", say=stop_in_the_last_run)
    lines: list[str] = []
    result, _ = compared(where, "stopped", say=lines.append, resume=True)
    # What was finished is not trained again.
    assert {run for line in lines for run in re.findall(r"\w+/seed-\d", line)} == {"pooled/seed-2"}
    whole, _ = compared(
        Settings(
            output=where.output / "other",
            cache_dir=where.cache_dir,
            tracking_uri=where.tracking_uri,
        ),
        "whole",
    )
    assert [of.rsums for of in compare(seed_runs(result.records))] == [
        of.rsums for of in compare(seed_runs(whole.records))
    ]


def test_a_comparison_that_was_renamed_without_its_tuning_is_refused(where: Settings) -> None:
    for name in ("a", f"a{TUNING}"):
        RunFolder(where.output / name).create({"kind": "comparison"})
    (where.output / "a").rename(where.output / "b")
    with pytest.raises(ConfigError, match=f"started as a.* rename a{TUNING} to b{TUNING} too"):
        compared(where, "b", resume=True)
    assert sorted(path.name for path in where.output.iterdir()) == [f"a{TUNING}", "b"]


def _runs(where: Settings):
    client, experiment = open_store(where.tracking_uri)
    return client.search_runs([experiment])


@pytest.mark.long
def test_a_comparison_that_used_up_its_budget_tells_so_and_goes_on_with_a_larger_one(
    where: Settings,
) -> None:
    ahead = 0.0

    def clock() -> float:
        return time.monotonic() + ahead

    def an_hour_each(line: str) -> None:
        nonlocal ahead
        ahead += 3600 * ("epoch 1/1 " in line)

    # Methods that are not tuned alike are not compared.
    cut, variants = compared(where, "c", an_hour_each, Budget(max_hours=2.5), clock=clock)
    assert [record.state for record in cut.records] == ["finished"] * 3
    assert variants == []
    assert "--max-hours 2.5 is used up" in cut.used_up
    assert cut.used_up.endswith("compare.py --resume --max-hours 5.5 --name c")
    assert newest_unfinished(where.output, "comparison", "tuning").name == "c-tuning"
    parent = runs_of(where, "c-tuning", "parent")[0]
    assert parent.data.tags["cpfean.used_up"].startswith("--max-hours 2.5")
    assert parent.data.metrics["study/hours"] == pytest.approx(3.0, abs=0.1)

    # Four hours of tuning count: two of four runs are begun.
    larger = Budget(max_hours=5.5)
    some, variants = compared(where, "c", an_hour_each, larger, resume=True, clock=clock)
    assert len(variants) == 2
    assert [record.state for record in some.records] == ["finished"] * 2
    assert some.used_up
    assert some.exit_code == 0
    assert (where.output / "c" / "report" / "table.md").exists()
    assert {run.info.status for run in runs_of(where, "c", "trial")} == {"FINISHED"}

    whole, _ = compared(where, "c", an_hour_each, resume=True, clock=clock)
    assert [record.state for record in whole.records] == ["finished"] * 4
    assert whole.used_up == ""
    assert runs_of(where, "c", "parent")[0].data.tags["cpfean.used_up"] == "no"
    assert whole.records[:2] == some.records


def runs_of(where: Settings, name: str, role: str) -> list[Any]:
    client, experiment = open_store(where.tracking_uri)
    query = f"tags.`cpfean.sweep` = '{name}' and tags.`cpfean.role` = '{role}'"
    return list(client.search_runs([experiment], query))
