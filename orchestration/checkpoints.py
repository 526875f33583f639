"""The checkpoints of one trial, in a folder that every node reaches: local, shared or an S3 URL.

<folder>/epoch-0004    what `cpfean.training.checkpoint` writes; the newest two are kept
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint

_KEPT = 2  # should the newest be damaged, there is the one before it


class CheckpointFolder:
    """Saves epochs, and finds the newest that can be trusted.

    Args:
        uri: an absolute path, or a URL that pyarrow knows.
    """

    def __init__(self, uri: str) -> None:
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
        """
        name = f"epoch-{checkpoint.state.epoch:04d}"
        if self._is_local:
            checkpoint.save(Path(self._path) / name)
        else:
            self._upload(checkpoint, name)
        for old in self.names()[:-_KEPT]:
            if self._is_local:
                shutil.rmtree(f"{self._path}/{old}")
            else:
                self._filesystem.delete_dir(f"{self._path}/{old}")
        return self.at(name)

    def at(self, name: str) -> str:
        """The address of a checkpoint."""
        return f"{self.uri}/{name}"

    def names(self) -> list[str]:
        """All checkpoints, oldest first, damaged ones included."""
        if self._is_local:
            return sorted(path.name for path in Path(self._path).glob("epoch-*"))
        from pyarrow import fs

        listed = self._filesystem.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in listed if info.base_name.startswith("epoch-"))

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
            checkpoint.save(Path(folder))
            try:
                fs.copy_files(
                    folder,
                    f"{self._path}/{name}",
                    destination_filesystem=self._filesystem,
                    use_threads=False,  # Arrow's S3 uploads can hang with more than one
                )
            except OSError as error:
                raise CheckpointError(f"{self.at(name)}: cannot be written: {error}.") from error
