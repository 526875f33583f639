"""How long nothing has happened, and how long the rest of a study will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cpfean.records.budget import eta

_SILENCE_SECONDS = 60.0  # without news: say what is waited for
_LIMIT_SECONDS = 600.0  # without news on one machine: nothing is expected any more
_CLUSTER_LIMIT_SECONDS = 3600.0  # a cluster may have to start its machines
_FIRST_EPOCH_SECONDS = 4 * 3600.0  # nobody knows yet how long one takes


@dataclass(eq=False)
class Progress:
    """Takes note of news, and judges the time since the last; by a clock that never goes back."""

    clock: Callable[[], float]
    is_local: bool = True

    def __post_init__(self) -> None:
        self._start = self._last = self.clock()
        self._epochs = 0
        self._slowest = 0.0
        self._floor = _LIMIT_SECONDS if self.is_local else _CLUSTER_LIMIT_SECONDS
        self._next_notice = _SILENCE_SECONDS
        self.has_begun = False

    @property
    def silent(self) -> float:
        """Seconds since the last news."""
        return self.clock() - self._last

    @property
    def has_stalled(self) -> bool:
        """Whether nothing is expected any more."""
        if self.has_begun and not self._epochs:
            return self.silent > _FIRST_EPOCH_SECONDS
        return self.silent > max(self._floor, 10 * self._slowest)

    def is_worth_a_line(self) -> bool:
        """Whether to say what is waited for; each time it takes twice as long until the next."""
        if self.silent <= self._next_notice:
            return False
        self._next_notice *= 2
        return True

    def begun(self) -> None:
        """Workers are there; the time that the first ones took to start says nothing of trials."""
        self.news()
        if not self.has_begun:
            self.has_begun = True
            self._start = self._last

    def news(self, *, epochs: int = 0) -> None:
        """Something has happened; so many epochs were finished."""
        if epochs > 0:
            self._slowest = max(self._slowest, self.silent)
            self._epochs += epochs
        self._last = self.clock()
        self._next_notice = max(_SILENCE_SECONDS, 3 * self._slowest)

    def eta(self, epochs_left: int) -> str:
        """When so many epochs more will be done, for people."""
        if not self._epochs:
            return "ETA unknown"
        return eta((self._last - self._start) / self._epochs * epochs_left)
