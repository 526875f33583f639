"""What is printed to be typed works when it is pasted: every kind of line, with awkward names."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cpfean import commands

AWKWARD = "/data/my run's $HOME/Übung `x`\t!"
SECRET = "https://someone:s3cret-word@host/"

# Of every function that makes a line: one with awkward words, and the words that must arrive.
LINES: dict[str, tuple[Callable[[], str], list[str]]] = {
    "shell": (lambda: commands.shell("awk", AWKWARD), ["awk", AWKWARD]),
    "script": (
        lambda: commands.script("train.py", "--data", AWKWARD),
        ["python", "train.py", "--data", AWKWARD],
    ),
    "resume": (
        lambda: commands.resume(
            "sweep.py", ["--data", AWKWARD, "--name", "old", "--resume"], run="a", retry_failed=True
        ),
        ["python", "sweep.py", "--data", AWKWARD, "--resume", "--retry-failed", "--name", "a"],
    ),
    "move": (lambda: commands.move(Path(AWKWARD), Path("/b c")), ["mv", AWKWARD, "/b c"]),
    "look_at_runs": (
        lambda: commands.look_at_runs(f"sqlite:///{AWKWARD}/mlflow.db"),
        ["mlflow", "ui", "--backend-store-uri", f"sqlite:///{AWKWARD}/mlflow.db"],
    ),
    "restore_experiment": (
        lambda: commands.restore_experiment(f"sqlite:///{AWKWARD}/mlflow.db", "1"),
        ["mlflow", "experiments", "restore", "--experiment-id", "1"],
    ),
    "holders": (lambda: commands.holders(Path(AWKWARD)), ["fuser", AWKWARD]),
    "for_owner_alone": (
        lambda: commands.for_owner_alone(Path(AWKWARD)),
        ["chmod", "600", AWKWARD],
    ),
    "cluster_status": (lambda: commands.cluster_status(), ["ray", "status"]),
    "pip_install": (
        lambda: commands.pip_install("cpfean[syntax]"),
        ["python", "-m", "pip", "install", "cpfean[syntax]"],
    ),
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is PATH, of stand-ins that write down how they are called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in = (
        f"#!{sys.executable}\nimport os, sys\n"
        "words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]\n"
        f"open({str(tmp_path / 'called')!r}, 'w').write('\\0'.join(words))\n"
    )
    for _, words in LINES.values():
        (folder / words[0]).write_text(stand_in, encoding="utf-8")
        (folder / words[0]).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def pasted(line: str, programs: Path) -> list[str]:
    """The words with which a shell calls a program for a line; none if it does not."""
    called = programs.with_name("called")
    called.unlink(missing_ok=True)
    subprocess.run(["/bin/bash", "-c", line], cwd=programs.parent, capture_output=True)
    return called.read_text(encoding="utf-8").split("\0") if called.exists() else []


def test_every_kind_of_line_has_an_example() -> None:
    public = {
        name
        for name, made in inspect.getmembers(commands, inspect.isfunction)
        if not name.startswith("_") and made.__module__ == commands.__name__
    }
    assert public - {"program"} == LINES.keys()


@pytest.mark.parametrize("name", sorted(LINES))
def test_a_line_that_is_pasted_calls_what_it_says(name: str, programs: Path) -> None:
    make, words = LINES[name]
    called = pasted(make(), programs)
    assert [Path(word).name if word.endswith(".py") else word for word in called] == words


def test_a_program_beside_this_python_is_named_by_its_path(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin = tmp_path / "some where" / ".venv" / "bin"
    bin.mkdir(parents=True)
    for name in ("python", "mlflow"):
        (bin / name).write_bytes((programs / name).read_bytes())
        (bin / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bin / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "some where")
    assert commands.program("mlflow") == ".venv/bin/mlflow"
    monkeypatch.chdir(bin)
    assert commands.program("mlflow") == "./mlflow"
    monkeypatch.chdir(tmp_path)
    assert pasted(commands.look_at_runs("x"), programs)[:2] == ["mlflow", "ui"]
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    assert commands.program("mlflow") == "mlflow"
    assert commands.program("not-here") == "not-here"


@pytest.mark.parametrize(
    ("typed", "resumed"),
    [
        (["--name=old", "--retry-failed"], ["--resume", "--name", "a"]),
        (["--dry-run", "--data", "x"], ["--data", "x", "--resume", "--name", "a"]),
        (["--set", "a=--resume", "--"], ["--set", "a=--resume", "--resume", "--name", "a"]),
        (
            ["--max-hours=2", "--seed", "1"],
            ["--seed", "1", "--resume", "--max-hours", "4", "--name", "a"],
        ),
        (["--max-hours", "2"], ["--resume", "--max-hours", "4", "--name", "a"]),
    ],
)
def test_a_command_that_is_resumed_says_each_flag_once(
    typed: list[str], resumed: list[str], programs: Path
) -> None:
    changed = {"--max-hours": "4"} if "--max-hours" in resumed else None
    line = commands.resume("sweep.py", typed, run="a", changed=changed)
    assert pasted(line, programs)[2:] == resumed


@pytest.mark.parametrize("typed", [["--tracking-uri", SECRET], [f"--tracking-uri={SECRET}"]])
def test_a_password_is_in_no_line_and_is_asked_of_the_environment(
    typed: list[str], programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [commands.resume("train.py", typed, run="a"), commands.restore_experiment(SECRET, "1")]
    assert "s3cret" not in "".join(lines)
    assert [pasted(line, programs) for line in lines] == [[], []]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    called = pasted(lines[0], programs)
    assert called[2 : 2 + len(typed)] == typed
    assert pasted(lines[1], programs)[0] == "mlflow"
