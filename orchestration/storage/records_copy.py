"""A copy of a study's records on the storage, which outlives the machine of the driver.

    <storage>/studies/<name>/    the small files of <output>/<name>, under the same names

The folder on the driver's machine is the truth. One background thread copies what has changed in
it, a file at a time and each as a whole, so that the copy is some seconds behind; a storage that is
away neither stalls nor stops the training. Checkpoints are on the storage anyway, and the search's
database is rebuilt from the records.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from cpfean.errors import ConfigError, message_of
from cpfean.files import is_there, read_file
from cpfean.json_files import LARGEST, RecordError
from cpfean.writing import write_text
from orchestration.settings import ServiceError, Settings
from orchestration.storage.object_store import Storage
from orchestration.study.budget import SPENT
from orchestration.study.records import RunFolder

_IDENTITY = "sweep.json"
_FILES = (SPENT, "summary.json", "best_config.toml")
_ANSWER_SECONDS = 10.0  # that a study waits at its start for a storage to answer
_LOOK_SECONDS = 2.0  # between two looks at what has changed
_RETRY_SECONDS = 15.0
_AWAY_SECONDS = 5.0  # the end of a study waits no longer for a storage that has not answered


class Mirror:
    """Keeps the copy of a study's records up to date, in the background.

    Args:
        folder: of the study; it need not be there yet.
        storage: URL or folder, as in the settings.
        say: shows the user a line.
        resume: the command that goes on with the study.
    """

    def __init__(
        self, folder: RunFolder, storage: str, *, say: Callable[[str], None], resume: str = ""
    ) -> None:
        self._folder = folder
        self._resume = resume
        self._copy = _Copy(storage, folder.name, patience=0.0)
        self._say = say
        self._agrees = False
        self._refusal: ConfigError | None = None
        self._copied: dict[str, tuple[int, int, int]] = {}
        self._closing = threading.Event()
        self._away = False
        self._warned = False
        self._complete = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def check(self) -> None:
        """Looks whether the copy, if there is one, is of this study and no further than it.

        A storage that does not answer for some seconds is asked again later; the copying does not
        begin before that.

        Raises:
            ConfigError: it is another study's, or it is further.
        """
        asking = threading.Thread(target=self._ask, name="mirror-check", daemon=True)
        asking.start()
        asking.join(_ANSWER_SECONDS)
        if self._refusal is not None:
            raise self._refusal

    def start(self) -> None:
        """Starts the copying."""
        self._thread.start()

    def close(self, *, seconds: float = 60.0) -> None:
        """Waits until all is copied, but no longer than this; not for a storage that is away."""
        self._closing.set()
        self._thread.join(min(seconds, _AWAY_SECONDS) if self._away else seconds)
        if not self._complete and self._refusal is None:
            self._say(
                f"{self._copy.uri} has not got all records; they are in {self._folder.path}, and "
                f"the rest is copied by\n  {self._resume}"
            )

    def _ask(self) -> None:
        try:
            self._compare()
        except ConfigError as error:
            self._refusal = error
        # The copying asks again, and tells.
        except Exception:
            return

    def _compare(self) -> None:
        here, uri = self._folder, self._copy.uri
        with tempfile.TemporaryDirectory(prefix="cpfean-") as temporary:
            there = RunFolder(Path(temporary) / here.name)
            if self._copy.get(_IDENTITY, there.identity_file):
                if not is_there(here.identity_file):
                    raise ConfigError(
                        f"{uri} holds a run already; continue it with\n  {self._resume}\nor choose "
                        "another --name."
                    )
                try:
                    if there.id != here.id:
                        raise ConfigError(
                            f"{uri} is another run than {here.path} (id {there.id}, and {here.id} "
                            "here): choose another --name, or move one of the two away."
                        )
                    self._copy.fetch(there.path)
                    epochs = _epochs(there)
                except RecordError as error:
                    if not error.file.is_relative_to(there.path):
                        raise
                    file = f"{uri}/{error.file.relative_to(there.path)}"
                    raise ConfigError(
                        f"{file}: {error.wrong}: damaged, or written by another release. Move "
                        f"{uri} away, and it is made anew from {here.path}."
                    ) from None
                if epochs > _epochs(here):
                    raise ConfigError(
                        f"{uri} is further than {here.path}: {epochs} epoch(s), and "
                        f"{_epochs(here)} here. Move the folder away to go on from the copy, or "
                        "the copy to go on from the folder; then --resume again."
                    )
        self._agrees = True

    def _work(self) -> None:
        while True:
            last = self._closing.is_set()
            try:
                if not self._agrees:
                    self._compare()
                self._copy_changes()
                self._away = False
            except ConfigError as error:
                self._refusal = error
                self._say(f"the records are not copied: {error}")
                return
            # Whatever a storage or the network raises must not end the training.
            except Exception as error:
                self._tell_away(error)
            if last:
                self._complete = not self._away
                return
            self._closing.wait(_RETRY_SECONDS if self._away else _LOOK_SECONDS)

    def _copy_changes(self) -> None:
        folder = self._folder.path
        # The identity first: with it the name is taken.
        names = (_IDENTITY, *_FILES, *_records(folder))
        for name in names:
            try:
                stat = (folder / name).stat()
            except FileNotFoundError:
                continue
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if self._copied.get(name) != seen:
                self._copy.put(folder / name, name)
                self._copied[name] = seen

    def _tell_away(self, error: Exception) -> None:
        self._away = True
        if not self._warned:
            self._warned = True
            self._say(
                f"the records are not copied to {self._copy.uri} ({message_of(error)}); training "
                "goes on, and they are when it answers."
            )


def fetch_records(name: str, settings: Settings, *, say: Callable[[str], None]) -> None:
    """Brings a study's folder back from its copy, if it is not here and there is a copy.

    Raises:
        ServiceError: the storage does not answer, or the folder cannot be written.
    """
    folder = RunFolder(settings.output / name)
    if settings.storage is None or is_there(folder.identity_file):
        return
    copy = _Copy(settings.storage, name)
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


class _Copy:
    """The copy of one study, in a folder or in an object store.

    Args:
        patience: as in `Storage`.
    """

    def __init__(self, storage: str, name: str, *, patience: float | None = None) -> None:
        self.uri = f"{storage.rstrip('/')}/studies/{name}"
        path = self.uri.removeprefix("file://")
        self._path = Path(path)
        self._store = self._trials = None
        if "://" in path:
            self._store = Storage(self.uri, patience=patience)
            self._trials = Storage(f"{self.uri}/trials", patience=patience)

    def put(self, file: Path, name: str) -> None:
        if self._store is not None:
            self._store.put(file, name)
            return
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
        if self._trials is None:
            names = _records(self._path)
        else:
            names = [f"trials/{number}/record.json" for number in self._trials.folders()]
        for name in (*_FILES, *names):
            if not is_there(folder / name):
                self.get(name, folder / name)


def _records(folder: Path) -> list[str]:
    """The names of its records."""
    return sorted(str(file.relative_to(folder)) for file in folder.glob("trials/*/record.json"))


def _epochs(folder: RunFolder) -> int:
    return sum(record.epochs for record in folder.records())
