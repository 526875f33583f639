"""A file that people call a photograph, to an upright RGB array; or a plain reason why not.

Axes:  height, width   pixels of the upright photograph

What comes is read as viewers show it: turned as its EXIF says, the first frame of an animation,
transparent parts on white, 16 bits scaled to 8, CMYK by the plain formula (no colour profile of any
kind is applied: detectors are trained without). What would have to be guessed is refused, and so is
what is too large to be held, by its header and before a pixel of it is decoded.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops, UnidentifiedImageError

from cpfean.errors import DataError, ServiceError, message_of
from cpfean.files import open_file, what_it_is

# A gigabyte, at the twelve bytes that a pixel takes at worst: of a progressive JPEG in CMYK all
# coefficients are held until the last has come, 8 bytes, beside the 4 of the pixel. Cameras of 61
# megapixels are below it, and it is below Pillow's own line for decompression bombs (89 million).
MOST_PIXELS = 80_000_000
LEAST_SIDE = 8  # pixels; below that there is nothing to be detected
MOST_ELONGATED = 32  # long side / short side: resized for a detector, less than a patch is left
_LARGEST_FILE = 2**28  # bytes: as large as the largest photograph without any compression
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
# What else is found under such names, or beside them: how it begins, or what follows "ftyp".
_STARTS = (
    (b"%PDF", "a PDF"),
    (b"8BPS", "a Photoshop document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML text (SVG drawings are such)"),
    (b"%!PS", "PostScript"),
    (b"IIU\0", "a camera's raw data"),
    (b"IIRO", "a camera's raw data"),
    (b"FUJIFILMCCD-RAW", "a camera's raw data"),
)
_BRANDS = (
    ((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "HEIC, as phones write it"),
    ((b"avif", b"avis"), "AVIF, which this Pillow was built without"),
    ((b"crx ",), "a camera's raw data"),
)
_REDUCED = 1  # bit of TIFF's NewSubfileType: a small copy of what comes later in the file
_BAND = 256  # rows that are converted together
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
_Answer = TypeVar("_Answer")


class _Quiet:
    """Pillow warns where viewers just show; what matters raises.

    Filters are of the whole process, and threads read side by side: the first one that reads sets
    this one, the last one takes it away.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._readers += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._before.__exit__(None, None, None)


_quiet = _Quiet()


class UnreadablePhotographError(DataError):
    """A file that is no photograph we can read; the message is the reason, without the path."""


def read_photograph(path: str) -> UInt8[np.ndarray, "height width 3"]:
    """The photograph in a file.

    Args:
        path: of a regular file, or an s3:// URL.

    Raises:
        UnreadablePhotographError: says what was found and what to do.
        ServiceError: an object store that does not answer.
    """
    if "://" in path:
        return decode_photograph(_fetched(path))
    with _open(path) as (file, size):
        return _decoded(file, size=size)


def check_photograph(path: str) -> int:
    """Looks at the beginning of a file, whose damage further on is found by reading it.

    Of an object in a store only its size is looked at.

    Args:
        path: as for `read_photograph`.

    Returns:
        Bytes of the file.

    Raises:
        UnreadablePhotographError, ServiceError: as `read_photograph`.
    """
    if "://" in path:
        size = _asked(path, lambda filesystem, name: int(filesystem.info(name)["size"]))
        _check_size(size)
        return size
    with _open(path) as (file, size), _header(file, size=size):
        return size


def decode_photograph(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """The photograph in the content of a file.

    Raises:
        UnreadablePhotographError: says what was found and what to do.
    """
    return _decoded(io.BytesIO(data), size=len(data))


@contextmanager
def _open(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """A local file and its size."""
    try:
        with open_file(Path(path)) as file:
            yield file, os.fstat(file.fileno()).st_size
    except UnreadablePhotographError:
        raise
    except FileNotFoundError as error:
        link = error.strerror if error.strerror and "link" in error.strerror else "no such file"
        raise UnreadablePhotographError(f"{link}; check the name") from None
    except OSError as error:
        raise UnreadablePhotographError(
            f"cannot be read: {error.strerror or message_of(error)}; check the disk and the rights"
        ) from None
    except ValueError as error:  # a name that no file can have
        raise UnreadablePhotographError(f"cannot be read: {message_of(error)}") from None


def _fetched(url: str) -> bytes:
    def read(filesystem: Any, name: str) -> bytes:
        with filesystem.open(name, "rb") as file:
            data: bytes = file.read(_LARGEST_FILE + 1)
        return data

    return _asked(url, read)


def _asked(url: str, ask: Callable[[Any, str], _Answer]) -> _Answer:
    """What a store answers about an object."""
    if not url.startswith("s3://"):
        raise UnreadablePhotographError(
            "expected a path or an s3:// URL; fetch it to this machine first"
        )
    import fsspec  # only those who need it pay for the import

    try:
        return ask(*fsspec.url_to_fs(url))
    except FileNotFoundError:
        raise UnreadablePhotographError("no such object; check the URL") from None
    except PermissionError:
        raise UnreadablePhotographError(
            "the store does not give it; check credentials and policy"
        ) from None
    except Exception as error:  # botocore's own errors have no ancestor but Exception
        raise ServiceError(f"{url}: cannot be fetched: {message_of(error)}") from None


def _decoded(file: BinaryIO, *, size: int) -> UInt8[np.ndarray, "height width 3"]:
    with _header(file, size=size) as image:
        image.load()
        return _upright(_as_rgb(image), _orientation(image))


@contextmanager
def _header(file: BinaryIO, *, size: int) -> Iterator[Image.Image]:
    """The image that a file holds, not decoded yet; what goes wrong later is told, too."""
    _check_size(size)
    start = file.read(64)
    file.seek(0)
    try:
        with _quiet, Image.open(file, formats=_known_formats()) as image:
            _check_header(image, start)
            yield image
    except UnreadablePhotographError:
        raise
    except Image.DecompressionBombError as error:  # twice the limit or more: Pillow's own
        number = re.search(r"\d+", str(error))
        pixels = f"{int(number[0]):,} pixels" if number else message_of(error)
        raise UnreadablePhotographError(
            f"too large: {pixels}; at most {MOST_PIXELS:,} are read: save it smaller"
        ) from None
    except UnidentifiedImageError:
        raise UnreadablePhotographError(_what_else(start)) from None
    except MemoryError:
        raise UnreadablePhotographError(
            "too large for the memory that is left; save it smaller"
        ) from None
    except Exception as error:  # whatever a decoder trips over in damaged bytes
        raise UnreadablePhotographError(_damage(error)) from None


def _check_size(size: int) -> None:
    """Refuses by the number of bytes."""
    if not size:
        raise UnreadablePhotographError("an empty file; fetch or copy it again")
    if size > _LARGEST_FILE:
        raise UnreadablePhotographError(
            f"a file of {size:,} bytes; at most {_LARGEST_FILE:,} are read: save it smaller"
        )


def _known_formats() -> list[str]:
    """Those that this Pillow can open; none that runs another program, as PostScript would."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _check_header(image: Image.Image, start: bytes) -> None:
    """Refuses by what the header says, before a pixel is decoded."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UnreadablePhotographError(
            f"too large: {width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are read: save it "
            "smaller"
        )
    if min(width, height) < LEAST_SIDE:
        raise UnreadablePhotographError(
            f"too small: {width:,} x {height:,} pixels; expected {LEAST_SIDE} a side at least: "
            "leave it out"
        )
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise UnreadablePhotographError(
            f"too narrow: {width:,} x {height:,} pixels; one side may be {MOST_ELONGATED} times "
            "the other: cut it into pieces"
        )
    tags: Any = getattr(image, "tag_v2", {})
    if start[8:10] == b"CR" or 50706 in tags or int(tags.get(254) or 0) & _REDUCED:
        raise UnreadablePhotographError(
            "a camera's raw data, of which only a preview could be read; save it as JPEG"
        )


def _as_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """RGB of a loaded image of any mode, band by band: one copy of it at a time."""
    width, height = image.size
    result = np.empty((height, width, 3), dtype=np.uint8)
    for top in range(0, height, _BAND):
        band = image.crop((0, top, width, min(top + _BAND, height)))
        result[top : top + _BAND] = _band_as_rgb(band, image)
    return result


def _band_as_rgb(
    band: Image.Image, whole: Image.Image
) -> UInt8[np.ndarray, "height width 3"] | UInt8[np.ndarray, "height width 1"]:
    mode, kind = whole.mode, whole.format
    if mode in _DEEP or (mode == "I" and kind in ("PNG", "PPM")):
        return _from_16_bits(np.asarray(band), whole)[:, :, None]
    if mode in ("I", "F"):
        raise UnreadablePhotographError(
            f"pixels of 32 bits ({'whole numbers' if mode == 'I' else 'fractions'}), of which "
            "nobody knows what is white; save it with 8 or 16 bits"
        )
    if mode not in _MODES:
        raise UnreadablePhotographError(f"colours in {mode}, which are not read; save it as JPEG")
    if mode == "CMYK" and kind == "JPEG" and "adobe" not in whole.info:
        # Pillow takes every CMYK JPEG for Adobe's, which are stored inverted.
        band = ImageChops.invert(band)
    if whole.has_transparency_data:
        coloured = np.asarray(band.convert("RGBA")).astype(np.uint16)
        alpha = coloured[:, :, 3:]
        on_white = coloured[:, :, :3] * alpha + 255 * (255 - alpha)
        return ((on_white + 127) // 255).astype(np.uint8)
    return np.asarray(band.convert("RGB"))


def _from_16_bits(values: np.ndarray, whole: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """Grey of 8 bits: white stays white, and nothing is clipped."""
    white = 65535
    bits: Any = getattr(whole, "tag_v2", {}).get(258, 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    if whole.format == "TIFF" and bits == 12:
        white = 4095
    wide = values.astype(np.int64)
    grey = ((wide * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    transparent = whole.info.get("transparency")
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return grey


def _orientation(image: Image.Image) -> int:
    """EXIF's number, from 1 to 8; what is damaged or unknown is taken as upright by viewers too."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # EXIF is written by hand in many places
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(
    array: UInt8[np.ndarray, "rows columns 3"], orientation: int
) -> UInt8[np.ndarray, "height width 3"]:
    turned = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array),
    }[orientation]
    return np.ascontiguousarray(turned)


def _what_else(start: bytes) -> str:
    """What was found in place of a photograph, and what to do."""
    formats = "JPEG, PNG, WebP, GIF, TIFF, BMP, JPEG 2000 or AVIF"
    found = next((words for magic, words in _STARTS if start.startswith(magic)), None)
    if start[4:8] == b"ftyp":
        of_brand = (words for brands, words in _BRANDS if start[8:12] in brands)
        found = next(of_brand, "a video, or another container of its kind")
    found = found or what_it_is(start)
    if found is None:
        found = "a text" if _is_text(start) else "something else, or a damaged beginning"
    return f"expected {formats}, found {found}; save it as JPEG, or leave it out"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        text = start[: error.start].decode("utf-8") if error.start > len(start) - 4 else "\0"
    return all(letter.isprintable() or letter in "\t\n\r" for letter in text)


def _damage(error: Exception) -> str:
    said = message_of(error)
    if "truncated" in said.lower() or isinstance(error, EOFError):
        return f"cut short: the file ends before the picture does ({said}); fetch it again"
    return f"damaged ({said}); fetch it again, or leave it out"
