"""A search space as plain data, and the Optuna study that proposes configurations from it.

The study lives in a file of the sweep's folder and is its only state: a driver that is started
again goes on where the last one stopped, without a snapshot of the searcher.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.config import ExperimentConfig, Plain, field_types
from cpfean.errors import ConfigError
from orchestration.records import TrialRecord

if TYPE_CHECKING:
    import optuna

METRIC = "val/rsum"
_TRIES = 50  # proposals looked at before a space counts as exhausted
_GUIDED = 5  # of these by TPE, which goes on proposing what it knows to be good; the rest at random


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values, without an order."""

    values: tuple[Plain, ...]

    @property
    def corners(self) -> tuple[Plain, ...]:
        return self.values

    def __contains__(self, value: Plain) -> bool:
        return value in self.values


@dataclass(frozen=True, slots=True)
class Range:
    """A number from `low` to `high`, both included; whole numbers if both are.

    Attributes:
        step: distance of the values, counted from `low`; None: any (1 for whole numbers).
        log: drawn evenly on the logarithm; excludes `step`.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def corners(self) -> tuple[float, ...]:
        return (self.low, self.high)

    def __contains__(self, value: Plain) -> bool:
        return not isinstance(value, str | bool) and self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """What may vary, by dotted path.

    Attributes:
        question: what a sweep over it finds out.
        parameters: values of each path, in the order in which they are drawn.
        only_if: a path -> (an earlier path, its values for which the first one matters); for other
            values it keeps the base configuration's value and is not searched.
    """

    name: str
    question: str
    parameters: Mapping[str, Choice | Range]
    only_if: Mapping[str, tuple[str, tuple[Plain, ...]]] = field(default_factory=dict)

    def applies(self, path: str, drawn: Mapping[str, Plain]) -> bool:
        """Whether the path is searched, given what was drawn before it."""
        if path not in self.only_if:
            return True
        other, values = self.only_if[path]
        return drawn.get(other) in values

    def corners(self) -> Iterator[dict[str, Plain]]:
        """Every combination of choices and ends of ranges."""
        paths = list(self.parameters)
        for values in itertools.product(*(self.parameters[path].corners for path in paths)):
            drawn: dict[str, Plain] = {}
            for path, value in zip(paths, values, strict=True):
                if self.applies(path, drawn):
                    drawn[path] = value
            yield drawn

    def baseline(self, config: ExperimentConfig) -> dict[str, Plain] | None:
        """The base configuration as a point of the space, or None if it lies outside."""
        flat = config.flat()
        drawn: dict[str, Plain] = {}
        for path, values in self.parameters.items():
            if self.applies(path, drawn):
                if flat[path] not in values:
                    return None
                drawn[path] = flat[path]
        return drawn

    def check(self, config: ExperimentConfig) -> None:
        """Builds the configuration at every corner.

        Raises:
            ConfigError: a path that does not exist, or a combination that cannot be run.
        """
        known = dict(field_types(ExperimentConfig))
        for path in self.parameters:
            if path not in known:
                raise ConfigError(f"search space {self.name!r}: no setting {path!r}.")
        for corner in self.corners():
            try:
                config.with_overrides(corner)
            except ConfigError as error:
                listed = ", ".join(f"{path} = {value}" for path, value in corner.items())
                raise ConfigError(f"search space {self.name!r}, at {listed}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that two spaces share only if they propose the same values."""
        return {
            path: list(values.values)
            if isinstance(values, Choice)
            else {"low": values.low, "high": values.high, "step": values.step, "log": values.log}
            for path, values in self.parameters.items()
        }


def spread_points(space: SearchSpace, count: int, *, seed: int) -> list[dict[str, Plain]]:
    """Points spread evenly over a space without conditions: a scrambled Sobol sequence.

    Choices are drawn like the rest, by their place in the list. The same for the same seed.
    """
    if count < 1:
        return []
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Optuna draws the configurations to tune over, and is not installed ({error}): "
            "pip install optuna, or take the methods as they stand with --tuning 1."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _silence_experimental(optuna)
    sampler = optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed)
    study = optuna.create_study(sampler=sampler)
    points: list[dict[str, Plain]] = []
    for number in range(count + 1):
        trial = study.ask()
        point = {path: _suggested(trial, path, values) for path, values in space.parameters.items()}
        study.tell(trial, 0.0)
        if number:  # before it knows the space, from its first trial, the sampler draws at random
            points.append(point)
    return points


def _suggested(trial: optuna.Trial, path: str, values: Choice | Range) -> Plain:
    """One coordinate; choices as whole numbers, which the quasi-random sampler covers evenly."""
    if isinstance(values, Choice):
        return values.values[trial.suggest_int(path, 0, len(values.values) - 1)]
    if isinstance(values.low, int) and isinstance(values.high, int):
        step = int(values.step or 1)
        return trial.suggest_int(path, values.low, values.high, step=step, log=values.log)
    drawn = trial.suggest_float(path, values.low, values.high, step=values.step, log=values.log)
    return _tidy(drawn)


class Proposals:
    """Asks Optuna's TPE for points of a space and tells it how they did.

    Beside what Tune's own Optuna adapter does: a trial that was stopped early is told as pruned, a
    failed one as failed, a point that is known already costs no training, and a proposal that a
    killed driver had made but not recorded is handed out again.

    Args:
        file: of the sqlite database; made if absent.
        seed: of the sampler.
        baseline: proposed first.
        trials: how many will be asked for; small sweeps start to learn earlier.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        file: Path,
        seed: int,
        baseline: Mapping[str, Plain] | None,
        trials: int,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # "Experimental" is what Optuna calls options that it has had for years.
        logging.getLogger("optuna").setLevel(logging.WARNING)
        _silence_experimental(optuna)
        self._space = space
        self._states = optuna.trial.TrialState
        if not file.exists():
            # A driver killed while Optuna writes its tables would leave some without the index that
            # keeps the study's name unique: the file appears complete or not at all.
            new = file.with_name(f"{file.name}.new")
            new.unlink(missing_ok=True)
            _open_study(new, name=file.parent.name)
            os.replace(new, file)
        self._study = _open_study(file, name=file.parent.name)
        known = len(self._study.get_trials(deepcopy=False))
        # A restarted sampler with the same seed would draw the same points once more.
        self._random = optuna.samplers.RandomSampler(seed=seed + known)
        self._guided = optuna.samplers.TPESampler(
            seed=seed + known,
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=max(2, min(10, trials // 3)),
        )
        if known == 0 and baseline is not None:
            self._study.enqueue_trial(dict(baseline))
        self.num_duplicates = 0

    def ask(self, number: int, seen: Sequence[TrialRecord]) -> dict[str, Plain] | None:
        """A new point for trial `number`; None if the space has no other left.

        Args:
            seen: all trials so far.
        """
        lost = self._lost(seen)
        if lost is not None:
            self._live(lost).set_user_attr("number", number)
            return {path: _tidy(value) for path, value in lost.params.items()}
        points = [record.overrides for record in seen]
        for attempt in range(_TRIES):
            self._study.sampler = self._guided if attempt < _GUIDED else self._random
            trial = self._study.ask()
            drawn = self._draw(trial)
            if drawn not in points:
                trial.set_user_attr("number", number)
                return drawn
            self._hand_back(trial, seen[points.index(drawn)])
        return None

    def tell(self, record: TrialRecord) -> None:
        """Tells the study of a settled trial; telling it twice changes nothing."""
        trial = self._find(record.number)
        if trial is None or trial.state.is_finished():
            return
        live = self._live(trial)
        for row in record.history:
            live.report(row[METRIC], int(row["epoch"]))
        if record.state == "finished":
            self._study.tell(live, record.best_rsum)
        elif record.state == "pruned":
            self._study.tell(live, state=self._states.PRUNED)
        else:
            self._study.tell(live, state=self._states.FAIL)

    def _draw(self, trial: optuna.Trial) -> dict[str, Plain]:
        drawn: dict[str, Plain] = {}
        for path, values in self._space.parameters.items():
            if not self._space.applies(path, drawn):
                continue
            if isinstance(values, Choice):
                choice = trial.suggest_categorical(path, values.values)
                assert choice is not None
                drawn[path] = choice
            else:
                drawn[path] = _suggested(trial, path, values)
        return drawn

    def _hand_back(self, trial: optuna.Trial, twin: TrialRecord) -> None:
        self.num_duplicates += 1
        if twin.state == "finished":
            self._study.tell(trial, twin.best_rsum)
        else:
            self._study.tell(trial, state=self._states.FAIL)

    def _find(self, number: int) -> optuna.trial.FrozenTrial | None:
        for trial in self._study.get_trials(deepcopy=False):
            if trial.user_attrs.get("number") == number:
                return trial
        return None

    def _lost(self, seen: Sequence[TrialRecord]) -> optuna.trial.FrozenTrial | None:
        """A proposal that no record tells of: its driver was killed in between."""
        numbers = {record.number for record in seen}
        expected = {path for path in self._space.parameters if path not in self._space.only_if}
        for trial in self._study.get_trials(states=(self._states.RUNNING,)):
            if trial.user_attrs.get("number") in numbers:
                continue
            if expected <= set(trial.params):
                return trial
            self._study.tell(self._live(trial), state=self._states.FAIL)  # killed while drawing
        return None

    def _live(self, trial: optuna.trial.FrozenTrial) -> optuna.Trial:
        import optuna

        return optuna.Trial(self._study, trial._trial_id)


def _tidy(value: Any) -> Any:
    # Steps of 0.01 leave tails such as 0.15000000000000002.
    return round(value, 10) if isinstance(value, float) else value


def _silence_experimental(optuna: Any) -> None:
    import warnings

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _open_study(file: Path, *, name: str) -> optuna.Study:
    """The study in a database, made if absent."""
    import optuna

    # timeout: another process may be looking at the study.
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 30}}
    )
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )
