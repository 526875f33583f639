"""Who may ask the page for what: requests to the guard alone, with a stand-in behind it."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from cpfean.search.page.guard import LARGEST_UPLOAD, Guard, remove_old

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})


async def stand_in(scope: Any, receive: Any, send: Any) -> None:
    """Takes a whole request, and answers with how long it was."""
    taken = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        taken += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(taken).encode()})


class Answer:
    """The status of an answer, its headers and its text."""

    def __init__(self, sent: list[MutableMapping[str, Any]]) -> None:
        self.status = sent[0]["status"] if sent else None
        self.headers = dict(sent[0]["headers"]) if sent else {}
        self.text = sent[1]["body"].decode() if sent else ""


def asked(
    guard: Guard,
    path: str,
    *,
    host: str = "127.0.0.1:7860",
    body: tuple[bytes, ...] = (b"",),
    length: int | None = None,
    **headers: str,
) -> Answer:
    """The answer to a request whose body comes in these pieces."""
    given = {"host": host, **({} if length is None else {"content-length": str(length)})}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    pieces = [
        {"type": "http.request", "body": piece, "more_body": number < len(body) - 1}
        for number, piece in enumerate(body)
    ]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return pieces.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return Answer(sent)


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(stand_in, hosts=LOOPBACK, password=None, uploads=tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config",
        "/theme.css",
        "/assets/index-abc.js",
        "/static/img/logo.svg",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
        "/gradio_api/upload",
        "/gradio_api/heartbeat/abc",
    ],
)
def test_what_the_page_needs_is_let_through(guard: Guard, path: str) -> None:
    answer = asked(guard, path)
    assert answer.status == 200
    assert b"default-src 'self'" in answer.headers[b"content-security-policy"]
    assert answer.headers[b"x-frame-options"] == b"DENY"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:22/",
        "/gradio_api/run/look",
        "/gradio_api/call/look",
        "/gradio_api/api/look",
        "/gradio_api/stream/x",
        "/gradio_api/component_server",
        "/gradio_api/vibe-code",
        "/gradio_api/deep_link",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/static/../../etc/passwd",
        "/assets/%2e%2e/secret",
        "//etc/passwd",
        "",
    ],
)
def test_every_other_door_is_shut(guard: Guard, path: str) -> None:
    assert asked(guard, path).status == 404


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "[::1]:7860", "127.0.0.1"])
def test_loopback_answers_under_its_names(guard: Guard, host: str) -> None:
    assert asked(guard, "/", host=host).status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "", "10.0.0.1"])
def test_loopback_answers_under_no_other_name(guard: Guard, host: str) -> None:
    assert asked(guard, "/", host=host).status == 403


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


def test_with_a_password_everything_asks_for_it(tmp_path: Path) -> None:
    guard = Guard(stand_in, hosts=None, password="correct horse ü", uploads=tmp_path)
    for path in ("/", "/gradio_api/queue/join", "/gradio_api/upload", "/docs"):
        answer = asked(guard, path, host="anything.example")
        assert answer.status == 401
        assert answer.headers[b"www-authenticate"].startswith(b"Basic ")
    right = basic("cpfean:correct horse ü")
    assert asked(guard, "/", host="anything.example", authorization=right).status == 200
    for wrong in ("cpfean:", "cpfean:correct horse", "admin:correct horse ü", ":", ""):
        assert asked(guard, "/", authorization=basic(wrong)).status == 401
    for odd in ("Basic", "Basic !!!", "Bearer x", "Basic " + "A" * 1001):
        assert asked(guard, "/", authorization=odd).status == 401


def test_what_is_too_large_is_refused_by_its_length(guard: Guard) -> None:
    assert asked(guard, "/gradio_api/upload", length=LARGEST_UPLOAD + 2**20).status == 413
    assert asked(guard, "/gradio_api/queue/join", length=2**20 + 1).status == 413
    assert asked(guard, "/gradio_api/queue/join", length=-1).status == 413
    assert asked(guard, "/gradio_api/upload", length=LARGEST_UPLOAD).status == 200


def test_what_is_larger_than_it_said_is_broken_off(guard: Guard) -> None:
    piece = b"x" * 2**19
    assert asked(guard, "/gradio_api/queue/join", body=(piece,)).text == str(2**19)
    assert asked(guard, "/gradio_api/queue/join", body=(piece,) * 4).status is None


def test_web_sockets_are_not_spoken(guard: Guard) -> None:
    async def never(*_: object) -> MutableMapping[str, Any]:
        raise AssertionError("nothing is received or sent")

    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, never, never))


def test_old_uploads_and_the_oldest_of_many_are_removed(tmp_path: Path) -> None:
    now = time.time()
    for age in range(8):
        file = tmp_path / f"folder-{age}" / "photo.jpg"
        file.parent.mkdir()
        file.write_bytes(b"x")
        os.utime(file, (now - 100 * age, now - 100 * age))
    remove_old(tmp_path, most=5, oldest=350)
    left = sorted(path.parent.name for path in tmp_path.rglob("*.jpg"))
    assert left == [f"folder-{age}" for age in range(4)]
    remove_old(tmp_path, most=2, oldest=1e6)
    left = sorted(path.parent.name for path in tmp_path.rglob("*.jpg"))
    assert left == ["folder-0", "folder-1"]


def test_an_upload_makes_room_for_itself(guard: Guard, tmp_path: Path) -> None:
    old = tmp_path / "old.jpg"
    old.write_bytes(b"x")
    os.utime(old, (1, 1))
    asked(guard, "/")
    assert old.exists()
    asked(guard, "/gradio_api/upload")
    assert not old.exists()
