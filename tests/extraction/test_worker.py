"""A worker that is somewhere else, called here as Ray Data calls it there."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpfean.errors import CheckpointError, CpfeanError, DataError, ServiceError
from cpfean.extraction.batches import Batch, Extractor, extract_batch, packed, unpacked
from cpfean.extraction.worker import Worker, received, sent
from tests.extraction.tiny import Quadrants, quadrants, write_photographs


def answer(worker: Worker, batch: Batch) -> dict[str, Any]:
    rows = worker({"batch": np.array([sent(batch)])})
    assert all(len(column) == 1 for column in rows.values())
    return {name: column[0] for name, column in rows.items()}


def worker(make: Any = quadrants, **changed: Any) -> Worker:
    provenance = Quadrants().provenance() | changed
    return Worker(make, provenance, device="cpu", readers=1)


def test_a_worker_gives_what_the_function_gives(tmp_path: Path) -> None:
    paths = tuple(one.path for one in write_photographs(tmp_path)["train"])
    batch = Batch(number=7, paths=paths, key="k")
    given = answer(worker(), batch)
    assert (given["number"], given["error"]) == (7, "")
    assert given["content"] == packed(extract_batch(quadrants(torch.device("cpu")), batch))
    assert len(unpacked(io.BytesIO(given["content"]))) == 7


def test_an_error_of_ours_arrives_as_what_it_was(tmp_path: Path) -> None:
    def without_model(device: torch.device) -> Extractor:
        raise CheckpointError("no such model")

    gone = Batch(number=1, paths=(str(tmp_path / "gone.jpg"),), key="k")
    for made, kind, said in (
        (worker(), DataError, "cannot be seen"),
        (worker(without_model), CheckpointError, "no such model"),
    ):
        given = answer(made, gone)
        assert (given["number"], given["content"]) == (1, b"")
        error = received(given["error"])
        assert type(error) is kind
        assert said in str(error)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"detector": {"name": "elsewhere", "sha256": "0"}}, ""),
        ({"settings": {"detector": "/other/place"}}, ""),
        ({"versions": {"torch": torch.__version__.split("+")[0] + "+cu130"}}, ""),
        (
            {"detector": {"name": "quadrants", "sha256": "1"}},
            'detector.sha256: "0" there, "1" here',
        ),
        ({"versions": {"torch": "1.0"}}, '"1.0" here'),
    ],
)
def test_other_models_and_versions_are_refused_wherever_they_are(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    path = write_photographs(tmp_path)["dev"][0].path
    given = answer(worker(**changed), Batch(number=0, paths=(path,), key="k"))
    if said:
        error = received(given["error"])
        assert isinstance(error, ServiceError)
        assert said in str(error)
    else:
        assert given["error"] == ""


def test_what_was_told_by_a_later_release_is_an_error_nevertheless() -> None:
    error = received('["SomethingNewError", "says something"]')
    assert isinstance(error, CpfeanError)
    assert str(error) == "says something"
