"""Files such as people have among their photographs.

The picture in all of them is 48 pixels wide and 36 high; its upper left quarter is red and the rest
blue, so that one sees which way up it is.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 48, 36
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Odd:
    """What is to become of a file.

    Attributes:
        corner: colour of its upper left quarter, if it is to be read.
        rest: colour of all else.
        tolerance: how far the colours may be off, for what compresses with losses.
        size: width and height.
        refused: a part of the reason, if it is to be refused.
    """

    corner: Colour = RED
    rest: Colour = BLUE
    tolerance: int = 0
    size: tuple[int, int] = (WIDTH, HEIGHT)
    refused: str | None = None


def odd_photographs(folder: Path) -> dict[str, Odd]:
    """Makes them in a folder, and tells by name what is to become of each."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, Odd] = {}
    for name, odd, make in _KINDS:
        make(folder / name)
        expected[name] = odd
    return expected


def picture() -> Image.Image:
    """The picture, upright."""
    pixels = np.full((HEIGHT, WIDTH, 3), BLUE, dtype=np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = RED
    return Image.fromarray(pixels)


def png_of_size(width: int, height: int) -> bytes:
    """The beginning of a PNG that says it is so large; there is next to nothing behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0"))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


Make = Callable[[Path], object]


def _saved(image: Callable[[], Image.Image], **options: object) -> Make:
    return lambda path: image().save(path, **options)


def _content(data: Callable[[], bytes]) -> Make:
    return lambda path: path.write_bytes(data())


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _turned(orientation: int) -> Image.Image:
    """The picture as a camera stores it that was held that way."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    return picture().transpose(back[orientation]) if orientation in back else picture()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _with_exif(orientation: int) -> Make:
    return _saved(lambda: _turned(orientation), exif=_exif(orientation), **_FINE)


def _see_through() -> Image.Image:
    """Red that covers all, and blue that covers nothing."""
    image = picture().convert("RGBA")
    alpha = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    alpha[: HEIGHT // 2, : WIDTH // 2] = 255
    image.putalpha(Image.fromarray(alpha))
    return image


def _grey(kind: type, dark: int, bright: int) -> np.ndarray:
    values = np.full((HEIGHT, WIDTH), dark, dtype=kind)
    values[: HEIGHT // 2, : WIDTH // 2] = bright
    return values


def _sixteen() -> Image.Image:
    return Image.fromarray(_grey(np.uint16, 0x4040, 0xFFFF))


def _grey_and_alpha() -> Image.Image:
    grey = Image.fromarray(_grey(np.uint8, 64, 128))
    alpha = Image.fromarray(_grey(np.uint8, 0, 255))
    return Image.merge("LA", (grey, alpha))


def _palette_with_hole(path: Path) -> None:
    image = picture().quantize(2)
    blue = image.getpixel((WIDTH - 1, HEIGHT - 1))
    image.save(path, transparency=blue)


def _frames(path: Path, **options: object) -> None:
    others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("green", "yellow")]
    picture().save(path, save_all=True, append_images=others, duration=100, **options)


def _cmyk_without_adobe() -> bytes:
    """As few programs write it: not inverted, and without the mark that says so."""
    cmyk = picture().convert("CMYK")
    inverted = Image.fromarray(255 - np.asarray(cmyk), mode="CMYK")
    data = _encoded(inverted, "JPEG", **_FINE)
    start = data.index(b"\xff\xee")
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    return data[:start] + data[start + 2 + length :]


def _damaged_exif() -> bytes:
    data = _encoded(picture(), "JPEG", exif=_exif(6), **_FINE)
    place = data.index(b"Exif\0\0") + 6
    return data[:place] + b"\xff" * 8 + data[place + 8 :]


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(_encoded(picture(), "JPEG", **_FINE))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


_FINE = {"quality": 98, "subsampling": 0}
_LOSSY = 12
_GREYS = Odd(corner=WHITE, rest=(64, 64, 64))
_KINDS: list[tuple[str, Odd, Make]] = [
    *((f"exif {n}.jpg", Odd(tolerance=_LOSSY), _with_exif(n)) for n in range(1, 9)),
    ("exif 6.png", Odd(), _saved(lambda: _turned(6), exif=_exif(6))),
    ("exif 8.tiff", Odd(), _saved(lambda: _turned(8), exif=_exif(8))),
    ("exif 99.jpg", Odd(tolerance=_LOSSY), _with_exif(99)),
    ("damaged exif.jpg", Odd(tolerance=_LOSSY), _content(_damaged_exif)),
    (
        "grey.jpg",
        Odd(corner=(76, 76, 76), rest=(29, 29, 29), tolerance=2),
        _saved(lambda: picture().convert("L"), **_FINE),
    ),
    ("palette.png", Odd(), _saved(lambda: picture().quantize(2))),
    ("palette with a hole.png", Odd(rest=WHITE), _palette_with_hole),
    ("palette with a hole.gif", Odd(rest=WHITE), _palette_with_hole),
    ("alpha.png", Odd(rest=WHITE), _saved(_see_through)),
    ("alpha.webp", Odd(rest=WHITE), _saved(_see_through, lossless=True)),
    ("grey and alpha.png", Odd(corner=(128, 128, 128), rest=WHITE), _saved(_grey_and_alpha)),
    (
        "one bit.png",
        Odd(corner=WHITE, rest=(0, 0, 0)),
        _saved(lambda: Image.fromarray(_grey(np.uint8, 0, 255)).convert("1")),
    ),
    (
        "cmyk.jpg",
        Odd(tolerance=_LOSSY),
        _saved(lambda: picture().convert("CMYK"), **_FINE),
    ),
    ("cmyk without adobe.jpg", Odd(tolerance=_LOSSY), _content(_cmyk_without_adobe)),
    ("cmyk.tif", Odd(), _saved(lambda: picture().convert("CMYK"))),
    ("16 bit.png", _GREYS, _saved(_sixteen)),
    ("16 bit.tif", _GREYS, _saved(_sixteen)),
    (
        "16 bit big-endian.tif",
        _GREYS,
        _saved(
            lambda: Image.frombytes(
                "I;16B", (WIDTH, HEIGHT), np.asarray(_sixteen()).astype(">u2").tobytes()
            )
        ),
    ),
    (
        "16 bit.pgm",
        _GREYS,
        _content(
            lambda: (
                f"P5 {WIDTH} {HEIGHT} 65535\n".encode()
                + np.asarray(_sixteen()).astype(">u2").tobytes()
            )
        ),
    ),
    ("animated.gif", Odd(), _frames),
    ("animated.webp", Odd(), lambda path: _frames(path, lossless=True)),
    ("animated.png", Odd(), _frames),
    ("progressive.jpg", Odd(tolerance=_LOSSY), _saved(picture, progressive=True, **_FINE)),
    (
        "Größe & Übermut (2).JPG",
        Odd(tolerance=_LOSSY),
        _content(lambda: _encoded(picture(), "JPEG", **_FINE)),
    ),
    ("png called.jpg", Odd(), _content(lambda: _encoded(picture(), "PNG"))),
    (
        "more behind it.jpg",
        Odd(tolerance=_LOSSY),
        _content(lambda: _encoded(picture(), "JPEG", **_FINE) + b"\0" * 99),
    ),
    ("picture.bmp", Odd(), _saved(picture)),
    ("picture.ppm", Odd(), _saved(picture)),
    (
        "cut short.jpg",
        Odd(refused="cut short"),
        _content(lambda: _encoded(picture(), "JPEG", **_FINE)[:-300]),
    ),
    (
        "cut short.png",
        Odd(refused="fetch it again"),
        _content(lambda: _encoded(picture(), "PNG")[:70]),
    ),
    ("nothing in it.jpg", Odd(refused="an empty file"), _content(lambda: b"")),
    ("a text.jpg", Odd(refused="found a text"), _content(lambda: "grüße\n".encode() * 99)),
    ("a page.jpg", Odd(refused="a web page"), _content(lambda: b"<!DOCTYPE html><title>404")),
    ("noise.jpg", Odd(refused="something else"), _content(lambda: bytes(range(256)) * 4)),
    ("phone.heic", Odd(refused="HEIC"), _content(lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")),
    ("drawing.png", Odd(refused="an SVG drawing"), _content(lambda: b"<svg xmlns='x'></svg>")),
    ("paper.jpg", Odd(refused="a PDF"), _content(lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")),
    ("film.jpg", Odd(refused="a video"), _content(lambda: b"\0\0\0\x18ftypisom\0\0\0\0isomiso2")),
    (
        "huge.png",
        Odd(refused="too large: 600,000,000 pixels"),
        _content(lambda: png_of_size(30_000, 20_000)),
    ),
    (
        "large.png",
        Odd(refused="too large: 12,000 x 8,000"),
        _content(lambda: png_of_size(12_000, 8_000)),
    ),
    (
        "huge.jpg",
        Odd(refused="too large: 600,000,000 pixels"),
        _content(lambda: _jpeg_of_size(30_000, 20_000)),
    ),
    ("one pixel.png", Odd(refused="too small: 1 x 1"), _saved(lambda: Image.new("RGB", (1, 1)))),
    ("a line.png", Odd(refused="too narrow"), _saved(lambda: Image.new("RGB", (4000, 10)))),
    (
        "fractions.tif",
        Odd(refused="32 bits"),
        _saved(lambda: Image.fromarray(_grey(np.float32, 0, 1))),
    ),
    (
        "whole numbers.tif",
        Odd(refused="32 bits"),
        _saved(lambda: Image.fromarray(_grey(np.int32, 0, 70000))),
    ),
    ("a folder.jpg", Odd(refused="found a folder"), Path.mkdir),
    ("a pipe.jpg", Odd(refused="found a named pipe"), _pipe),
    ("a device.jpg", Odd(refused="found a device"), lambda path: path.symlink_to("/dev/zero")),
    (
        "a link.jpg",
        Odd(refused="a link that leads nowhere"),
        lambda path: path.symlink_to("gone.jpg"),
    ),
]


def double(folder: Path, name: str, other: str) -> None:
    """The same bytes under another name."""
    shutil.copyfile(folder / name, folder / other)
