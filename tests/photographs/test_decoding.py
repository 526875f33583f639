"""Photographs as people have them: read as viewers show them, or refused with a reason."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image, ImageOps

from cpfean.errors import CpfeanError
from cpfean.photographs.decoding import (
    MOST_PIXELS,
    UnreadablePhotographError,
    check_photograph,
    decode_photograph,
    read_photograph,
)
from tests.memory_store import s3_in_memory
from tests.photographs.odd import HEIGHT, WIDTH, Odd, odd_photographs, picture, png_of_size


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Odd]]:
    folder = tmp_path_factory.mktemp("odd")
    return folder, odd_photographs(folder)


def test_there_are_more_than_fifty_kinds(odd: tuple[Path, dict[str, Odd]]) -> None:
    assert len(odd[1]) > 50


def test_each_odd_photograph_is_read_upright_or_refused(odd: tuple[Path, dict[str, Odd]]) -> None:
    folder, expected = odd
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, want in expected.items():
            try:
                found = read_photograph(str(folder / name))
            except UnreadablePhotographError as error:
                if want.refused is None or want.refused not in str(error) or name in str(error):
                    wrong.append(f"{name}: {error}")
                continue
            corner = np.asarray(want.corner, dtype=int), found[2:-22, 2:20]
            rest = np.asarray(want.rest, dtype=int), found[24:, 30:]
            off = [np.abs(part - colour).max() for colour, part in (corner, rest)]
            size = found.shape[1], found.shape[0]
            if want.refused or size != want.size or max(off) > want.tolerance:
                wrong.append(f"{name}: {size}, off by {off}")
    assert wrong == []


def test_every_refusal_says_what_to_do(odd: tuple[Path, dict[str, Odd]]) -> None:
    todo = ("save it", "fetch", "leave it out", "check", "cut it", "copy it", "found a ")
    for name, want in odd[1].items():
        if want.refused:
            with pytest.raises(UnreadablePhotographError) as caught:
                read_photograph(str(odd[0] / name))
            assert any(word in str(caught.value) for word in todo), str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_look_at_the_beginning_refuses_nothing_that_can_be_read(
    odd: tuple[Path, dict[str, Odd]],
) -> None:
    """And gives the reason that reading gives, or leaves it to reading to find one."""
    seen = set()
    for name in odd[1]:
        path = odd[0] / name
        try:
            read_photograph(str(path))
            reason = None
        except UnreadablePhotographError as error:
            reason = str(error)
        try:
            assert check_photograph(str(path)) == path.stat().st_size
            seen.add("taken" if reason is None else "taken, and damaged further on")
        except UnreadablePhotographError as error:
            assert str(error) == reason, name
            seen.add("refused")
    assert len(seen) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(orientation).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "it.png", exif=exif)
    with Image.open(tmp_path / "it.png") as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(read_photograph(str(tmp_path / "it.png")), upright)


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (200, 100, 0, 51)).save(tmp_path / "it.png")
    # 51 / 255 is a fifth of the colour and four fifths of white.
    assert read_photograph(str(tmp_path / "it.png"))[0, 0].tolist() == [244, 224, 204]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.arange(256 * 16, dtype=np.uint16).reshape(64, 64) * 16
    header = b"P5 64 64 65535\n"
    found = decode_photograph(header + values.astype(">u2").tobytes())
    exact = np.rint(values.astype(np.float64) / 65535 * 255)
    np.testing.assert_array_equal(found, np.repeat(exact[:, :, None], 3, axis=2))


def test_a_text_says_that_it_is_one_whatever_its_name() -> None:
    with pytest.raises(UnreadablePhotographError, match=r"expected JPEG.*found a text"):
        decode_photograph(b"not a photograph")


def test_the_limit_is_below_pillows_own_and_is_told() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MOST_PIXELS < Image.MAX_IMAGE_PIXELS
    with pytest.raises(UnreadablePhotographError, match=f"at most {MOST_PIXELS:,}"):
        decode_photograph(png_of_size(10_000, 8_001))
    # That many are not refused for their number.
    with pytest.raises(UnreadablePhotographError, match=r"cut short|damaged"):
        decode_photograph(png_of_size(10_000, 8_000))


def test_what_is_no_file_of_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePhotographError, match="s3:// URL"):
        read_photograph("https://example.org/a.jpg")
    with pytest.raises(UnreadablePhotographError, match="no such file"):
        read_photograph(str(tmp_path / "gone.jpg"))
    with pytest.raises(UnreadablePhotographError, match="cannot be read"):
        read_photograph(f"{tmp_path}/a\0b.jpg")


def test_threads_read_side_by_side_without_a_warning(tmp_path: Path) -> None:
    for n in range(8):
        picture().quantize(4).save(tmp_path / f"{n}.png", transparency=b"\x80" * 4)
    found: list[tuple[int, ...]] = []
    before = list(warnings.filters)

    def read(n: int) -> None:
        found.append(read_photograph(str(tmp_path / f"{n}.png")).shape)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(HEIGHT, WIDTH, 3)] * 8
    assert list(warnings.filters) == before


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    with s3_in_memory() as store:
        yield store


def test_an_object_is_read_as_a_file_is(store: MemoryFileSystem, tmp_path: Path) -> None:
    picture().save(tmp_path / "it.png")
    store.pipe_file("/bucket/a b/ü.png", (tmp_path / "it.png").read_bytes())
    found = read_photograph("s3://bucket/a b/ü.png")
    np.testing.assert_array_equal(found, np.asarray(picture()))
    with pytest.raises(UnreadablePhotographError, match="no such object"):
        read_photograph("s3://bucket/gone.png")


def test_an_error_of_a_photograph_is_the_users() -> None:
    assert issubclass(UnreadablePhotographError, CpfeanError)


_LARGEST = """
import resource, sys
import numpy as np
from cpfean.photographs.decoding import read_photograph
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read_photograph(sys.argv[1]).shape)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["alpha.png", "cmyk.jpg"])
def test_the_largest_photograph_takes_less_than_a_gigabyte(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / kind)
    subprocess.run([sys.executable, "-c", _MAKE_LARGEST, path], check=True)
    done = subprocess.run(
        [sys.executable, "-c", _READ_LARGEST, path], capture_output=True, encoding="utf-8"
    )
    shape, grown = done.stdout.splitlines()
    assert shape == "(10000, 8000, 3)", done.stderr
    assert int(grown) * 1024 < 1e9


# The progressive kind of JPEG, of which all coefficients are held until the last has come.
_MAKE_LARGEST = """
import sys
from PIL import Image
size, path = (8000, 10000), sys.argv[1]
if path.endswith("png"):
    Image.new("RGBA", size, (10, 200, 30, 128)).save(path, compress_level=1)
else:
    Image.new("CMYK", size, (10, 200, 30, 0)).save(path, progressive=True, subsampling=0)
"""
_READ_LARGEST = """
import sys
import numpy as np
from cpfean.photographs.decoding import read_photograph

def most_held():
    # Not getrusage: a process inherits the maximum of the one that started it.
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

before = most_held()
print(read_photograph(sys.argv[1]).shape)
print(most_held() - before)
"""
