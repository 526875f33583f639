"""Photographs as people have them, with their captions and splits.

Three layouts are known: a folder for each split with a table of captions in it (ImageFolder), one
folder with a file of captions for all of it, and a folder with nothing but photographs.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpfean.data.convert.captions import read_coco_captions, read_json, read_karpathy
from cpfean.data.convert.photo_captions import TABLES, clean_name, read_table
from cpfean.data.convert.photo_folder import PhotoFolder, is_photograph, open_folder
from cpfean.data.convert.photo_splits import (
    Captions,
    check_shares,
    draw_splits,
    find_leaks,
    tell_doubles,
)
from cpfean.data.findings import Findings
from cpfean.data.split import GALLERY, SPLITS
from cpfean.errors import ConfigError, DataError
from cpfean.files import read_file

logger = logging.getLogger(__name__)

_FOLDERS = {"train": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test"}
_LARGEST_TABLE = 2**30  # bytes


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A file with a picture, and what people wrote about it.

    Attributes:
        name: path from the folder that was given, with "/"; unique over all splits. It goes to
            `S_ids.txt`, so that the photographs of a finished data folder are found below the
            folder that they came from.
        path: of the file, or its s3:// URL.
        captions: cleaned; empty only in a gallery.
    """

    name: str
    path: str
    captions: tuple[str, ...]


def find_photographs(
    root: str,
    *,
    captions: Path | None = None,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> dict[str, list[Photograph]]:
    """The photographs of each split, sorted by name.

    Two files with the same bytes are one photograph to a model. Where splits are given, such
    doubles in two of them are refused, because a model would be tested on what it has seen; where
    they are drawn, doubles are drawn together. Doubles within a split are counted in the log.

    No photograph is decoded here.

    Args:
        root: a folder or an s3:// URL. With folders train, dev (or val, validation) and test in
            it, each with a metadata.csv or metadata.jsonl, these are the splits. With such a table
            in the root itself, that is taken for `captions`. Without any, it is a gallery.
        captions: a table of file_name and text (.csv, .jsonl), COCO's caption file or Karpathy's
            (.json), whose splits are then taken. Names are paths from the root; those of JSON may
            also be in any folder below it. A photograph without a row in a table is refused; of
            those that a JSON file does not tell of, only the number is said.
        shares: of train, dev and test among the photographs, where splits have to be drawn; with a
            share of 0 there is no such split.
        seed: of the draw, which depends on it and on the names alone.

    Returns:
        By "train", "dev" and "test", or "gallery" alone; none of them empty.

    Raises:
        ConfigError: shares that are none, or captions given beside splits that have their own.
        DataError: no photographs, or a list of everything that is wrong, by file and line.
        ServiceError: an object store that does not answer.
    """
    check_shares(shares)
    folder = open_folder(root)
    if not folder.photographs():
        raise DataError(
            f"{root}: expected photographs, found {len(folder.files):,} other files; check the "
            "path."
        )
    findings = Findings()
    for name in folder.photographs():
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            message = "expected a name of one line in UTF-8, found another; rename the file"
            findings.add("bad-name", ascii(name), message)
    findings.refuse(root)
    own = _tables_of_splits(folder)
    if own and captions is not None:
        raise ConfigError(
            f"{root} has captions in {', '.join(own.values())}, and {captions} was given too; "
            "leave out one of them."
        )
    if own:
        splits = _given_splits(folder, own, findings)
    else:
        found = _captions_for_all(folder, captions, findings)
        if found is None:
            names = folder.photographs()
            tell_doubles(folder.doubles(names))
            return {GALLERY: [_photograph(folder, name, ()) for name in names]}
        splits = found
    findings.refuse(root)
    groups = folder.doubles(sorted(name for split in splits.values() for name in split))
    if list(splits) == [""]:
        splits = draw_splits(splits[""], groups, shares=shares, seed=seed, root=root)
    else:
        find_leaks(splits, groups, findings)
        findings.refuse(root)
    tell_doubles(groups)
    return {
        split: [_photograph(folder, name, splits[split][name]) for name in sorted(splits[split])]
        for split in SPLITS
        if splits.get(split)
    }


def _photograph(folder: PhotoFolder, name: str, captions: Sequence[str]) -> Photograph:
    return Photograph(name=name, path=folder.path(name), captions=tuple(captions))


def _tables_of_splits(folder: PhotoFolder) -> dict[str, str]:
    """The table of each folder that is a split by its name and has one."""
    tables = {}
    for name in _FOLDERS:
        of_folder = [table for table in TABLES if f"{name}/{table}" in folder.files]
        if len(of_folder) > 1:
            raise DataError(
                f"{folder.root}/{name}: expected one table of captions, found "
                f"{' and '.join(of_folder)}; remove one."
            )
        if of_folder:
            tables[name] = f"{name}/{of_folder[0]}"
    for_dev = [name for name in tables if _FOLDERS[name] == "dev"]
    if len(for_dev) > 1:
        raise DataError(
            f"{folder.root}: expected one folder of the dev split, found {' and '.join(for_dev)}; "
            "remove one, or its table."
        )
    return tables


def _given_splits(
    folder: PhotoFolder, tables: Mapping[str, str], findings: Findings
) -> dict[str, Captions]:
    splits = {}
    for name, table in tables.items():
        captions = _table_captions(folder, table, _content(folder, table, findings), findings)
        splits[_FOLDERS[name]] = captions
    for name in sorted({photo.split("/", 1)[0] for photo in folder.photographs()} & set(_FOLDERS)):
        if name not in tables:
            findings.add(
                "no-caption",
                f"{name}/",
                f"expected {' or '.join(TABLES)} as in {', '.join(tables)}, found none; write it, "
                "or move the folder away",
            )
    return splits


def _captions_for_all(
    folder: PhotoFolder, captions: Path | None, findings: Findings
) -> dict[str, Captions] | None:
    """The captions of one folder, by split; "" where splits are to be drawn; None without any."""
    if captions is None:
        tables = [table for table in TABLES if table in folder.files]
        if len(tables) > 1:
            raise DataError(
                f"{folder.root}: expected one table of captions, found {' and '.join(tables)}; "
                "remove one, or name it as the captions."
            )
        if not tables:
            return None
        content = _content(folder, tables[0], findings)
        return {"": _table_captions(folder, tables[0], content, findings)}
    suffix = captions.suffix.lower()
    if suffix == ".json":
        return _json_captions(folder, captions, findings)
    if suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"{captions}: expected captions as .csv, .jsonl or .json.")
    try:
        content = read_file(captions, limit=_LARGEST_TABLE)
    except OSError as error:
        raise DataError(
            f"{captions}: cannot be read: {error.strerror or error}; check the path."
        ) from None
    return {"": _table_captions(folder, captions.name, content, findings, at_root=True)}


def _content(folder: PhotoFolder, table: str, findings: Findings) -> bytes | None:
    try:
        return folder.read(table)
    except OSError as error:
        findings.unreadable(table, error)
        return None


def _table_captions(
    folder: PhotoFolder,
    table: str,
    content: bytes | None,
    findings: Findings,
    *,
    at_root: bool = False,
) -> Captions:
    """What a table says; every photograph below its folder has to be in it."""
    if content is None:
        return {}
    below = "" if at_root else table[: table.rfind("/") + 1]
    before = len(findings)
    rows = read_table(content, name=table, findings=findings)
    captions: Captions = {}
    for file_name, texts in rows.items():
        name = folder.named(f"{below}{file_name}")
        if name is None or not is_photograph(name):
            what = "no file" if name is None else "a file that is none by its name"
            findings.add(
                "missing",
                table,
                f"expected the photograph {file_name}, found {what}; add it, or drop its rows",
                place=file_name,
            )
        elif name in captions:
            findings.add(
                "duplicate-id",
                table,
                "expected one spelling of a name, found two (composed and decomposed letters); "
                "choose one",
                place=file_name,
            )
        else:
            captions[name] = texts
    if rows or len(findings) == before:
        known = {folder.named(f"{below}{file_name}") for file_name in rows}
        for name in folder.photographs():
            if name.startswith(below) and name not in known:
                findings.add(
                    "no-caption",
                    table,
                    "expected a row for each photograph, found none; write one, or move the "
                    "photograph away",
                    place=name,
                )
    return captions


def _json_captions(folder: PhotoFolder, path: Path, findings: Findings) -> dict[str, Captions]:
    """COCO's captions, whose split is to be drawn, or Karpathy's with their splits."""
    data = read_json(path, without=("tokens", "sentids", "raw", "caption"))
    images = data.get("images") if isinstance(data, dict) else None
    first = images[0] if isinstance(images, list) and images else None
    if isinstance(first, dict) and "sentences" in first:
        captioned = read_karpathy(path, each="all")
    else:
        captioned = {"": read_coco_captions({"train": path}, each="all")["train"]}
    splits: dict[str, Captions] = {}
    taken: dict[str, str] = {}
    for split, of_split in captioned.items():
        own = splits.setdefault(split, {})
        for image, texts in zip(of_split.names, of_split.captions, strict=True):
            name = _place(folder, image, path.name, findings)
            if name is not None and taken.setdefault(name, image) != image:
                findings.add(
                    "duplicate-id",
                    path.name,
                    f"expected a photograph of its own, found that {taken[name]} is the same file",
                    place=image,
                )
            elif name is not None:
                own[name] = texts
    others = len(folder.photographs()) - len(taken)
    if others:
        logger.info(
            "%s: %d other photographs have no captions in %s and are left out",
            folder.root,
            others,
            path.name,
        )
    return splits


def _place(folder: PhotoFolder, image: str, source: str, findings: Findings) -> str | None:
    """Where the photograph of a name is: at the root, or the only one of that name below it."""
    try:
        name = folder.named(clean_name(image))
    except ValueError as error:
        findings.add("bad-name", source, str(error), place=image)
        return None
    if name is not None:
        return name
    places = folder.with_name(image)
    if len(places) == 1:
        return places[0]
    found = f"{len(places)}: {', '.join(places[:3])}" if places else "none"
    findings.add(
        "missing",
        source,
        f"expected one photograph of that name, found {found}; "
        + ("keep one" if places else "add it, or drop it from the captions"),
        place=image,
    )
    return None
