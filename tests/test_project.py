"""The files around the code agree with it and with each other."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cpfean.config import ExperimentConfig, field_types

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if "def main" in path.read_text(encoding="utf-8")
)


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins}


def requirements() -> list[Requirement]:
    """Everything that has been installed beside each other; the syntax extra has not."""
    extras = PROJECT["optional-dependencies"]
    listed = [PROJECT["dependencies"], *(extras[name] for name in extras if name != "syntax")]
    texts = [text for texts in listed for text in texts]
    return [Requirement(text) for text in texts if not text.startswith("cpfean[")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!\w+:)([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_make_targets_that_are_written_about_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    used = set()
    for path in [*DOCUMENTS, ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'(?:`|^    |" )make ([a-z-]+)\b', text, re.MULTILINE))
    assert {"sweep", "test", "install"} <= used
    assert used <= targets


def test_every_make_target_is_explained_by_make_help() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for target in re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE):
        assert re.search(rf"^  make {target} +\S", listed, flags=re.MULTILINE)


def test_the_options_in_the_readme_are_options_of_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"experiments.{script}").main()
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    lines = [line for line in README.splitlines() if "experiments/" in line or "| `--" in line]
    lines += re.findall(r'ARGS="([^"]*)"', README)
    used = {option for line in lines for option in re.findall(r"--[a-z][a-z-]+", line)}
    assert {"--data", "--set", "--resume", "--seeds"} <= used
    assert used <= known


def test_the_settings_in_the_documents_are_settings() -> None:
    known = dict(field_types(ExperimentConfig))
    for path in DOCUMENTS:
        used = re.findall(r"--set ([a-z][\w.]*)=", path.read_text(encoding="utf-8"))
        assert [name for name in used if name not in known] == []


def test_the_messages_that_the_cluster_page_explains_are_messages_of_the_code() -> None:
    said = [
        node.value
        for room in ("cpfean", "orchestration", "experiments")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    rows = page.split("| what you see |")[1].split("\n\n")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", rows, flags=re.MULTILINE)
    assert len(quoted) > 10
    pieces = [piece.strip() for line in quoted for piece in line.split("...") if piece.strip()]
    assert [piece for piece in pieces if not any(piece in text for text in said)] == []


def test_the_scripts_and_rooms_in_the_readme_exist() -> None:
    for script in re.findall(r"experiments/\w+\.py", README):
        assert (ROOT / script).exists()


def test_the_layout_in_the_readme_names_every_module_and_none_that_is_not_there() -> None:
    layout = README.split("## Layout")[1].split("\n## ")[0]
    named, folders = set(), []
    for indent, entry in re.findall(r"^    ( *)(\w.*?)(?:   .*)?$", layout, flags=re.MULTILINE):
        depth = len(indent) // 2
        names = entry.split()
        if names[0].endswith("/"):
            folders[depth:] = [names[0]]
            assert (ROOT / "".join(folders)).is_dir(), entry
        else:
            named |= {"".join(folders[:depth]) + name for name in names if "." in name}
    there = {
        str(path.relative_to(ROOT))
        for floor in ("cpfean", "orchestration", "experiments")
        for path in (ROOT / floor).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert there - named == set(), "without a line in the README's layout"
    assert {name for name in named if name.endswith(".py")} - there == set(), "not there"


def test_the_changelog_has_the_version_of_the_project() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", text, flags=re.MULTILINE)
    assert versions[0] == PROJECT["version"]
    assert versions == sorted(versions, key=Version, reverse=True)


def test_the_licence_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = constraints()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes {pins[name]}"


def test_the_constraints_are_only_versions() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in text.splitlines())
    assert constraints()["torch"].local is None


@pytest.mark.parametrize(("name", "hole"), [("ray", "2.58"), ("mlflow", "3.16.0")])
def test_versions_with_known_holes_are_excluded(name: str, hole: str) -> None:
    ranges = [item.specifier for item in requirements() if item.name == name]
    assert ranges
    assert not any(specifier.contains(hole) for specifier in ranges)


def test_continuous_integration_runs_the_two_commands() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert text.index("make test-all") < text.index("make sweep")
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.10 || exit 1\n', encoding="utf-8")
    old.chmod(0o755)
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    for python, said in ((str(old), "Python 3.8.10"), (str(tmp_path / "none"), "no ")):
        done = subprocess.run(
            ["make", "install", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert "Python 3.11 or newer" in done.stderr
        assert said in done.stderr
        assert python in done.stderr
        assert not (tmp_path / ".venv").exists()
