"""A worker that is somewhere else, called here as Ray Data calls it there."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpfean.errors import CheckpointError, CpfeanError, DataError, ServiceError
from cpfean.extraction.batches import Batch, Extractor, extract_batch, packed, unpacked
from cpfean.extraction.worker import Worker, received, sent
from tests.extraction.tiny import Quadrants, quadrants, write_photographs


def answer(worker: Worker, batch: Batch) -> tuple[int, bytes]:
    (given,) = received(worker({"batch": np.array([sent(batch)])}))
    return given


def worker(make: Any = quadrants, **changed: Any) -> Worker:
    provenance = Quadrants().provenance() | changed
    return Worker(make, provenance, "cpu")


def test_a_worker_gives_what_the_function_gives(tmp_path: Path) -> None:
    paths = tuple(one.path for one in write_photographs(tmp_path)["train"])
    batch = Batch(number=7, paths=paths, key="k")
    number, content = answer(worker(), batch)
    assert number == 7
    assert content == packed(extract_batch(quadrants(torch.device("cpu")), batch))
    assert len(unpacked(io.BytesIO(content))) == 7


def test_an_error_of_ours_arrives_as_what_it_was(tmp_path: Path) -> None:
    def without_model(device: torch.device) -> Extractor:
        raise CheckpointError("no such model")

    gone = Batch(number=1, paths=(str(tmp_path / "gone.jpg"),), key="k")
    with pytest.raises(DataError, match="cannot be seen"):
        answer(worker(), gone)
    with pytest.raises(CheckpointError, match="no such model"):
        answer(worker(without_model), gone)


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
    batch = Batch(number=0, paths=(path,), key="k")
    if said:
        with pytest.raises(ServiceError, match=re.escape(said)):
            answer(worker(**changed), batch)
    else:
        assert answer(worker(**changed), batch)[0] == 0


def test_what_a_later_release_tells_is_an_error_nevertheless() -> None:
    told = np.array(['["SomethingNewError", "says something"]'])
    with pytest.raises(CpfeanError, match="says something"):
        list(received({"number": np.array([0]), "content": np.array([b""]), "error": told}))
