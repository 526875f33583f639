"""What a study is to run, and what follows from that alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpfean import commands
from cpfean.config import ExperimentConfig, Plain
from cpfean.errors import ServiceError
from cpfean.fingerprints import encoder_fingerprint
from cpfean.records.budget import SPENT, Budget, Disk, Meter, free_bytes, size
from cpfean.records.results import Results
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TUNING, TrialRecord
from cpfean.storage.checkpoints import KEPT
from orchestration.proposals.search_space import SearchSpace
from orchestration.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What differs between studies of several kinds.

    Attributes:
        script: the command that starts one, and goes on with it.
        tested: which trials the test split is shown to; those that are only chosen among never are.
        fewer: what to lower if its checkpoints do not fit on the disk.
        has_parent: the tracker has a run of the whole, whose children the trials are.
        has_pictures: what the best model sees is drawn at the end.
    """

    script: str
    tested: Literal["best", "all", "none"]
    fewer: str
    has_parent: bool = True
    has_pictures: bool = False


KINDS: Mapping[str, Kind] = {
    "sweep": Kind(script="sweep.py", tested="best", fewer="--trials", has_pictures=True),
    "ablations": Kind(script="run_ablations.py", tested="all", fewer="--seeds or --only"),
    "train": Kind(
        script="train.py",
        tested="best",
        fewer="the size of the model (--set model.dim=...)",
        has_parent=False,
    ),
    "tuning": Kind(script="compare.py", tested="none", fewer="--tuning or --methods"),
    "comparison": Kind(script="compare.py", tested="all", fewer="--seeds or --methods"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialPlan:
    """One trial that is asked for by name: what it changes, and the whole configuration."""

    name: str
    overrides: Mapping[str, Plain]
    config: ExperimentConfig

    def record(self, number: int) -> TrialRecord:
        """Of the trial before it runs."""
        own, config = dict(self.overrides), self.config.to_dict()
        return TrialRecord(number=number, name=self.name, overrides=own, config=config)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """What to run; where it runs and where it is recorded is in the settings.

    Attributes:
        kind: one of `KINDS`.
        base: configuration that the trials vary.
        trials: how many, if a space is searched.
        workers: data-parallel processes of each trial.
        min_workers: with which a trial may go on when hosts are lost; 0: no fewer than `workers`.
        space: searched by Optuna; None runs `fixed`.
        fixed: trials to run as they are.
        grace: epochs before a trial may be stopped for being behind; 0 stops none.
        results: folder of what runs came to; a trial that it knows is not trained again.
        report: called at the end with what came out; writes files, which the tracker gets too.
        tags: of the tracker's runs, beside its own.
        register: the name that the tracker registers the best model by; empty: by none.
        data_folder: the data, checked, on this node.
        data_fingerprint: of the data.
        budget: what it may take; a resume may ask for another one.
        allow_drift: go on where versions are not those of the start, or differ between nodes.
        retry_failed: a resume runs trials that failed once more.
        typed: the words of the command that asked for it, for the lines that go on with it.
    """

    kind: str
    name: str
    base: ExperimentConfig
    workers: int
    data_folder: Path
    data_fingerprint: str
    trials: int
    min_workers: int = 0
    space: SearchSpace | None = None
    fixed: tuple[TrialPlan, ...] = ()
    grace: int = 0
    results: Path | None = None
    report: Callable[[Sequence[TrialRecord]], Sequence[Path]] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    register: str = ""
    budget: Budget = field(default_factory=Budget)
    allow_drift: bool = False
    retry_failed: bool = False
    typed: tuple[str, ...] = ()

    @property
    def of_kind(self) -> Kind:
        """What its kind says."""
        return KINDS[self.kind]

    @property
    def tests_all(self) -> bool:
        """Whether each trial is tested at its end."""
        return self.of_kind.tested == "all"

    def known_results(self, folder: RunFolder) -> Results | None:
        """The folder of results, if the plan has one."""
        if self.results is None:
            return None
        return Results(self.results, data_fingerprint=self.data_fingerprint, commit=folder.commit)

    def identity(self) -> dict[str, Any]:
        """What a resume has to ask for again."""
        return {
            "kind": self.kind,
            "metric": "val/rsum, maximized",
            "trials": self.trials,
            "workers": self.workers,
            "grace": self.grace,
            "data_fingerprint": self.data_fingerprint,
            "encoder_fingerprint": encoder_fingerprint(self.base),
            "space": self.space.to_dict() if self.space else {},
            "fixed": {plan.name: dict(plan.overrides) for plan in self.fixed},
            "config": self.base.to_dict(),
        }


def known_records(
    plan: StudyPlan, results: Results | None, *, begun: Collection[int]
) -> list[TrialRecord]:
    """Finished records of the trials, but for those that were begun, whose runs are known."""
    if results is None:
        return []
    new = [trial.record(n) for n, trial in enumerate(plan.fixed) if n not in begun]
    return [record for record in new if results.fill(record, tested=plan.tests_all)]


def num_open(plan: StudyPlan, settings: Settings) -> int:
    """Trials of a plan that would have to be trained now."""
    folder = folder_of(plan, settings)
    records = folder.records()
    settled = sum(r.settled and not (plan.retry_failed and r.state == "failed") for r in records)
    known = known_records(plan, plan.known_results(folder), begun={r.number for r in records})
    return max(0, plan.trials - settled - len(known))


def folder_of(plan: StudyPlan, settings: Settings) -> RunFolder:
    """Where the records of a study are or will be."""
    return RunFolder(settings.output / plan.name)


def storage_of(plan: StudyPlan, settings: Settings) -> Path | None:
    """The folder that checkpoints go to; None if it is a store, which has no end."""
    if settings.storage is None:
        return settings.output / plan.name
    storage = settings.storage.removeprefix("file://")
    return None if "://" in storage else Path(storage)


def checkpoint_root(folder: RunFolder, settings: Settings) -> str:
    """Folder or URL that has a folder for the checkpoints of each trial."""
    if settings.storage is None:
        return str(folder.path / "train")
    return f"{settings.storage.rstrip('/')}/{folder.id}"


def disk_of(plan: StudyPlan, settings: Settings, *, at_a_time: int) -> Disk:
    """The room that the checkpoints of a plan need."""
    from cpfean.training.timing import checkpoint_bytes

    each = checkpoint_bytes(plan.base, data_folder=plan.data_folder)
    return Disk(each=each, trials=num_open(plan, settings), kept=KEPT, at_a_time=at_a_time)


def check_room_for_checkpoints(
    plan: StudyPlan,
    settings: Settings,
    *,
    needs: Callable[..., Disk] = disk_of,
    free: Callable[[Path], int] = free_bytes,
) -> None:
    """Refuses a plan whose checkpoints do not fit where they go, if that is a folder.

    Raises:
        ServiceError: with the numbers, and the flags that lower them.
    """
    folder = storage_of(plan, settings)
    if folder is None or num_open(plan, settings) == 0:
        return
    # How many run at a time is known when Ray has started; it is one at least.
    disk, there = needs(plan, settings, at_a_time=1), free(folder)
    if there < disk.needed:
        raise ServiceError(
            f"{folder} has {size(there)} free, and the plan needs {disk}. Lower "
            f"{plan.of_kind.fewer}, or set CPFEAN_STORAGE (or --output) to where there is more."
        )


def meter_of(plan: StudyPlan, folder: RunFolder, **given: Any) -> Meter:
    """A `Meter`, with the arguments given, of a study; a comparison's tuning is part of it."""
    tuning = folder.path.with_name(folder.name + TUNING) / SPENT
    before = [tuning] if plan.kind == "comparison" else []
    return Meter(folder.path / SPENT, plan.budget, before=before, **given)


def resume_line(
    plan: StudyPlan, *, retry_failed: bool = False, changed: Mapping[str, str] | None = None
) -> str:
    """What to type to go on: the whole command, for a line of its own.

    Args:
        changed: flags with other values than before.
    """
    script = plan.of_kind.script
    run = plan.name.removesuffix(TUNING) if plan.kind == "tuning" else plan.name
    return commands.resume(script, plan.typed, run=run, retry_failed=retry_failed, changed=changed)


def with_more(plan: StudyPlan, meter: Meter) -> str:
    """What to type to go on with as much again as a study has had, at least."""
    limits = {
        "--max-hours": (plan.budget.max_hours, meter.hours),
        "--max-cost": (plan.budget.max_cost, meter.dollars or 0.0),
    }
    changed = {
        flag: f"{limit + max(limit, taken):.3g}"
        for flag, (limit, taken) in limits.items()
        if limit is not None and taken >= limit
    }
    return resume_line(plan, changed=changed)
