"""Points of a search space: how Optuna draws one, and a set that covers the space evenly."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from cpfean import commands
from cpfean.config import Plain
from cpfean.errors import ConfigError
from orchestration.proposals.search_space import Choice, Range, SearchSpace

if TYPE_CHECKING:
    import optuna


def quiet_optuna() -> ModuleType:
    """Optuna, which says nothing of every trial, nor that options of many years are experimental.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def draw(trial: optuna.trial.BaseTrial, space: SearchSpace) -> dict[str, Plain]:
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
        optuna = quiet_optuna()
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
