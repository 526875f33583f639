"""A look at the beginning of every photograph, before minutes or hours are spent on any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cpfean.data.convert.photographs import Photograph
from cpfean.errors import DataError
from cpfean.photographs.decoding import UnreadablePhotographError, check_photograph
from cpfean.progress import Progress

_LOOKERS = 16  # threads; they wait for disks and networks


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What the beginnings of the files tell.

    Attributes:
        sizes: bytes of each file, by path; -1 of those that cannot be read.
        faults: by path, why a photograph cannot be read; damage behind the beginning is not seen.
    """

    sizes: Mapping[str, int]
    faults: Mapping[str, str]


def look_at(photographs: Sequence[Photograph]) -> Looks:
    """Opens every photograph and reads its header; no pixel is decoded.

    Raises:
        ServiceError: an object store does not answer.
    """
    sizes: dict[str, int] = {}
    faults: dict[str, str] = {}
    progress = Progress("looking at the photographs", total=len(photographs))

    def look(photograph: Photograph) -> int | str:
        try:
            return check_photograph(photograph.path)
        except UnreadablePhotographError as error:
            return str(error)

    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="looking") as pool:
        results = pool.map(look, photographs)
        for done, (one, found) in enumerate(zip(photographs, results, strict=True), 1):
            if isinstance(found, str):
                faults[one.path] = found
            sizes[one.path] = -1 if isinstance(found, str) else found
            progress.step(done)
    return Looks(sizes=sizes, faults=faults)


def refuse(faults: Sequence[tuple[str, str]], *, of: int, done: bool) -> None:
    """Refuses photographs that cannot be read, all of them by name.

    Args:
        faults: path and reason of each.
        of: how many photographs there are.
        done: whether the others have been looked at in full.

    Raises:
        DataError: there are any.
    """
    if not faults:
        return
    lines = "\n".join(f"  {path}: {reason}" for path, reason in faults)
    # Without one of the photographs that it was begun with an extraction would be another one.
    mend = "Mend them" if done else "Mend or remove them"
    kept = " What is done is kept: the same command again goes on." if done else ""
    raise DataError(
        f"{len(faults)} of {of} photographs cannot be used:\n{lines}\n"
        f"{mend}, or leave them out with their captions by --skip-broken.{kept}"
    )
