"""Who may ask the page for what: requests to the guard alone, with a stand-in behind it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from cpfean.search.page.guard import LARGEST_QUESTION, Guard

QUESTION = "/gradio_api/queue/join"
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
def guard() -> Guard:
    return Guard(stand_in, hosts=LOOPBACK, password=None)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config",
        "/theme.css",
        "/assets/index-abc.js",
        "/static/img/logo.svg",
        "/gradio_api/queue/data",
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
        "/gradio_api/upload",
        "/gradio_api/upload_progress",
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


def test_with_a_password_everything_asks_for_it() -> None:
    guard = Guard(stand_in, hosts=None, password="correct horse ü")
    for path in ("/", "/gradio_api/queue/join", "/assets/x.js", "/docs"):
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
    for length in (LARGEST_QUESTION + 1, 10**30, -1):
        assert asked(guard, "/config", length=length).status == 413
    assert asked(guard, "/config", length=LARGEST_QUESTION).status == 200
    roomy = Guard(stand_in, hosts=LOOPBACK, password=None, largest=2 * LARGEST_QUESTION)
    assert asked(roomy, "/config", length=2 * LARGEST_QUESTION).status == 200


def test_what_is_larger_than_it_said_is_broken_off(guard: Guard) -> None:
    piece = b"x" * 2**19
    assert asked(guard, "/config", body=(piece,)).text == str(2**19)
    assert asked(guard, "/config", body=(piece,) * 4).status is None
    assert asked(guard, QUESTION, body=(piece,) * 4).status == 400


def test_a_question_of_texts_and_numbers_arrives_as_it_is(guard: Guard) -> None:
    for data, event in ((["a dog"], None), ([None], {"side": 0, "hit": 3}), ([], {"name": "x"})):
        told = {"data": data, "event_data": event, "fn_index": 0, "session_hash": "s"}
        body = json.dumps(told).encode()
        answer = asked(guard, QUESTION, body=(body[:5], body[5:]))
        assert (answer.status, answer.text) == (200, str(len(body)))


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "body",
    [
        {"data": [FILE], "event_data": None},
        {"data": ["a dog"], "event_data": FILE},
        {"data": [["a dog"]], "event_data": None},
        {"data": {"path": "/etc/passwd"}, "event_data": None},
        {"data": ["a dog"], "event_data": ["x"]},
        {"event_data": None},
        [],
        "a dog",
        None,
    ],
)
def test_a_question_that_names_files_or_is_none_is_refused(guard: Guard, body: object) -> None:
    assert asked(guard, QUESTION, body=(json.dumps(body).encode(),)).status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_question_at_all_is_refused(guard: Guard, body: bytes) -> None:
    assert asked(guard, QUESTION, body=(body,)).status == 400


def test_what_fails_behind_it_is_told_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(*_: object) -> None:
        raise KeyError(99)

    guard = Guard(failing, hosts=LOOPBACK, password=None)
    assert asked(guard, "/config").status is None
    assert "KeyError" in caplog.text
    assert "Traceback" not in caplog.text


def test_web_sockets_are_not_spoken(guard: Guard) -> None:
    async def never(*_: object) -> MutableMapping[str, Any]:
        raise AssertionError("nothing is received or sent")

    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, never, never))
