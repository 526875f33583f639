"""What goes wrong around a study, done to the real thing: connections, servers, disks."""

import json
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestration.tracking.server import ServerPlan
from tests.lab.hosts import wait_until

Fault = Literal["none", "refuse", "hang", "reset", "lose"] | int
_POSTGRES = os.pathsep.join(
    [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
)
_VERBS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"PATCH ", b"DELETE ")


class Proxy:
    """Stands before a server on this host, and does what networks and servers do.

    Attributes:
        fault: "refuse" connections, let them "hang", "reset" them, "lose" the answer to a request
            that was handed on, or answer with a status; "none" hands everything on.
        only: which requests, by their head, the fault is for.
        body: of an answer with a status.
        delay: seconds before a request is handed on.
        met: how many requests have met the fault.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.only: Callable[[bytes], bool] = lambda head: True
        self.body = b'{"error_code": "BAD_REQUEST", "message": "the proxy says no"}'
        self.delay = 0.0
        self.met = 0
        self._fault: Fault = "none"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        before, self._fault = self._fault, fault
        if fault == "refuse" != before:
            self.close()
        if before == "refuse" != fault:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for each in [self._listener, *self._open]:
            _reset(each)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Hands on what a client sends; every request in it may meet the fault."""
        server = socket.create_connection(("127.0.0.1", self.upstream))
        ends = {client, server}
        self._open |= ends
        lost = threading.Event()
        threading.Thread(target=self._answer, args=(server, client, lost), daemon=True).start()
        with suppress(OSError):
            while data := client.recv(65536):
                if data.startswith(_VERBS) and self._fault != "none" and self.only(data):
                    self.met += 1
                    if self._fault == "lose":
                        lost.set()
                    else:
                        self._fail(client)
                        break
                time.sleep(self.delay)
                server.sendall(data)
        self._open -= ends
        for each in ends:
            _reset(each)

    def _fail(self, client: socket.socket) -> None:
        if isinstance(self._fault, int):
            head = (
                f"HTTP/1.1 {self._fault} So\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
            )
            client.sendall(head.encode() + self.body)
            client.shutdown(socket.SHUT_WR)
        if self._fault != "reset":
            while client.recv(65536):
                pass

    def _answer(self, server: socket.socket, client: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if lost.is_set():
                    _reset(client)
                    break
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        if end.type == socket.SOCK_STREAM and _is_connected(end):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RD)
        end.close()


def _is_connected(end: socket.socket) -> bool:
    try:
        end.getpeername()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class TrackingServer:
    """An MLflow server that is killed and started again."""

    def __init__(
        self, folder: Path, *, store: str | None = None, files_at: Path | None = None
    ) -> None:
        """With `files_at`, clients write files themselves, to a folder of the server's disk."""
        self._files_at = files_at
        self.port = free_port()
        self.log = folder / "server.log"
        self._plan = ServerPlan(
            store=store or f"sqlite:///{folder / 'served.db'}",
            artifacts=str(folder / "artifacts"),
            folder=folder / "server",
            port=self.port,
            allowed_hosts=("127.0.0.1:*",),  # clients come through a proxy's port
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [*self._plan.command(), "--workers", "1"]
        if self._files_at is not None:
            where = command.index("--artifacts-destination")
            own = ["--no-serve-artifacts", "--default-artifact-root", str(self._files_at)]
            command[where : where + 2] = own
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=self._plan.environment(os.environ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, seconds=180, what=f"{self.log}")

    def kill(self) -> None:
        """Without a chance to tidy up."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False


class Postgres:
    """A PostgreSQL of its own on loopback; skips where its programs are not installed."""

    def __init__(self, folder: Path) -> None:
        initdb, postgres = postgres_program("initdb"), postgres_program("postgres")
        if not initdb or not postgres:
            pytest.skip("no PostgreSQL: install Debian's postgresql")
        pytest.importorskip("psycopg", reason="pip install 'cpfean[postgres]'")
        self.port = free_port()
        # It refuses to be run by root, and nobody cannot pass through pytest's folders.
        self._folder = Path(tempfile.mkdtemp(prefix="cpfean-pg-", dir="/tmp"))
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            shutil.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        data = str(self._folder / "db")
        init = [initdb, "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync"]
        subprocess.run(init, cwd="/tmp", check=True, capture_output=True, **user)
        own = ["-k", str(self._folder), "-c", "fsync=off", "-h", "127.0.0.1", "-p", str(self.port)]
        with (folder / "postgres.log").open("wb") as log:
            self._process = subprocess.Popen(
                [postgres, "-D", data, *own], cwd="/tmp", stdout=log, stderr=log, **user
            )
        wait_until(self._answers, seconds=60, what="PostgreSQL")

    @property
    def uri(self) -> str:
        return f"postgresql://mlflow@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        import psycopg

        assert self._process.poll() is None
        try:
            psycopg.connect(self.uri).close()
        except psycopg.OperationalError:
            return False
        return True


def moto_program() -> str:
    """moto's server, where `make moto` or MOTO_SERVER has it; empty if nowhere."""
    beside = Path(__file__).resolve().parents[1] / ".venv-moto" / "bin" / "moto_server"
    if given := os.environ.get("MOTO_SERVER"):
        return given
    return str(beside) if beside.exists() else shutil.which("moto_server") or ""


def postgres_program(name: str) -> str:
    """A program of PostgreSQL's; empty if it is not installed."""
    return shutil.which(name, path=_POSTGRES) or ""


class ObjectStore:
    """An S3 of this host, by moto's server; skips where that is not installed.

    `make moto` installs it, in an environment of its own.
    """

    def __init__(self, folder: Path) -> None:
        program = moto_program()
        if not program:
            pytest.skip("no moto_server: `make moto` installs it")
        self.port = free_port()
        with (folder / "moto.log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, "-p", str(self.port)], stdout=log, stderr=log
            )
        wait_until(self._answers, seconds=60, what="moto")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/moto-api/data.json", timeout=5).status == 200
        except OSError:
            return False


class Metadata:
    """The metadata service of a spot machine, version 2: without its token there is no answer.

    Attributes:
        answers: to the next looks: a status, "hang" or "garbage", or a notice with that many
            seconds left; the last one stays.
        looks: how often it was asked for a notice.
    """

    def __init__(self, *answers: int | str | timedelta) -> None:
        self.answers = list(answers)
        self.looks = 0
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                asked = self.path == "/latest/api/token"
                asked &= "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
                self._answer(200 if asked else 400, "token")

            def do_GET(self) -> None:
                if self.headers.get("X-aws-ec2-metadata-token") != "token":
                    return self._answer(401)
                if self.path != "/latest/meta-data/spot/instance-action":
                    return self._answer(404)
                return self._answer(*metadata.answer())

            def _answer(self, status: int, body: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self) -> tuple[int, str]:
        self.looks += 1
        now = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(now, timedelta):
            at = (datetime.now(UTC) + now).strftime("%Y-%m-%dT%H:%M:%SZ")
            return 200, json.dumps({"action": "terminate", "time": at})
        if now == "hang":
            time.sleep(5)
        return (now, "") if isinstance(now, int) else (200, "<html>")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[Path]:
    """A file system of its own; skips where none can be made."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk is mounted by root")
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def actors(kind: str, *, of: int) -> list[int]:
    """The processes of Ray actors of a class that live among the descendants of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            named = (folder / "cmdline").read_bytes().startswith(f"ray::{kind}".encode())
            if named and _descends(int(folder.name), of):
                found.append(int(folder.name))
    return sorted(found)


def _descends(process: int, ancestor: int) -> bool:
    while process not in (0, ancestor):
        # "pid (name) state parent ...", and a name may hold spaces.
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        process = int(stat.rpartition(")")[2].split()[1])
    return process != 0
