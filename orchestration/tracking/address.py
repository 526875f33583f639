"""Addresses of MLflow's stores, as people write them and as they are used.

A store is a server (http, https), a database (sqlite:///FILE, postgresql://...) or what a plugin of
MLflow brings. What is relative is made absolute where it enters, since workers, services and the
next day's shell stand in other folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cpfean.config import nearest
from cpfean.errors import ConfigError
from cpfean.folders import expanded

_Refuse = Callable[..., ConfigError]  # of why, and of what was meant instead
_WEB = ("http", "https")
_DATABASES = ("postgresql", "mysql", "mssql")
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d+(/.*)?")
_WEB_SLIP = re.compile(r"(?:(https?):?/{0,2}|//)([^/:].*)", re.IGNORECASE)
_UNSEEN = re.compile(r"[\x00-\x1f\x7f]")
_SECRET = re.compile(r"(?i)([?&](?:ssl)?password=)[^&\s]+|(//[^/@:\s]*:)[^@/\s]+(?=@)")


def tracking_address(
    uri: str, *, asked: str = "--tracking-uri", environment: Mapping[str, str] | None = None
) -> str:
    """The address with which MLflow finds the store from any folder.

    Args:
        uri: as it was asked for; a relative sqlite file is one of the folder that we stand in.
        asked: the flag or variable that it is the value of, for messages.
        environment: whether MLFLOW_ALLOW_FILE_STORE lets MLflow keep runs in plain folders.

    Raises:
        ConfigError: MLflow has no such store, or what is in it would be lost with this process.
    """
    environment = os.environ if environment is None else environment

    def refuse(why: str, instead: str = "") -> ConfigError:
        meant = f"; did you mean {shown(instead)}" if instead else ""
        return ConfigError(f"{asked} {shown(uri)!r} {why}{meant}{'?' if instead else '.'}")

    cleaned = _UNSEEN.sub("", uri.strip())
    if not cleaned:
        raise refuse("is empty")
    if cleaned != uri:
        raise refuse("has blanks around it, or control characters in it", cleaned)
    if _HOST_AND_PORT.fullmatch(uri):
        raise refuse("lacks the http://", f"http://{uri}")
    scheme, colon, rest = uri.partition(":")
    kind, _, driver = scheme.lower().partition("+")
    if kind in _WEB and rest.startswith("//"):
        try:
            parts = urlsplit(uri)
            usable = bool(parts.hostname) and parts.port != 0 and " " not in parts.netloc
        except ValueError:
            usable = False
        if not usable:
            raise refuse("names no host and port, as http://HOST:5000 does")
        return uri
    if slip := _WEB_SLIP.fullmatch(uri):
        raise refuse("is no address of a server", f"{(slip[1] or 'http').lower()}://{slip[2]}")
    if colon and kind == "sqlite":
        if driver not in ("", "pysqlite"):
            raise refuse(f"names a driver that is not used here, {driver!r}", f"sqlite:{rest}")
        return f"sqlite:///{_sqlite_path(rest, refuse)}"
    is_database = colon and kind in ("postgres", *_DATABASES)
    if is_database and not (kind in _DATABASES and rest.startswith("//")):
        name = "postgresql" if kind == "postgres" else kind
        raise refuse("is no address of a database", f"{name}://{rest.lstrip('/')}")
    if is_database or uri == "databricks" or (colon and kind == "databricks"):
        return uri
    if not colon or kind == "file" or "/" in scheme:
        return _folder(uri, refuse, environment)
    plugins = {found.name for found in metadata.entry_points(group="mlflow.tracking_store")}
    if scheme in plugins:
        return uri
    known = [*_WEB, "sqlite", *_DATABASES, *sorted(plugins)]
    raise ConfigError(
        f"{asked} {shown(uri)!r}: MLflow has no stores of the kind {scheme!r}"
        f"{nearest(scheme, known)} Write http://HOST:PORT or sqlite:///FILE, for example."
    )


def sqlite_file(uri: str) -> Path | None:
    """The file behind a sqlite address, absolute; None for any other address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute()


def is_web(uri: str) -> bool:
    """Whether a server is behind the address, which has a disk of its own."""
    return uri.lower().startswith(("http://", "https://"))


def shown(uri: str) -> str:
    """The address as others may read it."""
    return _SECRET.sub(r"\1\2***", without_password(uri, uri))


def without_password(text: str, uri: str) -> str:
    """The text without the password of an address."""
    try:
        password = urlsplit(uri).password
    except ValueError:
        return text
    return text.replace(password, "***") if password else text


def _sqlite_path(rest: str, refuse: _Refuse) -> Path:
    """The file of "sqlite:" and what follows it."""
    path = rest.removeprefix("///")
    if rest in ("", "//") or path in ("", ":memory:") or path.startswith(":memory:?"):
        raise refuse("is a store in memory, of which nothing is left at the end", "sqlite:///FILE")
    if not rest.startswith("///"):
        raise refuse("has to have three slashes before the file", f"sqlite:///{rest.lstrip('/')}")
    if path.startswith("file:") or "?" in path:
        raise refuse(
            "must name a file and nothing else: sqlite's own options are not used here",
            f"sqlite:///{path.removeprefix('file:').partition('?')[0]}",
        )
    try:
        # What follows a percent sign is read as in any address, by MLflow's database library too.
        file = expanded(unquote(path), what="its home").absolute()
        str(file).encode()
        is_folder = path.endswith("/") or file.is_dir()
        is_usual = file.is_file() or not file.exists()
    except (ConfigError, OSError, ValueError) as error:
        raise refuse(f"cannot be the name of a file: {error}") from None
    if is_folder:
        raise refuse("is a folder", f"sqlite:///{file / 'mlflow.db'}")
    if not is_usual:
        raise refuse("is no regular file")
    if "?" in str(file) or unquote(str(file)) != str(file):
        raise refuse(
            f"would be {file}, and an address cannot hold a '?', nor a '%' before two digits: take "
            "another folder or name"
        )
    return file


def _folder(uri: str, refuse: _Refuse, environment: Mapping[str, str]) -> str:
    """The address of a folder of runs, which MLflow keeps only where it is told to."""
    path = uri.removeprefix("file://") if uri.startswith("file://") else uri.removeprefix("file:")
    try:
        folder = expanded(path, what="its home").absolute()
        is_file = folder.is_file()
    except (ConfigError, OSError, ValueError) as error:
        raise refuse(f"cannot be the name of a folder: {error}") from None
    if is_file or folder.suffix in (".db", ".sqlite", ".sqlite3"):
        raise refuse("lacks the sqlite:///", f"sqlite:///{path}")
    if environment.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise refuse(
            "is a folder, in which MLflow keeps no runs any more (`mlflow migrate-filestore` turns "
            "one into a database). Write sqlite:///FILE or http://HOST:PORT; "
            "MLFLOW_ALLOW_FILE_STORE=true allows folders nevertheless"
        )
    return folder.as_uri()
