"""Variants of the model side by side on the same seeds: ablations, and methods tuned alike.

Every variant changes one base configuration: same encoders, data, loop and epochs. Methods are
tuned first, each over the same number of points of its own space, judged on dev on one seed; the
best point then runs on other seeds, which are tested. The points are drawn beforehand, evenly over
the space (Optuna's quasi-random sampler), so that what is tried depends neither on how many trials
run at a time nor on how often the driver was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpfean.analysis.report import write_report
from cpfean.analysis.statistics import SeedRun
from cpfean.config import ExperimentConfig, Plain
from cpfean.errors import ConfigError
from cpfean.files import is_there
from cpfean.records.trial_record import TUNING, TrialRecord
from orchestration.proposals.optuna_study import spread_points
from orchestration.proposals.search_space import Choice, Range, SearchSpace
from orchestration.settings import Settings
from orchestration.study.conclusion import StudyResult
from orchestration.study.plan import StudyPlan, TrialPlan, folder_of
from orchestration.study.study import run_study
from orchestration.study.variants import Method, Variant


def plan_trials(
    base: ExperimentConfig, variants: Sequence[Variant], seeds: Sequence[int]
) -> tuple[TrialPlan, ...]:
    """Every variant on every seed, seed by seed.

    Raises:
        ConfigError: a variant that this base does not allow.
    """
    return tuple(
        _trial(base, variant, f"seed-{seed}", {"seed": seed})
        for seed in seeds
        for variant in variants
    )


def seed_runs(records: Iterable[TrialRecord]) -> list[SeedRun]:
    """The trials that `plan_trials` planned, by number, as the statistics take them."""
    return [
        SeedRun(
            variant=record.name.split("/")[0],
            seed=int(record.overrides["seed"]),
            state=record.state,
            test=record.test,
            dev_rsums=tuple(row["val/rsum"] for row in record.history),
            seconds=record.seconds,
        )
        for record in sorted(records, key=lambda record: record.number)
    ]


def tuned(methods: Sequence[Method], records: Sequence[TrialRecord]) -> list[Method]:
    """Each method with its best point by rSum on dev.

    Raises:
        ConfigError: a method of which no trial finished.
    """
    variants = []
    finished = [record for record in records if record.state == "finished"]
    for method in methods:
        points = [record for record in finished if record.name.split("/")[0] == method.name]
        if not points:
            raise ConfigError(
                f"no trial of {method.name!r} finished, so there is nothing to compare; see the "
                "trials' messages, and leave it out with --methods or widen its space."
            )
        best = max(points, key=lambda record: record.best_rsum)
        variants.append(replace(method, overrides=best.overrides))
    return variants


def compare_methods(
    plan: StudyPlan,
    methods: Sequence[Method],
    common: Mapping[str, Choice | Range],
    *,
    points: int,
    seeds: Sequence[int],
    settings: Settings,
    resume: bool,
    say: Callable[[str], None],
    **how: Any,
) -> tuple[StudyResult, Sequence[Method]]:
    """Tunes the methods, then runs the best of each on the seeds.

    Args:
        plan: name, base, data, workers and folder of results; what to run is filled in.
        points: configurations that each method is tuned over; 1 takes all as they stand.
        seeds: of the runs that are reported; the base's own seed is for tuning.
        how: further arguments of `run_study`.

    Raises:
        ConfigError: a comparison that was renamed, and its tuning was not.

    Returns:
        The outcome, and every method with the settings that were chosen for it; that of the tuning
        and none if its budget was used up.
    """
    variants = methods
    if points > 1:
        tuning = tuning_study(plan, methods, common, points=points)
        folder = folder_of(plan, settings)
        if resume and folder.first_name != folder.name and not _exists(tuning, settings):
            raise ConfigError(
                f"{folder.path} was started as {folder.first_name}, and what tuned its methods is "
                f"not beside it: rename {folder.first_name + TUNING} to {tuning.name} too, or "
                f"{folder.name} back."
            )
        if _exists(plan, settings):
            # What is compared has been chosen: a better point would make another study of it.
            tuning = replace(tuning, retry_failed=False)
        say(f"tuning: {points} configurations of each of {len(methods)} methods, judged on dev")
        done = run_study(
            tuning, settings, resume=resume and _exists(tuning, settings), say=say, **how
        )
        if done.used_up:
            say("the methods are not tuned alike yet, so they are not compared.")
            return done, []
        variants = tuned(methods, done.records)
        for variant, method in zip(variants, methods, strict=True):
            own = {k: v for k, v in variant.overrides.items() if method.overrides.get(k) != v}
            listed = ", ".join(f"{path} = {value}" for path, value in own.items())
            say(f"{variant.name}: {listed or 'as it stands'}")
    result = compare_variants(
        plan, variants, seeds=seeds, settings=settings, resume=resume, say=say, **how
    )
    return result, variants


def compare_variants(
    plan: StudyPlan,
    variants: Sequence[Variant],
    *,
    seeds: Sequence[int],
    settings: Settings,
    resume: bool,
    **how: Any,
) -> StudyResult:
    """Runs every variant on every seed, tests each and writes the report beside the records.

    Args:
        plan: kind, name, base, data, workers and folder of results.
        resume: go on with a study of that name, if there is one.
        how: further arguments of `run_study`.
    """
    study = seeds_study(plan, variants, seeds=seeds, settings=settings)
    return run_study(study, settings, resume=resume and _exists(study, settings), **how)


def tuning_study(
    plan: StudyPlan,
    methods: Sequence[Method],
    common: Mapping[str, Choice | Range],
    *,
    points: int,
) -> StudyPlan:
    """The first half of a comparison: the same number of points for every method.

    The first point is the configuration as it stands.

    Raises:
        ConfigError: a method that the base does not allow.
    """
    trials = []
    for method in methods:
        parameters = {**common, **method.knobs}
        space = SearchSpace(name=method.name, question=method.source, parameters=parameters)
        # Its own stream: what one method tries does not depend on which others are compared.
        text = f"{method.name} {plan.base.seed}"
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
        drawn = [{}, *spread_points(space, points - 1, seed=seed)]
        trials += [
            _trial(plan.base, method, f"point-{n:02d}", point) for n, point in enumerate(drawn)
        ]
    name = plan.name + TUNING
    return replace(plan, kind="tuning", name=name, fixed=tuple(trials), trials=len(trials))


def seeds_study(
    plan: StudyPlan, variants: Sequence[Variant], *, seeds: Sequence[int], settings: Settings
) -> StudyPlan:
    """Every variant on every seed, with a report at the end."""
    trials = plan_trials(plan.base, variants, seeds)

    def report(records: Sequence[TrialRecord]) -> Sequence[Path]:
        return write_report(seed_runs(records), report_folder(plan, settings))

    return replace(plan, fixed=trials, trials=len(trials), report=report)


def report_folder(plan: StudyPlan, settings: Settings) -> Path:
    """Where a comparison's tables and pictures are."""
    return folder_of(plan, settings).path / "report"


def _exists(plan: StudyPlan, settings: Settings) -> bool:
    return is_there(folder_of(plan, settings).identity_file)


def _trial(
    base: ExperimentConfig, variant: Variant, part: str, more: Mapping[str, Plain]
) -> TrialPlan:
    """A variant with further overrides, named after both."""
    overrides = {**variant.overrides, **more}
    try:
        config = base.with_overrides(overrides)
    except ConfigError as error:
        raise ConfigError(f"variant {variant.name!r}: {error}") from None
    return TrialPlan(name=f"{variant.name}/{part}", overrides=overrides, config=config)
