"""A search space as plain data, and the Optuna study that proposes configurations from it.

The study lives in a file of the sweep's folder and is its only state: a driver that is started
again goes on where the last one stopped, without a snapshot of the searcher. A file that is lost or
damaged is made again from the records of the trials.
"""

from __future__ import annotations

import itertools
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean import commands
from cpfean.config import ExperimentConfig, Plain, field_types
from cpfean.errors import ConfigError
from cpfean.files import is_there, open_file
from cpfean.json_files import aside
from orchestration.settings import ServiceError
from orchestration.study.records import TrialRecord

if TYPE_CHECKING:
    import optuna

METRIC = "val/rsum"
_AWAY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
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
            f"{commands.pip_install('optuna')}, or take the methods as they stand with --tuning 1."
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


def _suggested(trial: optuna.trial.BaseTrial, path: str, values: Choice | Range) -> Plain:
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
        name: of the study in it.
        seed: of the sampler.
        baseline: proposed first.
        trials: how many will be asked for; small sweeps start to learn earlier.
        records: of the trials so far; what the database has lost of them it gets back.

    Attributes:
        damaged: where a database that could not be read was put aside, if it was.
        num_rebuilt: trials that came from the records.
        duplicates: names of the trials that proposals were repeats of, in their order.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        file: Path,
        name: str,
        seed: int,
        baseline: Mapping[str, Plain] | None,
        trials: int,
        records: Sequence[TrialRecord] = (),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # "Experimental" is what Optuna calls options that it has had for years.
        logging.getLogger("optuna").setLevel(logging.WARNING)
        _silence_experimental(optuna)
        self._space = space
        self._states = optuna.trial.TrialState
        self.damaged: Path | None = None
        if is_there(file) and not _is_sound(file, records, name=name):
            self.damaged = _put_aside(file)
        if not file.exists():
            # A driver killed while Optuna writes its tables would leave some without the index that
            # keeps the study's name unique: the file appears complete or not at all.
            new = file.with_name(f"{file.name}.new")
            new.unlink(missing_ok=True)
            _open_study(new, name=name)
            os.replace(new, file)
        self._study = _open_study(file, name=name)
        self.num_rebuilt = self._rebuild(records)
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
        self.duplicates: list[str] = []

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
        if trial is None:
            return
        if trial.state == self._states.FAIL and record.state in ("finished", "pruned"):
            # It was tried once more, and what has failed cannot be told of again.
            self._add(record)
            trial = self._find(record.number)
            assert trial is not None
        if trial.state.is_finished():
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

    def _rebuild(self, records: Sequence[TrialRecord]) -> int:
        """Adds the trials that the study does not know; returns how many."""
        known = {trial.user_attrs.get("number") for trial in self._study.get_trials(deepcopy=False)}
        lost = [record for record in records if record.number not in known]
        for record in lost:
            self._add(record)
            if record.settled:
                self.tell(record)
        return len(lost)

    def _add(self, record: TrialRecord) -> None:
        """Adds a trial as one that runs."""
        import optuna

        point = optuna.trial.FixedTrial(record.overrides)
        self._draw(point)
        trial = optuna.trial.create_trial(
            state=self._states.RUNNING,
            params=point.params,
            distributions=point.distributions,
            user_attrs={"number": record.number},
        )
        self._study.add_trial(trial)

    def _draw(self, trial: optuna.trial.BaseTrial) -> dict[str, Plain]:
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
        self.duplicates.append(twin.name)
        if twin.state == "finished":
            self._study.tell(trial, twin.best_rsum)
        else:
            self._study.tell(trial, state=self._states.FAIL)

    def _find(self, number: int) -> optuna.trial.FrozenTrial | None:
        """The last one, if it was tried more than once."""
        for trial in reversed(self._study.get_trials(deepcopy=False)):
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


def _is_sound(file: Path, records: Sequence[TrialRecord], *, name: str) -> bool:
    """Whether a database can be read to its end and agrees with the records.

    Raises:
        ServiceError: it cannot be opened, which says nothing about what is in it, or is no file.
    """
    import optuna

    try:
        open_file(file).close()
    except OSError as error:
        raise ServiceError(
            f"{file}: cannot be opened: {error.strerror}. It was left as it is; moved aside, it is "
            "made again from the records."
        ) from None

    points = {record.number: record.overrides for record in records}
    try:
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                return False
        storage = _storage(file)
        study = optuna.load_study(study_name=name, storage=storage)
        for trial in study.get_trials(deepcopy=False):
            number = trial.user_attrs.get("number")
            drawn = {path: _tidy(value) for path, value in trial.params.items()}
            if number in points and drawn != points[number]:
                return False
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in _AWAY:
            raise ServiceError(
                f"{file}: cannot be opened: {error}; see who has it, and the rights."
            ) from None
        return False
    # Bytes that are not what was written make SQLite, SQLAlchemy, JSON and Optuna stumble, each in
    # its own way.
    except Exception:
        return False
    return True


def _put_aside(file: Path) -> Path:
    """Renames a database; its journal must not be taken for that of the next one."""
    to = aside(file)
    os.rename(file, to)
    for suffix in ("-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(f"{file}{suffix}", f"{to}{suffix}")
    return to


def _storage(file: Path) -> optuna.storages.RDBStorage:
    import optuna

    # timeout: another process may be looking at the study.
    return optuna.storages.RDBStorage(
        f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 30}}
    )


def _open_study(file: Path, *, name: str) -> optuna.Study:
    """The study in a database, made if absent."""
    import optuna

    return optuna.create_study(
        storage=_storage(file), study_name=name, direction="maximize", load_if_exists=True
    )
