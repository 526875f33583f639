"""What tells whether code and folders are the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cpfean
from cpfean.fingerprints import code_fingerprint, content_fingerprint


def test_comments_and_docstrings_are_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(package: str, text: str) -> str:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "module.py").write_text(text)
        return code_fingerprint(package)

    plain = fingerprint("plain_code", "def f():\n    return 1\n")
    told = '"""Says."""\ndef f():\n    """Says more."""\n    return 1  # why\n'
    assert fingerprint("told_code", told) == plain
    assert fingerprint("other_code", "def f():\n    return 2\n") != plain
    assert len(code_fingerprint()) == 12


@pytest.mark.long
def test_what_no_training_runs_trains_nothing_anew(tmp_path: Path) -> None:
    package = tmp_path / "cpfean"
    shutil.copytree(Path(cpfean.__path__[0]), package, ignore=shutil.ignore_patterns("*.pyc"))
    line = "from cpfean.fingerprints import training_fingerprint as f; print(f())"

    def fingerprint() -> str:
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", line]
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        ).stdout

    plain = fingerprint()
    for file, is_part in {
        "search/ranking.py": False,
        "photographs/grid.py": False,
        "records/results.py": False,
        "training/loop.py": True,
        "kernels/prominent.py": True,
        "model/scorers/cross_attention.py": True,  # which is imported by its name in a registry
        "config.py": True,
    }.items():
        text = (package / file).read_text()
        (package / file).write_text(text + "\nCHANGED = True\n")
        assert (fingerprint() != plain) is is_part, file
        (package / file).write_text(text)
    assert fingerprint() == plain


def test_a_folder_is_what_its_files_are_called_and_hold(tmp_path: Path) -> None:
    def fingerprint(folder: str, **files: str) -> str:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return content_fingerprint(tmp_path / folder)

    first = fingerprint("a", x="1", y="2")
    assert fingerprint("b", y="2", x="1") == first
    assert first not in (fingerprint("c", x="2", y="1"), fingerprint("d", x="1", z="2"))
