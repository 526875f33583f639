"""Where the features of a folder come from: `provenance.json`, as `extract.py` writes it.

Folders that were made elsewhere have no such file. Where there is one it belongs to the data: the
fingerprint covers it, so that features of another detector are other data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpfean.data.findings import Findings
from cpfean.files import is_there, read_file

PROVENANCE = "provenance.json"
FORMAT = 1
_LARGEST = 2**26  # bytes; a line for each photograph that was left out


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What made the features of a folder; None where nothing tells.

    Raises:
        DataError: a file that says nothing that can be understood.
    """
    findings = Findings()
    told = _read(folder, findings)
    findings.refuse(folder)
    return told


def write_provenance(folder: Path, told: Mapping[str, Any]) -> None:
    """Writes what `read_provenance` reads; its format is added."""
    text = json.dumps({"format": FORMAT} | dict(told), indent=1, ensure_ascii=False)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")


def check_provenance(folder: Path, findings: Findings) -> None:
    """Adds a finding for a file that cannot be understood; none for a folder without one."""
    _read(folder, findings)


def described(told: dict[str, Any]) -> str:
    """Detector, backbone and what was left out, in a line for people."""
    settings = told["settings"]
    parts = [f"regions by {_model(told, 'detector') or settings.get('detector')}"]
    backbone = _model(told, "backbone")
    parts.append(f"features by {backbone}" if backbone else "features of the detector")
    if backbone and settings.get("features") == "both":
        parts[-1] += " and the detector"
    skipped = told.get("skipped") or []
    if skipped:
        number = "1 photograph" if len(skipped) == 1 else f"{len(skipped):,} photographs"
        parts.append(f"{number} could not be read")
    return ", ".join(parts)


def _model(told: dict[str, Any], part: str) -> str | None:
    """A model with the first digits of its weights' hash."""
    model = told.get(part)
    if not isinstance(model, dict):
        return None
    digest = str(model.get("sha256") or "")[:12]
    return f"{model.get('name')}{f' ({digest})' if digest else ''}"


def _read(folder: Path, findings: Findings) -> dict[str, Any] | None:
    path = folder / PROVENANCE
    if not is_there(path):
        return None
    try:
        told = json.loads(read_file(path, limit=_LARGEST))
    except OSError as error:
        findings.unreadable(PROVENANCE, error)
        return None
    except (ValueError, RecursionError) as error:
        found = f"found none: {error}"
    else:
        if (
            isinstance(told, dict)
            and told.get("format") == FORMAT
            and isinstance(told.get("settings"), dict)
        ):
            return told
        found = f"found {json.dumps(told)[:60]}"
    findings.add(
        "bad-json",
        PROVENANCE,
        f'expected an object with "format": {FORMAT} and "settings", as extract.py writes it, '
        f"{found}; extract anew, or take it away if the features are from elsewhere",
    )
    return None


__all__ = [
    "FORMAT",
    "PROVENANCE",
    "check_provenance",
    "described",
    "read_provenance",
    "write_provenance",
]
