"""A search space as plain data: which settings vary, over what, and when each of them matters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cpfean.config import ExperimentConfig, Plain, field_types
from cpfean.errors import ConfigError


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
        for path in self.parameters:  # also where no corner has it
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
            path: list(values.values) if isinstance(values, Choice) else asdict(values)
            for path, values in self.parameters.items()
        }
