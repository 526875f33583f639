"""Photographs of a gallery, as pictures that a page carries in itself.

Nothing is served from a path: a picture is read here, made small, and becomes a data URL.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

import numpy as np
from jaxtyping import UInt8

from cpfean.analysis.pictures.queries import photo_of
from cpfean.errors import ConfigError, CpfeanError
from cpfean.photographs.decoding import read_photograph

THUMBNAIL, LARGE = 320, 1024  # pixels of the longer side, at most
_KEPT = 512  # pictures, of 20 kB to 200 kB each
_QUALITY = 85
_TRIED = 1000  # images that a folder is tried with


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A photograph as a page shows it.

    Attributes:
        url: a data URL.
        width, height: in its own pixels.
    """

    url: str
    width: int
    height: int


class Photos:
    """The photographs of a gallery's images.

    Args:
        folder: of photographs, named as the images, with or without a suffix; None for none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        # Of this object, so that it ends with it.
        self._read = lru_cache(maxsize=_KEPT)(self._read_file)

    def check(self, names: list[str]) -> None:
        """Refuses a folder that has none of the first images.

        Raises:
            ConfigError: says how files are named.
        """
        if self.folder is None or any(self._file(name) for name in names[:_TRIED]):
            return
        raise ConfigError(
            f"--photos {self.folder} has none of the images; files must be named as the ids, e.g. "
            f"{names[0]}, with or without .jpg or .png."
        )

    def picture(self, name: str, *, side: int) -> Picture | None:
        """An image's photograph; None if there is none, or none that can be read.

        Args:
            name: of the image.
            side: the longer side, in pixels, at most.
        """
        return self._read(name, side)

    def _read_file(self, name: str, side: int) -> Picture | None:
        file = self._file(name)
        if file is None:
            return None
        try:
            return as_picture(read_photograph(str(file)), side=side)
        except CpfeanError:  # its regions are drawn in its place
            return None

    def _file(self, name: str) -> Path | None:
        """A file in the folder; what an id has of dots and slashes leads nowhere else."""
        if self.folder is None or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            return None
        try:
            return photo_of(name, self.folder)
        except (OSError, ValueError):  # a name that no file can have
            return None


def as_picture(pixels: UInt8[np.ndarray, "height width 3"], *, side: int) -> Picture:
    """A picture no larger than that, from pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    url = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(url=url, width=image.width, height=image.height)
