"""Models by name: huggingface_hub's own client against a hub in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpfean.errors import CheckpointError
from cpfean.hub import HubName, hub_name, model_at
from tests.local_hub import TOKEN, LocalHub, files_in, local_hub

ROOT = Path(__file__).resolve().parents[1]
OURS = {"format": 1, "model": {}, "inputs": {}, "text_encoder": {}}
FILES = {
    "config.json": json.dumps(OURS).encode(),
    "model.safetensors": b"weights",
    "config.toml": b"seed = 0\n",
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/caption_tokenizer.json": b'{"units": "words"}',
}
# What somebody may have put beside them.
OTHERS = {
    "README.md": b"# A model",
    "pytorch_model.bin": b"\x80\x04pickle",
    "modeling.py": b"print('run')",
    "tokenizer/tokenizer.py": b"print('run')",
    "tokenizer/vocab.pkl": b"\x80\x04pickle",
    "optimizer.safetensors": b"large",
}
PROGRAM = """
import sys
from cpfean.errors import CpfeanError
from cpfean.hub import model_at
try:
    print(model_at(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None))
except CpfeanError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "hub") as hub:
        yield hub


class Client:
    """A user of the hub: every call is a process of its own, with one cache for all."""

    def __init__(self, hub: LocalHub, home: Path) -> None:
        self.hub = hub
        self.home = home
        self.work = home / "work"
        self.work.mkdir(parents=True)

    def fetch(self, *words: str, token: str | None = None, **environment: str) -> tuple[int, str]:
        """Exit code, and the folder or what was said."""
        own = self.hub.environment(self.home, token=token) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            cwd=self.work,
            env=own | environment,
            capture_output=True,
            encoding="utf-8",
        )
        return done.returncode, (done.stdout or done.stderr).strip()

    def refused(self, *words: str, **environment: str) -> str:
        code, said = self.fetch(*words, **environment)
        assert code == 5, said
        assert said.startswith("CheckpointError "), said
        assert len(said.splitlines()) == 1
        return said


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("user/name", HubName("user/name")),
        ("user/name@v1", HubName("user/name", "v1", True)),
        ("hf://user/na.me-2_x", HubName("user/na.me-2_x", None, True)),
        ("hf:/user/name@refs/pr/1", HubName("user/name", "refs/pr/1", True)),  # through a Path
        ("name", None),
        ("/user/name", None),
        ("./user/name", None),
        ("../name", None),
        ("user/../name", None),
        ("user/name/more", None),
        ("https://host/user/name", None),
        ("us er/name", None),
    ],
)
def test_a_name_is_told_from_a_path(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name


def test_a_folder_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_at("user/name") == Path("user/name")
    assert model_at(tmp_path / "missing") == tmp_path / "missing"
    with pytest.raises(CheckpointError, match=r"has no revision 'v1'.*found a folder"):
        model_at("user/name", revision="v1")
    with pytest.raises(CheckpointError, match=r"no such model.*write hf://user/other"):
        model_at("user/other")
    with pytest.raises(CheckpointError, match="another revision is asked for"):
        model_at("some/name@v1", revision="v2")


def test_what_a_model_consists_of_is_fetched_and_nothing_else(
    hub: LocalHub, client: Client
) -> None:
    hub.commit("user/name", FILES | OTHERS)
    code, said = client.fetch("user/name")
    assert code == 0, said
    folder = Path(said)
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)}
    assert found == FILES
    got = {line.split("/")[-1] for line in hub.asked if line.startswith("GET /user/")}
    assert got == {name.split("/")[-1] for name in FILES}
    hub.asked.clear()
    assert client.fetch("user/name") == (0, said)
    assert [line for line in hub.asked if line.startswith("GET")] == []  # it is here


def test_revisions_are_branches_tags_and_commits(hub: LocalHub, client: Client) -> None:
    first = hub.commit("user/name", FILES, tag="v1")
    newer = hub.commit("user/name", {"model.safetensors": b"newer weights"})
    for words, commit in (
        (["user/name"], newer),
        (["user/name@v1"], first),
        (["hf://user/name", first], first),
        (["user/name", "main"], newer),
    ):
        code, said = client.fetch(*words)
        assert code == 0, said
        assert Path(said).name == commit
    assert "has no such revision" in client.refused("user/name", "v2")


def test_what_has_been_fetched_is_there_without_a_network(hub: LocalHub, client: Client) -> None:
    hub.commit("user/name", FILES)
    offline = {"HF_HUB_OFFLINE": "1"}
    said = client.refused("user/name", **offline)
    assert "HF_HUB_OFFLINE is set" in said
    assert "there is no folder user/name here" in said
    assert hub.asked == []
    code, folder = client.fetch("user/name")
    assert code == 0
    hub.asked.clear()
    assert client.fetch("user/name", **offline) == (0, folder)
    assert hub.asked == []
    # A copy that was cut short is told, and not taken for a model.
    os.unlink(Path(folder) / "model.safetensors")
    assert "or not whole" in client.refused("user/name", **offline)


def test_a_model_that_is_not_shown_is_told_from_one_that_has_to_be_asked_for(
    hub: LocalHub, client: Client
) -> None:
    hub.commit("user/name", FILES)
    assert "shows no such model" in client.refused("user/other")
    hub.private.add("user/name")
    said = client.refused("user/name")
    assert "if it is private, log in with `hf auth login`" in said
    assert client.fetch("user/name", token=TOKEN)[0] == 0
    hub.commit("user/gated", FILES)
    hub.gated.add("user/gated")
    said = client.refused("user/gated", HF_TOKEN=TOKEN)
    assert "is gated" in said
    assert f"Ask at {hub.url}/user/gated" in said


def test_a_model_of_another_kind_is_not_fetched(hub: LocalHub, client: Client) -> None:
    hub.commit("user/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    assert "describes no model of this project" in client.refused("user/bert")
    hub.commit("user/data", {"train.csv": b"a,b"})
    assert "it has no config.json" in client.refused("user/data")
    hub.commit("user/odd", {"config.json": b"[]", "model.safetensors": b"x"})
    assert "expected a JSON object" in client.refused("user/odd")
    assert not any("safetensors" in line for line in hub.asked)
    hub.commit("user/half", {"config.json": FILES["config.json"]})
    assert "has no model.safetensors" in client.refused("user/half")
