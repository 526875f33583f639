"""Homes that are not there, and caches that cannot be written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cpfean import folders
from cpfean.errors import ConfigError

ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to others")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, and no home that could be written."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CPFEAN_CACHE", raising=False)
    folders.say_once.cache_clear()
    return tmp_path


def test_the_cache_is_in_the_home_or_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.cache_folder({}) == tmp_path / ".cache" / "cpfean"
    assert folders.cache_folder({"CPFEAN_CACHE": "~/here"}) == tmp_path / "here"
    assert folders.cache_folder({"CPFEAN_CACHE": ""}) == tmp_path / ".cache" / "cpfean"
    assert not (tmp_path / ".cache").exists()


def test_without_a_home_the_cache_is_a_folder_of_this_user_alone(
    temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = folders.cache_folder({})
    assert cache == temporary / f"cpfean-{os.getuid()}"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert folders.cache_folder({}) == cache
    assert caplog.text.count("CPFEAN_CACHE names another") == 1


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def of_another_user(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


def link(folder: Path) -> None:
    (folder.parent / "mine").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "mine")


@pytest.mark.parametrize(
    "laid", [open_to_all, pytest.param(of_another_user, marks=ROOT_ONLY), link]
)
def test_a_folder_that_others_have_laid_there_is_not_used(laid, temporary: Path) -> None:
    laid(temporary / f"cpfean-{os.getuid()}")
    cache = folders.cache_folder({})
    assert not cache.is_relative_to(temporary / f"cpfean-{os.getuid()}")
    with pytest.raises(ConfigError, match="Set CPFEAN_CACHE"):
        folders.made(cache)


@pytest.mark.parametrize("laid", [open_to_all, pytest.param(of_another_user, marks=ROOT_ONLY)])
def test_compiled_code_is_loaded_from_a_folder_of_this_user_alone(
    laid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPFEAN_CACHE", str(tmp_path))
    folder = folders.code_folder()
    assert folder is not None
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    laid(folder)
    assert folders.code_folder() is None


@pytest.mark.parametrize("path", ["~nobody-of-this-name", "~nobody-of-this-name/x"])
def test_a_home_that_nobody_knows_is_told_with_the_flag(path: str) -> None:
    with pytest.raises(ConfigError, match="--output: nobody knows the home"):
        folders.expanded(path, what="--output")


def test_a_note_that_cannot_be_kept_is_told_and_stops_nothing(
    temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders.note(temporary / "cache" / "sound", "\udcff of a name that is no text\n")
    assert (temporary / "cache" / "sound").read_text(encoding="utf-8").startswith("\\udcff")
    folders.note(temporary / "home" / "sound", "words\n")  # "home" is a file
    folders.note(temporary / "home" / "sound", "words\n")
    assert caplog.text.count("CPFEAN_CACHE") == 1


def test_a_cache_that_can_be_made_is_made_once(tmp_path: Path) -> None:
    assert folders.made(tmp_path / "a" / "b").is_dir()
    assert folders.made(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Set CPFEAN_CACHE"):
        folders.made(tmp_path / "file" / "cache")
