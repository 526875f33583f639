"""The folder of one run on disk: what was asked for, and the record of every trial.

    <output>/<name>/sweep.json              what was asked for; a resume has to ask for the same
    <output>/<name>/trials/003/record.json  one trial: configuration, state, every epoch's numbers

The driver alone writes them, each as a whole: to a temporary name, then renamed. A folder belongs
to whoever wrote its sweep.json first. It may be moved and renamed, and so may data and text
encoder: what they hold tells which they are.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from cpfean.errors import ConfigError
from cpfean.files import is_there
from cpfean.json_files import RecordError, of_type, read_fields, read_table, shown
from cpfean.records.trial_record import TUNING, TrialRecord, check_record, relocated
from cpfean.writing import as_json, cannot_write, write_first, write_json

_NEWER = ("reused", "drift")  # fields of records that not every release has written
_WITHOUT = {
    "identity": "Without it nothing tells what the run was. Where CPFEAN_STORAGE has a copy, "
    "--resume fetches it once this one is put aside; else start anew under another --name: the "
    "records and checkpoints beside it stay.",
    "record": "--resume uses all other records; this one's trial is then run again, from its "
    "newest checkpoint where that is of the same configuration.",
    "summary": "--resume uses all records and writes the summary anew.",
}
_ABSENT = object()
# What a run has beside what was asked for.
_OWN: dict[str, Any] = {
    "id": str,
    "name": str,
    "commit": str | None,
    "versions": dict[str, str],
}
# What tells whether something is the same -> where it was.
_PLACES = {
    "data_fingerprint": "config.data.path",
    "encoder_fingerprint": "config.model.text.encoder",
}


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
        resume: str = "",
    ) -> None:
        """Writes what was asked for, an id of its own, and name, commit and versions at the start.

        Of several processes that do so at the same time, on any hosts, one alone succeeds.

        Args:
            resume: the command that goes on with a run of this name.

        Raises:
            ConfigError: the folder holds a run already.
            ServiceError: it cannot be written.
        """
        own = {
            "id": uuid.uuid4().hex[:12],
            "name": self.name,
            "commit": commit,
            "versions": dict(versions or {}),
        }
        if any(self.path.glob("trials/*/record.json")) and not is_there(self.identity_file):
            raise ConfigError(
                f"{self.path} holds the records of a run whose {self.identity_file.name} is gone: "
                "put that back to resume it, or choose another --name."
            )
        _check_is_ours(self)
        try:
            (self.path / "trials").mkdir(parents=True, exist_ok=True)
            write_first(self.identity_file, as_json(own | identity))
        except FileExistsError as error:
            if not is_there(self.identity_file):  # but a file is where a folder should be
                raise cannot_write(self.path, error) from None
            goes_on = (
                f"; continue it with\n  {resume}\n" if resume else "; continue it with --resume, "
            )
            raise ConfigError(
                f"{self.path} holds a run already{goes_on}or choose another --name."
            ) from None
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def check_same(self, identity: dict[str, Any]) -> None:
        """Compares what is asked for with what the folder was made for.

        Where data and text encoder are says nothing if they are known to hold the same.

        Raises:
            ConfigError: no run there, or another one; every difference is named.
            RecordError: what it was made for cannot be read.
        """
        known = self.identity()
        if known is None:
            raise ConfigError(f"nothing to resume: {self.identity_file} does not exist.")
        # Through JSON, so that tuples and lists compare equal.
        before = _flat({name: value for name, value in known.items() if name not in _OWN})
        now = _flat(json.loads(json.dumps(identity)))
        for what, place in _PLACES.items():
            if now.get(what) and before.get(what) == now[what]:
                before[place] = now.get(place)
        if "encoder_fingerprint" in now:  # which not every release has noted
            before.setdefault("encoder_fingerprint", now["encoder_fingerprint"])
        differences = [
            f"  {path}: {_shown(before, path)} then, {_shown(now, path)} now"
            for path in sorted({*before, *now})
            if before.get(path, _ABSENT) != now.get(path, _ABSENT)
        ]
        if differences:
            raise ConfigError(
                f"{self.name} cannot be resumed as something else; it differs in\n"
                + "\n".join(differences)
                + f"\nAsk for the same as before, which is in {self.identity_file}, or start anew "
                "under another --name."
            )

    def identity(self) -> dict[str, Any] | None:
        """What the folder was made for, and what is the run's own; None if there is no run.

        Raises:
            RecordError: it cannot be read.
        """
        file = self.identity_file
        known = read_table(file, without=_WITHOUT["identity"])
        if known is None:
            return None
        try:
            for name, hint in _OWN.items():
                if name == "id" or name in known:
                    of_type(known.get(name), hint, path=name)
            of_type(known.get("kind", ""), str, path="kind")
            # Both name folders.
            if not known["id"].isalnum():
                raise ConfigError(f"id must be letters and digits; got {shown(known['id'])}")
            name = known.get("name", self.name)
            if not name or PurePath(name).name != name or not name.isprintable():
                raise ConfigError(f"name must be that of a folder; got {shown(name)}")
        except ConfigError as error:
            raise RecordError(file, str(error), without=_WITHOUT["identity"]) from None
        return known

    def check(self) -> None:
        """Reads all that a resume needs, before anything is started.

        Raises:
            RecordError: a file that is damaged or of another release.
        """
        self.identity()
        self.records()
        self._summary()

    @property
    def is_complete(self) -> bool:
        """Whether it has come to its end, and not only to that of its budget."""
        told = self._summary()
        if told is None or told.get("used_up"):
            return False
        # Since then trials that failed may have been asked for once more.
        return all(record.settled for record in self.records())

    @property
    def id(self) -> str:
        return self._own("id", "")

    @property
    def first_name(self) -> str:
        """The name that it was started under: checkpoints and the search are filed under it."""
        return self._own("name", self.name)

    @property
    def commit(self) -> str | None:
        """The commit that was checked out when the run was started."""
        return self._own("commit", None)

    @property
    def versions(self) -> dict[str, str]:
        """What the run was started with; empty if that is not known."""
        return self._own("versions", {})

    def records(self) -> list[TrialRecord]:
        """All trials, by number; one that was cut off before its first write is not there.

        Raises:
            RecordError: one that is damaged or of another release.
        """
        # A pattern that ended in the file's name would pass over a link that leads nowhere.
        files = [trial / "record.json" for trial in sorted(self.path.glob("trials/*"))]
        return [record for file in files if (record := self._record(file)) is not None]

    def _record(self, file: Path) -> TrialRecord | None:
        without = _WITHOUT["record"]
        given = read_fields(file, TrialRecord, without=without, optional=_NEWER)
        if given is None:
            return None
        record = TrialRecord(**given)
        try:
            check_record(record, folder=file.parent.name)
        except ConfigError as error:
            raise RecordError(file, str(error), without=without) from None
        if not record.reused:
            record.checkpoint = relocated(record.checkpoint, self.path)
        return record

    def _summary(self) -> dict[str, Any] | None:
        file, without = self.path / "summary.json", _WITHOUT["summary"]
        told = read_table(file, without=without)
        if told is not None and not isinstance(told.get("used_up", ""), str):
            wrong = f"used_up must be a text; got {shown(told['used_up'])}"
            raise RecordError(file, wrong, without=without)
        return told

    def _own(self, name: str, otherwise: Any) -> Any:
        known = self.identity() or {}
        return known.get(name, otherwise)

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
            # What a stranger's file of that name holds is left in it.
            opened = (self.path / "lock").open("a", encoding="utf-8")
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


def _check_is_ours(run: RunFolder) -> None:
    """Refuses a folder that holds anything else: files of the same names would be replaced.

    Raises:
        ConfigError: what is in it.
    """
    if not run.path.is_dir() or is_there(run.identity_file):
        return
    # A process that was killed at its start leaves no more than these.
    # Or another one has made it its own meanwhile, which `create` finds.
    ours = {"trials", "lock", run.identity_file.name}
    others = sorted(set(os.listdir(run.path)) - ours)
    strange = [name for name in others if not name.startswith(f".{run.identity_file.name}.")]
    if strange:
        raise ConfigError(
            f"{run.path} is no run, and holds {', '.join(strange[:3])}, which might be "
            "replaced; choose another --name."
        )


def all_runs(output: Path) -> list[RunFolder]:
    """The runs of an output folder, by name, those included that cannot be read."""
    runs = [RunFolder(path) for path in sorted(output.glob("*"))]
    return [run for run in runs if is_there(run.identity_file)]


def newest_unfinished(
    output: Path,
    *kinds: str,
    with_failed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> RunFolder:
    """The run of one of these kinds that was started last and has not been completed.

    Args:
        with_failed: a run of which a trial failed counts as not completed.
        say: shows the user a line: of a run that cannot be read, which is passed over.

    Raises:
        ConfigError: there is none.
    """
    candidates, unreadable = [], []
    for run in all_runs(output):
        # Tuning is half of a comparison: it is done with when that is.
        whole = RunFolder(run.path.with_name(run.name.removesuffix(TUNING)))
        try:
            identity = run.identity()
            if identity is None or identity.get("kind") not in kinds:
                continue
            is_open = not whole.is_complete or (
                with_failed and any(r.state == "failed" for r in run.records())
            )
            if is_open:
                candidates.append((run.identity_file.stat().st_mtime, run.path))
        except RecordError as error:
            unreadable.append(error.line)
    if not candidates:
        told = "".join(f"\n  {line}" for line in unreadable)
        passed = f" These cannot be read:{told}" if unreadable else ""
        raise ConfigError(f"nothing to resume: no unfinished {kinds[0]} in {output}.{passed}")
    for line in unreadable:
        say(f"passed over: {line}")
    return RunFolder(max(candidates)[1])


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _shown(flat: dict[str, Any], path: str) -> str:
    return shown(flat[path]) if path in flat else "nothing"
