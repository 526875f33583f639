"""What stands in place of a file by mistake or malice."""

import os
import socket
from collections.abc import Callable
from pathlib import Path


def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's name may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to("gone/elsewhere")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 * 2**40)


# What it is, and the words that say so.
THINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a named pipe": (fifo, "a named pipe"),
    "a socket": (socket_file, "a socket"),
    "a device": (device, "a device"),
    "a folder": (folder, "a folder"),
    "a link that leads nowhere": (dangling, "leads nowhere"),
    "a link to itself": (loop, "link"),
    "four terabytes of nothing": (hole, ""),
}


def put(thing: str, path: Path) -> str:
    """Puts a thing in the place of a file; returns the words that a message has to have."""
    path.unlink(missing_ok=True)
    make, words = THINGS[thing]
    make(path)
    return words
