"""Ray and Tune: the trials of a study as Tune sees them; imported when a study starts.

Tune runs a small process for each trial at a time, and that process has a crew of Ray Train workers
(`orchestration.runners.worker_pool`); both stay for the next trial. What a trial is, what is known
of it and what comes next is the study's business, behind `Hooks`; Tune's own snapshots are not read
back, so that a restart depends on nothing but our records and the checkpoints.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import cloudpickle, tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import TrainingFailedError, WorkerGroupError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cpfean.errors import (
    CheckpointError,
    CpfeanError,
    LostPartnerError,
    ServiceError,
    StoppedError,
)
from cpfean.folders import can_be_written
from orchestration.cluster.capacity import Node, Room, places
from orchestration.cluster.ray_address import check_head, check_this_host, parse_address
from orchestration.proposals.search import METRIC
from orchestration.runners.worker_pool import HEAD, Crew, free
from orchestration.settings import (
    Settings,
    prepare_environment,
    token_file,
    usable_cpus,
)
from orchestration.storage.checkpoints import CheckpointFolder
from orchestration.study.budget import OTHER
from orchestration.study.failures import known_failure
from orchestration.study.records import TrialRecord

_RETRIED = ("infra", "preempted")
MAX_RETRIES = 3
_PAUSE_SECONDS = 2.0  # times the number of the retry, where a disk or a store has refused
_CLOSE_SECONDS = 10.0
_JOIN_SECONDS = 40.0  # a cluster that is well takes a few
_ACTOR_SECONDS = 45  # in which one starts, on a cluster that takes us
_ELASTIC_START_SECONDS = 30


class Hooks(Protocol):
    """What a study does as its trials come and go; called in the driver's main thread."""

    def next_trial(self) -> TrialRecord | None: ...

    def started(self, number: int) -> None: ...

    def begun(self, number: int, crew: str) -> None: ...

    def reported(self, number: int, metrics: dict[str, Any]) -> None: ...

    def ended(self, number: int, *, pruned: bool) -> None: ...

    def failed(self, number: int, failure: str, message: str) -> None: ...

    def lost(self, number: int, message: str) -> None: ...

    def noted(self, number: int, line: str) -> None: ...

    def tick(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What there is to run on.

    Attributes:
        cpus, gpus: of all nodes now.
        is_local: Ray was started by this process, on this machine.
        nodes: that live now; without them all is taken to be one node.
    """

    cpus: int
    gpus: int
    is_local: bool
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What the trials take.

    Attributes:
        workers: of one trial.
        min_workers: with which it may go on when there is no room for more.
        cpus: of one worker.
        use_gpu: one for each worker.
        concurrent: trials at a time. Tune does not count the workers of a trial: without this
            limit trials hold each other up for ever.
    """

    workers: int
    cpus: int
    use_gpu: bool
    concurrent: int
    min_workers: int = 0  # 0: no fewer than `workers`


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopping:
    """Successive halving: what is clearly behind after `grace` epochs, and so on, is stopped."""

    grace: int
    epochs: int
    reduction: float = 2.0


class _HeadStart:
    """Ray on this machine, started in a thread of its own while the main one checks the data.

    The thread stays until Ray has ended: Linux ends Ray's processes with the thread that made them.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_done = threading.Event()
        self._is_over = threading.Event()
        self._cluster: Cluster | None = None
        self._error: CpfeanError | None = None
        threading.Thread(target=self._run, name="ray", daemon=True).start()
        atexit.register(self.end)

    def cluster(self) -> Cluster:
        """What there is; waits for Ray.

        Raises:
            ConfigError, ServiceError: Ray does not start.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._cluster is not None
        return self._cluster

    def wait(self) -> None:
        """Until Ray has started, or has not."""
        self._is_done.wait()

    def end(self) -> None:
        """At the end of the process: ends Ray, once it has started; half of it could not be."""
        if not self._is_over.is_set():
            self.wait()
            disconnect()

    def let_go(self) -> None:
        """Ray has ended."""
        self._is_over.set()

    def _run(self) -> None:
        try:
            self._cluster = _connected(self._settings, _end)
        except CpfeanError as error:
            self._error = error
        except BaseException as error:
            self._error = ServiceError(f"Ray does not start: {error!r}")
            raise
        finally:
            self._is_done.set()
        self._is_over.wait()


_head_start: _HeadStart | None = None


def start_early(settings: Settings) -> None:
    """Begins to start Ray on this machine and returns; `connect` then waits for the rest of it.

    Without effect where a cluster is to be joined. What is started ends with `disconnect`, or else
    with the process.
    """
    global _head_start
    if settings.address is None and _head_start is None:
        _head_start = _HeadStart(settings)


def wait_for_start() -> None:
    """Waits until what `start_early` began is done, well or badly, if it was called."""
    if _head_start is not None:
        _head_start.wait()


def connect(
    settings: Settings, *, give_up: Callable[[ServiceError], None] | None = None
) -> Cluster:
    """Joins the cluster, or starts Ray on this machine.

    Args:
        give_up: ends the process where Ray does not come back from joining a cluster, from another
            thread; None says why and exits.

    Raises:
        ConfigError: a folder for Ray's files that cannot be.
        ServiceError: no cluster at the address, or Ray does not start.
    """
    if settings.address is None and _head_start is not None:
        return _head_start.cluster()
    return _connected(settings, give_up or _end)


def _connected(settings: Settings, give_up: Callable[[ServiceError], None]) -> Cluster:
    _check(settings)
    cpus = usable_cpus()
    try:
        with _sigterm_kept():
            if settings.address is None:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,  # ten processes that would start first
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=200 * 2**20,
                )
            else:
                _join(settings, give_up)
        if settings.address is not None:
            _check_actors_start()
    # Ray raises many kinds here, down to OSError and its own.
    except Exception as error:
        where, hint = settings.address or "on this machine", ""
        if settings.address:
            where += f", from {settings.address_source}"
            hint = (
                "\nDoes this machine have the cluster's ~/.ray/auth_token? If the cluster wants "
                "none, set RAY_AUTH_MODE=disabled. Without the cluster: --address local."
            )
        raise ServiceError(f"Ray does not start or answer ({where}): {error}{hint}") from error
    # An instance that a neighbour started on this host must not be taken for ours.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return cluster_now(is_local=settings.address is None)


def _check(settings: Settings) -> None:
    """Finds in seconds what Ray would try for many minutes, or fall over in the middle of."""
    settings.check_address()
    if settings.address is None:
        check_this_host()
        # Ray's own parts read it, and take it for theirs.
        os.environ.pop("RAY_ADDRESS", None)
        _give_a_token()
    else:
        check_head(parse_address(settings.address, source=settings.address_source))


def _join(settings: Settings, give_up: Callable[[ServiceError], None]) -> None:
    """Joins the cluster; where its part on this host is dead Ray waits, and ends the process."""
    error = ServiceError(
        f"the head of the Ray cluster at {settings.address} (from {settings.address_source}) "
        f"answers, and cannot be joined from this machine within {_JOIN_SECONDS:.0f} s. Is this "
        "one of its machines, and does `ray status` list it? `ray start` on it joins; --address "
        "local runs on this machine alone."
    )
    timer = threading.Timer(_JOIN_SECONDS, give_up, [error])
    timer.daemon = True
    timer.start()
    try:
        ray.init(address=settings.address, log_to_driver=False, logging_level=logging.ERROR)
    finally:
        timer.cancel()


def _end(error: ServiceError) -> None:
    """Ends the process from another thread, as the main thread hangs in Ray."""
    print(error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def _give_a_token() -> None:
    """Ray started here asks for a token, and makes it in the home; without one it is in memory."""
    there = os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(token_file())
    if not there and not can_be_written(Path.home() / ".ray"):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def cluster_now(*, is_local: bool) -> Cluster:
    """What the Ray that this process has joined or started has now."""
    nodes = _nodes()
    return Cluster(
        cpus=sum(node.cpus for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        is_local=is_local,
        nodes=nodes,
    )


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Undoes what Ray does to SIGTERM as it starts: it would end this process without a word."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM and callable(ours):
            ours(signal.SIGTERM, None)  # what Ray has taken for its own
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours or signal.SIG_DFL)


def this_machine() -> Cluster:
    """What Ray would find here, without starting it."""
    import torch

    cpus, gpus = usable_cpus(), torch.cuda.device_count()
    return Cluster(cpus=cpus, gpus=gpus, is_local=True, nodes=(Node(cpus=cpus, gpus=gpus),))


def look_at(settings: Settings) -> tuple[Cluster, list[str]]:
    """A cluster and its nodes' types; nothing is started on it.

    Raises:
        ServiceError: no cluster at the address.
    """
    _check(settings)
    try:
        _join(settings, _end)
        return cluster_now(is_local=False), node_types()
    except Exception as error:  # Ray raises many kinds here
        raise ServiceError(f"Ray does not answer ({settings.address}): {error}") from error
    finally:
        ray.shutdown()


def _nodes() -> tuple[Node, ...]:
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return tuple(
        Node(cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0))) for has in resources
    )


def node_types() -> list[str]:
    """The type of every node that lives, as the autoscaler's file calls it; none if Ray is gone."""
    try:
        labels = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    except Exception:  # Ray raises many kinds; what is lost is told elsewhere
        return []
    return [of.get("ray.io/node-group") or OTHER for of in labels]


def room_for(resources: Resources) -> Room | None:
    """A trial beside the cluster as it is now; None if the cluster does not answer."""
    try:
        nodes = _nodes()
        room = Room(
            workers=resources.min_workers or resources.workers,
            cpus=resources.cpus,
            use_gpu=resources.use_gpu,
            nodes=nodes,
            grows=_grows(),
        )
    except Exception:  # as above
        return None
    return room


def _grows() -> bool | None:
    """Whether the autoscaler adds nodes for what waits now; None if there is no telling.

    A head that was started without an autoscaler's file has one that only looks on. Ray's second
    autoscaler tells what it cannot give whatever it adds; the first one does not.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        client = ray._raylet.GcsClient(ray.get_runtime_context().gcs_address)
        reply = GetClusterStatusReply()
        reply.ParseFromString(client.get_cluster_status(timeout_s=10))
        state = reply.autoscaling_state
        if state.pending_instance_requests or state.pending_instances:
            return True
        # Those that an autoscaler starts know the machine that they are; where none does, this one
        # only looks on, and cannot even tell that: parts of a resource, of which our trials have
        # one, are an error in its own list of what there is.
        if not any(node.instance_id for node in reply.cluster_resource_state.node_states):
            return False
        cannot = state.infeasible_gang_resource_requests or state.infeasible_resource_requests
        return False if cannot else None
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    report = status.get("autoscaler_report")
    if not report:
        return None
    if report["pending_nodes"] or report["pending_launches"]:
        return True
    # Nodes that nobody described go by their own ids.
    known = report["active_nodes"]
    return False if known and all(name.startswith("node_") for name in known) else None


def _check_actors_start() -> None:
    """Starts an actor: where client and cluster disagree about tokens, that alone goes wrong."""
    probe = ray.remote(num_cpus=0)(_Probe).remote()
    ray.get(probe.answer.remote(), timeout=_ACTOR_SECONDS)


class _Probe:
    def answer(self) -> None: ...


def disconnect() -> None:
    """Leaves the cluster; ends Ray if this process started it."""
    global _head_start
    os.environ.pop("RAY_ADDRESS", None)
    ray.shutdown()
    early, _head_start = _head_start, None
    if early is not None:
        early.let_go()


def share_out(cluster: Cluster, *, workers: int, trials: int, min_workers: int = 0) -> Resources:
    """How many trials of so many workers run at a time, and with what.

    Raises:
        ServiceError: one trial alone asks for more than there is.
    """
    use_gpu = cluster.gpus > 0
    there, what = (cluster.gpus, "GPUs") if use_gpu else (cluster.cpus, "CPUs")
    if workers > there and cluster.is_local:
        raise ServiceError(
            f"{workers} workers need {workers} {what} and this machine has {there}; lower "
            "--workers or give a cluster with --address."
        )
    # A cluster may grow to what a first trial waits for; one trial at a time is always right.
    concurrent = max(1, min(trials, there // workers))
    cpus = max(1, cluster.cpus // (workers * concurrent))
    if not cluster.is_local:
        cpus = min(cpus, 8)  # the nodes that join later may be smaller
    # A worker is on one node: what all nodes have together is no measure of it.
    fitting = min(workers * concurrent, places(cluster.nodes, cpus=1, use_gpu=use_gpu))
    while cpus > 1 and places(cluster.nodes, cpus=cpus, use_gpu=use_gpu) < fitting:
        cpus -= 1
    return Resources(
        workers=workers,
        cpus=cpus,
        use_gpu=use_gpu,
        concurrent=concurrent,
        min_workers=min_workers,
    )


def run_trials(
    hooks: Hooks,
    *,
    num_trials: int,
    resources: Resources,
    settings: Settings,
    run_name: str,
    train_storage: str,
    tune_storage: str,
    early_stopping: EarlyStopping | None,
    test: bool,
    past: Iterable[TrialRecord],
) -> None:
    """Runs trials until the hooks have no more.

    Args:
        num_trials: at most so many are asked for.
        train_storage: folder or URL of the checkpoints; all nodes reach it.
        tune_storage: folder of Tune's own files.
        test: whether workers test each trial's best epoch on the test split.
        past: trials of earlier drivers; the scheduler compares with them.
    """
    job = {
        "cache_dir": str(settings.cache_dir),
        "workers": resources.workers,
        "min_workers": resources.min_workers or resources.workers,
        "silence": settings.silence,
        "cpus": resources.cpus,
        "use_gpu": resources.use_gpu,
        "is_local": settings.address is None,
        "storage": train_storage,
        "run_name": run_name,
        "test": test,
    }

    # Tune repeats as an error what the study has said of its trials.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scheduler: _Halving | FIFOScheduler = FIFOScheduler()
    if early_stopping is not None:
        scheduler = _Halving(early_stopping, list(past))
    # On one machine the processes of several trials only slow each other down as they start.
    source = _Source(hooks, first_alone=settings.address is None)
    watcher = _Watcher(hooks, scheduler, begun=source.begun)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_Trial, job=job), tune.PlacementGroupFactory([{HEAD: 0.001}])
        ),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler,
            num_samples=(1 + MAX_RETRIES) * num_trials,  # what is lost is a new trial to Tune
            max_concurrent_trials=resources.concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=tune_storage,
            callbacks=[watcher],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        watcher.free_all()


class _Trial(tune.Trainable):
    """One trial after another, each trained by the crew; one step is one piece of news.

    Tune keeps the process for the next trial, and with it the crew.
    """

    def setup(self, config: dict[str, Any], job: dict[str, Any] | None = None) -> None:
        prepare_environment()
        assert job is not None
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(job["silence"]))
        if job["min_workers"] < job["workers"]:
            # Right after a host is lost it is still counted on; the next count will be right.
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_ELASTIC_START_SECONDS)
        if job["is_local"]:
            # Nobody takes this machine away; that is one process less.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        self._job = job
        self._crew: Crew | None = None
        self._workers = job["workers"]
        self._begin()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin()
        return True

    def _begin(self) -> None:
        self._given = False
        self._epoch = 0
        self._retries = 0
        self._first_loss = ""

    def step(self) -> dict[str, Any]:
        try:
            return self._news()
        except (TrainingFailedError, RayActorError, ServiceError, CheckpointError) as error:
            refusal = _refusal(error)
            what = refusal or self._lost(error)
            self._dismiss()
            if _has_waited(error):
                return {"done": False}  # how long that may go on is for the study to say
            failure, message = classify(error)
            self._retries += failure == "infra"
            if failure not in _RETRIED or self._retries > MAX_RETRIES:
                if self._first_loss not in ("", what):
                    message = f"It began with: {self._first_loss}.\n{message}"
                # As news and not as an error, which would cost this process as well.
                return {"failure": failure, "message": message, "done": True}
            if failure == "infra":
                self._first_loss = self._first_loss or what
                line = f"{what}; retry {self._retries}/{MAX_RETRIES} from epoch {self._epoch}."
                if refusal:
                    time.sleep(_PAUSE_SECONDS * self._retries)
            elif any(isinstance(cause, StoppedError) for cause in _causes(error)):
                line = f"preempted: {message} It goes on there."
            else:
                line = f"preempted; goes on from epoch {self._epoch}."
            return {"note": line, "done": False}

    def cleanup(self) -> None:
        self._dismiss()

    def _news(self) -> dict[str, Any]:
        name = f"{self._job['run_name']}-{self.config['number']:03d}"
        if not self._given and self._workers < self._job["workers"] and self._has_room():
            self._dismiss()
        if self._crew is None:
            self._crew = Crew(self._job, name=f"crew-{uuid.uuid4().hex[:8]}")
        if self._given:
            self._crew.go_on(self._epoch)
        else:
            folder = CheckpointFolder(f"{self._job['storage']}/{name}")
            folder.create()
            trial = {
                "config": json.loads(self.config["config"]),
                "folder": folder.uri,
                "attempt": folder.new_attempt(),
                "test": self._job["test"],
            }
            self._crew.train(trial)
            self._given = True
        news = self._crew.news()
        self._epoch = int(news.get("epoch", news.get("resumed", self._epoch)))
        if "begun" in news:
            news |= {"crew": self._crew.name}
        workers, most = news.get("workers", self._workers), self._job["workers"]
        if workers != self._workers:
            self._workers = workers
            news |= {"note": f"trained by {workers} of {most} workers; the batch is the same."}
        return news | {"done": bool(news.get("ended"))}

    def _has_room(self) -> bool:
        """Whether one more worker would fit; only between trials is it worth a new crew."""
        kind, number = ("GPU", 1) if self._job["use_gpu"] else ("CPU", self._job["cpus"])
        return bool(ray.available_resources().get(kind, 0) >= number)

    def _lost(self, error: BaseException) -> str:
        """Who is lost, as far as it is known; what may come back of them is fenced."""
        silent, gone = lost_ranks(error)
        hosts = {} if self._crew is None else self._crew.hosts()
        if not (silent or gone):
            # Those who waited in vain are told of first; if all but one did, it is that one.
            missing = sorted(set(hosts) - waiting_ranks(error))
            gone = missing if len(missing) == 1 else []
        what = "worker lost" if gone or not silent else f"node silent {self._job['silence']} s"
        named = ", ".join(f"rank {rank} on {hosts.get(rank, '?')}" for rank in gone or silent)
        return f"{what} ({named}), fenced" if named else f"{what}, fenced"

    def _dismiss(self) -> None:
        crew, self._crew, self._given = self._crew, None, False
        if crew is not None:
            crew.close(seconds=_CLOSE_SECONDS)


def classify(error: BaseException) -> tuple[str, str]:
    """The class of a failure and its last lines.

    Classes: preempted, infra (something was lost), oom, diverged, data, config, bug.
    """
    causes = list(_causes(error))
    if known := known_failure(causes):
        failure, message = known
        return failure, _tail(message)
    for cause in causes:
        if isinstance(cause, OutOfMemoryError):  # Ray has ended a process before the system would
            return "oom", _tail(str(cause))
    if any(_is_preemption(cause) for cause in causes):
        return "preempted", _tail(str(error))
    # A worker with an error of its own takes the others' connections along: then it is to blame.
    roots = [cause for cause in causes if not _inner(cause)]
    if any(map(_is_loss, causes)) and all(map(_is_loss, roots)):
        return "infra", _tail(str(error))
    blamed = [cause for cause in roots if not _is_loss(cause)]
    return "bug", _tail(str((blamed or [error])[0]))


def lost_ranks(error: BaseException) -> tuple[list[int], list[int]]:
    """Ranks that do not answer any more, and ranks that are gone."""
    silent: list[int] = []
    gone: list[int] = []
    for cause in _causes(error):
        if isinstance(cause, WorkerGroupError):
            for rank, failure in sorted(cause.worker_failures.items()):
                if type(failure).__name__.startswith("WorkerHealthCheckTimeout"):
                    silent.append(rank)
                elif _is_loss(failure):
                    gone.append(rank)
    return silent, gone


def waiting_ranks(error: BaseException) -> set[int]:
    """Ranks that waited for another one in vain."""
    return {
        rank
        for cause in _causes(error)
        if isinstance(cause, WorkerGroupError)
        for rank, failure in cause.worker_failures.items()
        if any(isinstance(inner, LostPartnerError) for inner in _causes(failure))
    }


def _refusal(error: BaseException) -> str:
    """What a disk or a store has said, if that is what is wrong."""
    for cause in _causes(error):
        if isinstance(cause, ServiceError):
            return str(cause).splitlines()[0].rstrip(".")
    return ""


def _has_waited(error: BaseException) -> bool:
    """Whether workers were waited for in vain: there is no room for them, and no failure."""
    return any(
        type(cause).__name__.startswith("WorkerGroupStartupTimeout") for cause in _causes(error)
    )


def _is_preemption(error: BaseException) -> bool:
    """Whether Ray knows that the host was taken away."""
    return type(error).__name__ == "PreemptionError" or bool(getattr(error, "preempted", False))


def _is_loss(error: BaseException) -> bool:
    """Whether a process, node or connection was lost; names and texts differ with who noticed.

    Often it is the other workers of a lost host: their next exchange with it fails at once, long
    before Ray takes the host for dead.
    """
    lost = ("WorkerHealthCheck", "WorkerGroupStartup", "InsufficientClusterResources", "NodeDied")
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, RayActorError | ConnectionError | TimeoutError)
        or type(error).__name__.startswith(lost)
        or "DistError" in names  # torch's, of NCCL and of the rendezvous
        or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
    )


def _causes(error: BaseException) -> Iterable[BaseException]:
    """The error and all that is wrapped in it, outermost first."""
    todo: list[BaseException] = [error]
    seen: set[int] = set()
    while todo:
        current = todo.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += _inner(current)


def _inner(error: BaseException) -> list[BaseException]:
    """What an error wraps."""
    wrapped: list[Any] = []
    if isinstance(error, WorkerGroupError):
        failures = [failure for _, failure in sorted(error.worker_failures.items())]
        # Those that only waited for it in vain do not know the cause.
        wrapped += [one for one in failures if not isinstance(one, LostPartnerError)] or failures
    names = ("cause", "_base_exc", "controller_failure", "health_check_failure", "__cause__")
    wrapped += [getattr(error, name, None) for name in names]
    return [one for one in wrapped if isinstance(one, BaseException)]


def _tail(text: str, *, lines: int = 30) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


class _Source(Searcher):
    """Hands the study's trials to Tune, one at a time."""

    def __init__(self, hooks: Hooks, *, first_alone: bool = False) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._hooks = hooks
        self._running: set[str] = set()
        self._waits = first_alone

    def begun(self) -> None:
        """A trial has its workers: the others may be started."""
        self._waits = False

    def suggest(self, trial_id: str) -> Any:  # FINISHED is a text, whatever Tune's types say
        if self._waits and self._running:
            return None  # not now
        record = self._hooks.next_trial()
        if record is None:
            # Tune takes that as final, and a trial that runs may be lost and come back.
            return None if self._running else Searcher.FINISHED
        self._running.add(trial_id)
        return {"number": record.number, "config": json.dumps(record.config)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # What came of it the study tells itself, with states that Tune does not pass on.
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Tune takes snapshots; ours are the records."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a study is resumed from its records, not from Tune's snapshot")

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return (_Source, (None,))  # in a snapshot: nothing of the driver's state


class _Halving(ASHAScheduler):
    """ASHA that knows the trials of earlier drivers, and which trials it stopped itself."""

    def __init__(self, rule: EarlyStopping, past: list[TrialRecord]) -> None:
        # One epoch more than there are: a trial that reaches its end ends by itself, which frees
        # its workers in good order.
        super().__init__(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=rule.epochs + 1,
            grace_period=rule.grace,
            reduction_factor=rule.reduction,
        )
        self.stopped: set[str] = set()
        self._past = {record.number: record for record in past}
        for record in past:
            if record.settled and record.history:
                settled: Any = _Settled(f"settled-{record.number}")
                nobody: Any = None
                super().on_trial_add(nobody, settled)
                for row in record.history:
                    super().on_trial_result(nobody, settled, row)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        known = self._past.get(trial.config["number"])
        # The epochs before a restart were judged when they came.
        for row in known.history if known else ():
            super().on_trial_result(tune_controller, trial, row)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP and not result.get("ended"):
            self.stopped.add(trial.trial_id)
            return decision
        # What has come to its end anyway is finished, however it compares.
        return TrialScheduler.CONTINUE if decision == TrialScheduler.STOP else decision


@dataclass(frozen=True, slots=True)
class _Settled:
    """All that ASHA asks of a trial."""

    trial_id: str


class _Watcher(tune.Callback):
    """Tells the study what happens, and frees what a lost crew holds."""

    def __init__(
        self, hooks: Hooks, scheduler: Any, *, begun: Callable[[], None] = lambda: None
    ) -> None:
        self._hooks = hooks
        self._begun = begun
        self._scheduler = scheduler
        self._groups: dict[int, str] = {}

    def __reduce__(self) -> tuple[type, tuple[None, None]]:
        return (_Watcher, (None, None))  # in a snapshot: nothing of the driver's state

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._hooks.tick()

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._hooks.started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any
    ) -> None:
        number = trial.config["number"]
        if "note" in result:
            self._hooks.noted(number, result["note"])
        if "begun" in result:
            group = result["placement_group"]
            others = {n: known for n, known in self._groups.items() if known != group}
            self._groups = others | {number: group}
            self._begun()
            self._hooks.begun(number, result["crew"])
        elif "history" in result:
            self._hooks.reported(number, result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        number = trial.config["number"]
        last = trial.last_result or {}
        if "failure" in last:
            self._free(number)
            self._hooks.failed(number, last["failure"], last["message"])
        else:
            pruned = trial.trial_id in getattr(self._scheduler, "stopped", ())
            self._hooks.ended(number, pruned=pruned)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        number = trial.config["number"]
        self._free(number)
        failure, message = classify(_error_of(trial))
        if failure == "infra":
            self._hooks.lost(number, message)
        else:
            self._hooks.failed(number, failure, message)

    def free_all(self) -> None:
        """At the end: crews that Tune has not let end by themselves."""
        for number in list(self._groups):
            self._free(number)

    def _free(self, number: int) -> None:
        """Removes the workers of a trial, which failed or whose process is gone."""
        free(self._groups.pop(number, ""))


def _error_of(trial: Trial) -> BaseException:
    """What a trial failed with.

    Tune reads it from the storage, where it has not arrived yet when callbacks are told.
    """
    if trial.pickled_error_file and Path(trial.pickled_error_file).is_file():
        return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    if trial.error_file and Path(trial.error_file).is_file():
        return RuntimeError(Path(trial.error_file).read_text(encoding="utf-8"))
    return RuntimeError("no error was left behind")


__all__ = [
    "Cluster",
    "EarlyStopping",
    "Hooks",
    "Resources",
    "classify",
    "connect",
    "disconnect",
    "run_trials",
    "share_out",
]
