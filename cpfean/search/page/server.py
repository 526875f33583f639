"""The server of the page: on loopback, or with a password where others may reach it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cpfean.errors import ConfigError
from cpfean.listening import LOOPBACK
from cpfean.search.page.guard import Guard

_LEAST = 12  # characters of a password
_GOODBYE = 1  # seconds that browsers' open connections are waited for


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the page is served, and to whom.

    Attributes:
        host: name or address of this host.
        port: to listen at.
        password: of the user "cpfean"; None where nobody else can reach it.

    Raises:
        ConfigError: an address that others reach without a password, a password that is soon
            guessed, or no port.
    """

    host: str
    port: int
    password: str | None

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 1 to 65535; got {self.port}.")
        if self.host not in LOOPBACK and self.password is None:
            raise ConfigError(
                f"--host {self.host} shows the photographs to everybody who reaches this machine: "
                "add --password-file FILE, or leave --host out and reach the page through a "
                f"tunnel: ssh -L {self.port}:127.0.0.1:{self.port} HOST."
            )
        if self.password is not None and len(self.password) < _LEAST:
            raise ConfigError(
                f"the password has {len(self.password)} characters, and {_LEAST} are the least; "
                "take a random one, e.g. from `openssl rand -base64 24`."
            )

    @property
    def url(self) -> str:
        """What to type into a browser."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def names(self) -> frozenset[str] | None:
        """Under which a browser may ask; None for any."""
        if self.host not in LOOPBACK:
            return None
        return frozenset({"127.0.0.1", "localhost", "[::1]"})


def serve(
    make_app: Callable[[], Any],
    place: Place,
    bound: socket.socket,
    *,
    largest: int,
    ready: Callable[[], None],
) -> None:
    """Serves an application until the process is told to stop.

    Args:
        make_app: builds the application; called when Gradio has a folder of its own.
        place: where, and to whom.
        bound: what `listening` gave.
        largest: bytes of a request.
        ready: called when it answers.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        SystemExit: a polite kill.
    """
    import uvicorn

    folder = Path(tempfile.mkdtemp(prefix="cpfean-search-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    signal.signal(signal.SIGTERM, _stop)
    try:
        guarded = Guard(make_app(), hosts=place.names, password=place.password, largest=largest)
        config = uvicorn.Config(
            guarded,
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GOODBYE,
        )
        _announced(config, ready).run(sockets=[bound])
        raise KeyboardInterrupt  # where the shell that started us had it ignored
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _announced(config: Any, ready: Callable[[], None]) -> Any:
    """A server that says when it answers."""
    import uvicorn

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    return Announced(config)


def _stop(_number: int, _frame: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)
