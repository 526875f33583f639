"""Folders that a command fills with files of fixed names: its own, or new ones."""

from __future__ import annotations

from pathlib import Path

from cpfean.errors import ConfigError
from cpfean.writing import cannot_write

MARK = ".cpfean-output"  # in a folder all of whose files a command of ours may replace


def own_folder(folder: Path, *, flag: str) -> Path:
    """Makes a folder for results, or takes one that was made for results before.

    Raises:
        ConfigError: it is a file, or holds files of somebody else, which ours might replace.
        ServiceError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{flag} {folder}: expected a folder, found a file; name a folder.")
    try:
        if folder.is_dir() and not (folder / MARK).exists() and any(folder.iterdir()):
            raise ConfigError(
                f"{flag} {folder}: holds files that were not made here, and might be replaced; "
                "name a new folder or an empty one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder
