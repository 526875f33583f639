"""Only files are opened, whatever has their names."""

from pathlib import Path

import pytest

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from cpfean.files import is_there, open_file, read_file, what_it_is
from tests.things import THINGS, put


@pytest.mark.timeout(20)
@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_file_is_not_opened_and_is_named(thing: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    words = put(thing, path)
    with pytest.raises(OSError, match="file") as refusal:
        read_file(path, limit=1000)
    assert words in (refusal.value.strerror or "")
    assert is_there(path)


def test_a_file_is_read_up_to_a_limit_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ten bytes.")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", limit=10) == b"ten bytes."
    with open_file(tmp_path / "file") as file:
        assert file.read() == b"ten bytes."
    with pytest.raises(OSError, match="at most 9 bytes, found 10"):
        read_file(tmp_path / "file", limit=9)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "nothing")
    assert not is_there(tmp_path / "nothing")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("thing", THINGS)
def test_a_configuration_is_read_from_a_file_only(thing: str, tmp_path: Path) -> None:
    words = put(thing, tmp_path / "my.toml")
    with pytest.raises(ConfigError, match=r"my\.toml") as refusal:
        ExperimentConfig.from_toml(tmp_path / "my.toml")
    assert words in str(refusal.value)


def test_a_configuration_in_another_encoding_or_beyond_all_measure_is_refused(
    tmp_path: Path,
) -> None:
    text = ExperimentConfig().to_toml()
    (tmp_path / "a.toml").write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-8"):
        ExperimentConfig.from_toml(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text(text + "#" * 10**6)
    with pytest.raises(ConfigError, match="at most 1,000,000 bytes"):
        ExperimentConfig.from_toml(tmp_path / "b.toml")
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert ExperimentConfig.from_toml(tmp_path / "c.toml") == ExperimentConfig()


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"PK\x03\x04rest", "zip"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\xff\xfea\0", "UTF-16"),
    ],
)
def test_a_file_is_named_by_how_it_begins(start: bytes, words: str) -> None:
    assert words in (what_it_is(start) or "")
    assert what_it_is(b"1000\t500\t333\t") is None
