"""What is known of a trial: the truth that resuming and tracking start from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from cpfean.config import ExperimentConfig, Plain
from cpfean.errors import ConfigError
from cpfean.json_files import shown

State = Literal["waiting", "running", "finished", "pruned", "failed", "interrupted"]
SETTLED: tuple[State, ...] = ("finished", "pruned", "failed")
METRIC = "val/rsum"  # of an epoch: what trials are judged by, to be maximized
TUNING = "-tuning"  # ends the name of the study that tunes the methods of a comparison
_CHECKPOINTS = ("checkpoints", "train")  # the folders of a run that checkpoints are in


@dataclass(kw_only=True, slots=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: from 0, unique in the sweep; names its folder, its Train run and its tracking run.
        name: for people.
        overrides: what makes it differ from the base configuration, by dotted path.
        config: the whole configuration as plain data.
        state: "finished", "pruned" and, unless it is asked for again, "failed" are for good; the
            others are run by a resume.
        history: the metrics of every epoch, in order, those before a restart included.
        seconds: spent on it, over all attempts.
        checkpoint: folder or URL of the newest checkpoint.
        complete: the training has come to its own end: all epochs, or its patience ran out.
        failure: class of the error: preempted, infra, oom, diverged, data, config or bug.
        message: last lines of the error.
        test: metrics on the test split, of the trials that were to be tested.
        reused: the file in the folder of results that it was taken from, if it was not trained.
        drift: which versions differed while it was trained, if that was allowed.
    """

    number: int
    name: str
    overrides: dict[str, Plain] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    state: State = "waiting"
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    checkpoint: str = ""
    complete: bool = False
    failure: str = ""
    message: str = ""
    test: dict[str, float] = field(default_factory=dict)
    reused: str = ""
    drift: str = ""

    @property
    def settled(self) -> bool:
        return self.state in SETTLED

    @property
    def epochs(self) -> int:
        return len(self.history)

    @property
    def best_rsum(self) -> float:
        """Best rSum on dev so far, of those that are numbers; minus infinity before the first."""
        rsums = (row[METRIC] for row in self.history)
        return max(filter(math.isfinite, rsums), default=-math.inf)

    @property
    def newest(self) -> str:
        """What its newest epoch came to, for people."""
        row = self.history[-1]
        return (
            f"epoch {self.epochs}/{self.experiment.optim.epochs}  rSum {row[METRIC]:.1f}  "
            f"best {self.best_rsum:.1f}  loss {row['train/loss']:.4g}  "
            f"{row['train/seconds']:.0f} s"
        )

    @property
    def threads(self) -> set[int]:
        """How many threads its epochs were trained with; empty if that is not known."""
        return {int(row["train/threads"]) for row in self.history if "train/threads" in row}

    @property
    def experiment(self) -> ExperimentConfig:
        return ExperimentConfig.from_dict(self.config)


def relocated(checkpoint: str, folder: Path) -> str:
    """The place of a checkpoint of a run whose folder may have been moved since.

    A folder that was copied has checkpoints of its own, which are the ones that count.

    Args:
        checkpoint: as it was noted: a path, or the URL of a place that does not move.
        folder: of the run, where it is now.
    """
    parts = PurePath(checkpoint.removeprefix("file://")).parts
    for tail in (parts[-2:], parts[-3:]):
        if tail and tail[0] in _CHECKPOINTS and "://" not in checkpoint.removeprefix("file://"):
            here = folder.joinpath(*tail)
            return str(here) if here.is_dir() else checkpoint
    return checkpoint


def check_outcome(
    history: list[dict[str, float]], test: dict[str, float], *, seconds: float
) -> None:
    """Raises ConfigError for what a training cannot have come to."""
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"seconds must be a finite number; got {seconds}")
    for number, row in enumerate(history, start=1):
        if row.get("epoch") != number or METRIC not in row:
            raise ConfigError(f"history must tell of epoch {number} and its {METRIC} in its place")
    if test and "rsum" not in test:
        raise ConfigError("test must have rsum")


def check_record(record: TrialRecord, *, folder: str) -> None:
    """Raises ConfigError for what the types of its fields do not tell."""
    if f"{record.number:03d}" != folder:
        raise ConfigError(f"number must be that of its folder, {folder}; got {record.number}")
    # It names folders too.
    if not record.name.isprintable() or ".." in record.name or record.name[:1] in ("", "/"):
        raise ConfigError(f"name must be that of a trial; got {shown(record.name)}")
    check_outcome(record.history, record.test, seconds=record.seconds)
    try:
        ExperimentConfig.from_dict(record.config)
    except ConfigError as error:
        raise ConfigError(f"config: {error}") from None
