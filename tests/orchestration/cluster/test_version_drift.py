"""Versions that are not those of the start, or not the same on all nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from orchestration.cluster import version_drift as drift
from orchestration.cluster.doctor import versions
from orchestration.cluster.version_drift import among_nodes, since_start
from orchestration.settings import ServiceError
from orchestration.study.records import RunFolder


def other(monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    here = versions() | changed
    monkeypatch.setattr(drift, "versions", lambda: here)


@pytest.mark.parametrize("what", ["python", "torch", "transformers", "numpy", "code"])
def test_a_run_is_not_resumed_by_other_versions_unless_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = RunFolder(tmp_path / "s")
    folder.create({"kind": "sweep"}, commit="abc", versions=versions())
    folder.check_same({"kind": "sweep"})
    assert since_start(folder, allowed=False) == ""
    other(monkeypatch, **{what: "9.9"})
    differs = f"{what} {versions()[what]} then, 9.9 now"
    with pytest.raises(ConfigError) as refused:
        since_start(folder, allowed=False)
    for said in ("s was started", "commit abc", differs, "--allow-drift"):
        assert said in str(refused.value)
    assert since_start(folder, allowed=True) == differs


def test_a_resume_may_have_other_orchestration_and_what_was_not_written_down_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, old = RunFolder(tmp_path / "s"), RunFolder(tmp_path / "old")
    folder.create({}, versions=versions())
    old.create({})
    other(monkeypatch, orchestration="mended", mlflow="9.9")
    assert since_start(folder, allowed=False) == ""
    other(monkeypatch, torch="9.9")
    assert since_start(old, allowed=False) == ""


def test_nodes_with_other_versions_are_named_with_both() -> None:
    answers: dict[str, dict[str, str] | str] = {
        "one": versions(),
        "two": versions() | {"torch": "1.0", "orchestration": "older", "mlflow": "no matter"},
    }
    here = versions()
    differs = (
        f"two: torch 1.0 there, {here['torch']} here, "
        f"orchestration older there, {here['orchestration']} here"
    )
    with pytest.raises(ServiceError, match="--allow-drift") as refused:
        among_nodes(answers, allowed=False)
    assert differs in str(refused.value)
    assert "one" not in str(refused.value).split()
    assert among_nodes(answers, allowed=True) == differs
    del answers["two"]
    assert among_nodes(answers, allowed=False) == ""


def test_a_node_that_cannot_tell_its_versions_is_refused_with_what_it_said() -> None:
    missing = "ModuleNotFoundError: No module named 'orchestration'"
    answers: dict[str, dict[str, str] | str] = {"one": versions(), "two": missing}
    said = f"two does not tell its versions: {missing}"
    with pytest.raises(ServiceError, match=r"`ray up` again .*; --allow-drift") as refused:
        among_nodes(answers, allowed=False)
    assert said in str(refused.value)
    assert "one" not in str(refused.value).split("\n")[1]
    assert among_nodes(answers, allowed=True) == said
