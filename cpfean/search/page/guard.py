"""What stands before the page: who may ask, for what, and how much at a time.

Gradio has many more doors than this page uses: it hands out files, forwards to other servers, runs
functions by name, takes files. All but those that its own page in a browser asks for are shut here.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

USER = "cpfean"
LARGEST_QUESTION = 2**20  # bytes
_EXACT = frozenset(
    {
        *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
        *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/startup-events"),
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
        await self._app(scope, _limited(receive, self._largest), _with_headers(send))

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
