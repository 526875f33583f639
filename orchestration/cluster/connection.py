"""Joining a Ray cluster or starting Ray on this machine, ahead of time too, and leaving it."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path

import ray

from cpfean.errors import CpfeanError, ServiceError
from cpfean.folders import can_be_written
from cpfean.threads import usable_cpus
from orchestration.cluster.capacity import Cluster
from orchestration.cluster.nodes import cluster_now, node_types
from orchestration.cluster.ray_address import check_head, check_this_host, parse_address
from orchestration.settings import Settings, token_file

_JOIN_SECONDS = 40.0  # a cluster that is well takes a few
_ACTOR_SECONDS = 45  # in which one starts, on a cluster that takes us


class _HeadStart:
    """Ray on this machine, started in a thread of its own while the main one checks the data.

    The thread stays until Ray has ended: Linux ends Ray's processes with the thread that made them.
    """

    def __init__(self, settings: Settings) -> None:
        self.cluster: Future[Cluster] = Future()
        self.is_over = threading.Event()  # as Ray has ended
        threading.Thread(target=self._run, args=[settings], name="ray", daemon=True).start()
        atexit.register(self._end)

    def _run(self, settings: Settings) -> None:
        try:
            self.cluster.set_result(_connected(settings, end_process))
        except CpfeanError as error:
            self.cluster.set_exception(error)
        except BaseException as error:
            self.cluster.set_exception(ServiceError(f"Ray does not start: {error!r}"))
            raise
        self.is_over.wait()

    def _end(self) -> None:
        """At the end of the process: ends Ray, once it has started; half of it could not be."""
        if not self.is_over.is_set():
            wait([self.cluster])
            disconnect()


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
        wait([_head_start.cluster])


def connect(
    settings: Settings, *, give_up: Callable[[ServiceError], None] | None = None
) -> Cluster:
    """Joins the cluster, or starts Ray on this machine.

    Args:
        give_up: ends the process from another thread, where joining never ends; None: says why.

    Raises:
        ConfigError: a folder for Ray's files that cannot be.
        ServiceError: no cluster at the address, or Ray does not start.
    """
    if settings.address is None and _head_start is not None:
        return _head_start.cluster.result()
    return _connected(settings, give_up or end_process)


def _connected(settings: Settings, give_up: Callable[[ServiceError], None]) -> Cluster:
    _check(settings)
    try:
        with _sigterm_kept():
            if settings.address is None:
                ray.init(
                    address="local",
                    num_cpus=usable_cpus(),
                    include_dashboard=False,  # ten processes that would start first
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=200 * 2**20,
                )
            else:
                _join(settings, give_up)
        if settings.address is not None:
            # Where client and cluster disagree about tokens, an actor alone does not start.
            probe = ray.remote(num_cpus=0)(_Probe).remote()
            ray.get(probe.answer.remote(), timeout=_ACTOR_SECONDS)
    # Ray raises many kinds here, down to OSError and its own.
    except Exception as error:
        where, hint = "on this machine", ""
        if settings.address:
            where = f"{settings.address}, from {settings.address_source}"
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
    if settings.address is not None:
        settings.check_address()
        check_head(parse_address(settings.address, source=settings.address_source))
        return
    check_this_host()
    # Ray's own parts read it, and take it for theirs.
    os.environ.pop("RAY_ADDRESS", None)
    # Ray started here asks for a token, and makes it in the home; without one it is in memory.
    has_token = os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(token_file())
    if not has_token and not can_be_written(Path.home() / ".ray"):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


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


def end_process(error: ServiceError) -> None:
    """Ends the process from another thread, as the main thread hangs in Ray."""
    print(error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)


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


def look_at(settings: Settings) -> tuple[Cluster, list[str]]:
    """A cluster and its nodes' types, with nothing started; raises ServiceError if none answers."""
    _check(settings)
    try:
        _join(settings, end_process)
        return cluster_now(is_local=False), node_types()
    except Exception as error:  # Ray raises many kinds here
        raise ServiceError(f"Ray does not answer ({settings.address}): {error}") from error
    finally:
        ray.shutdown()


class _Probe:
    def answer(self) -> None: ...


def disconnect() -> None:
    """Leaves the cluster; ends Ray if this process started it."""
    global _head_start
    os.environ.pop("RAY_ADDRESS", None)
    ray.shutdown()
    early, _head_start = _head_start, None
    if early is not None:
        early.is_over.set()
