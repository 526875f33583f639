"""A copy of a study's records on the storage, which outlives the machine of the driver.

    <storage>/studies/<name>/    the small files of <output>/<name>, under the same names

The folder on the driver's machine is the truth. What has changed in it is copied, a file at a time
and each as a whole, so that the copy is some seconds behind. Checkpoints are on the storage anyway,
and the search's database is rebuilt from the records.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cpfean.errors import ConfigError, ServiceError, message_of
from cpfean.files import is_there, read_file
from cpfean.json_files import LARGEST, RecordError
from cpfean.records.budget import SPENT
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from cpfean.storage.object_store import Storage
from cpfean.writing import write_text
from orchestration.settings import Settings
from orchestration.study.follower import GivenUpError, StudyNews
from orchestration.study.plan import StudyPlan, folder_of, resume_line

_IDENTITY = "sweep.json"
_FILES = (SPENT, "summary.json", "best_config.toml")


@dataclass(eq=False)
class RecordsCopy:
    """Brings the copy of a study's records up to date; a `Sink`.

    Attributes:
        folder: of the study; it need not be there yet.
        copy: where it goes.
        resume: the command that goes on with the study.
        answer_seconds: that `check` waits for the storage to answer.
        look_seconds: between two looks at what has changed without news.
    """

    name = "records-copy"
    names_resume = True

    folder: RunFolder
    copy: CopyFolder
    resume: str = ""
    answer_seconds: float = 10.0
    look_seconds: float = 2.0

    def __post_init__(self) -> None:
        self.beat_due = 0.0
        self._agrees = False
        self._copied: dict[str, tuple[int, int, int]] = {}

    def check(self) -> None:
        """Looks whether the copy, if there is one, is of this study and no further than it.

        A storage that does not answer for some seconds is asked again later; the copying does not
        begin before that.

        Raises:
            ConfigError: it is another study's, or it is further.
        """
        refusals: list[ConfigError] = []

        def ask() -> None:
            with suppress(Exception):  # the copying asks again, and tells
                try:
                    self._compare()
                except ConfigError as error:
                    refusals.append(error)

        asking = threading.Thread(target=ask, name="records-copy-check", daemon=True)
        asking.start()
        asking.join(self.answer_seconds)
        if refusals:
            raise refusals[0]

    def load(self) -> None: ...

    def open(self) -> None:
        try:
            if not self._agrees:
                self._compare()
        except ConfigError as error:
            raise GivenUpError(f"the records are not copied: {error}") from None

    def send_study(self, news: StudyNews) -> None:
        self._copy_changes()

    def send_trial(self, record: TrialRecord) -> None:
        self._copy_changes()

    def send_files(self, paths: Sequence[Path], record: TrialRecord | None) -> None:
        """They stay where they are."""

    def beat(self) -> bool:
        self.beat_due = time.monotonic() + self.look_seconds
        return next(self._changed(), None) is not None

    def away(self, error: Exception) -> str:
        return (
            f"the records are not copied to {self.copy.uri} ({message_of(error)}); training goes "
            "on, and they are when it answers."
        )

    def lacks(
        self, records: Sequence[TrialRecord], files: Mapping[int | None, Sequence[Path]]
    ) -> str:
        return (
            f"{self.copy.uri} has not got all records; they are in {self.folder.path}, and the "
            f"rest is copied by\n  {self.resume}"
        )

    def _copy_changes(self) -> None:
        for name, seen in self._changed():
            self.copy.put(self.folder.path / name, name)
            self._copied[name] = seen

    def _changed(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """The names of files that are not copied as they are now, and by what that is seen."""
        folder = self.folder.path
        # The identity first: with it the name is taken.
        for name in (_IDENTITY, *_FILES, *_records(folder)):
            try:
                stat = (folder / name).stat()
            except FileNotFoundError:
                continue
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if self._copied.get(name) != seen:
                yield name, seen

    def _compare(self) -> None:
        here, uri = self.folder, self.copy.uri
        with tempfile.TemporaryDirectory(prefix="cpfean-") as temporary:
            there = RunFolder(Path(temporary) / here.name)
            try:
                if self.copy.get(_IDENTITY, there.identity_file):
                    self._compare_with(there)
            except RecordError as error:
                if not error.file.is_relative_to(there.path):
                    raise
                file = f"{uri}/{error.file.relative_to(there.path)}"
                raise ConfigError(
                    f"{file}: {error.wrong}: damaged, or written by another release. Move {uri} "
                    f"away, and it is made anew from {here.path}."
                ) from None
        self._agrees = True

    def _compare_with(self, there: RunFolder) -> None:
        here, uri = self.folder, self.copy.uri
        if not is_there(here.identity_file):
            raise ConfigError(
                f"{uri} holds a run already; continue it with\n  {self.resume}\nor choose another "
                "--name."
            )
        if there.id != here.id:
            raise ConfigError(
                f"{uri} is another run than {here.path} (id {there.id}, and {here.id} here): "
                "choose another --name, or move one of the two away."
            )
        self.copy.fetch(there.path)
        if _epochs(there) > _epochs(here):
            raise ConfigError(
                f"{uri} is further than {here.path}: {_epochs(there)} epoch(s), and "
                f"{_epochs(here)} here. Move the folder away to go on from the copy, or the copy "
                "to go on from the folder; then --resume again."
            )


def checked_copy(plan: StudyPlan, settings: Settings) -> RecordsCopy | None:
    """The copy of a study's records, if they are to be copied; raises as `RecordsCopy.check`."""
    if settings.storage is None:
        return None
    place = CopyFolder(settings.storage, plan.name, patience=0.0)
    copy = RecordsCopy(folder_of(plan, settings), place, resume=resume_line(plan))
    copy.check()
    return copy


def fetch_records(name: str, settings: Settings, *, say: Callable[[str], None]) -> None:
    """Brings a study's folder back from its copy, if it is not here and there is a copy.

    Raises:
        ServiceError: the storage does not answer, or the folder cannot be written.
    """
    folder = RunFolder(settings.output / name)
    if settings.storage is None or is_there(folder.identity_file):
        return
    copy = CopyFolder(settings.storage, name)
    try:
        with tempfile.TemporaryDirectory(prefix="cpfean-") as temporary:
            identity = Path(temporary) / _IDENTITY
            if not copy.get(_IDENTITY, identity):
                return
            folder.path.mkdir(parents=True, exist_ok=True)
            copy.fetch(folder.path)
            # Last: without it there is no run, and the next resume fetches again.
            write_text(folder.identity_file, identity.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServiceError(f"{copy.uri}: cannot be copied to {folder.path}: {error}.") from None
    say(
        f"{folder.path} is not here: fetched from {copy.uri}, with {len(folder.records())} "
        f"trial(s) and {_epochs(folder)} epoch(s)."
    )


class CopyFolder:
    """The copy of one study, in a folder or in an object store; `patience` as in `Storage`."""

    def __init__(self, storage: str, name: str, *, patience: float | None = None) -> None:
        self.uri = f"{storage.rstrip('/')}/studies/{name}"
        path = self.uri.removeprefix("file://")
        self._path = Path(path)
        self._patience = patience
        self._store = Storage(self.uri, patience=patience) if "://" in path else None

    def put(self, file: Path, name: str) -> None:
        if self._store is not None:
            self._store.put(file, name)
        else:
            target = self._path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, file.read_text(encoding="utf-8"))

    def get(self, name: str, file: Path) -> bool:
        """Fetches a file as a whole; False if it is not there."""
        partial = file.with_name(f".{file.name}.partial")
        try:
            if self._store is not None:
                self._store.get(name, partial)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(read_file(self._path / name, limit=LARGEST))
        except FileNotFoundError:
            return False
        partial.replace(file)
        return True

    def fetch(self, folder: Path) -> None:
        """Fetches all that there is but the identity; what is there already is as new."""
        if self._store is None:
            names = _records(self._path)
        else:
            trials = Storage(f"{self.uri}/trials", patience=self._patience)
            names = [f"trials/{number}/record.json" for number in trials.folders()]
        for name in (*_FILES, *names):
            if not is_there(folder / name):
                self.get(name, folder / name)


def _records(folder: Path) -> list[str]:
    """The names of its records."""
    return sorted(str(file.relative_to(folder)) for file in folder.glob("trials/*/record.json"))


def _epochs(folder: RunFolder) -> int:
    return sum(record.epochs for record in folder.records())
