"""What a study takes while it runs, beside what it may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestration.study.budget import Budget, Meter


class Spending:
    """Counts hours and dollars, and says once when a limit is reached.

    Args:
        meter: of the study, over all its attempts.
        nodes: types of the nodes that are held now.
        say: shows the user a line.

    Attributes:
        used_up: the limit that kept trials from being begun; empty as long as none did.
    """

    def __init__(
        self,
        budget: Budget,
        meter: Meter,
        *,
        nodes: Callable[[], Sequence[str]],
        say: Callable[[str], None],
    ) -> None:
        self.meter = meter
        self.used_up = ""
        self._budget = budget
        self._nodes = nodes
        self._say = say
        self._unpriced: set[str] = set()

    @property
    def spent(self) -> str:
        """Hours, and dollars where prices are known, up to now; for people."""
        self.meter.look()
        return self.meter.spent

    def check_prices(self) -> None:
        """Raises ConfigError for a limit in dollars, and a node without a price."""
        self._budget.check_prices(self._nodes())

    def count(self, *, only_if_due: bool = False) -> None:
        """Counts up to now by the nodes that there are now, and writes it down."""
        if only_if_due and not self.meter.is_due:
            return
        prices = self._budget.prices
        if prices is None:
            self.meter.look()
        else:
            types = self._nodes()
            unknown = set(prices.unknown(types))
            # A limit in dollars was refused at the start if a node had no price; one that joins
            # later is told of, and so is any that is missing in the dollars that are shown.
            matters = self._budget.max_cost is not None or unknown < set(types)
            if matters and unknown - self._unpriced:
                names = ", ".join(sorted(unknown))
                self._say(f"{prices.file} has no price of {names}: not counted.")
                self._unpriced |= unknown
            self.meter.look(None if unknown >= set(types) else prices.hourly(types))
        self.meter.save()

    def allows_another(self, *, left: int, running: int) -> bool:
        """Whether one more trial may be begun.

        Args:
            left: trials that are not begun, for the line that is said once.
            running: trials that are underway.
        """
        self.meter.look()
        reached = self._budget.used_up(hours=self.meter.hours, dollars=self.meter.dollars or 0.0)
        if reached and not self.used_up:
            self.used_up = reached
            self._say(f"{reached}: {left} trial(s) are not begun, {running} running go on.")
        return not reached
