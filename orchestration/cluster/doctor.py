"""Looks at all that a study needs, one thing after the other, and says how to mend what is not so.

Each check is a function that returns what it found in a few words, or raises `Ill` with what is
wrong and what to do.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean import commands
from cpfean.errors import ConfigError, CpfeanError, message_of
from cpfean.folders import can_be_written, expanded
from cpfean.json_files import RecordError
from orchestration.cluster.ray_address import check_this_host
from orchestration.settings import Settings, token_file
from orchestration.study.records import RunFolder
from orchestration.tracking.address import is_web, shown, sqlite_file, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LIBRARIES = ("ray", "torch", "transformers", "numpy", "mlflow", "optuna")
_DISK_GB = 5.0  # below this a few checkpoints of a full-size model do not fit
_NODE_SECONDS = 60.0
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


def check_cluster(settings: Settings) -> str:
    """Whether Ray answers at the address; joins it for the checks that follow."""
    from orchestration.cluster import connection

    if settings.address is None:
        check_this_host()
        return "none: studies run on this machine"
    cluster = connection.connect(settings)
    return f"{settings.address}: {cluster.cpus} CPUs, {cluster.gpus} GPUs"


def check_nodes(settings: Settings) -> str:
    """Whether all nodes run what this one runs, and see the storage."""
    if settings.address is None:
        return "this machine alone"
    mine = versions()
    nodes = ask_nodes(settings.storage)
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


def differences(
    other: Mapping[str, str], mine: Mapping[str, str], *, names: tuple[str, str]
) -> list[str]:
    """Each version that is not the same, with both; `names` says whose they are."""
    return [
        f"{what} {other.get(what)} {names[0]}, {version} {names[1]}"
        for what, version in mine.items()
        if other.get(what) != version
    ]


def versions() -> dict[str, str]:
    """Python, libraries and our own code, here."""
    from orchestration.study.results import code_fingerprint

    found = {
        "python": platform.python_version(),
        "code": code_fingerprint(),
        "orchestration": code_fingerprint("orchestration"),
    }
    for library in _LIBRARIES:
        try:
            # CPU and CUDA builds of one version go together.
            found[library] = metadata.version(library).split("+")[0]
        except metadata.PackageNotFoundError:
            found[library] = "none"
    return found


def ask_nodes(
    storage: str | None, *, known: Collection[str] = ()
) -> dict[str, dict[str, str] | str]:
    """Versions of every node that lives, by host name and address; or what is wrong with it.

    A node that gives no answer is asked once more. One that has died by then is left out.

    Args:
        storage: that all have to see.
        known: nodes that need not be asked.
    """

    def look(token: str) -> dict[str, str]:
        found = versions()
        if storage and token:
            found["storage"] = _read_token(storage, token)
        return found

    token = _write_token(storage) if storage else ""
    try:
        nodes = {host: node for host, node in _living_nodes().items() if host not in known}
        answers = _answers(nodes, look, token)
        if silent := [host for host, answer in answers.items() if isinstance(answer, str)]:
            living = _living_nodes()
            again = {host: living[host] for host in silent if host in living}
            answers |= _answers(again, look, token)
            living = _living_nodes()
            answers = {
                host: answer
                for host, answer in answers.items()
                if not isinstance(answer, str) or host in living
            }
    finally:
        if storage:
            _remove_token(storage, token)
    for host, answer in answers.items():
        if not isinstance(answer, str) and answer.pop("storage", token) != token:
            answers[host] = f"does not see {storage}"
    return answers


def _living_nodes() -> dict[str, str]:
    """Ray's ids of the nodes that live, by host name and address."""
    import ray

    return {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
    }


def _answers(
    nodes: Mapping[str, str], look: Callable[[str], dict[str, str]], token: str
) -> dict[str, dict[str, str] | str]:
    """What `look` returns on each node, by host; or the last line of why it does not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    for host, node in nodes.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(num_cpus=0)(look).options(scheduling_strategy=there)
        asked[host] = task.remote(token)
    answers: dict[str, dict[str, str] | str] = {}
    for host, reference in asked.items():
        try:
            answers[host] = ray.get(reference, timeout=_NODE_SECONDS)
        except Exception as error:  # Ray raises many kinds
            answers[host] = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
    return answers


def missing_workers(there: int) -> str:
    """On the head of a cluster made by `ray up`: says so if fewer workers are there than asked for.

    Empty if not; and on other machines, and where Ray was started by hand: nobody knows how many
    there should be.
    """
    try:
        file = expanded("~/ray_bootstrap_config.yaml", what="HOME")
        types = json.loads(file.read_text(encoding="utf-8"))["available_node_types"]
        wanted = sum(kind.get("min_workers", 0) for kind in types.values())
    except (OSError, ConfigError, ValueError, LookupError):  # without a home it is no head
        return ""
    return f"{there} of {wanted} worker(s) have joined" if there < wanted else ""


def check_storage(settings: Settings) -> str:
    """Whether checkpoints can be written, read and removed."""
    storage = settings.storage or str(settings.output)
    token = _write_token(storage)
    try:
        if _read_token(storage, token) != token:
            raise Ill(f"{storage} does not give back what was written", "see its own logs")
    finally:
        _remove_token(storage, token)
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
    for folder in RunFolder.all_in(settings.output):
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


def _write_token(storage: str) -> str:
    token = uuid.uuid4().hex
    filesystem, path = _filesystem(storage)
    try:
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(f"{path}/.doctor-{token}", token.encode())
    except Exception as error:  # fsspec's stores raise their own
        raise Ill(
            f"{storage} cannot be written: {message_of(error)}", "rights, credentials, space"
        ) from None
    return token


def _read_token(storage: str, token: str) -> str:
    filesystem, path = _filesystem(storage)
    try:
        return filesystem.cat_file(f"{path}/.doctor-{token}").decode()
    except Exception:  # not there, or not to be read: the same to whoever asks
        return ""


def _remove_token(storage: str, token: str) -> None:
    filesystem, path = _filesystem(storage)
    filesystem.rm_file(f"{path}/.doctor-{token}")


def _filesystem(storage: str) -> tuple[Any, str]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(storage, use_listings_cache=False)
    return filesystem, path.rstrip("/")


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
