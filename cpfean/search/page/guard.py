"""What stands before the page: who may ask, for what, and how much at a time.

Gradio has many more doors than this page uses: it hands out files, forwards to other servers, runs
functions by name, takes files, and copies any file of this host that a question names where a text
is expected. All but what its own page in a browser asks for is shut here: few addresses, and
questions that hold texts and numbers.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

USER = "cpfean"
LARGEST_QUESTION = 2**20  # bytes
_QUESTION = "/gradio_api/queue/join"
_PLAIN = (str, int, float, bool, type(None))
_EXACT = frozenset(
    {
        *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
        *(_QUESTION, "/gradio_api/queue/data", "/gradio_api/startup-events"),
        *("/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/info", "/gradio_api/app_id"),
    }
)
_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    # Nothing is fetched from anywhere else, whatever a text may hold.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        b"object-src 'none'; base-uri 'self'; frame-ancestors 'none'",
    ),
)


class Guard:
    """An application behind a password, with few doors.

    Args:
        app: what is guarded.
        hosts: names under which a browser may ask, without port; None for any. On loopback this
            keeps out other sites' pages whose name leads here.
        password: of the user `USER`; None asks for none.
        largest: bytes of a request.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: frozenset[str] | None,
        password: str | None,
        largest: int = LARGEST_QUESTION,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._password = password
        self._largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page uses no web sockets
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._largest:
            await _answer(send, 413, f"At most {self._largest:,} bytes are taken.")
            return
        if scope["path"] == _QUESTION:
            body = await _whole(receive, self._largest)
            if body is None or not is_plain_question(body):
                await _answer(send, 400, "A question is made of texts and numbers.")
                return
            receive = _again(body, receive)
        else:
            receive = _limited(receive, self._largest)
        try:
            await self._app(scope, receive, _with_headers(send))
        except Exception as error:  # Gradio's, of a question that its own page does not ask
            logger.warning("a request that failed: %s: %r", type(error).__name__, str(error)[:200])

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and _without_port(host) not in self._hosts:
            return 403, "This page answers under the name that it was started with alone."
        if self._password is not None and not _knows(headers, self._password):
            return 401, "User name and password, please."
        path = unquote(scope["path"])
        if path not in _EXACT and (not path.startswith(_BELOW) or ".." in path):
            return 404, "There is nothing here."
        return None


def is_plain_question(body: bytes) -> bool:
    """Whether a question holds nothing but texts and numbers where it may hold what it likes.

    Args:
        body: of the request, as the page in the browser makes it.
    """
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(told, dict):
        return False
    data, event = told.get("data"), told.get("event_data")
    if not isinstance(data, list) or not isinstance(event, dict | None):
        return False
    return all(isinstance(value, _PLAIN) for value in [*data, *(event or {}).values()])


def _knows(headers: dict[bytes, bytes], password: str) -> bool:
    kind, _, given = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() != b"basic":
        return False
    try:
        pair = base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(pair, f"{USER}:{password}".encode())


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


async def _whole(receive: Receive, limit: int) -> bytes | None:
    """The body of a request; None if it is larger than that, or the client has gone."""
    parts, taken = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        taken += len(parts[-1])
        if taken > limit:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A request whose body was read already."""
    told = False

    async def once() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def _limited(receive: Receive, limit: int) -> Receive:
    """Ends a request that sends more than it said."""
    taken = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return {"type": "http.disconnect"} if taken > limit else message

    return counted


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="CPFEAN search", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
