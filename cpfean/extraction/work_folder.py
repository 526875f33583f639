"""OUT.unfinished: what an extraction has made so far, a file a batch, for whoever goes on with it.

    lock             held by the extraction that runs
    settings.json    what all batches have in common, as `ExtractionPlan.settings` has it
    batches/KEY.npz  a batch that is done; written under another name first
    folder/          the data folder, while it is put together

A file is there whole or not at all, so that a process may end at any point.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import filelock

from cpfean.errors import DataError
from cpfean.extraction.batches import Batch, Found, unpacked, unpacked_reasons
from cpfean.extraction.plan import differences
from cpfean.files import is_there, open_file
from cpfean.json_files import read_object
from cpfean.writing import as_json

_LOCK, _SETTINGS, _BATCHES = "lock", "settings.json", "batches"
_Item = TypeVar("_Item")
_NEW = ".new"  # behind the name of a file that is being written


class WorkFolder:
    """Of one extraction, held by this process: see `claimed`.

    Attributes:
        target: the data folder that is made.
        folder: beside it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f"{target.name}.unfinished")
        self._batches = self.folder / _BATCHES

    @property
    def assembled(self) -> Path:
        """Where the data folder is put together; nothing is there yet."""
        return self.folder / "folder"

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Takes the settings for those of this folder, or refuses those that are not.

        Raises:
            DataError: says what differs; or the folder cannot be written.
        """
        file = self.folder / _SETTINGS
        if is_there(file):
            found = differences(read_object(file, error=DataError), settings)
            if found:
                raise DataError(
                    f"{self.folder}: was begun with other settings:\n"
                    + "\n".join(f"  {line}" for line in found)
                    + "\nGo on with those, name another OUT, or remove the folder to begin anew."
                )
        try:
            if not is_there(file):
                _write(file, as_json(dict(settings)).encode())
            self._batches.mkdir(exist_ok=True)
            self._clear()
        except OSError as error:
            raise no_room(self.folder, error) from error

    def has(self, batch: Batch) -> bool:
        """Whether a batch is done."""
        return is_there(self._file(batch))

    def store(self, batch: Batch, content: bytes) -> None:
        """Keeps a batch, as `packed` has made it.

        Raises:
            DataError: the disk is full, or cannot be written.
        """
        try:
            _write(self._file(batch), content)
        except OSError as error:
            raise no_room(self.folder, error) from error

    def load(self, batch: Batch) -> list[Found]:
        """What is known of the photographs of a batch that is done.

        Raises:
            DataError: its file is damaged, and has been taken away to be made again.
        """
        return self._read(batch, unpacked)

    def reasons(self, batch: Batch) -> list[str]:
        """Why each photograph of a batch is left out, empty if it is not; raises as `load` does."""
        return self._read(batch, unpacked_reasons)

    def forget(self, batches: Iterable[Batch]) -> None:
        """Takes batches away that are done, to be made again."""
        for batch in batches:
            self._file(batch).unlink(missing_ok=True)

    def discard(self) -> None:
        """Takes all of it away, once the data folder is there."""
        # What tells whose it is goes last: a process may end at any point of this too.
        for part in (self._batches, self.assembled):
            shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, batch: Batch, read: Callable[[BinaryIO], list[_Item]]) -> list[_Item]:
        file = self._file(batch)
        try:
            with open_file(file) as stream:
                found = read(stream)
            if len(found) != len(batch.paths):
                raise DataError(f"expected {len(batch.paths)} photographs, found {len(found)}")
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}.") from None
        except DataError as error:
            file.unlink()
            raise DataError(
                f"{file}: {error}; it was removed: the same command again makes it anew."
            ) from None
        return found

    def _file(self, batch: Batch) -> Path:
        return self._batches / f"{batch.key}.npz"

    def _clear(self) -> None:
        """Removes what an attempt that was killed has left half done."""
        for leftover in self._batches.glob(f"*{_NEW}"):
            leftover.unlink()
        for folder in (self.assembled, self.assembled.with_name("folder.unfinished")):
            if folder.exists():
                shutil.rmtree(folder)


@contextmanager
def claimed(target: Path) -> Iterator[WorkFolder]:
    """The work folder of a data folder, made if need be, for this process alone.

    Raises:
        DataError: another process has it, it is of something else, or cannot be written.
    """
    work = WorkFolder(target)
    try:
        lock = _locked(work.folder)
    except filelock.Timeout:
        raise DataError(
            f"{target}: another extraction is making it (it holds {work.folder / _LOCK}); wait for "
            "it, or name another OUT."
        ) from None
    except OSError as error:
        raise no_room(work.folder, error) from None
    try:
        yield work
    finally:
        if work.folder.is_dir() and _only_begun(work.folder):
            work.discard()  # nothing was done in it
        lock.release()


def no_room(path: Path, error: OSError) -> DataError:
    """What is wrong with the disk, as an error to raise; what is done stays."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    return DataError(
        f"{path}: cannot be written: {error.strerror or error} ({free / 1e9:,.2f} GB free). Make "
        "room or check the rights; the same command again goes on where this one stopped."
    )


def _locked(folder: Path) -> filelock.BaseFileLock:
    file = folder / _LOCK
    while True:
        if is_there(folder):
            _refuse_strange(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(file)
        lock.acquire(timeout=0)
        if is_there(file):
            return lock
        lock.release()  # of a folder that whoever had it has just removed


def _refuse_strange(folder: Path) -> None:
    """Raises DataError for a folder that none of our extractions has made."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder, or nothing; move it away.")
    if not is_there(folder / _SETTINGS) and not _only_begun(folder):
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise DataError(
            f"{folder}: expected the unfinished work of an extraction, found something else "
            f"({names}); move it away, or name another OUT."
        )


def _only_begun(folder: Path) -> bool:
    """Whether there is nothing but the lock, and the settings as they were being written."""
    return {path.name for path in folder.iterdir()} <= {_LOCK, _SETTINGS + _NEW}


def _write(file: Path, content: bytes) -> None:
    """A file that is there whole or not at all, after a loss of power too; raises OSError."""
    new = file.with_name(file.name + _NEW)
    with new.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
