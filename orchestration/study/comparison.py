"""Methods side by side: the same budget to tune each, then the same seeds for all.

Every method is a variant of one base configuration: same encoders, data, loop and epochs. Each
is tuned over the same number of points of its own space, judged on dev on one seed; the best point
then runs on other seeds, which are tested. The points are drawn beforehand, evenly over the space
(Optuna's quasi-random sampler), so that what is tried depends neither on how many trials run at a
time nor on how often the driver was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpfean.analysis.report import write_report
from cpfean.config import ExperimentConfig, Plain
from cpfean.errors import ConfigError
from cpfean.files import is_there
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TUNING, TrialRecord
from orchestration.proposals.optuna_study import spread_points
from orchestration.proposals.search_space import Choice, Range, SearchSpace
from orchestration.runners.protocol import Runner
from orchestration.settings import Settings
from orchestration.study.ablations import Ablation, plan_trials, seed_runs
from orchestration.study.conclusion import StudyResult
from orchestration.study.plan import StudyPlan, TrialPlan
from orchestration.study.study import run_study


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to score image and caption, as a variant of the full model.

    Attributes:
        name: of the tables.
        source: who published it.
        overrides: what makes it differ from the base configuration.
        knobs: its own main settings, tuned beside those that all methods have in common.
    """

    name: str
    source: str
    overrides: Mapping[str, Plain]
    knobs: Mapping[str, Choice | Range] = field(default_factory=dict)


def tuning_trials(
    base: ExperimentConfig,
    methods: Sequence[Method],
    common: Mapping[str, Choice | Range],
    *,
    points: int,
) -> tuple[TrialPlan, ...]:
    """The same number of points for every method; the first is the configuration as it stands.

    Raises:
        ConfigError: a method that this base does not allow.
    """
    plans = []
    for method in methods:
        config = _config(base, method.name, method.overrides)
        space = SearchSpace(
            name=method.name, question=method.source, parameters={**common, **method.knobs}
        )
        # Its own stream: what one method tries does not depend on which others are compared.
        seed = int(hashlib.sha256(f"{method.name} {base.seed}".encode()).hexdigest()[:8], 16)
        drawn = [{}, *spread_points(space, points - 1, seed=seed)]
        for number, point in enumerate(drawn):
            overrides = {**method.overrides, **point}
            plans.append(
                TrialPlan(
                    name=f"{method.name}/point-{number:02d}",
                    overrides=overrides,
                    config=_config(config, method.name, overrides),
                )
            )
    return tuple(plans)


def tuned(methods: Sequence[Method], records: Sequence[TrialRecord]) -> list[Ablation]:
    """Each method with its best point by rSum on dev.

    Raises:
        ConfigError: a method of which no trial finished.
    """
    variants = []
    for method in methods:
        finished = [
            record
            for record in records
            if record.name.split("/")[0] == method.name and record.state == "finished"
        ]
        if not finished:
            raise ConfigError(
                f"no trial of {method.name!r} finished, so there is nothing to compare; see the "
                "trials' messages, and leave it out with --methods or widen its space."
            )
        best = max(finished, key=lambda record: record.best_rsum)
        variants.append(
            Ablation(name=method.name, question=method.source, overrides=best.overrides)
        )
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
    runner: Runner,
    say: Callable[[str], None],
) -> tuple[StudyResult, list[Ablation]]:
    """Tunes the methods, then runs the best of each on the seeds.

    Args:
        plan: name, base, data, workers and folder of results; what to run is filled in.
        points: configurations that each method is tuned over; 1 takes all as they stand.
        seeds: of the runs that are reported; the base's own seed is for tuning.
        runner: that trains the trials.

    Raises:
        ConfigError: a comparison that was renamed, and its tuning was not.

    Returns:
        The outcome, and every method with the settings that were chosen for it; that of the tuning
        and none if its budget was used up.
    """
    variants = as_they_stand(methods)
    if points > 1:
        tuning = tuning_study(plan, methods, common, points=points)
        folder = RunFolder(settings.output / plan.name)
        if resume and folder.first_name != folder.name and not _exists(tuning, settings):
            raise ConfigError(
                f"{folder.path} was started as {folder.first_name}, and what tuned its methods is "
                f"not beside it: rename {folder.first_name + TUNING} to {tuning.name} too, or "
                f"{folder.name} back."
            )
        if is_there(folder.identity_file):
            # What is compared has been chosen: a better point would make another study of it.
            tuning = replace(tuning, retry_failed=False)
        say(f"tuning: {points} configurations of each of {len(methods)} methods, judged on dev")
        done = run_study(
            tuning,
            settings,
            runner=runner,
            resume=resume and _exists(tuning, settings),
            say=say,
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
        plan, variants, seeds=seeds, settings=settings, resume=resume, runner=runner, say=say
    )
    return result, variants


def compare_variants(
    plan: StudyPlan,
    variants: Sequence[Ablation],
    *,
    seeds: Sequence[int],
    settings: Settings,
    resume: bool,
    runner: Runner,
    say: Callable[[str], None],
) -> StudyResult:
    """Runs every variant on every seed, tests each and writes the report beside the records.

    Args:
        plan: kind, name, base, data, workers and folder of results.
        resume: go on with a study of that name, if there is one.
    """
    study = seeds_study(plan, variants, seeds=seeds, settings=settings)
    is_there_already = _exists(study, settings)
    return run_study(study, settings, runner=runner, resume=resume and is_there_already, say=say)


def as_they_stand(methods: Sequence[Method]) -> list[Ablation]:
    """The methods untuned."""
    return [Ablation(name=m.name, question=m.source, overrides=m.overrides) for m in methods]


def tuning_study(
    plan: StudyPlan,
    methods: Sequence[Method],
    common: Mapping[str, Choice | Range],
    *,
    points: int,
) -> StudyPlan:
    """The first half of a comparison."""
    trials = tuning_trials(plan.base, methods, common, points=points)
    return replace(plan, kind="tuning", name=plan.name + TUNING, fixed=trials, trials=len(trials))


def seeds_study(
    plan: StudyPlan, variants: Sequence[Ablation], *, seeds: Sequence[int], settings: Settings
) -> StudyPlan:
    """Every variant on every seed, with a report at the end."""
    trials = plan_trials(plan.base, variants, seeds)
    folder = report_folder(plan, settings)
    return replace(
        plan,
        fixed=trials,
        trials=len(trials),
        report=lambda records: write_report(seed_runs(records), folder),
    )


def report_folder(plan: StudyPlan, settings: Settings) -> Path:
    """Where a comparison's tables and pictures are."""
    return settings.output / plan.name / "report"


def _exists(plan: StudyPlan, settings: Settings) -> bool:
    return is_there(RunFolder(settings.output / plan.name).identity_file)


def _config(base: ExperimentConfig, name: str, overrides: Mapping[str, Plain]) -> ExperimentConfig:
    try:
        return base.with_overrides(overrides)
    except ConfigError as error:
        raise ConfigError(f"method {name!r}: {error}") from None
