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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

_EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
# Of a command that is resumed: said anew, or for once.
_BARE = ("--resume", "--retry-failed", "--dry-run", "--")


def shell(*words: str | Path) -> str:
    """The words as a shell has to be given them."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    """The word in quotes, if it needs any; in bytes, if the terminal could not show it."""
    try:
        word.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        shown = word.isprintable()
    except UnicodeEncodeError:
        shown = False
    if shown:
        return shlex.quote(word)
    characters = (
        chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"
        for byte in word.encode("utf-8", errors="surrogateescape")
    )
    return f"$'{''.join(characters)}'"


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
    words = [word for word in _without(typed, new) if word not in _BARE]
    more = ["--retry-failed"] if retry_failed else []
    line = script(name)
    for word in [*words, "--resume", *more]:
        line += " " + _secretless(word)
    for flag, value in reversed(new.items()):
        line += " " + shell(flag, value)
    return line


def _without(typed: Sequence[str], flags: Collection[str]) -> list[str]:
    """The words without some flags and their values."""
    words = []
    is_value = False
    for word in typed:
        if is_value:
            is_value = False
        elif word in flags:
            is_value = True
        elif word.partition("=")[0] not in flags:
            words.append(word)
    return words


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
    """MLflow's pages of what was tracked in a store that is no server."""
    return f"{shell(program('mlflow'), 'ui', '--backend-store-uri')} {_secretless(uri)}"


def restore_experiment(uri: str, experiment: str) -> str:
    """Brings an experiment back that was deleted in MLflow's pages.

    Args:
        uri: of the store.
        experiment: its id.
    """
    return _restore(uri, "experiments", "--experiment-id", experiment)


def restore_run(uri: str, run: str) -> str:
    """Brings a run back that was deleted in MLflow's pages.

    Args:
        uri: of the store.
        run: its id.
    """
    return _restore(uri, "runs", "--run-id", run)


def _restore(uri: str, what: str, flag: str, id: str) -> str:
    line = shell(program("mlflow"), what, "restore", flag, id)
    return f"MLFLOW_TRACKING_URI={_secretless(uri)} {line}"


def holders(file: Path) -> str:
    """Which processes have a file open."""
    return shell("fuser", file)


def move(file: Path, to: Path) -> str:
    """Gives a file, or what is in its place, another name."""
    return shell("mv", file, to)


def listeners(port: int) -> str:
    """Which process listens at a port of this host."""
    return shell("fuser", f"{port}/tcp")


def for_owner_alone(file: Path) -> str:
    """Takes everybody else's rights to a file."""
    return shell("chmod", "600", file)


def submit_job(address: str, name: str, typed: Sequence[str]) -> str:
    """Sends a command as a job to a cluster made by `ray up`, where the code is in ~/cpfean.

    Args:
        address: of the job server.
        name: of the script.
        typed: the words after it; an address among them is the job's own business.
    """
    words = [f"experiments/{name}", *_without(typed, ["--address"])]
    line = f"cd ~/cpfean && python {' '.join(map(_secretless, words))}"
    return shell(program("ray"), "job", "submit", "--address", address, "--", "bash", "-c", line)


def first_lines(file: Path, count: int) -> str:
    """Cuts a text behind its first so many lines."""
    return _rewritten(shell("head", "-n", str(count), _path(file)), file)


def without_lines(file: Path, numbers: Sequence[int]) -> str:
    """Takes lines out of a text, by their numbers from 1."""
    return _rewritten(shell("sed", ";".join(f"{n}d" for n in numbers), _path(file)), file)


def without_first_bytes(file: Path, count: int) -> str:
    """Takes the first so many bytes off a file."""
    return _rewritten(shell("tail", "-c", f"+{count + 1}", _path(file)), file)


def as_utf8(file: Path, encoding: str) -> str:
    """Makes UTF-8 of a text in another encoding, under a name that iconv knows."""
    return _rewritten(shell("iconv", "-f", encoding, "-t", "UTF-8", _path(file)), file)


def as_unix_lines(file: Path) -> str:
    """Ends the lines of a text that carriage returns end with newlines."""
    return _rewritten(shell("awk", "-v", "RS=\\r", "1", _path(file)), file)


def unpickled_sizes(file: Path, to: Path) -> str:
    """Makes JSON of a pickle of GSMN's sizes: for whoever trusts it, as that runs what is in it."""
    code = (
        "import json, sys, numpy; "
        'sizes = numpy.load(sys.argv[1], allow_pickle=True, encoding="latin1"); '
        "json.dump([{k: int(v) for k, v in size.items()} for size in sizes], "
        'open(sys.argv[2], "w"))'
    )
    return shell(program(Path(sys.executable).name), "-c", code, file, to)


def captions_of_images(file: Path, *, captions: int, each: int) -> str:
    """Writes which row of the images each caption describes, if all have the same number."""
    code = (
        "import sys, numpy; "
        "numpy.save(sys.argv[1], numpy.arange(int(sys.argv[2])) // int(sys.argv[3]))"
    )
    python = program(Path(sys.executable).name)
    return shell(python, "-c", code, file, str(captions), str(each))


def _path(file: Path) -> str:
    """A path that no program takes for a flag."""
    return os.path.join(".", file) if str(file).startswith("-") else str(file)


def _rewritten(line: str, file: Path) -> str:
    """Puts what a command writes in the place of a file, once all of it is written."""
    new = f"{_path(file)}.new"
    return f"{line} > {shell(new)} && {shell('mv', new, _path(file))}"


def cluster_status() -> str:
    """What Ray's cluster is made of."""
    return shell(program("ray"), "status")


def pip_install(requirement: str) -> str:
    """Installs what is missing for this very Python."""
    return shell(program(Path(sys.executable).name), "-m", "pip", "install", requirement)
