"""Points of a search space that Optuna draws: one after another, or a set that covers it evenly.

Optuna's study is made from the records of the trials whenever it is needed. They are the only
state: a proposal depends on them, the seed and the trial's number alone, so that one that a killed
driver made and did not record is made once more. The file that optuna-dashboard shows is an export,
which nothing reads back.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from cpfean import commands
from cpfean.analysis.importance import Importance, shuffle_test
from cpfean.config import Plain
from cpfean.errors import ConfigError, ServiceError
from cpfean.files import is_there
from cpfean.records.trial_record import METRIC, TrialRecord
from cpfean.writing import cannot_write
from orchestration.proposals.search_space import Choice, Range, SearchSpace

if TYPE_CHECKING:
    import optuna

_TRIES = 50  # proposals looked at before a space counts as exhausted
_GUIDED = 5  # of these by TPE, which goes on proposing what it knows to be good; the rest at random
_BEST = 5  # trials at least, or a tenth if that is more, whose values are compared with all
NEEDED = 4 * _BEST  # trials that tell which settings mattered


class Proposals:
    """Asks Optuna's TPE for points of a space, given how the trials so far did.

    Beside what Tune's own Optuna adapter does: a trial that was stopped early is told as pruned, a
    failed one as failed, one that runs counts too, and a point that is known already costs no
    training. Of a trial that failed and was tried once more Optuna is told what came of it.

    Args:
        name: of the study, as optuna-dashboard lists it.
        baseline: proposed first.
        trials: how many will be asked for; small sweeps start to learn earlier.

    Attributes:
        duplicates: names of the trials that proposals were repeats of, in their order.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        name: str,
        seed: int,
        baseline: Mapping[str, Plain] | None,
        trials: int,
    ) -> None:
        self._optuna = _quiet_optuna()
        self._space = space
        self._name = name
        self._seed = seed
        self._baseline = baseline
        self._num_startup = max(2, min(10, trials // 3))
        self.duplicates: list[str] = []

    def ask(self, number: int, seen: Sequence[TrialRecord]) -> dict[str, Plain] | None:
        """A new point for trial `number`, given all so far; None if the space has no other left."""
        points = [record.overrides for record in seen]
        if self._baseline is not None and self._baseline not in points:
            return dict(self._baseline)
        study = self._study(seen)
        # Others for each trial, as the seed says.
        seeds = np.random.SeedSequence([self._seed, number]).generate_state(2)
        first, second = map(int, seeds)
        guided = self._optuna.samplers.TPESampler(
            seed=first,
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=self._num_startup,
        )
        at_random = self._optuna.samplers.RandomSampler(seed=second)
        for attempt in range(_TRIES):
            study.sampler = guided if attempt < _GUIDED else at_random
            trial = study.ask()
            drawn = _draw(trial, self._space)
            if drawn not in points:
                return drawn
            twin = seen[points.index(drawn)]
            self.duplicates.append(twin.name)
            # The sampler is told, so that it looks elsewhere.
            if twin.state == "finished":
                study.tell(trial, twin.best_rsum)
            else:
                study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return None

    def export(self, file: Path, records: Sequence[TrialRecord]) -> None:
        """Writes all trials as a database for optuna-dashboard, whole or not at all.

        One that is there is replaced: nothing reads it back.

        Raises:
            ServiceError: it cannot be written, or is no file; what was there still is.
        """
        if is_there(file) and (file.is_symlink() or not file.is_file()):
            raise ServiceError(f"{file}: cannot be written: it is no file, and was left as it is.")
        from sqlalchemy import URL
        from sqlalchemy.exc import SQLAlchemyError

        optuna = self._optuna
        new = file.with_name(f"{file.name}.new")
        try:
            _remove(new)
            memory = optuna.storages.InMemoryStorage()
            self._study(records, memory).set_metric_names([METRIC])
            # In a URL that is put together by hand a path would end at its first question mark.
            url = URL.create("sqlite", database=str(new)).render_as_string()
            database = optuna.storages.RDBStorage(url)
            try:
                optuna.copy_study(
                    from_study_name=self._name, from_storage=memory, to_storage=database
                )
            finally:
                database.remove_session()
                database.engine.dispose()
            os.replace(new, file)
        except (OSError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            with suppress(OSError):
                _remove(new)
            raise cannot_write(file, error) from error

    def importance(self, records: Sequence[TrialRecord]) -> dict[str, Importance]:
        """How much each setting mattered for being among the best trials, by path, greatest first.

        By Optuna's PED-ANOVA, which knows conditions (arXiv 2304.10255, 2601.20800). Stopped trials
        count with the rSum that they had: without them a setting whose bad values were all stopped
        would seem not to matter. Empty if fewer than NEEDED trials have one.
        """
        known = [r for r in records if r.state in ("finished", "pruned")]
        judged = [replace(r, state="finished") for r in known if math.isfinite(r.best_rsum)]
        if len(judged) < NEEDED:
            return {}
        study, module = self._study(judged), self._optuna.importance
        part = max(0.1, _BEST / len(judged))
        evaluator = module.PedAnovaImportanceEvaluator(target_quantile=part)

        def measure(rsums: Sequence[float]) -> dict[str, float]:
            with warnings.catch_warnings(category=UserWarning, action="ignore"):
                # Of a target the lowest are the best, of which it warns each time.
                return module.get_param_importances(
                    study, evaluator=evaluator, target=lambda t: -rsums[t.number], normalize=False
                )

        return shuffle_test(measure, [t.values[0] for t in study.trials], seed=self._seed)

    def _study(
        self, records: Sequence[TrialRecord], storage: optuna.storages.BaseStorage | None = None
    ) -> optuna.Study:
        """A study in memory that has every trial, in their order."""
        optuna = self._optuna
        study = optuna.create_study(
            storage=storage,
            study_name=self._name,
            direction="maximize",
            sampler=optuna.samplers.RandomSampler(seed=self._seed),  # draws nothing: all is given
        )
        for record in sorted(records, key=lambda record: record.number):
            notes = {"number": record.number, "name": record.name, "seconds": record.seconds}
            if record.failure:
                notes["failure"] = record.failure
            study.enqueue_trial(record.overrides, user_attrs=notes)
            trial = study.ask()
            _draw(trial, self._space)
            for row in record.history:
                trial.report(row[METRIC], int(row["epoch"]))
            if record.state == "finished":
                study.tell(trial, record.best_rsum)
            elif record.state == "pruned":
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            elif record.state == "failed":
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return study


def _remove(database: Path) -> None:
    """Removes a database, with the journal that a killed writer has left beside it."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)


def _quiet_optuna() -> ModuleType:
    """Optuna, silent on every trial, and on options that have been experimental for years."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _draw(trial: optuna.trial.BaseTrial, space: SearchSpace) -> dict[str, Plain]:
    """A point of a space as a trial suggests it; what does not apply there is left out."""
    drawn: dict[str, Plain] = {}
    for path, values in space.parameters.items():
        if space.applies(path, drawn):
            if isinstance(values, Choice):
                choice = trial.suggest_categorical(path, values.values)
                assert choice is not None
                drawn[path] = choice
            else:
                drawn[path] = _number(trial, path, values)
    return drawn


def spread_points(space: SearchSpace, count: int, *, seed: int) -> list[dict[str, Plain]]:
    """Points spread evenly over a space without conditions: a scrambled Sobol sequence.

    Choices are drawn like the rest, by their place in the list. The same for the same seed.
    """
    if count < 1:
        return []
    try:
        optuna = _quiet_optuna()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Optuna draws the configurations to tune over, and is not installed ({error}): "
            f"{commands.pip_install('optuna')}, or take the methods as they stand with --tuning 1."
        ) from None
    sampler = optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed)
    study = optuna.create_study(sampler=sampler)
    points: list[dict[str, Plain]] = []
    for _ in range(count + 1):
        trial = study.ask()
        point: dict[str, Plain] = {}
        for path, values in space.parameters.items():
            if isinstance(values, Choice):
                place = trial.suggest_int(path, 0, len(values.values) - 1)
                point[path] = values.values[place]
            else:
                point[path] = _number(trial, path, values)
        study.tell(trial, 0.0)
        points.append(point)
    return points[1:]  # the first is drawn at random: it tells the sampler what the space is


def _number(trial: optuna.trial.BaseTrial, path: str, values: Range) -> int | float:
    if isinstance(values.low, int) and isinstance(values.high, int):
        step = int(values.step or 1)
        return trial.suggest_int(path, values.low, values.high, step=step, log=values.log)
    drawn = trial.suggest_float(path, values.low, values.high, step=values.step, log=values.log)
    return round(drawn, 10)  # steps of 0.01 leave tails such as 0.15000000000000002
