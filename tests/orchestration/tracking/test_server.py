"""The tracking server: who may write to it, and what it is started with."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import closing
from pathlib import Path

import pytest

from cpfean.errors import ConfigError, ServiceError
from experiments import tracking_server
from orchestration.tracking.passwords import PASSWORD
from orchestration.tracking.server import ServerPlan
from tests.faults import free_port

GOOD = "tulip-orbit-58-Zebra"
SCRIPT = Path(__file__).resolve().parents[3] / "experiments" / "tracking_server.py"
# Every kind of door that MLflow has: pages, records, files, accounts, traces, jobs, models, chats.
DOORS = (
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/metrics"),
    ("POST", "/graphql"),
    ("GET", "/api/2.0/mlflow/experiments/search?max_results=1"),
    ("GET", "/ajax-api/2.0/mlflow/experiments/search?max_results=1"),
    ("POST", "/api/2.0/mlflow/experiments/create"),
    ("POST", "/api/2.0/mlflow/runs/search"),
    ("POST", "/api/2.0/mlflow/runs/log-batch"),
    ("POST", "/api/2.0/mlflow/runs/delete"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts"),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/planted.txt"),
    ("GET", "/get-artifact?run_uuid=1&path=a"),
    ("GET", "/api/2.0/mlflow/users/get?username=admin"),
    ("POST", "/api/2.0/mlflow/users/create"),
    ("GET", "/signup"),
    ("POST", "/v1/traces"),
    ("POST", "/ajax-api/3.0/jobs/"),
    ("POST", "/gateway/mlflow/v1/chat/completions"),
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
    ("GET", "/api/3.0/mlflow/mcp-servers"),
)


def plan_of(folder: Path, **fields) -> ServerPlan:
    given = {
        "store": f"sqlite:///{folder / 'mlflow.db'}",
        "artifacts": str(folder / "artifacts"),
        "folder": folder / "server",
    }
    return ServerPlan(**given | fields)


@pytest.mark.parametrize(
    ("password", "message"),
    [
        (None, "needs the password of the user 'admin'"),
        ("Zebra-58-or", "11 characters; 12 are the least"),
        ("password1234", "soon guessed"),
    ],
)
def test_a_server_does_not_start_with_a_weak_password(
    tmp_path: Path, password: str | None, message: str
) -> None:
    port = free_port()
    mine = {name: value for name, value in os.environ.items() if name != PASSWORD}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--output", str(tmp_path), "--port", str(port), "--auth"],
        env=mine | ({} if password is None else {PASSWORD: password}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert password is None or password not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_network_gets_in_with_a_password_only(tmp_path: Path) -> None:
    plan_of(tmp_path).check({})
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 lets everybody"):
        plan_of(tmp_path, host="0.0.0.0").check({PASSWORD: GOOD})
    plan_of(tmp_path, host="0.0.0.0", auth=True).check({PASSWORD: GOOD})
    with pytest.raises(ConfigError, match="lets any web page in"):
        plan_of(tmp_path, allowed_hosts=("*",)).check({})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with what no server can use."""
    (tmp_path / "file").write_text("junk " * 1000)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE photos (name)")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port must be from 1 to 65535"),
        (["--port", "-1"], "--port must be from 1 to 65535"),
        (["--port", "0"], "--port must be from 1 to 65535"),
        (["--host", ""], "--host: it is empty"),
        (["--host", "http://here"], "--host must be"),
        (["--output", "file"], "--output"),
        (["--output", "file/below"], "--output"),
        (["--output", "what?"], "--output"),
        (["--store", ""], "--store"),
        (["--store", "foo://bar"], "no stores of the kind 'foo'"),
        (["--store", "http://here:5000"], "is no database"),
        (["--store", "mlflow.db"], "did you mean sqlite:///mlflow.db?"),
        (["--store", "sqlite://"], "in memory"),
        (["--store", "sqlite:///."], "is a folder"),
        (["--store", "sqlite:///file"], "is no sqlite database"),
        (["--store", "sqlite:///file/mlflow.db"], "has to be a folder"),
        (["--store", "sqlite:///other.db"], "nothing in it was changed"),
        (["--store", "postgresql://host:port/db"], "--store"),
        (["--store", "mssql://host/db"], "needs pyodbc"),
        (["--artifacts", ""], "--artifacts: it is empty"),
        (["--artifacts", "file"], "--artifacts"),
        (["--artifacts", "foo://bar"], "--artifacts 'foo://bar' is no place for files"),
        (["--artifacts", "s3://"], "is no place for files"),
        (["--artifacts", "s3:bucket"], "neither a folder nor a URL"),
        (["--artifacts", "http://here/"], "is no place for files"),
        *(
            (["--allowed-host", name], "--allowed-host must")
            for name in ("*", "a,*", "a,b", "*.example.org", "a?", "[ab]", "a b", "http://a")
        ),
        (["--allowed-host", ""], "--allowed-host: it is empty"),
        (["--allowed-host", "a:0"], "--allowed-host must"),
        (["--allowed-host", "a:99999"], "--allowed-host must"),
    ],
)
def test_a_flag_that_cannot_be_is_named_and_nothing_is_made(
    words: list[str],
    message: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {file.name: file.read_bytes() for file in here.iterdir()}
    monkeypatch.setattr(sys, "argv", ["tracking_server.py", *words])
    with pytest.raises(SystemExit) as left:
        tracking_server.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert message in said
    assert words[0] in said
    assert "Traceback" not in said
    assert {file.name: file.read_bytes() for file in here.iterdir()} == before


def test_flags_that_can_be_are_taken(tmp_path: Path) -> None:
    plan_of(tmp_path, port=65535, allowed_hosts=("head", "head.example.org:5000")).check({})
    for artifacts in ("s3://bucket/path", f"file://{tmp_path}/new", str(tmp_path / "new")):
        plan_of(tmp_path, artifacts=artifacts).check({})


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"--port {port}: something listens there already"):
            plan_of(tmp_path, port=port).check_port()
    plan_of(tmp_path, port=port).check_port()
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 is no address of this host"):
        plan_of(tmp_path, host="192.0.2.1", port=port).check_port()


def test_the_password_is_in_no_file_and_no_command_line(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        plan = plan_of(tmp_path, auth=True, store="postgresql://us:canary@db/mlflow")
        environment = plan.environment({PASSWORD: GOOD, "MLFLOW_TRACKING_URI": "http://elsewhere"})
    finally:
        os.umask(before)
    assert GOOD not in " ".join(plan.command())
    assert "canary" not in " ".join(plan.command())
    assert environment["MLFLOW_BACKEND_STORE_URI"] == plan.store
    assert "MLFLOW_TRACKING_URI" not in environment
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    files = list(plan.folder.iterdir())
    assert len(files) == 3
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        assert GOOD not in file.read_text()
    assert plan.folder.stat().st_mode & 0o777 == 0o700
    # Who was logged in before a restart stays so.
    again = plan.environment({PASSWORD: GOOD})
    key = "MLFLOW_FLASK_SERVER_SECRET_KEY"
    assert again[key] == environment[key]
    assert PASSWORD not in plan_of(tmp_path).environment({PASSWORD: GOOD})


def ask(
    url: str, *, method: str = "GET", user: str = "", host: str = "", body: bytes = b"{}"
) -> int:
    """The status that a request gets; 0 if nobody answers."""
    headers = {"Content-Type": "application/json"}
    if user:
        headers["Authorization"] = f"Basic {b64encode(user.encode()).decode()}"
    if host:
        headers["Host"] = host
    data = None if method == "GET" else body
    try:
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.long
def test_a_server_with_passwords_answers_nobody_without_one(tmp_path: Path) -> None:
    port = free_port()
    words = ["--output", str(tmp_path), "--port", str(port), "--auth"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            # Each of its processes imports MLflow first, for seconds.
            env=os.environ | {PASSWORD: GOOD, "MLFLOW_WORKERS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        search = url + "/api/2.0/mlflow/experiments/search?max_results=1"
        create = url + "/api/2.0/mlflow/experiments/create"
        while ask(search, user=f"admin:{GOOD}") != 200:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        answers = {door: ask(url + door[1], method=door[0]) for door in DOORS}
        assert answers == dict.fromkeys(DOORS, 401)
        assert not list(tmp_path.rglob("planted.txt"))
        assert ask(search, user="admin:password1234") == 401
        new = b'{"name": "new"}'
        assert ask(create, method="POST", body=new, user=f"admin:{GOOD}") == 200
        assert ask(search, user=f"admin:{GOOD}", host="elsewhere.example") == 403
        assert GOOD not in (tmp_path / "log").read_text()
        assert (tmp_path / "mlflow.db").stat().st_size > 0
        # It listens on loopback alone.
        listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
        addresses = {row.split()[1] for row in listening if row.split()[3] == "0A"}
        assert f"0100007F:{port:04X}" in addresses
        assert f"00000000:{port:04X}" not in addresses
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=60)
