"""Values with which nothing can be done: every flag of every command refuses them by name."""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from experiments import command_line
from tests.experiments.conftest import Run
from tests.experiments.test_command_line import ROOT

SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if "def main" in path.read_text(encoding="utf-8")
)
# Whatever a flag is for, it cannot be that.
NEVER = {
    "another flag's sign": "--",
    "nothing": "",
    "a blank": " ",
    "a line break": "a\nb",
    "the end of a text": "a\0b",
    "half a character": "a\udcff",
    "too long": "x" * 5000,
}
NUMBERS = ("1e3x", "0x10", "1,000", "9" * 31, "9" * 5000)


@pytest.fixture
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The parser of a script; its body is not run."""
    made: list[command_line.Parser] = []
    monkeypatch.setattr(command_line, "run", lambda parser, body: made.append(parser))
    monkeypatch.setattr(sys, "argv", [f"{request.param}.py"])
    importlib.import_module(f"experiments.{request.param}").main()
    return made[0]  # type: ignore[return-value]


def refusal(
    parser: command_line.Parser, words: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2, words
    return capsys.readouterr().err.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize("parser", SCRIPTS, indirect=True)
def test_every_flag_refuses_what_no_flag_can_be(
    parser: command_line.Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [a for a in parser._actions if a.option_strings and a.nargs is None]
    assert flags
    for action in flags:
        (flag,) = action.option_strings
        wrong = list(NEVER.values())
        if action.type is Path:  # what is only read may have any name
            wrong.remove(NEVER["half a character"])
        wrong += NUMBERS if action.type in (int, float) else ()
        for value in wrong:
            if action.type is float and value.isdecimal() and value.isascii():
                continue  # a large number is one
            said = refusal(parser, [f"{flag}={value}"], capsys)
            assert f"argument {flag}: " in said
            if not value.startswith("--"):
                assert f"argument {flag}: " in refusal(parser, [flag, value], capsys)


@pytest.mark.parametrize("parser", SCRIPTS, indirect=True)
def test_every_word_that_is_no_flag_refuses_them_too(
    parser: command_line.Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(not a.option_strings for a in parser._actions):
        for what, value in NEVER.items():
            if what not in ("another flag's sign", "half a character"):
                refusal(parser, [value], capsys)


@pytest.mark.parametrize("parser", SCRIPTS, indirect=True)
def test_a_folder_that_is_a_file_is_refused(
    parser: command_line.Parser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    given = {flag for action in parser._actions for flag in action.option_strings}
    ours = {a.option_strings[0] for a in parser._actions if a.type is command_line.output_folder}
    if parser.prog not in ("prepare.py", "tracking_server.py"):
        assert {"--output", "--results"} & given == ours
    for flag in ours:
        for path in (tmp_path / "file", tmp_path / "file" / "inside"):
            said = refusal(parser, [flag, str(path)], capsys)
            assert f"argument {flag}: expected a folder, and {tmp_path / 'file'} is none" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name=--"], "--name"),
        (["--name=-x"], "--name"),
        (["--set=--"], "--set"),
        (["--set=-x"], "--set"),
        (["--workers=1000000"], "--workers must be at most"),
        (["--data", b"caf\xe9"], "--data: 'caf\\udce9' has bytes that are no text"),
        (["--output", "~nobody-of-that-name/runs"], "argument --output: nobody knows the home"),
        (["--set", "data.path=" + "x" * 300], "data.path: no file can have a name of 300"),
        (["--set", "model.text.encoder=" + "x" * 300], "model.text.encoder: no file can have"),
        (["--set", "optim.batch_size=1" + "0" * 30], "optim.batch_size must be a whole number"),
        (["--config", "a-folder.toml"], "expected a file, found a folder"),
        (["--config", "pipe.toml"], "expected a file, found a named pipe"),
        (["--config", "huge.toml"], "expected at most 1,000,000 bytes"),
        (["--config", "binary.toml"], "save it as UTF-8"),
        (["--config", "deep.toml"], "not valid TOML"),
        (["--prices", "a-folder.toml"], "expected a file, found a folder"),
        (["--prices", "pipe.toml"], "expected a file, found a named pipe"),
        (["--prices", "huge.toml"], "expected at most 1,000,000 bytes"),
        (["--prices", "binary.toml"], "not valid TOML"),
        (["--prices", "nowhere.toml"], "a link that leads nowhere"),
    ],
    ids=lambda given: ascii(given)[:60],
)
def test_what_is_typed_is_refused_before_anything_is_made(
    words: list[str | bytes], said: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "a-folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    os.truncate(os.open(tmp_path / "huge.toml", os.O_CREAT | os.O_RDWR), 10**12)
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    (tmp_path / "deep.toml").write_text("a = " + "[" * 3000 + "]" * 3000)
    (tmp_path / "nowhere.toml").symlink_to(tmp_path / "nothing")
    answer = run("train.py", *words)
    assert answer.returncode == 2, answer.stderr
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_that_cannot_be_written_to_is_refused(resume: list[str]) -> None:
    script = """
import os, sys
import orchestration.runners.in_process, orchestration.study.study
from experiments import train

"".encode("utf-8-sig")  # loaded while this Python can be read
if os.geteuid() == 0:  # who may write anywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
train.main()
"""
    with tempfile.TemporaryDirectory() as folder:
        closed = Path(folder) / "closed"
        closed.mkdir(mode=0o555)
        Path(folder).chmod(0o755)
        answer = subprocess.run(
            [sys.executable, "-c", script, *resume, "--output", str(closed / "runs")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"HOME": folder, "CPFEAN_CACHE": f"{folder}/cache"},
        )
        assert answer.returncode == 2, answer.stderr
        assert f"--output {closed / 'runs'}: this user cannot write there" in answer.stderr
        assert os.listdir(folder) == ["closed"]


def test_a_folder_and_a_configuration_of_one_name_stay_apart() -> None:
    assert command_line.place("./small") == "./small"
    assert command_line.place("s3://bucket/" + "x" * 300) == "s3://bucket/" + "x" * 300
    assert command_line.place("~/data") == str(Path.home() / "data")


def test_commands_of_one_second_get_a_name_and_a_folder_each(tmp_path: Path) -> None:
    """In processes of their own, which all wait for the same moment."""
    script = """
import argparse, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from dataclasses import dataclass
from experiments.command_line import named
from cpfean.records.run_folder import RunFolder

@dataclass
class Plan:
    name: str
    fixed: tuple = ()

root = Path(sys.argv[1])
asked = argparse.Namespace(name=None, resume=False)
where = SimpleNamespace(output=root / "runs")
children = []
for number in range(8):
    if (child := os.fork()) == 0:
        while not (root / "go").exists():
            time.sleep(0.001)
        try:
            with named(Plan("train-1"), asked, where) as plan:
                if number % 2:  # the others find something wrong before they begin
                    RunFolder(where.output / plan.name).create({"kind": "train"})
                (root / f"{number}").write_text(plan.name)
                while len(list(root.glob("[0-9]"))) < 8:
                    time.sleep(0.001)
        except BaseException:
            os._exit(3)
        os._exit(0)
    children.append(child)
(root / "go").touch()
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == str([0] * 8), done.stderr
    names = [(tmp_path / str(number)).read_text() for number in range(8)]
    assert sorted(names) == ["train-1", *(f"train-1-{n}" for n in range(2, 9))]
    # Of those that began nothing is left behind.
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names[1::2])


def test_a_command_that_begins_nothing_leaves_no_folder(tmp_path: Path) -> None:
    where = argparse.Namespace(output=tmp_path / "runs")
    plan = argparse.Namespace(name="a", fixed=())
    asked = argparse.Namespace(name=None, resume=False)

    def begin() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_line, "replace", lambda plan, **changed: plan)
            with command_line.named(plan, asked, where):  # type: ignore[arg-type]
                assert (tmp_path / "runs" / "a").is_dir()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert list(tmp_path.iterdir()) == []
