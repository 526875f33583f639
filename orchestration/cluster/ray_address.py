"""Which Ray cluster is meant: every form that addresses are given in, and the head found here."""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cpfean import commands
from cpfean.errors import ConfigError, ServiceError
from cpfean.folders import can_be_written, say_once

_SECONDS = 15.0  # in which a head that lives has answered
_FEWEST_FILES = 256  # that suffice for all that Ray starts here
_LONGEST_SOCKET = 107  # bytes of the path of a socket, on Linux


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """The head of a cluster.

    Attributes:
        host, port: of its GCS, as sockets take them.
        source: who names it: a flag, a variable, or a file that Ray has left.
    """

    host: str
    port: int
    source: str

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_cluster(asked: str | None, environment: Mapping[str, str]) -> Address | None:
    """The cluster that is asked for, or runs here; None: none, Ray is started on this machine.

    What is empty or blank is not asked. A head on this host that another user has started is not
    joined by itself: nobody has said that it may be used.

    Args:
        asked: the value of --address.
        environment: RAY_ADDRESS is read if that is not given.

    Raises:
        ConfigError: what is no address of a head; says what it is instead.
        ServiceError: "auto", and no head runs here.
    """
    for value, source in ((asked, "--address"), (environment.get("RAY_ADDRESS"), "RAY_ADDRESS")):
        value = (value or "").strip()
        if value == "local":
            return None
        if value == "auto":
            found = running_head()
            if found is None:
                raise ServiceError(
                    f'{source} is "auto", the cluster of this machine, and none runs here (there '
                    f"is no live one in {_head_file()}). Start one with `ray start --head`, or run "
                    "without: --address local."
                )
            return found
        if value:
            return parse_address(value, source=source)
    found = running_head()
    if found is not None and (owner := _other_owner(Path(found.source))):
        say_once(
            f"a Ray cluster of {owner} runs at {found} ({found.source}); nobody asked for it, so "
            f"it is not joined: --address {found} does."
        )
        return None
    return found


def parse_address(value: str, *, source: str) -> Address:
    """The head that an address names.

    Args:
        source: the flag or variable that it is the value of.

    Raises:
        ConfigError: another form; says which, and what helps.
    """
    shown = re.sub(r"//[^/@]*@", "//***@", value)[:200]
    scheme, is_url, _ = value.partition("://")
    instead = "--address local uses this machine alone"
    if source == "RAY_ADDRESS":
        instead += ", and without RAY_ADDRESS a cluster is used whose head runs here"
    if is_url and scheme.lower() in ("http", "https"):
        job = commands.submit_job(shown, Path(sys.argv[0]).name, sys.argv[1:])
        raise ConfigError(
            f"{source} is {shown!r}, the address of Ray's job server; a study joins a cluster at "
            f"host:port of its head (port 6379 by default), on one of its machines. {instead}; "
            f"as a job it is sent there by\n  {job}"
        )
    if is_url and scheme.lower() == "ray":
        raise ConfigError(
            f"{source} is {shown!r}, the address of Ray's client server; a study joins a cluster "
            "at host:port of its head (port 6379 by default), on one of its machines, or is sent "
            f"there with `ray job submit`. {instead}."
        )
    if is_url:
        raise ConfigError(
            f"{source} must be host:port of a Ray head; got {shown!r}, which is a URL. {instead}."
        )
    try:
        parts = urlsplit(f"//{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    address = Address(host=host or "", port=port or 0, source=source)
    # A user, a path or a query is part of no address, and Ray would take it for the host's name.
    if not host or not port or str(address) != value.lower() or re.search(r"\s", value):
        hint = ""
        if re.fullmatch(r"[A-Za-z0-9._-]+", value) and not value.isdecimal():
            hint = f" It has no port: {value}:6379 is where a head listens by default."
        elif value.count(":") > 1 and not value.startswith("["):
            hint = " An IPv6 address goes in brackets: [::1]:6379."
        raise ConfigError(
            f'{source} must be host:port of a Ray head (port 6379 by default), "auto" or "local"; '
            f"got {shown!r}.{hint} {instead}."
        )
    return address


def running_head() -> Address | None:
    """The head that was started on this host by `ray start`, if something listens there."""
    file = _head_file()
    try:
        address = parse_address(file.read_text(encoding="utf-8").strip(), source=str(file))
        socket.create_connection((address.host, address.port), timeout=1).close()
    except (OSError, ValueError, ConfigError):
        return None  # never started, or left behind by one that is gone
    return address


def ray_folder() -> Path:
    """The folder in which Ray keeps its files on this host."""
    return _ray_folder()[0]


def _ray_folder() -> tuple[Path, str]:
    """The folder, and the variable that names it."""
    variables = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    for name in variables:
        if folder := os.environ.get(name):
            return Path(folder), name
    return Path("/tmp"), "the default"


def check_this_host() -> None:
    """Refuses what Ray cannot start with: it would fall over half way, or try for ever.

    Raises:
        ConfigError: its folder cannot be written, or the sockets in it would have too long a path;
            or too few files may be open.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FEWEST_FILES:
        raise ConfigError(
            f"only {files} files may be open at a time here, and Ray's processes need "
            f"{_FEWEST_FILES}; raise it with `ulimit -n 4096` (in containers --ulimit nofile=4096)."
        )
    folder, source = _ray_folder()
    if not folder.is_absolute():
        raise ConfigError(
            f"Ray's files need an absolute folder; {source} is {str(folder)!r}. Set RAY_TMPDIR."
        )
    # An older Ray of another user may have left its folder; only what is in it has to be ours.
    if not can_be_written(folder / "ray"):
        raise ConfigError(
            f"Ray's files cannot be written: {folder / 'ray'} ({source}). Set RAY_TMPDIR to a "
            "folder where this user may write, with a short path."
        )
    sockets = folder / "ray" / f"session_{'0' * 26}_{os.getpid()}" / "sockets" / "plasma_store"
    if len(os.fsencode(sockets)) > _LONGEST_SOCKET:
        most = _LONGEST_SOCKET - len(os.fsencode(sockets)) + len(os.fsencode(folder))
        raise ConfigError(
            f"the path of Ray's files is too long for sockets: {folder} ({source}) has "
            f"{len(os.fsencode(folder))} bytes of at most {most}. Set RAY_TMPDIR to a shorter "
            "one, such as /tmp."
        )


def check_head(address: Address, *, seconds: float = _SECONDS) -> None:
    """Asks a head whether it lives, in seconds; Ray itself would try for many minutes.

    Args:
        seconds: in which it has to answer.

    Raises:
        ServiceError: what answers is no head, wants another token, or is of another version.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    without = "--address local runs on this machine alone"
    try:
        # What Ray makes of it: a name of this host becomes the address that others know it by.
        there = canonicalize_bootstrap_address(str(address)) or str(address)
        channel = init_grpc_channel(there, options=[("grpc.enable_http_proxy", 0)])
        with channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            reply = stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=seconds)
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ServiceError(
                f"the Ray cluster at {address} ({address.source}) does not take the token of this "
                "user. Is it yours? Then give this machine its ~/.ray/auth_token (it is looked for "
                "in RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH too); if it wants none, set "
                f"RAY_AUTH_MODE=disabled. {without}."
            ) from None
        slow = code == grpc.StatusCode.DEADLINE_EXCEEDED
        what = f"does not answer within {seconds:.0f} s" if slow else "is no head of a Ray cluster"
        hint = ""
        if os.path.isabs(address.source):
            hint = f"{address.source} names it, and may have been left by a cluster that is gone. "
        elif address.port in (8265, 10001):
            hint = "Ray's pages and client have that port, its head 6379 by default. "
        raise ServiceError(
            f"what listens at {address} (from {address.source}) {what}. {hint}Start one with `ray "
            f"start --head`, name another with --address, or: {without}."
        ) from None
    if reply.ray_version and reply.ray_version != ray.__version__:
        raise ServiceError(
            f"the Ray cluster at {address} (from {address.source}) runs Ray {reply.ray_version}, "
            f"and this is {ray.__version__}: both must be the same, which `ray up` sees to. "
            f"{without}."
        )


def _head_file() -> Path:
    return ray_folder() / "ray" / "ray_current_cluster"


def _other_owner(file: Path) -> str:
    """Who has written a file, if that is another user."""
    try:
        owner = file.stat().st_uid
    except OSError:
        return ""
    if owner == os.getuid():
        return ""
    try:
        return file.owner()
    except (OSError, KeyError):  # gone meanwhile, or a user without a name
        return f"user {owner}"
