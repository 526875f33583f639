"""A worker that is somewhere else: batches come and go as columns of texts and bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from cpfean import errors
from cpfean.errors import CpfeanError, ServiceError
from cpfean.extraction.batches import READERS, Batch, Extractor, extract_batch, packed
from cpfean.extraction.plan import differences

MakeExtractor = Callable[[torch.device], Extractor]


class Worker:
    """Looks at batches with an extractor of its own, and one torch thread; for `map_batches`.

    Args:
        make_extractor: makes it, where the worker is.
        provenance: what it has to tell of itself, apart from where its models are.
        device: "cpu" or "cuda", where it computes.
    """

    def __init__(
        self,
        make_extractor: MakeExtractor,
        provenance: Mapping[str, Any],
        device: str,
    ) -> None:
        torch.set_num_threads(1)
        self._readers = READERS if device == "cuda" else 1
        self._failure = ""
        try:
            self._extractor = make_extractor(torch.device(device))
            mine, host = _content(self._extractor.provenance()), socket.gethostname()
            if found := differences(mine, _content(provenance), names=("there", "here")):
                raise ServiceError(
                    f"{host} has another extractor than this machine: {'; '.join(found)}. Give all "
                    "nodes the same models and versions."
                )
        except CpfeanError as error:
            self._failure = _told(error)

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Looks at one batch.

        Args:
            rows: "batch", as `sent` makes it.

        Returns:
            "number" of the batch; "content", as `packed` makes it, or "error" for `received`.
        """
        (text,) = rows["batch"]
        plain = json.loads(text)
        batch = Batch(**plain | {"paths": tuple(plain["paths"])})
        content, failure = b"", self._failure
        if not failure:
            try:
                content = packed(extract_batch(self._extractor, batch, readers=self._readers))
            except CpfeanError as error:
                failure = _told(error)
        columns = {"number": batch.number, "content": content, "error": failure}
        return {name: np.array([value], dtype=object) for name, value in columns.items()}


def sent(batch: Batch) -> str:
    """A batch on its way to a worker."""
    return json.dumps(asdict(batch))


def received(rows: Mapping[str, np.ndarray]) -> Iterator[tuple[int, bytes]]:
    """Number and content of each batch that workers have given.

    Raises:
        CpfeanError: what a worker has told of, as what it was there.
    """
    columns = (rows[name] for name in ("number", "content", "error"))
    for number, content, told in zip(*columns, strict=True):
        if told:
            name, message = json.loads(told)
            raise getattr(errors, name, ServiceError)(message)
        yield number, content


def _told(error: CpfeanError) -> str:
    return json.dumps([type(error).__name__, str(error)])


def _content(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What an extractor computes with, wherever its files are, and whatever torch was built for."""
    plain: dict[str, Any] = json.loads(json.dumps({**provenance, "settings": None}))
    for part in plain.values():
        if isinstance(part, dict):
            part.pop("name", None)
    versions = plain.get("versions", {})
    return plain | {"versions": {name: v.split("+")[0] for name, v in versions.items()}}
