"""Looks at all that a study needs, one thing after the other, and says how to mend what is not so.

Each check is a function that returns what it found in a few words, or raises `Ill` with what is
wrong and what to do.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean import commands
from cpfean.errors import CpfeanError, message_of
from cpfean.folders import can_be_written
from cpfean.json_files import RecordError
from cpfean.records.run_folder import all_runs
from cpfean.storage.check_file import check_file, read_check_file
from orchestration.cluster.ray_address import check_this_host
from orchestration.cluster.versions import (
    Answer,
    ask_nodes,
    differences,
    missing_workers,
)
from orchestration.settings import Settings, token_file
from orchestration.tracking.address import is_web, shown, sqlite_file, without_password
from orchestration.versions import versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from orchestration.cluster.capacity import Cluster

_DISK_GB = 5.0  # below this a few checkpoints of a full-size model do not fit
_BEATS = 3  # heartbeats that may be missed


class Ill(Exception):  # noqa: N818  (a finding, not an error)
    """What is wrong, and what mends it."""

    def __init__(self, wrong: str, fix: str) -> None:
        super().__init__(wrong)
        self.fix = fix


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        ok: whether a study can rely on it.
        text: what was found.
        fix: what to do; empty if ok.
    """

    name: str
    ok: bool
    text: str
    fix: str = ""


Check = Callable[[], str]


def examine(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Runs checks one after the other; whatever one raises, the others are run."""
    for name, check in checks.items():
        try:
            yield Finding(name=name, ok=True, text=check())
        except Ill as ill:
            yield Finding(name=name, ok=False, text=str(ill), fix=ill.fix)
        except CpfeanError as error:
            text, _, more = str(error).partition("\n")
            yield Finding(name=name, ok=False, text=text, fix=more.strip() or "see above")
        # A check that falls over has found something as well.
        except Exception as error:
            yield Finding(name=name, ok=False, text=message_of(error), fix="see the message")


def check_token() -> str:
    """The token of Ray's clusters: there, and nobody else's to read."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return "switched off by RAY_AUTH_MODE=disabled"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "from RAY_AUTH_TOKEN"
    file = token_file()
    if not os.path.isfile(file):
        raise Ill(
            f"{file} does not exist",
            "`ray get-auth-token --generate` makes one; a cluster that runs has its own there",
        )
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        fix = commands.for_owner_alone(file)
        raise Ill(f"{file} can be read by others (mode {mode:o})", fix)
    return str(file)


def check_cluster(
    settings: Settings, *, connect: Callable[[Settings], Cluster] | None = None
) -> str:
    """Whether Ray answers at the address; joins it for the checks that follow.

    Args:
        connect: joins it; None for that of `orchestration.cluster.connection`.
    """
    if settings.address is None:
        check_this_host()
        return "none: studies run on this machine"
    if connect is None:
        from orchestration.cluster import connection

        connect = connection.connect
    cluster = connect(settings)
    return f"{settings.address}: {cluster.cpus} CPUs, {cluster.gpus} GPUs"


def check_nodes(
    settings: Settings, *, ask: Callable[[str | None], Mapping[str, Answer]] = ask_nodes
) -> str:
    """Whether all nodes run what this one runs, and see the storage.

    Args:
        ask: for the versions of the nodes.
    """
    if settings.address is None:
        return "this machine alone"
    mine = versions()
    nodes = ask(settings.storage)
    if not nodes:
        raise Ill("no node answers", "see `ray status`")
    missing = missing_workers(len(nodes) - 1)
    wrong = [missing] if missing else []
    for host, answer in nodes.items():
        if isinstance(answer, str):
            wrong.append(f"{host}: {answer}")
            continue
        if drift := differences(answer, mine, names=("there", "here")):
            wrong.append(f"{host}: {', '.join(drift)}")
    if wrong:
        raise Ill(
            "; ".join(wrong),
            "`ray up` again installs the same on all nodes; a node that is silent or missing: "
            "`ray status`, and on your machine `ray monitor CLUSTER.yaml`",
        )
    return f"{len(nodes)} node(s), all with the versions of this one"


def check_storage(settings: Settings) -> str:
    """Whether checkpoints can be written, read and removed."""
    storage = settings.storage or str(settings.output)
    with check_file(storage) as token:
        if read_check_file(storage, token) != token:
            raise Ill(f"{storage} does not give back what was written", "see its own logs")
    if settings.storage is None and settings.address is not None:
        raise Ill(
            "CPFEAN_STORAGE is not set, and the workers of a cluster do not see this folder",
            "set it to an s3:// URL or to a folder that all nodes share",
        )
    return storage


def check_disk(folders: Sequence[Path], *, least_gb: float = _DISK_GB) -> str:
    """Rights and free space where records, data and Ray's files go."""
    for folder in folders:
        if not can_be_written(folder):
            raise Ill(
                f"{folder} cannot be written by this user",
                "its rights, or another: --output, CPFEAN_CACHE, RAY_TMPDIR",
            )
    free = {folder: shutil.disk_usage(_existing(folder)).free / 1e9 for folder in folders}
    short = [f"{folder}: {gb:.1f} GB free" for folder, gb in free.items() if gb < least_gb]
    if short:
        raise Ill(
            f"{'; '.join(short)}, {least_gb:.0f} GB are the least",
            "free some, or move: --output, CPFEAN_CACHE, RAY_TMPDIR",
        )
    return ", ".join(f"{gb:.0f} GB at {folder}" for folder, gb in free.items())


def check_tracking(settings: Settings) -> str:
    """Whether MLflow takes numbers and files, and gives them back; removes what it has sent.

    A deleted run named "doctor" stays in MLflow's trash, one for each machine.
    """
    from orchestration.tracking.stores import (
        ExperimentDeletedError,
        FilesElsewhereError,
        experiments_of_ours,
        try_out,
    )

    uri = settings.tracking_uri
    try:
        client, experiment = try_out(uri)
        others = list(experiments_of_ours(client, experiment).values())[1:]
    except ExperimentDeletedError as error:
        raise Ill(error.wrong, f"`{error.line}`; then --resume sends what is missing") from None
    except FilesElsewhereError as error:
        raise Ill(error.wrong, error.fix) from None
    # Whatever a tracker, its database or the network raises.
    except Exception as error:
        text = without_password(message_of(error), uri)
        named = text if text.startswith(shown(uri)) else f"{shown(uri)}: {text}"
        raise Ill(named, _mends_tracking(uri, error)) from None
    renamed = f"; runs of ours are also in {', '.join(map(repr, others))}" if others else ""
    return f"{shown(uri)} takes numbers and files{renamed}"


def _mends_tracking(uri: str, error: Exception) -> str:
    """What to do about a tracker that does not take what was sent."""
    from mlflow.exceptions import MlflowException

    status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
    file = sqlite_file(uri)
    if is_web(uri) and status in (401, 403):
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of somebody who may write; "
            "a server that was started with --allowed-host answers to those names alone"
        )
    if file is not None and "readonly" in str(error):
        return (
            f"{file} and its folder have to be yours to write; or name another with --tracking-uri"
        )
    if is_web(uri) and 400 <= status < 500:
        return "it answers, and does not take this: see its log, and whether it is a MLflow server"
    return (
        "start it (experiments/tracking_server.py), or look at MLFLOW_TRACKING_URI; studies "
        "run without it, and --resume sends what is missing"
    )


def check_runs(
    settings: Settings,
    *,
    repair: bool,
    say: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """Whether every study that MLflow has as RUNNING has somebody who runs it.

    It has if its folder is here and held, or is elsewhere and a heartbeat of it is young. The rest
    may still live, since clocks differ and folders are copied: before `repair` closes their runs
    it looks twice, and leaves alone those with a heartbeat in between.

    Args:
        say: shows the user a line.
        wait: for so many seconds.
    """
    from orchestration.tracking.runs import HEARTBEAT_SECONDS, HEARTBEAT_TAG
    from orchestration.tracking.stores import experiments_of_ours, open_store

    client, experiment = open_store(settings.tracking_uri)
    experiments = list(experiments_of_ours(client, experiment))
    patience = _BEATS * HEARTBEAT_SECONDS
    folders = {}
    for folder in all_runs(settings.output):
        try:
            folders[folder.id] = folder
        except RecordError as error:  # for all that is known its study runs
            text, _, fix = str(error).partition("\n")
            raise Ill(text, fix) from None
    before = _running_studies(client, experiments)
    suspects, beating, silent = set(), 0, 0
    for id, runs in before.items():
        beats = _heartbeats(runs)
        if id in folders:
            if not folders[id].is_locked():
                suspects.add(id)
        elif not beats:
            silent += len(runs)  # of a version that has none: for all that is known it lives
        elif any(abs(_age(beat)) < patience for beat in beats.values()):
            beating += len(runs)
        else:
            suspects.add(id)
    lost = [run for id in sorted(suspects) for run in before[id]]
    if lost and not repair:
        raise Ill(
            f"{len(lost)} run(s) of {_names(lost)} are RUNNING and, it seems, nobody runs them",
            "--resume the study, or close them with doctor.py --repair",
        )
    if lost:
        say(f"watching {len(lost)} run(s) of {_names(lost)} for {patience:.0f} s ...")
        wait(patience)
        after = _running_studies(client, experiments)
        lost = []
        for id in sorted(suspects & after.keys()):
            if _heartbeats(after[id]) == _heartbeats(before[id]):
                lost += after[id]
            else:
                beating += len(after[id])
    for run in lost:
        last = run.data.tags.get(HEARTBEAT_TAG, "none")
        client.set_tag(run.info.run_id, "cpfean.reaped", f"last heartbeat: {last}")
        client.set_tag(run.info.run_id, "cpfean.state", "interrupted")
        client.set_terminated(run.info.run_id, "KILLED")
    told = [f"{len(lost)} of {_names(lost)} closed as KILLED"] if lost else []
    if beating:
        told.append(f"{beating} have a driver elsewhere")
    if silent:
        told.append(f"{silent} without a heartbeat belong to folders that are not here")
    return "; ".join(told) or "none is left without its driver"


def _running_studies(client: MlflowClient, experiments: list[str]) -> dict[str, list[Run]]:
    """Runs of ours that are RUNNING, by the id of their study."""
    studies: dict[str, list[Run]] = defaultdict(list)
    for run in client.search_runs(experiments, "attributes.status = 'RUNNING'"):
        if "cpfean.id" in run.data.tags:
            studies[run.data.tags["cpfean.id"]].append(run)
    return studies


def _heartbeats(runs: Sequence[Run]) -> dict[str, str]:
    """Those that there are, by run."""
    from orchestration.tracking.runs import HEARTBEAT_TAG

    return {
        run.info.run_id: run.data.tags[HEARTBEAT_TAG]
        for run in runs
        if HEARTBEAT_TAG in run.data.tags
    }


def _age(heartbeat: str) -> float:
    """Seconds; below zero if the clock there is ahead of ours."""
    return (datetime.now(UTC) - datetime.fromisoformat(heartbeat)).total_seconds()


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(sorted({run.data.tags.get("cpfean.sweep", "?") for run in runs}))


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
