"""JSON files as they are given to us: of a bounded size, and an object outermost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpfean.errors import CpfeanError
from cpfean.files import is_there, read_file

LIMIT = 2**24  # bytes; a vocabulary of 100,000 labels has a tenth of it


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


def _kind(plain: Any) -> str:
    if plain is None:
        return "null"
    return {list: "a list", str: "a text", bool: "a truth value"}.get(type(plain), "a number")
