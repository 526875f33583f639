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

    Raises:
        ConfigError: --address or RAY_ADDRESS is no address of a head; says what it is instead.
        ServiceError: "auto", and no head runs here.
    """
    for value, source in ((asked, "--address"), (environment.get("RAY_ADDRESS"), "RAY_ADDRESS")):
        value = (value or "").strip()
        if value == "local":
            return None
        if value == "auto":
            if found := running_head():
                return found
            raise ServiceError(
                f'{source} is "auto", and no cluster of this machine lives ({_head_file()}). Start '
                "one with `ray start --head`, or run without: --address local."
            )
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
    """The head that an address names; raises ConfigError, which says what else it is."""
    try:
        parts = urlsplit(f"//{value}")
        address = Address(host=parts.hostname or "", port=parts.port or 0, source=source)
    except ValueError:
        address = Address(host="", port=0, source=source)
    # A user, a path or a query is part of no address, and Ray would take it for the host's name.
    is_whole = str(address) == value.lower() and not re.search(r"\s", value)
    if address.host and address.port and is_whole:
        return address
    instead = "--address local uses this machine alone"
    if source == "RAY_ADDRESS":
        instead += ", and without RAY_ADDRESS a cluster is used whose head runs here"
    shown = re.sub(r"//[^/@]*@", "//***@", value)[:200]
    raise ConfigError(
        f'{source} must be host:port of a Ray head (port 6379 by default), "auto" or "local" '
        f"({instead}). {shown!r} {_what_it_is(value, shown)}"
    )


def _what_it_is(value: str, shown: str) -> str:
    """Of what is no address of a head: what it is instead, and what helps."""
    scheme, is_url, _ = value.partition("://")
    if is_url and scheme.lower() in ("http", "https"):
        job = commands.submit_job(shown, Path(sys.argv[0]).name, sys.argv[1:])
        return f"is the address of Ray's job server; as a job it is sent there by\n  {job}"
    if is_url and scheme.lower() == "ray":
        return (
            "is the address of Ray's client server; a study joins a cluster on one of its "
            "machines, or is sent there with `ray job submit`."
        )
    if is_url:
        return "is a URL."
    if value.count(":") > 1 and not value.startswith("["):
        return "has an IPv6 address without its brackets: [::1]:6379."
    if re.fullmatch(r"[A-Za-z0-9._-]+", value) and not value.isdecimal():
        return f"has no port: {value}:6379 is where a head listens by default."
    return "is no such address."


def running_head() -> Address | None:
    """The head that was started on this host by `ray start`, if something listens there."""
    file = _head_file()
    try:
        address = parse_address(file.read_text(encoding="utf-8").strip(), source=str(file))
        socket.create_connection((address.host, address.port), timeout=1).close()
    except (OSError, ValueError, ConfigError):
        return None  # never started, or left behind by one that is gone
    return address


def ray_folder() -> tuple[Path, str]:
    """The folder in which Ray keeps its files on this host, and the variable that names it."""
    variables = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    for name in variables:
        if folder := os.environ.get(name):
            return Path(folder), name
    return Path("/tmp"), "the default"


def check_this_host() -> None:
    """Raises ConfigError where Ray cannot start: it would fall over half way, or try for ever."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FEWEST_FILES:
        raise ConfigError(
            f"only {files} files may be open at a time here, and Ray's processes need "
            f"{_FEWEST_FILES}; raise it with `ulimit -n 4096` (in containers --ulimit nofile=4096)."
        )
    folder, source = ray_folder()
    sockets = folder / "ray" / f"session_{'0' * 26}_{os.getpid()}" / "sockets" / "plasma_store"
    excess = len(os.fsencode(sockets)) - _LONGEST_SOCKET
    if not folder.is_absolute():
        wrong = "has to be absolute"
    # An older Ray of another user may have left its folder; only what is in it has to be ours.
    elif not can_be_written(folder / "ray"):
        wrong = "cannot be written"
    elif excess > 0:
        wrong = f"is {excess} byte(s) too long for the sockets in it"
    else:
        return
    raise ConfigError(
        f"the folder of Ray's files {wrong}: {folder} ({source}). Set RAY_TMPDIR to an absolute "
        "one where this user may write, with a short path, such as /tmp."
    )


def check_head(address: Address, *, seconds: float = _SECONDS) -> None:
    """Raises ServiceError if no head answers that takes us; Ray would try for many minutes."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    what, hint = "", ""
    try:
        # What Ray makes of it: a name of this host becomes the address that others know it by.
        there = canonicalize_bootstrap_address(str(address)) or str(address)
        with init_grpc_channel(there, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            reply = stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=seconds)
        if reply.ray_version in ("", ray.__version__):
            return
        what = f"is the head of a cluster with Ray {reply.ray_version}"
        hint = f"This is {ray.__version__}, and both must be the same, which `ray up` sees to. "
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            what = "is the head of a cluster that does not take the token of this user"
            hint = (
                "Is it yours? Then give this machine its ~/.ray/auth_token (it is looked for in "
                "RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH too); if it wants none, set "
                "RAY_AUTH_MODE=disabled. "
            )
        elif code == grpc.StatusCode.DEADLINE_EXCEEDED:
            what = f"does not answer within {seconds:.0f} s"
        else:
            what = "is no head of a Ray cluster"
    if not hint and os.path.isabs(address.source):
        hint = f"{address.source} names it, and may have been left by a cluster that is gone. "
    elif not hint and address.port in (8265, 10001):
        hint = "Ray's pages and client have that port, its head 6379 by default. "
    raise ServiceError(
        f"what listens at {address} (from {address.source}) {what}. {hint}Start one with `ray "
        "start --head`, name another with --address, or: --address local runs on this machine "
        "alone."
    )


def _head_file() -> Path:
    return ray_folder()[0] / "ray" / "ray_current_cluster"


def _other_owner(file: Path) -> str:
    """Who has written a file, if that is another user."""
    try:
        owner = file.stat().st_uid
        return "" if owner == os.getuid() else file.owner()
    except KeyError:
        return f"user {owner}"  # who has no name
    except OSError:  # gone meanwhile
        return ""
