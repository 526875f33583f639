"""The MLflow server of a cluster: on loopback, and with passwords where others may reach it.

One server is what many drivers write to at once. It listens on the host that it runs on alone, and
is reached through a tunnel; any other address asks for a password first. MLflow's own job runner is
off: nothing here needs a server that runs code.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpfean import commands
from cpfean.errors import ConfigError, ServiceError, message_of
from orchestration.tracking.address import shown, sqlite_file, tracking_address
from orchestration.tracking.passwords import ADMIN, PASSWORD, check_password

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerPlan:
    """What a server serves, and to whom.

    Attributes:
        store: address of its database, as MLflow writes it: sqlite:///FILE, postgresql://...
        artifacts: folder or s3:// URL for files; the server hands them out and takes them.
        folder: for the server's own files.
        host: address to listen on.
        auth: whether it asks for user name and password.
        allowed_hosts: names under which browsers may reach it, beside loopback.
    """

    store: str
    artifacts: str
    folder: Path
    host: str = "127.0.0.1"
    port: int = 5000
    auth: bool = False
    allowed_hosts: tuple[str, ...] = ()

    def check(self, environment: Mapping[str, str]) -> None:
        """Raises ConfigError for a flag that cannot be, or if strangers could write to it."""
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 1 to 65535; got {self.port}.")
        if not _HOST.fullmatch(self.host) and not re.fullmatch(r"[0-9a-fA-F:.]+", self.host):
            raise ConfigError(
                f"--host must be a name or an address of this host; got {self.host!r}."
            )
        if self.host not in _LOOPBACK and not self.auth:
            raise ConfigError(
                f"--host {self.host} lets everybody who reaches this machine write to the records; "
                "add --auth, or leave --host out and reach the server through a tunnel."
            )
        for name in self.allowed_hosts:
            _check_allowed(name)
        _check_folder(self.folder.parent, "--output")
        check_store(self.store)
        check_artifacts(self.artifacts)
        if self.auth:
            check_password(environment.get(PASSWORD, ""), known=[self.host, *self.allowed_hosts])

    def check_port(self) -> None:
        """Whether the server will be able to listen.

        Raises:
            ConfigError: not at this address, or not at this port.
            ServiceError: something listens there already.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
                trial.listen()
        except socket.gaierror as error:
            raise ConfigError(f"--host {self.host}: no such host ({error}).") from None
        except PermissionError:
            raise ConfigError(
                f"--port {self.port} is for root alone; take one above 1023."
            ) from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceError(
                    f"--port {self.port}: something listens there already, another server perhaps; "
                    f"`{commands.listeners(self.port)}` names it. Take another --port, or stop it."
                ) from None
            raise ConfigError(f"--host {self.host} is no address of this host ({error}).") from None

    def command(self) -> list[str]:
        """The command line of the server; its database is told by the environment.

        Everybody on the host reads command lines, and an address may hold a password.
        """
        # A browser names the port as well, a client may not.
        names = [*_LOOPBACK[:2], *self.allowed_hosts]
        hosts = [*names, *(f"{name}:{self.port}" for name in names)]
        command = [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--artifacts-destination", self.artifacts),
            *("--host", self.host, "--port", str(self.port)),
            *("--allowed-hosts", ",".join(hosts)),
        ]
        return [*command, "--app-name", "basic-auth"] if self.auth else command

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The server's environment; makes the files that its passwords need.

        Raises:
            ServiceError: they cannot be written.
        """
        own = dict(environment) | {
            "MLFLOW_BACKEND_STORE_URI": self.store,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        # A server is not a client of the address that clients are given.
        own.pop("MLFLOW_TRACKING_URI", None)
        if not self.auth:
            own.pop(PASSWORD, None)
            return own
        users = self.folder / "users.ini"
        key = self.folder / "session_key"
        lines = [
            "[mlflow]",
            "default_permission = READ",
            f"database_uri = sqlite:///{self.folder / 'users.db'}",
            f"admin_username = {ADMIN}",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "grant_default_workspace_access = false",
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_own(users, "\n".join(lines) + "\n")
            if not key.exists():
                _write_own(key, secrets.token_hex(32))
            _write_own(self.folder / "users.db", None)
            session = key.read_text(encoding="ascii")
        except OSError as error:
            raise ServiceError(f"{self.folder}: cannot be written: {error}") from None
        return own | {
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": session,
        }


def check_store(store: str) -> None:
    """Raises ConfigError if a server cannot keep its runs there."""
    address = tracking_address(store, asked="--store")
    kind = address.partition(":")[0].partition("+")[0]
    if kind not in _DATABASES:
        raise ConfigError(
            f"--store {shown(store)!r} is no database; write sqlite:///FILE or "
            "postgresql://USER@HOST/NAME."
        )
    file = sqlite_file(address)
    if file is None:
        _check_driver(address)
        return
    from orchestration.tracking.stores import check_is_store

    _check_folder(file.parent, "--store")
    if file.exists():
        if not os.access(file, os.R_OK | os.W_OK):
            raise ConfigError(f"--store {file}: you may not read and write it.")
        try:
            check_is_store(file)
        except ServiceError as error:
            raise ConfigError(f"--store {error}") from None


def _check_driver(address: str) -> None:
    """Raises ConfigError if the library of a database is not there, or the address is none."""
    from sqlalchemy import make_url

    try:
        make_url(address).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        line = commands.pip_install("cpfean[postgres]")
        hint = f": `{line}`" if address.startswith("postgresql") else ""
        raise ConfigError(f"--store {shown(address)} needs {error.name}{hint}.") from None
    # SQLAlchemy has its own kinds, and int() speaks of a port.
    except Exception as error:
        raise ConfigError(f"--store {shown(address)!r}: {message_of(error)}.") from None


def check_artifacts(artifacts: str) -> None:
    """Raises ConfigError if a server cannot keep files there."""
    if not artifacts.strip():
        raise ConfigError("--artifacts must name a folder or a URL; it is empty.")
    scheme, is_url, rest = artifacts.partition("://")
    if not is_url:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", artifacts):
            raise ConfigError(f"--artifacts {artifacts!r} is neither a folder nor a URL.")
        _check_folder(Path(artifacts), "--artifacts")
        return
    if scheme.lower() == "file":
        _check_folder(Path(rest), "--artifacts")
        return
    from mlflow.store.artifact.artifact_repository_registry import (
        get_registered_artifact_repositories,
    )

    own = {"", "file", "http", "https", "mlflow-artifacts", "runs", "models", "dbfs"}
    known = sorted(set(get_registered_artifact_repositories()) - own)
    if scheme not in known or not rest.strip("/"):
        raise ConfigError(
            f"--artifacts {shown(artifacts)!r} is no place for files: a folder, s3://BUCKET/PATH, "
            f"or another of {', '.join(known)}."
        )


def _check_folder(folder: Path, flag: str) -> None:
    """Raises ConfigError if a path is no folder, and can be none."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise ConfigError(f"{flag} {folder}: {there} is a file, and has to be a folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"{flag} {folder}: you may not write to {there}.")
    except (OSError, ValueError) as error:  # too long a name, a NUL
        raise ConfigError(f"{flag} {str(folder)!r} cannot be a folder: {error}.") from None


def _check_allowed(name: str) -> None:
    """Raises ConfigError if the name of a host is none; MLflow reads it as a pattern."""
    if "*" in name:
        raise ConfigError(
            f"--allowed-host must name a host, and {name!r} has a '*', which lets any web page in."
        )
    host, colon, port = name.partition(":")
    is_port = port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535
    if not _HOST.fullmatch(host) or (colon and not is_port):
        raise ConfigError(
            f"--allowed-host must be the name of one host, or HOST:PORT, without http://; "
            f"got {name!r}. It may be repeated."
        )


def _write_own(file: Path, text: str | None) -> None:
    """Writes a file that only its owner reads; with None, makes it if it is absent."""
    mode = os.O_WRONLY | os.O_CREAT | (0 if text is None else os.O_TRUNC)
    descriptor = os.open(file, mode, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        os.fchmod(descriptor, 0o600)
        if text is not None:
            stream.write(text)
