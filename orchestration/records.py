"""What is known of every trial, on disk: the truth that resuming and tracking start from.

    <output>/<name>/sweep.json              what was asked for; a resume has to ask for the same
    <output>/<name>/trials/003/record.json  one trial: configuration, state, every epoch's numbers

The driver alone writes them, each as a whole: to a temporary name, then renamed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpfean.config import ExperimentConfig, Plain
from cpfean.errors import ConfigError
from orchestration.disks import cannot_write

State = Literal["waiting", "running", "finished", "pruned", "failed", "interrupted"]
SETTLED: tuple[State, ...] = ("finished", "pruned", "failed")
TUNING = "-tuning"  # ends the name of the study that tunes the methods of a comparison


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
        rsums = (row["val/rsum"] for row in self.history)
        return max(filter(math.isfinite, rsums), default=-math.inf)

    @property
    def experiment(self) -> ExperimentConfig:
        return ExperimentConfig.from_dict(self.config)


class RunFolder:
    """The folder of one run, sweep or set of ablations."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def identity_file(self) -> Path:
        return self.path / "sweep.json"

    def create(
        self,
        identity: dict[str, Any],
        *,
        commit: str | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Writes what was asked for, an id of its own, and the commit and versions at the start.

        Raises:
            ConfigError: the folder holds a run already.
        """
        if self.identity_file.exists():
            raise ConfigError(
                f"{self.path} holds a run already; continue it with --resume --name {self.name}, "
                "or choose another --name."
            )
        own = {"id": uuid.uuid4().hex[:12], "commit": commit, "versions": dict(versions or {})}
        try:
            (self.path / "trials").mkdir(parents=True, exist_ok=True)
            write_json(self.identity_file, own | identity)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def check_same(self, identity: dict[str, Any]) -> None:
        """Compares what is asked for with what the folder was made for.

        Raises:
            ConfigError: no run there, or another one; every difference is named.
        """
        known = read_json(self.identity_file)
        if known is None:
            raise ConfigError(
                f"nothing to resume: {self.identity_file} does not exist or is damaged."
            )
        # Through JSON, so that tuples and lists compare equal.
        before = _flat({name: value for name, value in known.items() if name not in _OWN})
        now = _flat(json.loads(json.dumps(identity)))
        differences = [
            f"  {path}: {_shown(before, path)} then, {_shown(now, path)} now"
            for path in sorted({*before, *now})
            if before.get(path, _ABSENT) != now.get(path, _ABSENT)
        ]
        if differences:
            raise ConfigError(
                f"{self.name} cannot be resumed as something else; it differs in\n"
                + "\n".join(differences)
                + "\nAsk for the same as before, or start anew under another --name."
            )

    @property
    def is_complete(self) -> bool:
        """Whether it has come to its end, and not only to that of its budget."""
        file = self.path / "summary.json"
        if not file.exists() or (read_json(file) or {}).get("used_up"):
            return False
        # Since then trials that failed may have been asked for once more.
        return all(record.settled for record in self.records())

    @property
    def id(self) -> str:
        return read_json(self.identity_file)["id"]

    @property
    def commit(self) -> str | None:
        """The commit that was checked out when the run was started."""
        return (read_json(self.identity_file) or {}).get("commit")

    @property
    def versions(self) -> dict[str, str]:
        """What the run was started with; empty if that is not known."""
        return (read_json(self.identity_file) or {}).get("versions", {})

    def records(self) -> list[TrialRecord]:
        """All trials, by number; one that was cut off before its first write is not there."""
        found = (read_json(file) for file in sorted(self.path.glob("trials/*/record.json")))
        return [TrialRecord(**data) for data in found if data is not None]

    def write(self, record: TrialRecord) -> None:
        folder = self.path / "trials" / f"{record.number:03d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        write_json(folder / "record.json", asdict(record))

    def reopen_failed(self) -> int:
        """Makes trials that failed wait to be run once more; returns how many."""
        failed = [record for record in self.records() if record.state == "failed"]
        for record in failed:
            record.state, record.failure, record.message = "waiting", "", ""
            self.write(record)
        return len(failed)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second driver out; the system lets go of the lock when its holder dies.

        Raises:
            ConfigError: another process works on this folder.
        """
        try:
            opened = (self.path / "lock").open("w", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another process is at work on this run.") from None
            yield

    def is_locked(self) -> bool:
        """Whether a driver is at work on this folder."""
        try:
            with self.lock():
                return False
        except ConfigError:
            return True

    @staticmethod
    def newest_unfinished(output: Path, *kinds: str, with_failed: bool = False) -> RunFolder:
        """The run of one of these kinds that was started last and has not been completed.

        Args:
            with_failed: a run of which a trial failed counts as not completed.

        Raises:
            ConfigError: there is none.
        """
        candidates = []
        for file in output.glob("*/sweep.json"):
            identity = read_json(file)
            # Tuning is half of a comparison: it is done with when that is.
            whole = RunFolder(file.parent.with_name(file.parent.name.removesuffix(TUNING)))
            is_open = not whole.is_complete or (
                with_failed and any(r.state == "failed" for r in RunFolder(file.parent).records())
            )
            if identity and identity.get("kind") in kinds and is_open:
                candidates.append((file.stat().st_mtime, file.parent))
        if not candidates:
            raise ConfigError(f"nothing to resume: no unfinished {kinds[0]} in {output}.")
        return RunFolder(max(candidates)[1])


def write_json(file: Path, data: Any) -> None:
    """Writes a file that is there whole or not at all; raises as `write_text` does."""
    write_text(file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a file that is there whole or not at all.

    Raises:
        ServiceError: the disk is full, or it cannot be written; what was there still is.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(file, error, needed=len(text.encode())) from error


def read_json(file: Path) -> Any:
    """The data, or None if the file is absent or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


_ABSENT = object()
_OWN = ("id", "commit", "versions")  # what a run has beside what was asked for


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _shown(flat: dict[str, Any], path: str) -> str:
    return json.dumps(flat[path], ensure_ascii=False) if path in flat else "nothing"
