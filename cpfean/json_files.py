"""JSON files: as they are given to us, and our own, which are read strictly.

A file that is given to us is of a bounded size, and an object outermost. One of our own that was
cut, edited by hand, replaced by something else or written by a release that knows more must not be
taken for another one, and never be written over: what is damaged or of another release is told, not
guessed. So every reader of records goes through `read_fields`, which checks each field by the type
of its dataclass.
"""

from __future__ import annotations

import functools
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cpfean import commands
from cpfean.config import nearest, typed
from cpfean.errors import ConfigError, CpfeanError
from cpfean.files import is_there, read_file

LIMIT = 2**24  # bytes; a vocabulary of 100,000 labels has a tenth of it
LARGEST = 2**26  # bytes; ten thousand epochs take a tenth of it
_DEEPEST = 20  # of lists and tables in each other; ours have five


def read_object(path: Path, *, error: type[CpfeanError], limit: int = LIMIT) -> dict[str, Any]:
    """Reads a JSON file whose outermost value is an object.

    Args:
        path: of the file.
        error: what to raise.
        limit: the most bytes that such a file can sensibly have.

    Raises:
        CpfeanError: of the type `error`: missing, no regular file, too large, no JSON, no object.
    """
    if not is_there(path):
        raise error(f"{path}: missing.")
    try:
        plain = json.loads(read_file(path, limit=limit))
    except RecursionError:
        raise error(f"{path}: cannot be read: JSON that is nested too deeply.") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}.") from None
    except ValueError as reason:
        raise error(f"{path}: cannot be read: no JSON: {reason}.") from None
    if not isinstance(plain, dict):
        raise error(f"{path}: cannot be read: expected a JSON object, found {_kind(plain)}.")
    return plain


class RecordError(ConfigError):
    """A file of ours that is damaged, or of another release.

    Args:
        file: that cannot be used.
        wrong: what is wrong with it.
        without: what becomes of the run when it is put aside.
    """

    def __init__(self, file: Path, wrong: str, *, without: str) -> None:
        self.file = file
        self.wrong = wrong.rstrip(".")
        self.without = without
        super().__init__(
            f"{self.line}\nIt was left as it is. {without} To put it aside:\n"
            f"  {commands.move(file, aside(file))}"
        )

    @property
    def line(self) -> str:
        """What is wrong, without what to do."""
        return f"{self.file}: {self.wrong}: damaged, or written by another release."


def read_table(file: Path, *, without: str) -> dict[str, Any] | None:
    """A JSON object of ours; None if there is nothing of that name.

    Raises:
        RecordError: something else, of any kind.
    """
    if not is_there(file):
        return None
    try:
        plain = read_object(file, error=ConfigError, limit=LARGEST)
        _check_values(plain)
    except ConfigError as error:
        raise RecordError(file, str(error).removeprefix(f"{file}: "), without=without) from None
    return plain


def read_fields(
    file: Path, cls: type, *, without: str, optional: Iterable[str] = ()
) -> dict[str, Any] | None:
    """The fields of a dataclass, each of its type; None if there is nothing of that name.

    Args:
        optional: fields that earlier releases had not; others have to be there.

    Raises:
        RecordError: not a JSON object, or a field that is unknown, missing or of another type.
    """
    plain = read_table(file, without=without)
    if plain is None:
        return None
    try:
        return checked(plain, cls, optional=optional)
    except ConfigError as error:
        raise RecordError(file, str(error), without=without) from None


def checked(plain: Mapping[str, Any], cls: type, *, optional: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, each of its type.

    Raises:
        ConfigError: a field that is unknown, missing or of another type.
    """
    hints = _hints(cls)
    for name in plain:
        if name not in hints:
            raise ConfigError(f"unknown field {name[:100]!r}{nearest(name[:100], hints)}")
    missing = [name for name in hints if name not in plain and name not in set(optional)]
    if missing:
        raise ConfigError(f"no field {', '.join(map(repr, missing))}")
    return {name: of_type(value, hints[name], path=name) for name, value in plain.items()}


def of_type(value: Any, hint: Any, *, path: str) -> Any:
    """The value, if it is of a type that JSON can hold; numbers need not be finite.

    Raises:
        ConfigError: it is of another one.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (hint is str and isinstance(value, str)):
        return value
    if hint is float and isinstance(value, float):
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a table; got {shown(value)}.")
        return {k: of_type(v, inner[1], path=f"{path}.{k[:100]}") for k, v in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise ConfigError(f"{path} must be a list; got {shown(value)}.")
        each = [of_type(v, inner[0], path=f"{path}[{i}]") for i, v in enumerate(value)]
        return tuple(each) if origin is tuple else each
    if origin in (types.UnionType, typing.Union):
        for kind in inner:
            try:
                return of_type(value, kind, path=path)
            except ConfigError:
                continue
        names = ["nothing" if kind is types.NoneType else kind.__name__ for kind in inner]
        raise ConfigError(f"{path} must be {' or '.join(names)}; got {shown(value)}.")
    if hint is types.NoneType:
        if value is not None:
            raise ConfigError(f"{path} must be null; got {shown(value)}.")
        return None
    if isinstance(value, dict | list):
        raise ConfigError(f"{path} must be a single value; got {shown(value)}.")
    return typed(value, hint, path=path)


def shown(value: Any) -> str:
    """A value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + " ..."


def aside(file: Path, *, why: str = "damaged") -> Path:
    """A name beside a file that nobody has yet."""
    names = (f"{file.name}.{why}{'' if n == 1 else f'-{n}'}" for n in range(1, 10**6))
    return next(free for name in names if not os.path.lexists(free := file.with_name(name)))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def _check_values(plain: Any) -> None:
    """Raises ConfigError for what would make a later step stumble: depth, and broken texts."""
    todo: list[tuple[Any, int]] = [(plain, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > _DEEPEST:
            raise ConfigError("it is nested too deeply")
        inner: Iterable[Any] = ()
        if isinstance(value, dict):
            inner = (*value, *value.values())
        elif isinstance(value, list):
            inner = value
        elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError("a text in it is not Unicode (half of a pair of surrogates)")
        todo += [(one, depth + 1) for one in inner]


def _kind(plain: Any) -> str:
    if plain is None:
        return "null"
    return {list: "a list", str: "a text", bool: "a truth value"}.get(type(plain), "a number")
