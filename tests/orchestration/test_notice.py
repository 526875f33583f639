"""The notice of AWS is passed on to Ray once, by what cluster.yaml starts on a worker."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from orchestration.notice import listen
from tests.lab.hosts import wait_until

CLUSTER = yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text(encoding="utf-8"))
DRAIN = "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message"


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
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

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


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    metadata = Metadata(timedelta(seconds=120))
    yield metadata
    metadata.close()


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """A folder with a `ray` that notes down its flags, and fails as often as a file says."""
    programs = tmp_path / "venv/bin"
    programs.mkdir(parents=True)
    program = programs / "ray"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f"test -s {tmp_path}/away || exit 0\nsed -i 1d {tmp_path}/away\nexit 1\n"
    )
    program.chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    return programs


def calls(folder: Path) -> list[str]:
    noted = folder / "calls"
    return noted.read_text().splitlines() if noted.exists() else []


def seconds_left(call: str) -> int:
    match = re.fullmatch(rf"{DRAIN} .* --deadline-remaining-seconds (\d+)", call)
    assert match, call
    return int(match[1])


def test_the_notice_is_passed_on_once_whatever_the_metadata_said_before(
    metadata: Metadata, ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{ray}:/usr/bin:/bin")
    metadata.answers[:0] = [404, 500, "garbage", "hang", 401, 404]
    listen(metadata.url, pause=0.01)
    assert metadata.looks == 7
    (call,) = calls(tmp_path)
    assert 105 <= seconds_left(call) <= 110  # some are kept in reserve


def test_a_notice_that_comes_late_is_passed_on_all_the_same(
    metadata: Metadata, ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{ray}:/usr/bin:/bin")
    metadata.answers = [timedelta(seconds=-30)]
    listen(metadata.url, pause=0.01)
    assert [seconds_left(call) for call in calls(tmp_path)] == [1]


def test_a_ray_that_is_not_up_is_told_when_it_is(
    metadata: Metadata, ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{ray}:/usr/bin:/bin")
    (tmp_path / "away").write_text("not up\nnot up\n")
    listen(metadata.url, pause=0.01)
    assert len(calls(tmp_path)) == 3


def test_workers_of_the_cluster_listen_once_and_go_on_with_their_setup(
    metadata: Metadata, ray: Path, tmp_path: Path
) -> None:
    """The very command of cluster.yaml, with a systemd that starts what it is told to."""
    (command,) = [line for line in CLUSTER["worker_setup_commands"] if "notice" in line]
    # It runs the program apart from whoever asked for it.
    apart = '{ timeout 60 "$@"; echo $? > $HOME/ended; } &'
    for name, does in {
        "systemctl": 'test -f "$HOME/unit"',
        "sudo": 'exec "$@"',
        "systemd-run": f'touch $HOME/unit; while [ "${{1#--}}" != "$1" ]; do shift; done; {apart}',
    }.items():
        program = ray / name
        program.write_text(f"#!/bin/sh\necho {name} >> $HOME/said\n{does}\n")
        program.chmod(0o755)
    metadata.answers = [404]
    (tmp_path / "cpfean.env").write_text(
        f"export PATH={ray}:/usr/bin:/bin AWS_EC2_METADATA_SERVICE_ENDPOINT={metadata.url}\n"
    )
    (tmp_path / "cpfean").symlink_to(Path(__file__).parents[2])
    environment = {"HOME": str(tmp_path), "PATH": f"{ray}:/usr/bin:/bin"}
    for _ in range(2):  # as `ray up` does again on a host that it knows
        subprocess.run(
            ["bash", "-c", f"cd $HOME/cpfean; {command}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=30,
        )
    said = (tmp_path / "said").read_text().split()
    assert said == ["systemctl", "sudo", "systemd-run", "systemctl"]
    wait_until(lambda: metadata.looks > 0, seconds=30, what="the first look")
    assert calls(tmp_path) == []
    metadata.answers = [timedelta(seconds=120)]
    wait_until(lambda: bool(calls(tmp_path)), seconds=30, what="the notice to be passed on")
    ended = tmp_path / "ended"
    wait_until(lambda: ended.exists() and bool(ended.read_text()), seconds=30, what="its end")
    assert ended.read_text().strip() == "0"  # else systemd would start it again
    (call,) = calls(tmp_path)
    assert 100 <= seconds_left(call) <= 110
