"""Folders of results: new, empty or our own, and nobody else's."""

from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from cpfean.output_folders import own_folder


def test_a_new_an_empty_and_an_own_folder_are_taken(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    for folder in (new, new, tmp_path / "empty"):
        assert own_folder(folder, flag="--output") == folder
        (folder / "ranks.csv").write_text("ours", encoding="utf-8")
    own_folder(new, flag="--output")


@pytest.mark.parametrize("name", ["ranks.csv", ".hidden"])
def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs", encoding="utf-8")
    with pytest.raises(ConfigError, match="might be replaced"):
        own_folder(tmp_path, flag="--output")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output .*file: expected a folder"):
        own_folder(tmp_path / "file", flag="--output")
