"""The checkpoints of one trial, in a folder that every node reaches: local, shared or an S3 URL.

<folder>/epoch-0004    what `cpfean.training.checkpoint` writes; the newest two are kept; for other
                       names see `cpfean.storage.checkpoint_names`
<folder>/attempt       number of the last attempt at the trial

A checkpoint appears as a whole: in a folder by being renamed, in an object store by its manifest,
which is sent last and looked for first. What is there is not removed before that.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cpfean.errors import CheckpointError, ConfigError
from cpfean.files import is_there, read_file
from cpfean.storage.checkpoint_names import MARKER, check_current, in_order, name_of
from cpfean.storage.object_store import Storage
from cpfean.writing import cannot_write

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint, TrainingState

logger = logging.getLogger("cpfean.checkpoints")

KEPT = 2  # should the newest be damaged, there is the one before it
_MANIFEST = "manifest.json"


class CheckpointFolder:
    """Saves epochs, and finds the newest that can be trusted.

    Args:
        uri: an absolute path, or a URL that fsspec knows.
        attempt: which one of the trial saves; 0 is where there never is another.
    """

    def __init__(self, uri: str, *, attempt: int = 0) -> None:
        self.attempt = attempt
        self.uri = uri.rstrip("/")
        path = self.uri.removeprefix("file://")
        self._path = Path(path)
        self._store = Storage(self.uri) if "://" in path else None

    def create(self) -> None:
        """Makes the folder if it is not there; of an object store only looks whether it answers.

        Raises:
            ServiceError: it cannot be made or reached.
        """
        if self._store is not None:
            # There are no folders to be made, and a role that is limited to a prefix may not look
            # at the bucket as a whole.
            self.names()
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def new_attempt(self) -> int:
        """Registers the trial's next attempt, which ends all those before; returns its number.

        Raises:
            CheckpointError: the number of the last one cannot be read.
            ServiceError: it cannot be written.
        """
        attempt = self._last_attempt() + 1
        with tempfile.TemporaryDirectory(prefix="cpfean-") as temporary:
            marker = (Path(temporary) if self._store else self._path) / f"{MARKER}.partial"
            try:
                marker.write_text(str(attempt), encoding="utf-8")
                if self._store is None:
                    marker.replace(self._path / MARKER)
                else:
                    self._store.put(marker, MARKER)
            except OSError as error:
                raise cannot_write(marker, error, needed=len(str(attempt))) from error
        return attempt

    def check_current(self) -> None:
        """Raises FencedError once a newer attempt has been registered."""
        if self.attempt:
            check_current(self.attempt, self._last_attempt(), uri=self.uri)

    def _last_attempt(self) -> int:
        try:
            if self._store is None:
                return _number(self._path / MARKER, uri=self.at(MARKER))
            with tempfile.TemporaryDirectory(prefix="cpfean-") as temporary:
                marker = Path(temporary) / MARKER
                self._store.get(MARKER, marker)
                return _number(marker, uri=self.at(MARKER))
        except FileNotFoundError:
            return 0

    def check_shared(self) -> None:
        """Raises ConfigError on a node that does not see the folder the driver has made."""
        if self._store is None and not self._path.is_dir():
            raise ConfigError(
                f"{self.uri}: not on this node. The workers of a cluster need a place that all "
                "nodes reach: set CPFEAN_STORAGE to an s3:// URL or a shared folder."
            )

    def save(self, checkpoint: Checkpoint) -> str:
        """Saves an epoch and removes what is not kept; returns where it is.

        Raises:
            ServiceError: it cannot be written; the older ones are still there.
            FencedError: a newer attempt has taken over.
        """
        name = name_of(checkpoint.state.progress, attempt=self.attempt)
        self.check_current()
        if self._store is None:
            self._write(checkpoint, name)
        else:
            self._upload(checkpoint, name, self._store)
        self.check_current()
        names = self.names()
        older = names[: names.index(name)]
        whole = [known for known in older if self._has_manifest(known)]
        for old in older:
            if old not in whole[1 - KEPT :]:
                self._remove(old)
        return self.at(name)

    def at(self, name: str) -> str:
        """The address of a checkpoint."""
        return f"{self.uri}/{name}"

    def names(self) -> list[str]:
        """All checkpoints, oldest first, damaged ones included."""
        if self._store is None:
            return in_order(path.name for path in self._path.glob("epoch-*"))
        return in_order(self._store.folders())

    def newest_valid(self, *, fits: Callable[[TrainingState], None] | None = None) -> str | None:
        """The name of the newest complete checkpoint; what is passed over is logged.

        Args:
            fits: raises CheckpointError for a checkpoint of something else.
        """
        from cpfean.training.checkpoint import read_state

        passed_over = False
        for name in reversed(self.names()):
            try:
                with self.opened(name) as folder:
                    state = read_state(folder)
                if fits is not None:
                    fits(state)
            except CheckpointError as error:
                logger.warning("%s is passed over: %s", self.at(name), error)
                passed_over = True
                continue
            if passed_over:
                logger.warning("%s is used instead", self.at(name))
            return name
        if passed_over:
            logger.warning("%s has no other: the training starts anew", self.uri)
        return None

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """A checkpoint as a local folder, fetched if need be.

        Raises:
            CheckpointError: files of it are missing in the store.
            ServiceError: it cannot be fetched.
        """
        if self._store is None:
            yield self._path / name
            return
        with tempfile.TemporaryDirectory(prefix="cpfean-") as folder:
            try:
                self._download(name, Path(folder), self._store)
            except OSError as error:
                raise cannot_write(Path(folder), error) from error
            yield Path(folder)

    def _write(self, checkpoint: Checkpoint, name: str) -> None:
        for leftover in self._path.glob(".epoch-*"):  # of a writer that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial = self._path / f".{name}.{uuid.uuid4().hex[:8]}"
        try:
            checkpoint.save(partial)
            self.check_current()
            if (self._path / name).exists():  # from an attempt that had come further
                (self._path / name).rename(partial.with_suffix(".old"))
            partial.rename(self._path / name)
            shutil.rmtree(partial.with_suffix(".old"), ignore_errors=True)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            self.check_current()  # a newer attempt takes what it finds unfinished for a leftover
            raise cannot_write(self._path / name, error, needed=_size(checkpoint)) from error

    def _upload(self, checkpoint: Checkpoint, name: str, store: Storage) -> None:
        with tempfile.TemporaryDirectory(prefix="cpfean-") as temporary:
            folder = Path(temporary)
            try:
                checkpoint.save(folder)
            except CheckpointError as error:
                raise cannot_write(folder, error, needed=_size(checkpoint)) from error
            manifest = f"{name}/{_MANIFEST}"
            store.remove(manifest)  # while files of two attempts are mixed it is no checkpoint
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                relative = file.relative_to(folder).as_posix()
                if relative != _MANIFEST:
                    store.put(file, f"{name}/{relative}")
            self.check_current()
            store.put(folder / _MANIFEST, manifest)

    def _download(self, name: str, folder: Path, store: Storage) -> None:
        """Fetches what the manifest names; a listing may lack what is new."""
        try:
            store.get(f"{name}/{_MANIFEST}", folder / _MANIFEST)
        except FileNotFoundError:
            return  # what reads it says that it is not complete
        for file, size in _described(folder / _MANIFEST).items():
            try:
                store.get(f"{name}/{file}", folder / file, size=size)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.at(name)}/{file}: missing from the checkpoint."
                ) from None

    def _has_manifest(self, name: str) -> bool:
        if self._store is None:
            return (self._path / name / _MANIFEST).is_file()
        return self._store.has(f"{name}/{_MANIFEST}")

    def _remove(self, name: str) -> None:
        if self._store is None:
            shutil.rmtree(self._path / name, ignore_errors=True)
        else:
            self._store.remove(name)


def _number(marker: Path, *, uri: str) -> int:
    """The number of the last attempt.

    Raises:
        FileNotFoundError: there was none.
        CheckpointError: something else is in its place.
    """
    if not is_there(marker):
        raise FileNotFoundError(uri)
    try:
        text = read_file(marker, limit=100).decode("ascii").strip()
        if text.isdecimal():
            return int(text)
        found = f"found {text!r}"
    except OSError as error:
        found = error.strerror or str(error)
    except UnicodeDecodeError:
        found = "found no text"
    raise CheckpointError(
        f"{uri}: expected the number of the trial's last attempt, {found}. It was left as it is. "
        "Once no other process works on this trial, move it aside: the next attempt is the first "
        "again, and goes on from the newest checkpoint."
    )


def _described(manifest: Path) -> dict[str, int]:
    """The files that a manifest names, none of them outside its folder, and their sizes."""
    with suppress(ValueError, AttributeError, KeyError, TypeError):
        files = json.loads(manifest.read_bytes())["files"]
        paths = {PurePosixPath(name): int(about["size"]) for name, about in files.items()}
        return {
            str(path): size
            for path, size in paths.items()
            if not path.is_absolute() and ".." not in path.parts
        }
    return {}


def _size(checkpoint: Checkpoint) -> int:
    """Bytes of its tensors; the rest is small."""
    parts = (checkpoint.weights, checkpoint.best_weights, checkpoint.moments)
    tensors = [tensor for part in parts for tensor in part.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
