"""What a study asks of whoever runs its trials, and what it offers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cpfean.errors import ServiceError
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from orchestration.cluster.capacity import Demand
from orchestration.runners.messages import Message
from orchestration.settings import Settings
from orchestration.study.plan import StudyPlan
from orchestration.study.stopping import Stop


class Driver(Protocol):
    """A study, as its runner sees it; called in one thread."""

    plan: StudyPlan
    settings: Settings
    folder: RunFolder
    stop: Stop

    @property
    def records(self) -> Sequence[TrialRecord]:
        """All trials so far, by number."""

    @property
    def num_open(self) -> int:
        """Trials that are not settled, those included that have not been begun."""

    def say(self, line: str) -> None:
        """Shows the user a line."""

    def checkpoints_of(self, number: int) -> str:
        """Folder or URL of a trial's checkpoints."""

    def expect(self, *, is_local: bool) -> None:
        """Takes note that trials are about to be run, on this machine or on a cluster.

        Raises:
            ConfigError: a limit in dollars, and a node without a price.
        """

    def differs(self, versions: str) -> None:
        """Takes note of versions of nodes that differ, which is allowed."""

    def next_trial(self) -> TrialRecord | None:
        """The next trial to run: one that was cut off first, then a new one; None: no more."""

    def started(self, number: int) -> None:
        """Takes note that a trial is underway."""

    def tell(self, number: int, message: Message) -> None:
        """Takes note of what is told of a trial."""

    def tick(self) -> None:
        """To be called about every second while trials run elsewhere."""


class Runner(Protocol):
    """Runs the trials of a study, one at a time or many.

    Attributes:
        meet_seconds: that a study waits for its tracker's first answer; what is wrong with it is
            told by then.
        needs_mlflow: a study without MLflow is refused.
    """

    meet_seconds: float
    needs_mlflow: bool

    def check(self, plan: StudyPlan) -> None:
        """Finds what can be wrong before anything is made.

        Raises:
            ConfigError: a limit in dollars, and a node without a price.
        """

    def wait_for_start(self) -> None:
        """Until what was started ahead of time is there; importing MLflow beside Ray can hang."""
        return

    def run(self, study: Driver) -> None:
        """Runs trials until the study has no more, or is stopped.

        Raises:
            CpfeanError: what ends the study.
            Interrupted: the study was stopped.
        """

    def node_types(self) -> Sequence[str]:
        """The type of every node that is held now, as the file of prices calls it."""

    def demand(self) -> Demand | None:
        """What a trial asks for beside what there is; None: this machine, or not known."""
        return None

    def gone(self, plan: StudyPlan) -> ServiceError | None:
        """What to say if the cluster that trials run on does not answer any more; else None."""
        return None
