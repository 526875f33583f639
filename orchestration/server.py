"""The MLflow server of a cluster: on loopback, and with passwords where others may reach it.

One server is what many drivers write to at once. It listens on the host that it runs on alone, and
is reached through a tunnel; any other address asks for a password first. MLflow's own job runner is
off: nothing here needs a server that runs code.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpfean.errors import ConfigError
from orchestration.settings import ServiceError

PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # the variable that MLflow itself reads
ADMIN = "admin"
_LEAST = 12
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Twelve characters and more that are tried first by whoever guesses.
_WELL_KNOWN = (
    "password", "passw0rd", "123456", "qwerty", "letmein", "welcome", "admin", "mlflow",
    "changeme", "secret", "iloveyou", "abc123", "default",
)  # fmt: skip


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
        """Raises ConfigError if strangers could write to the server."""
        if self.host not in _LOOPBACK and not self.auth:
            raise ConfigError(
                f"--host {self.host} lets everybody who reaches this machine write to the records; "
                "add --auth, or leave --host out and reach the server through a tunnel."
            )
        if "*" in self.allowed_hosts:
            raise ConfigError("--allowed-host must name a host; '*' lets any web page in.")
        if self.auth:
            check_password(environment.get(PASSWORD, ""))

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


def check_password(password: str) -> None:
    """Raises ConfigError for a password that is absent, short or well known."""
    if not password:
        raise ConfigError(
            f"--auth needs the password of the user {ADMIN!r} in {PASSWORD}: at least {_LEAST} "
            "characters, e.g. from `openssl rand -base64 24`."
        )
    if len(password) < _LEAST:
        raise ConfigError(f"{PASSWORD}: {len(password)} characters; {_LEAST} are the least.")
    # What is left when the guesses are taken out, as in "password1234", "MLflow-Admin-1".
    rest = password.lower()
    for word in _WELL_KNOWN:
        rest = rest.replace(word, "")
    if len(set(rest)) < 6:
        raise ConfigError(
            f"{PASSWORD} is one of those that are tried first, or says the same few characters "
            "over and over; take a random one."
        )


def _write_own(file: Path, text: str | None) -> None:
    """Writes a file that only its owner reads; with None, makes it if it is absent."""
    mode = os.O_WRONLY | os.O_CREAT | (0 if text is None else os.O_TRUNC)
    descriptor = os.open(file, mode, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        os.fchmod(descriptor, 0o600)
        if text is not None:
            stream.write(text)
