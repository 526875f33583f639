"""Versions that are not those of the start, or not the same on all nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cpfean.errors import ConfigError, ServiceError
from cpfean.records.run_folder import RunFolder
from orchestration.cluster.versions import (
    Answer,
    among_nodes,
    ask_nodes,
    since_start,
)
from orchestration.versions import versions


@pytest.mark.parametrize("what", ["python", "torch", "transformers", "numpy", "code"])
def test_a_run_is_not_resumed_by_other_versions_unless_that_is_allowed(
    tmp_path: Path, what: str
) -> None:
    folder = RunFolder(tmp_path / "s")
    folder.create({"kind": "sweep"}, commit="abc", versions=versions())
    folder.check_same({"kind": "sweep"})
    assert since_start(folder, allowed=False) == ""
    other = versions() | {what: "9.9"}
    differs = f"{what} {versions()[what]} then, 9.9 now"
    with pytest.raises(ConfigError) as refused:
        since_start(folder, allowed=False, here=other)
    for said in ("s was started", "commit abc", differs, "--allow-drift"):
        assert said in str(refused.value)
    assert since_start(folder, allowed=True, here=other) == differs


def test_a_resume_may_have_other_orchestration_and_what_was_not_written_down_is_not_asked_for(
    tmp_path: Path,
) -> None:
    folder, old = RunFolder(tmp_path / "s"), RunFolder(tmp_path / "old")
    folder.create({}, versions=versions())
    old.create({})
    mended = versions() | {"orchestration": "mended", "mlflow": "9.9"}
    assert since_start(folder, allowed=False, here=mended) == ""
    assert since_start(old, allowed=False, here=mended | {"torch": "9.9"}) == ""


def test_nodes_with_other_versions_are_named_with_both() -> None:
    answers: dict[str, Answer] = {
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
    answers: dict[str, Answer] = {"one": versions(), "two": missing}
    said = f"two does not tell its versions: {missing}"
    with pytest.raises(ServiceError, match=r"`ray up` again .*; --allow-drift") as refused:
        among_nodes(answers, allowed=False)
    assert said in str(refused.value)
    assert "one" not in str(refused.value).split("\n")[1]
    assert among_nodes(answers, allowed=True) == said


class Nodes:
    """Some of which answer, stumble, or die while they are asked."""

    def __init__(self) -> None:
        names = ("known", "well", "stumbles", "broken", "dies", "dies later")
        self.alive = {name: f"id of {name}" for name in names}
        self.asked: list[set[str]] = []

    def living(self) -> dict[str, str]:
        return dict(self.alive)

    def ask(
        self, nodes: Mapping[str, str], look: Callable[[], dict[str, str]]
    ) -> dict[str, Answer]:
        self.asked.append(set(nodes))
        is_first = len(self.asked) == 1
        self.alive.pop("dies" if is_first else "dies later")
        well = {"well"} if is_first else {"stumbles"}
        return {host: look() if host in well else "no answer" for host in nodes}


def test_a_node_without_an_answer_is_asked_once_more_and_left_out_if_it_has_died() -> None:
    nodes = Nodes()
    told = ask_nodes(None, known={"known"}, nodes=nodes)
    assert told == {"well": versions(), "stumbles": versions(), "broken": "no answer"}
    assert nodes.asked[1] == {"stumbles", "broken", "dies later"}


def test_a_node_that_does_not_see_the_storage_is_told_and_nothing_is_left_there(
    tmp_path: Path,
) -> None:
    class Two:
        def living(self) -> dict[str, str]:
            return {"sees": "1", "does not": "2"}

        def ask(
            self, nodes: Mapping[str, str], look: Callable[[], dict[str, str]]
        ) -> dict[str, Answer]:
            return {"sees": look(), "does not": versions() | {"storage": ""}}

    storage = str(tmp_path / "shared")
    told = ask_nodes(storage, nodes=Two())
    assert told == {"sees": versions(), "does not": f"does not see {storage}"}
    assert list((tmp_path / "shared").iterdir()) == []
