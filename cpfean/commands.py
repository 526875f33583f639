"""Command lines for people to paste into a shell: quoted, and with the programs that are there.

Whatever is printed to be typed is made here, by a function for each kind of line, so that a test
can paste every one of them. A line works in the folder in which it is printed: programs beside this
Python are named by their path where the shell would not find them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

_EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
# Of a command that is resumed: said anew, or for once.
_BARE = ("--resume", "--retry-failed", "--dry-run", "--")


def shell(*words: str | Path) -> str:
    """The words as a shell has to be given them."""
    return shlex.join(map(str, words))


def program(name: str) -> str:
    """What to type for a program: its name if the shell finds it, else the path beside Python."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not beside.exists() or (found and Path(found).absolute() == beside):
        return name
    return _from_here(beside)


def script(name: str, *words: str | Path) -> str:
    """One of the commands of `experiments/`.

    Args:
        name: such as "sweep.py".
        words: what follows it.
    """
    python = program(Path(sys.executable).name) if sys.executable else "python3"
    return shell(python, _from_here(_EXPERIMENTS / name), *words)


def resume(
    name: str,
    typed: Sequence[str],
    *,
    run: str,
    retry_failed: bool = False,
    changed: Mapping[str, str] | None = None,
) -> str:
    """What goes on with a run: the command as it was typed, and what makes it a resume.

    An address that holds a password is left to the environment: lines are kept in logs.

    Args:
        name: of the script.
        typed: the words after it.
        run: name of the run.
        retry_failed: run what failed once more.
        changed: flags with another value than the one that was typed.
    """
    new = {"--name": run} | dict(changed or {})
    words: list[str] = []
    skip = False
    for word in typed:
        if skip:
            skip = False
        elif word in new:
            skip = True
        elif word not in _BARE and word.partition("=")[0] not in new:
            words.append(word)
    more = ["--retry-failed"] if retry_failed else []
    line = script(name)
    for word in [*words, "--resume", *more]:
        line += " " + _secretless(word)
    for flag, value in reversed(new.items()):
        line += " " + shell(flag, value)
    return line


def _secretless(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    try:
        secret = urlsplit(value).password is not None
    except ValueError:
        secret = False
    if not secret:
        return shell(word)
    return f'{flag}{equals}"${{MLFLOW_TRACKING_URI:?}}"'


def _from_here(path: Path) -> str:
    """The path as it is typed in the folder that the process stands in."""
    try:
        relative = path.relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, or the folder has gone
        return str(path)
    # A program without a slash would be looked for in PATH.
    return str(relative) if len(relative.parts) > 1 else os.path.join(".", relative)


def look_at_runs(uri: str) -> str:
    """MLflow's pages of what was tracked in a local store."""
    return shell(program("mlflow"), "ui", "--backend-store-uri", uri)


def restore_experiment(uri: str, experiment: str) -> str:
    """Brings an experiment back that was deleted in MLflow's pages.

    Args:
        uri: of the store.
        experiment: its id.
    """
    line = shell(program("mlflow"), "experiments", "restore", "--experiment-id", experiment)
    return f"MLFLOW_TRACKING_URI={_secretless(uri)} {line}"


def holders(file: Path) -> str:
    """Which processes have a file open."""
    return shell("fuser", file)


def move(file: Path, to: Path) -> str:
    """Gives a file, or what is in its place, another name."""
    return shell("mv", file, to)


def for_owner_alone(file: Path) -> str:
    """Takes everybody else's rights to a file."""
    return shell("chmod", "600", file)


def cluster_status() -> str:
    """What Ray's cluster is made of."""
    return shell(program("ray"), "status")


def pip_install(requirement: str) -> str:
    """Installs what is missing for this very Python."""
    return shell(program(Path(sys.executable).name), "-m", "pip", "install", requirement)
