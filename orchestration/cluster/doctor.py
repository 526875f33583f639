"""Looks at all that a study needs, one thing after the other, and says how to mend what is not so.

Each check is a function that returns what it found in a few words, or raises `Ill` with what is
wrong and what to do.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean import commands
from cpfean.errors import CpfeanError, message_of
from cpfean.folders import can_be_written
from cpfean.records.budget import free_bytes
from cpfean.records.run_folder import all_runs
from cpfean.storage.check_file import check_file, read_check_file
from orchestration.cluster.ray_address import check_this_host
from orchestration.cluster.versions import Answer, ask_nodes, differences, missing_workers
from orchestration.settings import Settings, token_file
from orchestration.tracking import stores
from orchestration.tracking.address import is_web, shown, sqlite_file, without_password
from orchestration.tracking.runs import HEARTBEAT_SECONDS, HEARTBEAT_TAG, close_run, status_of
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
    """One line of the report: what was looked at, and found; `fix` is what to do if it is ill."""

    name: str
    ok: bool
    text: str
    fix: str = ""


def examine(checks: Mapping[str, Callable[[], str]]) -> Iterator[Finding]:
    """Runs checks one after the other; whatever one raises, the others are run."""
    for name, check in checks.items():
        try:
            yield Finding(name=name, ok=True, text=check())
            continue
        except Ill as ill:
            text, fix = str(ill), ill.fix
        except CpfeanError as error:
            text, _, more = str(error).partition("\n")
            fix = more.strip() or "see above"
        # A check that falls over has found something as well.
        except Exception as error:
            text, fix = message_of(error), "see the message"
        yield Finding(name=name, ok=False, text=text, fix=fix)


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
        raise Ill(f"{file} can be read by others (mode {mode:o})", commands.for_owner_alone(file))
    return str(file)


def check_cluster(
    settings: Settings, *, connect: Callable[[Settings], Cluster] | None = None
) -> str:
    """Whether Ray answers at the address; joins it, as studies do, for the checks that follow."""
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
    """Whether all nodes run what this one runs, and see the storage."""
    if settings.address is None:
        return "this machine alone"
    mine = versions()
    nodes = ask(settings.storage)
    if not nodes:
        raise Ill("no node answers", "see `ray status`")
    missing = missing_workers(len(nodes) - 1)
    wrong = [missing] if missing else []
    for host, answer in nodes.items():
        drift = [answer] if isinstance(answer, str) else differences(answer, mine)
        if drift:
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
    move = "--output, CPFEAN_CACHE, RAY_TMPDIR"
    for folder in folders:
        if not can_be_written(folder):
            raise Ill(f"{folder} cannot be written by this user", f"its rights, or another: {move}")
    free = {folder: free_bytes(folder) / 1e9 for folder in folders}
    short = [f"{folder}: {gb:.1f} GB free" for folder, gb in free.items() if gb < least_gb]
    if short:
        wrong = f"{'; '.join(short)}, {least_gb:.0f} GB are the least"
        raise Ill(wrong, f"free some, or move: {move}")
    return ", ".join(f"{gb:.0f} GB at {folder}" for folder, gb in free.items())


def check_tracking(settings: Settings) -> str:
    """Whether MLflow takes numbers and files, and gives them back; removes what it has sent.

    A deleted run named "doctor" stays in MLflow's trash, one for each machine.
    """
    uri = settings.tracking_uri
    try:
        client, experiment = stores.try_out(uri)
        others = list(stores.experiments_of_ours(client, experiment).values())[1:]
    except (stores.ExperimentDeletedError, stores.FilesElsewhereError) as error:
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
    status, file = status_of(error), sqlite_file(uri)
    if file is not None and "readonly" in str(error):
        return f"{file} and its folder have to be yours to write; --tracking-uri names another"
    if is_web(uri) and status in (401, 403):
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of somebody who may write; "
            "a server that was started with --allowed-host answers to those names alone"
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
    """
    client, experiment = stores.open_store(settings.tracking_uri)
    experiments = list(stores.experiments_of_ours(client, experiment))
    now, patience = datetime.now(UTC), timedelta(seconds=_BEATS * HEARTBEAT_SECONDS)
    # For all that is known the study of a record that cannot be read runs: nothing is closed then.
    folders = {folder.id: folder for folder in all_runs(settings.output)}
    before = _running_studies(client, experiments)
    suspects, beating, silent = set(), 0, 0
    for id, runs in before.items():
        beats = _heartbeats(runs)
        if id in folders:
            if not folders[id].is_locked():
                suspects.add(id)
        elif not beats:
            silent += len(runs)  # of a version that has none: for all that is known it lives
        elif any(abs(now - datetime.fromisoformat(beat)) < patience for beat in beats.values()):
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
        seconds = patience.total_seconds()
        say(f"watching {len(lost)} run(s) of {_names(lost)} for {seconds:.0f} s ...")
        wait(seconds)
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
        close_run(client, run)
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
    return {run.info.run_id: beat for run in runs if (beat := run.data.tags.get(HEARTBEAT_TAG))}


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(sorted({run.data.tags.get("cpfean.sweep", "?") for run in runs}))
