"""The captions that are checked before the start are those that will be read."""

from pathlib import Path

import pytest

from cpfean.config import ExperimentConfig
from cpfean.errors import DataError
from cpfean.training.text_check import check_text


@pytest.mark.parametrize("has_both", [False, True])
def test_the_test_split_is_testall_where_it_is_there(
    has_both: bool, data_folder: Path, tmp_path: Path
) -> None:
    for path in data_folder.iterdir():
        name = path.name.replace("test_", "testall_")
        (tmp_path / name).write_bytes(path.read_bytes())
    check_text(ExperimentConfig(), data_folder=tmp_path)
    captions = tmp_path / "testall_caps.txt"
    if has_both:
        (tmp_path / "test_caps.txt").write_bytes(captions.read_bytes())
    number = len(captions.read_text(encoding="utf-8").splitlines())
    captions.write_text("ж\n" * number, encoding="utf-8")
    with pytest.raises(DataError, match=f"{number} of {number}"):
        check_text(ExperimentConfig(), data_folder=tmp_path)
