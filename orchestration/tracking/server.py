"""The MLflow server of a cluster: on loopback, and with passwords where others may reach it.

One server is what many drivers write to at once. It listens on the host that it runs on alone, and
is reached through a tunnel; any other address asks for a password first. MLflow's own job runner is
off: nothing here needs a server that runs code.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpfean import commands
from cpfean.errors import ConfigError, ServiceError, message_of
from cpfean.listening import LOOPBACK, listening
from orchestration.tracking.address import shown, sqlite_file
from orchestration.tracking.passwords import ADMIN, PASSWORD, check_password
from orchestration.tracking.stores import check_is_store

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerPlan:
    """What a server serves, and to whom.

    Attributes:
        store: address of its database, as MLflow writes it: sqlite:///FILE, postgresql://...
        artifacts: folder or s3:// URL for files; the server hands them out and takes them.
        folder: for the server's own files.
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
            raise ConfigError(f"--host must be a name or address of this host; got {self.host!r}.")
        if self.host not in LOOPBACK and not self.auth:
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
        """Raises ConfigError if a server cannot listen there, ServiceError if one does already."""
        listening(self.host, self.port).close()

    def command(self) -> list[str]:
        """The command line of the server; its database is told by the environment.

        Everybody on the host reads command lines, and an address may hold a password.
        """
        # A browser names the port as well, a client may not.
        names = [*LOOPBACK[:2], *self.allowed_hosts]
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
        users, key, accounts = (self.folder / n for n in ("users.ini", "session_key", "users.db"))
        lines = [
            "[mlflow]",
            "default_permission = READ",
            f"database_uri = sqlite:///{accounts}",
            f"admin_username = {ADMIN}",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "grant_default_workspace_access = false",
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for file in (users, key, accounts):
                file.touch(mode=0o600)
                file.chmod(0o600)  # it may have been there
            users.write_text("\n".join(lines) + "\n", encoding="utf-8")
            if key.stat().st_size == 0:
                key.write_text(secrets.token_hex(32), encoding="ascii")
            session = key.read_text(encoding="ascii")
        except OSError as error:
            raise ServiceError(f"{self.folder}: cannot be written: {error}") from None
        own |= {"MLFLOW_AUTH_CONFIG_PATH": str(users), "MLFLOW_FLASK_SERVER_SECRET_KEY": session}
        return own


def check_store(store: str) -> None:
    """Raises ConfigError if a server cannot keep its runs at an address."""
    from sqlalchemy import make_url

    try:
        make_url(store).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        line = commands.pip_install("cpfean[postgres]")
        hint = f": `{line}`" if store.startswith("postgresql") else ""
        raise ConfigError(f"--store {shown(store)} needs {error.name}{hint}.") from None
    # SQLAlchemy has its own kinds, and int() speaks of a port.
    except Exception as error:
        raise ConfigError(
            f"--store {shown(store)!r} is no database ({message_of(error)}); write "
            "sqlite:///FILE or postgresql://USER@HOST/NAME."
        ) from None
    file = sqlite_file(store)
    if file is None:
        return
    _check_folder(file.parent, "--store")
    if file.exists():
        if not os.access(file, os.R_OK | os.W_OK):
            raise ConfigError(f"--store {file}: you may not read and write it.")
        try:
            check_is_store(file)
        except ServiceError as error:
            raise ConfigError(f"--store {error}") from None


def check_artifacts(artifacts: str) -> None:
    """Raises ConfigError if a server cannot keep files there."""
    scheme, is_url, rest = artifacts.partition("://")
    if not is_url and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", artifacts):
        raise ConfigError(f"--artifacts {artifacts!r} is neither a folder nor a URL.")
    if not is_url or scheme.lower() == "file":
        _check_folder(Path(rest if is_url else artifacts), "--artifacts")
        return
    from mlflow.store.artifact import artifact_repository_registry as registry

    own = {"", "file", "http", "https", "mlflow-artifacts", "runs", "models", "dbfs"}
    known = sorted(set(registry.get_registered_artifact_repositories()) - own)
    if scheme not in known or not rest.strip("/"):
        raise ConfigError(
            f"--artifacts {shown(artifacts)!r} is no place for files: a folder, s3://BUCKET/PATH, "
            f"or another of {', '.join(known)}."
        )


def _check_folder(folder: Path, flag: str) -> None:
    """Raises ConfigError if a path is no folder, and can be none."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise ConfigError(f"{flag} {folder}: {there} has to be a folder that you may write to.")
    except (OSError, ValueError) as error:  # too long a name, a NUL
        raise ConfigError(f"{flag} {str(folder)!r} cannot be a folder: {error}.") from None


def _check_allowed(name: str) -> None:
    """Raises ConfigError if the name of a host is none; MLflow reads it as a pattern."""
    host, colon, port = name.partition(":")
    is_port = port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535
    if not _HOST.fullmatch(host) or (colon and not is_port):
        why = ", since a '*' lets any web page in" if "*" in name else ""
        raise ConfigError(
            f"--allowed-host must be the name of one host, or HOST:PORT, without http://{why}; "
            f"got {name!r}. It may be repeated."
        )
