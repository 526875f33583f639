"""Which of several processes ended first, and which only because of it.

Under NCCL a process whose partner is gone is aborted by NCCL's watchdog: no exception tells why,
and whoever started the processes sees several of them end. So each keeps a connection to a
`Listener` in the process that looks after them. Over it goes a sign of life every second; and, as
the last thing, what faulthandler says of a fatal signal, which it writes without any help from
Python. The system delivers that when the process is gone already. A process that is killed, or
whose host loses its power, says nothing.
"""

from __future__ import annotations

import faulthandler
import logging
import secrets
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

_BEAT = b"."
_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 10.0  # a process may hold Python's lock for some seconds, e.g. to compile
_ABORTED = b"Fatal Python error: Aborted"
_MOST_BYTES = 4096  # of what one process says
_CONNECT_SECONDS = 10.0

_connections: list[socket.socket] = []  # that faulthandler writes to, open for good


class Listener:
    """Where processes leave their last words; one for each group of processes.

    Attributes:
        address: for `leave_last_words`: host, port and a word that strangers do not know.
    """

    def __init__(self, host: str, *, silence: float = _SILENT_SECONDS) -> None:
        """Listens from now on, in threads that end with the process or with `close`.

        Args:
            host: address of this one that the others reach.
            silence: seconds without a sign of life that say something.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self.address = (host, int(self._server.getsockname()[1]), secrets.token_hex(8))
        self._silence = silence
        self._closed = False
        self._heard: dict[int, float] = {}  # by rank, when it gave a sign of life
        self._ended: dict[int, bool] = {}  # by rank, in their order: whether it was aborted
        self._ended_at = 0.0  # the first of them
        threading.Thread(target=self._accept, name="last words", daemon=True).start()

    def culprits(self, gone: Collection[int], *, waiting: Collection[int] = ()) -> list[int]:
        """Ranks that the others ended or failed because of; empty if that is not known.

        Those that are gone without having been aborted. If all of these were: those that had not
        been heard of for a while when the first one ended. If there are none: the first one.

        Args:
            gone: ranks that are known to have ended by themselves.
            waiting: ranks that told of having waited for another one in vain.
        """
        self._wait_for(gone)
        ended = dict(self._ended)
        innocent = {rank for rank, aborted in ended.items() if aborted} | set(waiting)
        if killed := sorted(set(gone) - innocent):
            return killed
        moment = (self._ended_at if ended else time.monotonic()) - self._silence
        silent = {rank for rank, at in dict(self._heard).items() if at < moment} - innocent
        if silent:
            return sorted(silent)
        return [rank for rank in ended if rank not in waiting][:1]

    def _wait_for(self, gone: Collection[int]) -> None:
        """A moment, until what those who are gone have said last is read."""
        end = time.monotonic() + _BEAT_SECONDS
        connected = set(gone) & set(self._heard)
        while not connected <= set(self._ended) and time.monotonic() < end:
            time.sleep(_BEAT_SECONDS / 20)

    def close(self) -> None:
        """Takes no more connections."""
        self._closed = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # else it listens until the next one has come
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_BEAT_SECONDS)  # e.g. too many open files
                continue
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        rank, said = None, b""
        # A connection that is reset has ended like any other.
        with suppress(OSError), connection, connection.makefile("rb") as lines:
            connection.settimeout(_CONNECT_SECONDS)  # a stranger may say nothing
            word, _, number = lines.readline(100).decode("ascii", "replace").strip().partition(" ")
            if word != self.address[2] or not number.isdecimal():
                return
            connection.settimeout(None)
            rank = int(number)
            self._heard[rank] = time.monotonic()
            while heard := lines.read1(_MOST_BYTES):
                self._heard[rank] = time.monotonic()
                said = (said + heard.strip(_BEAT))[:_MOST_BYTES]
        if rank is None:
            return
        if said:
            # The worker's own log, where this would be else, may be on a host that is gone.
            logger.warning("rank %d ended with: %s", rank, said.decode("utf-8", "replace"))
        self._ended_at = self._ended_at or time.monotonic()
        self._ended[rank] = _ABORTED in said


def leave_last_words(address: tuple[str, int, str], *, rank: int) -> None:
    """Lets a listener know of this process until its end; without one nothing is told.

    Args:
        address: of the listener.
        rank: of this process.
    """
    host, port, word = address
    try:
        connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        connection.settimeout(None)
        connection.sendall(f"{word} {rank}\n".encode())
    except OSError:
        return
    _connections.append(connection)
    faulthandler.enable(file=connection.fileno(), all_threads=False)
    threading.Thread(target=_beat, args=(connection,), name="sign of life", daemon=True).start()


def _beat(connection: socket.socket) -> None:
    while True:
        try:
            connection.sendall(_BEAT)
        except OSError:  # nobody listens any more
            return
        time.sleep(_BEAT_SECONDS)
