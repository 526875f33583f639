"""The checkpoints of one trial, in a folder that every node reaches: local, shared or an S3 URL.

<folder>/epoch-0004    what `cpfean.training.checkpoint` writes; the newest two are kept; for other
                       names see `orchestration.attempts`
<folder>/attempt       number of the last attempt at the trial
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.errors import CheckpointError, ConfigError
from orchestration.attempts import MARKER, check_current, in_order, name_of

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint

_KEPT = 2  # should the newest be damaged, there is the one before it


class CheckpointFolder:
    """Saves epochs, and finds the newest that can be trusted.

    Args:
        uri: an absolute path, or a URL that pyarrow knows.
        attempt: which one of the trial saves; 0 is where there never is another.
    """

    def __init__(self, uri: str, *, attempt: int = 0) -> None:
        self.attempt = attempt
        self.uri = uri.rstrip("/")
        self._path = self.uri.removeprefix("file://")
        self._is_local = "://" not in self._path
        self._filesystem: Any = None
        if not self._is_local:
            from pyarrow import fs

            self._filesystem, self._path = fs.FileSystem.from_uri(self.uri)

    def create(self) -> None:
        """Makes the folder if it is not there; raises OSError where that cannot be."""
        if self._is_local:
            Path(self._path).mkdir(parents=True, exist_ok=True)
        else:
            # S3 has no folders. To make one all the same, Arrow looks at the bucket as a whole,
            # which a role that is limited to a prefix may not; what is under the prefix it may.
            self.names()

    def new_attempt(self) -> int:
        """Registers the trial's next attempt, which ends all those before; returns its number."""
        attempt = self._last_attempt() + 1
        if self._is_local:
            partial = Path(f"{self._path}/{MARKER}.{os.getpid()}.partial")
            with partial.open("w", encoding="utf-8") as file:
                file.write(str(attempt))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(f"{self._path}/{MARKER}")
        else:
            with self._filesystem.open_output_stream(f"{self._path}/{MARKER}") as file:
                file.write(str(attempt).encode())
        return attempt

    def check_current(self) -> None:
        """Raises FencedError once a newer attempt has been registered."""
        check_current(self.attempt, self._last_attempt(), uri=self.uri)

    def _last_attempt(self) -> int:
        path = f"{self._path}/{MARKER}"
        try:
            if self._is_local:
                return int(Path(path).read_text(encoding="utf-8"))
            with self._filesystem.open_input_stream(path) as file:
                return int(file.read())
        except FileNotFoundError:
            return 0

    def check_shared(self) -> None:
        """Raises ConfigError on a node that does not see the folder the driver has made."""
        if self._is_local and not Path(self._path).is_dir():
            raise ConfigError(
                f"{self.uri}: not on this node. The workers of a cluster need a place that all "
                "nodes reach: set CPFEAN_STORAGE to an s3:// URL or a shared folder."
            )

    def save(self, checkpoint: Checkpoint) -> str:
        """Saves an epoch and removes what is not kept; returns where it is.

        Raises:
            CheckpointError: it cannot be written.
            FencedError: a newer attempt has taken over.
        """
        name = name_of(checkpoint.state.progress, attempt=self.attempt)
        if self._is_local:
            checkpoint.save(Path(self._path) / name, confirm=self.check_current)
        else:
            self._upload(checkpoint, name)
        self.check_current()
        # What an attempt before has not finished is no checkpoint, and none to keep one of.
        names = self.names()
        older = names[: names.index(name)]
        whole = [known for known in older if self._is_complete(known)]
        for old in older:
            if old not in whole[1 - _KEPT :]:
                if self._is_local:
                    # What resists now, e.g. because it is still written to, goes next time.
                    shutil.rmtree(f"{self._path}/{old}", ignore_errors=True)
                else:
                    self._filesystem.delete_dir(f"{self._path}/{old}")
        return self.at(name)

    def at(self, name: str) -> str:
        """The address of a checkpoint."""
        return f"{self.uri}/{name}"

    def names(self) -> list[str]:
        """All checkpoints, oldest first, damaged ones included."""
        if self._is_local:
            found = [path.name for path in Path(self._path).glob("epoch-*")]
        else:
            from pyarrow import fs

            everything = fs.FileSelector(self._path, allow_not_found=True)
            found = [info.base_name for info in self._filesystem.get_file_info(everything)]
        return in_order(found)

    def _is_complete(self, name: str) -> bool:
        """Whether the checkpoint has its manifest, which is written last."""
        from cpfean.training.checkpoint import MANIFEST

        path = f"{self._path}/{name}/{MANIFEST}"
        if self._is_local:
            return Path(path).is_file()
        from pyarrow import fs

        return bool(self._filesystem.get_file_info(path).type == fs.FileType.File)

    def newest_valid(self) -> str | None:
        """The name of the newest complete checkpoint; what is passed over is logged."""
        from cpfean.training.checkpoint import newest_valid

        for name in reversed(self.names()):
            with self.opened(name) as folder:
                if newest_valid([folder]) is not None:
                    return name
        return None

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """A checkpoint as a local folder, fetched if need be."""
        if self._is_local:
            yield Path(self._path) / name
            return
        from pyarrow import fs

        with tempfile.TemporaryDirectory(prefix="cpfean-") as folder:
            fs.copy_files(f"{self._path}/{name}", folder, source_filesystem=self._filesystem)
            yield Path(folder)

    def _upload(self, checkpoint: Checkpoint, name: str) -> None:
        from pyarrow import fs

        with tempfile.TemporaryDirectory(prefix="cpfean-") as folder:
            checkpoint.save(Path(folder), confirm=self.check_current)
            try:
                fs.copy_files(
                    folder,
                    f"{self._path}/{name}",
                    destination_filesystem=self._filesystem,
                    use_threads=False,  # Arrow's S3 uploads can hang with more than one
                )
            except OSError as error:
                raise CheckpointError(f"{self.at(name)}: cannot be written: {error}.") from error
