"""Text files of a data folder: UTF-8, split at "\\n" and nowhere else.

What else a file may be (UTF-16, a byte order mark, lines of an old Mac, a blank line at the end) is
told as what it is, with the command that makes a plain text of it.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from cpfean import commands
from cpfean.data.findings import Findings
from cpfean.files import NotAFileError, open_file, what_it_is

_LONGEST_LINE = 1_000_000  # bytes
# Line separators of Unicode, form feeds and the like are part of a caption, however odd.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f]")
_LETTER = re.compile(r"\w")
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark


def read_lines(path: Path, findings: Findings) -> list[str] | None:
    """A text's lines without their ends; None, and findings, for anything else.

    A file that is not there is left to the caller: None without a finding.
    """
    name = path.name
    try:
        with open_file(path) as file:
            raw: list[bytes] = []
            # Bounded, so that no file can fill the memory.
            while line := file.readline(_LONGEST_LINE + 2):
                raw.append(line.removesuffix(b"\n"))
                if len(raw[-1]) > _LONGEST_LINE:
                    break
    except FileNotFoundError:
        return None
    except NotAFileError as error:
        findings.add("not-text", name, f"{error.strerror}; replace it")
        return None
    except OSError as error:
        findings.unreadable(name, error)
        return None
    if not raw:
        return []
    if not _is_plain(path, raw, findings):
        return None
    before = len(findings)
    lines: list[str] = []
    offset = 0
    for number, content in enumerate(raw, start=1):
        lines.append(_decoded(content, path, findings, number=number, offset=offset))
        offset += len(content) + 1
    return lines if len(findings) == before else None


def says_something(text: str) -> bool:
    """Whether a tokenizer would find a word or a sign in it.

    Those of the BERT family drop white space, controls, format characters and bare accents.
    """
    if _LETTER.search(text):
        return True
    return any(unicodedata.category(c)[0] not in "ZCM" and c != "\ufffd" for c in text)


def blank_end(path: Path, lines: list[str], findings: Findings) -> bool:
    """Adds a finding if the text ends in blank lines, and says whether it does."""
    filled = len(lines)
    while filled and not lines[filled - 1].strip():
        filled -= 1
    blank = len(lines) - filled
    if not blank:
        return False
    if not filled:
        message = f"expected text, found {blank:,} blank lines and nothing else; write it again"
    else:
        found = "a blank line" if blank == 1 else f"{blank:,} blank lines"
        message = (
            f"expected the text to end at line {filled:,}, found {found} behind it; take it away: "
            f"{commands.first_lines(path, filled)}"
        )
    findings.add("blank-end", path.name, message, place=f"line {filled + 1}")
    return True


def _is_plain(path: Path, raw: list[bytes], findings: Findings) -> bool:
    """Whether a file is a text of the expected kind, by its first line."""
    name, first = path.name, raw[0]
    if first.startswith(_MARK):
        findings.add(
            "bad-text",
            name,
            "expected plain UTF-8, found a byte order mark; save it without: "
            f"{commands.without_first_bytes(path, len(_MARK))}",
            place="line 1, byte 0",
        )
        return False
    known = what_it_is(first)
    if known == "a text in UTF-16":
        findings.add(
            "bad-text",
            name,
            f"expected UTF-8, found UTF-16 by its byte order mark; convert it: "
            f"{commands.as_utf8(path, 'UTF-16')}",
            place="line 1, byte 0",
        )
        return False
    if known:
        findings.add("not-text", name, f"expected a text, found {known}; unpack it")
        return False
    if len(raw) == 1 and b"\r" in first.rstrip(b"\r"):
        findings.add(
            "bad-text",
            name,
            "expected lines that end in \\n, found carriage returns alone, as old Macs write them; "
            f"convert it: {commands.as_unix_lines(path)}",
            place="line 1",
        )
        return False
    return True


def _decoded(content: bytes, path: Path, findings: Findings, *, number: int, offset: int) -> str:
    name = path.name
    if len(content) > _LONGEST_LINE:
        findings.add(
            "long-line",
            name,
            f"expected at most {_LONGEST_LINE:,} bytes, found more; what follows was not read; "
            "break it",
            place=f"line {number}",
        )
        return ""
    try:
        line = content.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        findings.add(
            "bad-text",
            name,
            f"expected UTF-8, found the byte {content[error.start]:#04x}; if it is Latin-1, as on "
            f"older systems: {commands.as_utf8(path, 'LATIN1')}",
            place=f"line {number}, byte {offset + error.start}",
        )
        return ""
    control = _CONTROL.search(line)
    if control:
        at = len(line[: control.start()].encode())
        findings.add(
            "bad-text",
            name,
            f"expected text, found the control character {control[0]!r}; remove it",
            place=f"line {number}, byte {offset + at}",
        )
    return line


__all__ = ["blank_end", "read_lines", "says_something"]
