"""The commands where people run them: without a home, without rights, on any terminal.

One table: where it is run, what is run, and what it comes to. Rows that need another user or mounts
are skipped where those cannot be had.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.environment import FAIR
from tests.orchestration.samples import TINY

ROOT = Path(__file__).resolve().parents[1]
USER = 12345  # in no password file
ODD = "Übung“s Ω"  # no sign of it is in ASCII, the last one in none of the old code pages

# Another user; reads the checkout and this Python even where they are in a home that is closed.
_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
_READS_ALL = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
_NO_TEXT = ("LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")


@functools.cache
def as_user() -> tuple[str, ...] | None:
    """What makes a command run as another user; None if it cannot be."""
    # Its processes start others: the first of all may be let through alone.
    start = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import numba'], check=True)"
    )
    for words in (_USER, _USER + _READS_ALL):
        probe = [*words, sys.executable, "-c", start]
        if (
            shutil.which("setpriv")
            and not subprocess.run(probe, cwd=ROOT, capture_output=True).returncode
        ):
            return tuple(words)
    return None


@functools.cache
def can_mount() -> bool:
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        bool(shutil.which("unshare")) and not subprocess.run(probe, capture_output=True).returncode
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a command is run.

    Attributes:
        environment: NAME=VALUE; {out} is a folder that everybody may write.
        user: another user than root.
        mounts: done before, in a namespace of its own.
        shell: what follows the command in a shell; "$@" is the command.
    """

    environment: tuple[str, ...] = ()
    user: bool = False
    mounts: str = ""
    shell: str = ""


CACHE = "CPFEAN_CACHE={out}/cache"
READ_ONLY = "mount --bind {0} {0} && mount -o remount,ro,bind {0}"
PLACES = {
    "ordinary": Place(environment=("HOME={out}",)),
    "no home": Place(user=True),
    "no home, own cache, shared memory of a container": Place(
        user=True, environment=(CACHE,), mounts="mount -t tmpfs -o size=64m none /dev/shm"
    ),
    "home is /": Place(user=True, environment=("HOME=/",)),
    "home is nowhere": Place(user=True, environment=("HOME=/nowhere",)),
    "home of somebody else": Place(user=True, environment=("HOME={closed}",)),
    "no place for a cache": Place(user=True, environment=("HOME=/", "CPFEAN_CACHE={closed}/c")),
    "cache with nothing in it and checkout, read-only": Place(
        environment=(CACHE,),
        mounts=" && ".join(
            ["mkdir {out}/cache", READ_ONLY.format("{out}/cache"), READ_ONLY.format(ROOT)]
        ),
    ),
    "ASCII": Place(environment=("HOME={out}", "PYTHONIOENCODING=ascii")),
    "Latin 1": Place(environment=("HOME={out}", "PYTHONIOENCODING=latin-1")),
    "Windows 1252": Place(environment=("HOME={out}", "PYTHONIOENCODING=cp1252")),
    "C": Place(environment=("HOME={out}", "LC_ALL=C")),
    "C, ASCII": Place(environment=("HOME={out}", "LC_ALL=C", "PYTHONIOENCODING=ascii")),
    "C, not UTF-8": Place(environment=("HOME={out}", *_NO_TEXT)),
    "reader has gone": Place(environment=("HOME={out}",), shell='"$@" 2>&1 | :; exit $PIPESTATUS'),
    "no output": Place(environment=("HOME={out}",), shell='exec "$@" <&- >&- 2>&-'),
    "no temporary files": Place(environment=("HOME={out}", "TMPDIR=/nowhere")),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is run there, and what it comes to.

    Attributes:
        command: {data} is sound, {faulty} is not, {odd} is sound and has an odd path, as {faulty}.
        code: it exits with.
        says: texts that are printed.
        trains: a training comes to the same as in an ordinary place.
        lists: so many findings, as JSON.
        long: it is one of many that train, or needs Ray.
    """

    place: str
    command: str
    code: int = 0
    says: tuple[str, ...] = ()
    trains: bool = False
    lists: int = 0
    long: bool = False


TRAIN = "train.py --data {data} --config {tiny} --epochs 1 --output {out}/runs --name a"
SWEEP = "sweep.py --data {data} --config {tiny} --epochs 1 --trials 1 --output {out}/runs --name a"
ODDLY = "train.py --data {odd} --config {tiny} --epochs 1 --output {oddly} --name a"
VALIDATE, FAULTY = "validate.py {data}", "validate.py {faulty}"
DOCTOR = "doctor.py --data {data} --output {out}/runs --address local"

ROWS = [
    *(
        Row(place=place, command=VALIDATE, says=("nothing wrong",))
        for place in ("no home", "home is /", "home is nowhere", "home of somebody else")
    ),
    Row(
        place="no home",
        command=TRAIN,
        trains=True,
        says=("CPFEAN_CACHE names another",),
        long=True,  # compiles once more, as nothing is kept
    ),
    Row(
        place="no place for a cache", command=TRAIN, trains=True, says=("CPFEAN_CACHE",), long=True
    ),
    Row(
        place="no place for a cache",
        command=TRAIN.replace("{data}", "synthetic"),
        code=2,
        says=("the cache cannot be written", "Set CPFEAN_CACHE"),
    ),
    Row(
        place="no home",
        command=TRAIN.replace("{out}", "/nowhere"),
        code=2,
        says=("--output /nowhere",),
    ),
    Row(
        place="no home",
        command=TRAIN.replace("{out}", "~nobody-of-this-name"),
        code=2,
        says=("--output", "set HOME"),
    ),
    Row(place="no home", command=DOCTOR, says=("ok    tracking",), long=True),
    Row(
        place="no place for a cache",
        command=DOCTOR,
        code=5,
        says=("FAIL  disk", "CPFEAN_CACHE"),
        long=True,
    ),
    Row(
        place="cache with nothing in it and checkout, read-only",
        command=TRAIN,
        trains=True,
        says=("CPFEAN_CACHE names another",),
        long=True,
    ),
    *(
        Row(place=place, command=FAULTY, code=3, says=("[bad-text]",))
        for place in ("ASCII", "Latin 1", "Windows 1252", "C", "C, not UTF-8", "ordinary")
    ),
    *(
        Row(place=place, command=f"{FAULTY} --json", code=3, lists=2)
        for place in ("ASCII", "Latin 1", "Windows 1252", "C", "C, not UTF-8")
    ),
    Row(place="C, ASCII", command=ODDLY, trains=True, long=True),
    Row(place="C, not UTF-8", command=ODDLY, code=2, says=("PYTHONUTF8=1", "--data")),
    Row(place="reader has gone", command=FAULTY, code=3),
    Row(place="reader has gone", command="validate.py --help"),
    Row(place="reader has gone", command="validate.py --no-such-flag", code=2),
    Row(place="reader has gone", command=TRAIN, trains=True, long=True),
    Row(place="no output", command=FAULTY, code=3),
    Row(place="no output", command="validate.py --no-such-flag", code=2),
    Row(place="no output", command=TRAIN, trains=True, long=True),
    Row(place="no temporary files", command=DOCTOR, says=("ok    tracking",), long=True),
    # with Ray: what its processes need of a user, and of memory that they share
    Row(
        place="no home, own cache, shared memory of a container",
        command=SWEEP,
        trains=True,
        long=True,
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Data, and a configuration that is trained in a second; everybody may read them."""
    from cpfean.data.synthetic import write_synthetic

    # Beside pytest's folders, which are closed to others, and short enough for Ray's sockets.
    folder = Path(tempfile.mkdtemp(prefix="e-", dir="/tmp"))
    try:
        sound, odd, faulty = folder / "data", folder / ODD / "data", folder / ODD / "faulty"
        sound.mkdir()
        write_synthetic(sound, TINY.data.synthetic)
        shutil.copytree(sound, odd)
        shutil.copytree(sound, faulty)
        captions = (faulty / "train_caps.txt").read_text(encoding="utf-8").split("\n")
        text = "\n".join([f"a “dog” {ODD} \0", *captions[1:]])
        (faulty / "train_caps.txt").write_text(text, encoding="utf-8")
        (faulty / "dev_ids.txt").write_bytes(b"\xff\n" + (sound / "dev_ids.txt").read_bytes())
        (folder / "tiny.toml").write_text(TINY.to_toml(), encoding="utf-8")
        (folder / "closed").mkdir()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        (folder / "closed").chmod(0o700)
        yield {"data": sound, "odd": odd, "faulty": faulty, "tiny": folder / "tiny.toml"} | {
            "closed": folder / "closed"
        }
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def out() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="e-", dir="/tmp"))
    folder.chmod(0o777)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def names(files: dict[str, Path], out: Path) -> dict[str, str]:
    """What the words of a row stand for."""
    return {name: str(path) for name, path in files.items()} | {
        "out": str(out),
        "oddly": str(out / ODD),
    }


def run(
    place: Place, words: Sequence[str], named: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command of experiments/ in a place, with nothing of this process's environment."""
    mine = dict(pair.format(**named).split("=", 1) for pair in place.environment)
    # The user's own folder of temporary files, so that none of /tmp is left behind.
    basic = {"PATH": "/usr/bin:/bin", "TMPDIR": f"{named['out']}/tmp", "OMP_NUM_THREADS": "1"}
    basic |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    basic |= FAIR
    script, *more = (word.format(**named) for word in words)
    line = [sys.executable, str(ROOT / "experiments" / script), *more]
    if place.user:
        user = as_user()
        if user is None:
            pytest.skip("needs root and setpriv, to be another user")
        line = [*user, *line]
    if place.shell:
        line = ["bash", "-c", place.shell, "bash", *line]
    if place.mounts:
        if not can_mount():
            pytest.skip("needs root and unshare, to mount")
        line = [
            "unshare",
            "-m",
            "bash",
            "-c",
            f'{place.mounts.format(**named)} && exec "$@"',
            "bash",
            *line,
        ]
    return subprocess.run(
        line, capture_output=True, cwd=named["out"], env=basic | mine, timeout=300
    )


def rsum(folder: Path) -> float:
    (summary,) = folder.glob("*/a/summary.json")
    return float(json.loads(summary.read_text(encoding="utf-8"))["test"]["rsum"])


def identity(row: Row) -> str:
    script, *words = row.command.split()
    return f"{row.place}: {script} {' '.join(w for w in words if 'nobody' in w or w == '--json')}"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row, id=identity(row), marks=[pytest.mark.slow, pytest.mark.long] if row.long else []
        )
        for row in ROWS
    ],
)
def test_a_command_comes_to_the_same_or_says_what_to_set(
    row: Row, files: dict[str, Path], out: Path
) -> None:
    named = names(files, out)
    answer = run(PLACES[row.place], row.command.split(" "), named)
    printed = (answer.stdout + answer.stderr).decode("utf-8", errors="replace")
    assert answer.returncode == row.code, printed
    assert "Traceback" not in printed
    assert "Exception ignored" not in printed
    for text in row.says:
        assert text in printed
    if row.lists:
        assert len(json.loads(answer.stdout)["findings"]) == row.lists
    if row.trains:
        assert rsum(out) == ordinary_rsum(files, out)
    assert not (out / "~").exists()


_ORDINARY: dict[Path, float] = {}


def ordinary_rsum(files: dict[str, Path], out: Path) -> float:
    """What the same training comes to where nothing is unusual; found once."""
    if files["data"] not in _ORDINARY:
        named = names(files, out / "ordinary")
        (out / "ordinary" / "tmp").mkdir(parents=True)
        answer = run(PLACES["ordinary"], TRAIN.split(" "), named)
        assert answer.returncode == 0, answer.stderr
        _ORDINARY[files["data"]] = rsum(out / "ordinary")
    return _ORDINARY[files["data"]]
