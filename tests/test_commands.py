"""What is printed to be typed works when it is pasted: every kind of line, with awkward names."""

import inspect
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cpfean import commands

AWKWARD = "/data/my run's $HOME/Übung `x`\t!"
FILE = AWKWARD.replace("/", "_")  # beside us, so that it can be written to
SIZES = shlex.split(commands.unpickled_sizes(Path("a"), Path("b")))[2]
GROUPS = shlex.split(commands.captions_of_images(Path("a"), captions=2, each=1))[2]
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
    "restore_run": (
        lambda: commands.restore_run(f"sqlite:///{AWKWARD}/mlflow.db", "a1"),
        ["mlflow", "runs", "restore", "--run-id", "a1"],
    ),
    "holders": (lambda: commands.holders(Path(AWKWARD)), ["fuser", AWKWARD]),
    "listeners": (lambda: commands.listeners(5000), ["fuser", "5000/tcp"]),
    "for_owner_alone": (
        lambda: commands.for_owner_alone(Path(AWKWARD)),
        ["chmod", "600", AWKWARD],
    ),
    "submit_job": (
        lambda: commands.submit_job(
            "http://head:8265", "sweep.py", ["--data", AWKWARD, "--address", "x"]
        ),
        [
            *("ray", "job", "submit", "--address", "http://head:8265", "--", "bash", "-c"),
            f"cd ~/cpfean && python experiments/sweep.py --data {commands.shell(AWKWARD)}",
        ],
    ),
    "first_lines": (
        lambda: commands.first_lines(Path(FILE), 3),
        ["head", "-n", "3", FILE],
    ),
    "without_lines": (
        lambda: commands.without_lines(Path(FILE), [3, 7]),
        ["sed", "3d;7d", FILE],
    ),
    "without_first_bytes": (
        lambda: commands.without_first_bytes(Path(FILE), 3),
        ["tail", "-c", "+4", FILE],
    ),
    "as_utf8": (
        lambda: commands.as_utf8(Path(FILE), "UTF-16"),
        ["iconv", "-f", "UTF-16", "-t", "UTF-8", FILE],
    ),
    "as_unix_lines": (
        lambda: commands.as_unix_lines(Path(FILE)),
        ["awk", "-v", "RS=\\r", "1", FILE],
    ),
    "unpickled_sizes": (
        lambda: commands.unpickled_sizes(Path(AWKWARD), Path("b")),
        ["python", "-c", SIZES, AWKWARD, "b"],
    ),
    "captions_of_images": (
        lambda: commands.captions_of_images(Path(AWKWARD), captions=20, each=10),
        ["python", "-c", GROUPS, AWKWARD, "20", "10"],
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
        f"called = {str(tmp_path / 'called')!r}\n"
        "if not os.path.exists(called):  # of a line that calls several, the first\n"
        "    open(called, 'wb').write(os.fsencode('\\0'.join(words)))\n"
    )
    for _, words in LINES.values():
        (folder / words[0]).write_text(stand_in, encoding="utf-8")
        (folder / words[0]).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_what_is_told_to_do_with_a_text_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (FILE, "-n"):
        for line, before, after in (
            (commands.first_lines(Path(name), 2), b"a\nb\n\n\n", b"a\nb\n"),
            (commands.without_lines(Path(name), [1, 3]), b"a\nb\nc\nd\n", b"b\nd\n"),
            (commands.without_first_bytes(Path(name), 3), b"\xef\xbb\xbfa\n", b"a\n"),
            (
                commands.as_utf8(Path(name), "UTF-16"),
                "Übung\n".encode("utf-16"),
                "Übung\n".encode(),
            ),
            (
                commands.as_utf8(Path(name), "LATIN1"),
                "Übung\n".encode("latin1"),
                "Übung\n".encode(),
            ),
            (commands.as_unix_lines(Path(name)), b"a\rb\r", b"a\nb\n"),
        ):
            (tmp_path / name).write_bytes(before)
            subprocess.run(["/bin/bash", "-c", line], check=True)
            assert (tmp_path / name).read_bytes() == after
            assert [path.name for path in tmp_path.iterdir()] == [name]
            (tmp_path / name).unlink()


def pasted(line: str, programs: Path) -> list[str]:
    """The words with which a shell calls a program for a line; none if it does not."""
    called = programs.with_name("called")
    called.unlink(missing_ok=True)
    subprocess.run(["/bin/bash", "-c", line], cwd=programs.parent, capture_output=True)
    return os.fsdecode(called.read_bytes()).split("\0") if called.exists() else []


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


@pytest.mark.parametrize("word", [AWKWARD, "/Ω/“x”", os.fsdecode(b"/\xff/x'y"), "/a\nb\x1b[31m"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_line_can_be_pasted_from_a_terminal_that_cannot_show_its_words(
    word: str, encoding: str, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        line = commands.shell("awk", word)
    assert line.isprintable()
    line.encode(encoding)
    called = pasted(line, programs)
    assert [os.fsencode(each) for each in called] == [b"awk", os.fsencode(word)]


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
    lines = [
        commands.resume("train.py", typed, run="a"),
        commands.restore_experiment(SECRET, "1"),
        commands.restore_run(SECRET, "a1"),
        commands.look_at_runs(SECRET),
    ]
    assert "s3cret" not in "".join(lines)
    assert [pasted(line, programs) for line in lines] == [[], [], [], []]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    called = pasted(lines[0], programs)
    assert called[2 : 2 + len(typed)] == typed
    assert [pasted(line, programs)[0] for line in lines[1:]] == ["mlflow"] * 3
    assert pasted(lines[3], programs)[-1] == SECRET
