"""A study's hooks, whose errors end Tune in good order; Tune would make a text of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.errors import CpfeanError
from cpfean.writing import cannot_write, is_disk_error
from orchestration.study.records import TrialRecord

if TYPE_CHECKING:
    from orchestration.runners.tuner import Hooks


class Guarded:
    """Hands on what Tune tells; after the first error of ours there are no more trials.

    Args:
        hooks: whose errors they are.
        folder: of the study, for errors that name no file.
        give_up: told of the first error; is to stop Tune.
    """

    def __init__(
        self, hooks: Hooks, *, folder: Path, give_up: Callable[[CpfeanError], None]
    ) -> None:
        self._hooks = hooks
        self._folder = folder
        self._give_up = give_up
        self._failed = False

    def next_trial(self) -> TrialRecord | None:
        return None if self._failed else self._guarded(self._hooks.next_trial)

    def started(self, number: int) -> None:
        self._guarded(self._hooks.started, number)

    def begun(self, number: int, crew: str) -> None:
        self._guarded(self._hooks.begun, number, crew)

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        self._guarded(self._hooks.reported, number, metrics)

    def ended(self, number: int, *, pruned: bool) -> None:
        self._guarded(self._hooks.ended, number, pruned=pruned)

    def failed(self, number: int, failure: str, message: str) -> None:
        self._guarded(self._hooks.failed, number, failure, message)

    def lost(self, number: int, message: str) -> None:
        self._guarded(self._hooks.lost, number, message)

    def noted(self, number: int, line: str) -> None:
        self._guarded(self._hooks.noted, number, line)

    def tick(self) -> None:
        self._guarded(self._hooks.tick)

    def _guarded(self, hook: Callable[..., Any], *words: Any, **named: Any) -> Any:
        try:
            return hook(*words, **named)
        except CpfeanError as error:
            self._fail(error)
        except Exception as error:
            if not is_disk_error(error):
                raise
            self._fail(cannot_write(self._folder, error))
        return None

    def _fail(self, error: CpfeanError) -> None:
        if not self._failed:
            self._failed = True
            self._give_up(error)
