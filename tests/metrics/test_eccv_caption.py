"""ECCV Caption's metrics on made scores of all its images and captions, against plain sorting."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from cpfean.errors import ConfigError, DataError
from cpfean.metrics.best import BestCandidates
from cpfean.metrics.eccv_caption import METRICS, EccvCaption
from tests.metrics.coco_scores import CAPTIONS, IMAGES, made_scores

ROWS = 500


@pytest.fixture(scope="module")
def judged() -> Any:
    """The judgements as they are."""
    package = pytest.importorskip("eccv_caption")
    return package.Metrics()


@pytest.fixture(scope="module")
def ids(judged: Any) -> tuple[list[int], list[int], list[int]]:
    """Images and captions of the test split, the captions image by image, and their images."""
    own = judged.coco_gts["i2t"]
    captions = [caption for image in own for caption in own[image]]
    return list(own), captions, np.repeat(np.arange(IMAGES), 5).tolist()


def slow(ranked: list[int], matches: set[int]) -> tuple[float, float, float]:
    """R@1, mAP@R and R-Precision of one query, by their definitions (arXiv:2204.03359)."""
    hits = [item in matches for item in ranked[: len(matches)]]
    precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
    size = len(matches)
    return float(hits[0]), sum(precisions) / size, sum(hits) / size


@pytest.mark.long
def test_metrics_are_those_of_sorting_every_judged_query(
    judged: Any, ids: tuple[list[int], list[int], list[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    images, captions, owners = ids
    eccv = EccvCaption(images, captions, image_of_caption=owners)
    assert (eccv.captions_each, eccv.images_each) == (48, 19)  # as docs/reproduce.md says
    scores = made_scores(judged, images, captions)
    best = BestCandidates(IMAGES, CAPTIONS, captions_each=48, images_each=19)
    for start in range(0, IMAGES, ROWS):
        best.add(torch.from_numpy(scores[start : start + ROWS]), first=start)
    found = eccv.metrics(best)
    assert capfd.readouterr().err == ""

    sides = {"i2t": (scores, images, captions), "t2i": (scores.T, captions, images)}
    expected = {}
    for way, (matrix, queries, items) in sides.items():
        row_of = {query: row for row, query in enumerate(queries)}
        each = []
        for query, matches in judged.eccv_gts[way].items():
            row = matrix[row_of[query]]
            least = np.partition(row, -len(matches))[-len(matches)]  # the rest need not be sorted
            order = sorted(np.flatnonzero(row >= least), key=lambda i: (-row[i], i))
            each.append(slow([items[i] for i in order], set(matches)))
        means = np.mean(each, axis=0)
        expected |= {
            f"{way}_{name}": 100 * mean for name, mean in zip(METRICS, means, strict=False)
        }
        first = matrix.argmax(axis=1)
        hits = [
            items[first[row_of[query]]] in matches for query, matches in judged.cxc_gts[way].items()
        ]
        expected[f"{way}_cxc_r1"] = 100 * np.mean(hits)
    assert found == pytest.approx(expected)
    assert all(1 < value < 99 for value in found.values()), found


def test_another_split_is_refused(judged: Any, ids: tuple[list[int], list[int], list[int]]) -> None:
    images, captions, owners = ids
    with pytest.raises(DataError, match="found 4,999 images and 24,995 captions, 24,995 of them"):
        EccvCaption(images[:-1], captions[:-5], image_of_caption=owners[:-5])
    with pytest.raises(DataError, match="25,001 captions, 25,000 of them"):
        EccvCaption(images, [*captions, 1], image_of_caption=[*owners, IMAGES - 1])
    swapped = [captions[5], *captions[1:5], captions[0], *captions[6:]]
    with pytest.raises(DataError, match="25,000 captions, 24,998 of them"):
        EccvCaption(images, swapped, image_of_caption=owners)


def test_without_the_package_its_installation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(ConfigError, match="pip install eccv-caption"):
        EccvCaption([], [], image_of_caption=[])
