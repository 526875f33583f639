"""Tables of captions: `file_name` and `text`, as CSV or as a JSON object a line.

The layout of Hugging Face's ImageFolder. A photograph has a row for each of its captions; other
columns are passed over.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterator
from typing import Any

from cpfean.data.convert.captions import clean_caption
from cpfean.data.findings import Findings
from cpfean.files import what_it_is

TABLES = ("metadata.csv", "metadata.jsonl")
_COLUMNS = ("file_name", "text")


def read_table(content: bytes, *, name: str, findings: Findings) -> dict[str, list[str]]:
    """The captions of each photograph by its file name, both in the order of the rows.

    Args:
        content: of the file.
        name: of the file, whose ending tells CSV from JSON lines; for messages too.
        findings: where everything that is wrong goes, with the line it is on.
    """
    known = what_it_is(content[:64])
    if known or not content.strip():
        found = known or "an empty file"
        findings.add("bad-table", name, f"expected a table of captions, found {found}; write it")
        return {}
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        findings.add(
            "bad-text",
            name,
            f"expected UTF-8, found the byte 0x{content[error.start]:02x}; save it as UTF-8",
            place=f"line {line}",
        )
        return {}
    rows = _json_rows if name.lower().endswith(".jsonl") else _csv_rows
    captions: dict[str, list[str]] = {}
    for place, file_name, texts in rows(text, name, findings):
        try:
            path = clean_name(file_name)
        except ValueError as error:
            findings.add("bad-name", name, str(error), place=place)
            continue
        for caption in texts:
            try:
                captions.setdefault(path, []).append(clean_caption(caption))
            except ValueError as error:
                findings.add("empty-caption", name, str(error), place=f"{place} ({path})")
    return captions


def clean_name(name: str) -> str:
    """A file's path from the folder of its table, with "/" and without "." in it.

    Raises:
        ValueError: says why it is none.
    """
    if not name.strip():
        raise ValueError("expected a file_name, found none; write it, or drop the row")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ValueError(f"expected a file_name on one line, found {name!r}; rename the file")
    path = posixpath.normpath(name)
    if name.startswith("/") or path in (".", "..") or path.startswith("../") or name[1:3] == ":\\":
        raise ValueError(
            f"expected a path within the folder of the table, found {name!r}; move the photograph "
            "there"
        )
    return path


Row = tuple[str, str, list[str]]  # where it is, the file's name, the captions


def _csv_rows(text: str, name: str, findings: Findings) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip() for column in next(reader)]
        missing = [column for column in _COLUMNS if header.count(column) != 1]
        if missing:
            findings.add(
                "bad-table",
                name,
                f"expected the columns file_name and text, separated by a comma, found "
                f"{', '.join(header)[:200]}; name them in the first line",
                place="line 1",
            )
            return
        file_name, caption = (header.index(column) for column in _COLUMNS)
        for row in reader:
            place = f"line {reader.line_num}"
            if len(row) == len(header):
                yield place, row[file_name], [row[caption]]
            elif row:
                findings.add(
                    "bad-table",
                    name,
                    f"expected {len(header)} fields, found {len(row)}; put a text with commas into "
                    "double quotes",
                    place=place,
                )
    except csv.Error as error:
        findings.add(
            "bad-table",
            name,
            f"expected CSV, found something else ({error}); a double quote within a text is "
            "written twice",
            place=f"line {reader.line_num}",
        )


def _json_rows(text: str, name: str, findings: Findings) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
            if not all(isinstance(each, str) for each in (row["file_name"], *texts)):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            findings.add(
                "bad-table",
                name,
                'expected a JSON object with the texts "file_name" and "text", found '
                f"{line.strip()[:80]!r}; correct it",
                place=f"line {number}",
            )
            continue
        yield f"line {number}", row["file_name"], texts
