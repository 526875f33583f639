"""The field's scorers at their published temperatures give the numbers of their definitions.

Two regions in the plane, at 0 and 90 degrees, and three words at 30, 80 and 200; the right values
were computed once from the definitions, in float64, with every context formed.
"""

from __future__ import annotations

import math

import pytest
import torch

from cpfean.analysis.statistics import FULL
from cpfean.config import ExperimentConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, unit
from cpfean.model.scorers.pairs import every_pair
from cpfean.model.scorers.scorer import scorer_class
from experiments.methods import COMMON, METHODS

# CHAN's sum stands in its publication without the factor t = 0.1.
PUBLISHED = {
    "scan": 0.3747037832620171,
    "chan": 0.1 * 10.114193098533166,
    "chan_mean": 0.5029376711569927,
}
MARGINS = {"chan": 0.1 * 0.05, "chan_mean": 0.05}  # the others' is 0.2
SCORED = [m for m in METHODS if m.name.removesuffix("_on_full_encoder") in PUBLISHED]


def at(*degrees: float) -> torch.Tensor:
    angles = torch.tensor([math.radians(d) for d in degrees], dtype=torch.float64)
    return torch.stack((angles.cos(), angles.sin()), dim=1)[None]


@pytest.mark.parametrize("method", SCORED, ids=lambda method: method.name)
def test_a_baseline_scores_as_published(method) -> None:
    alignment = ExperimentConfig().with_overrides(method.overrides).model.alignment
    assert alignment.global_weight == 0
    scorer = scorer_class(alignment.kind).from_config(alignment, dim=2)
    regions, words = at(0, 90), at(30, 80, 200)
    real = torch.ones(1, 3, dtype=torch.bool)
    images = ImageEmbeddings(regions, real[:, :2], unit(regions.mean(1)), torch.zeros(1, 2))
    captions = CaptionEmbeddings(words, real, unit(words.mean(1)), torch.ones(1, 3))
    found = scorer(every_pair(images, captions)).item()
    assert found == pytest.approx(PUBLISHED[method.name.removesuffix("_on_full_encoder")], abs=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_first_point_of_a_baseline_is_the_published_one_and_is_searched(method) -> None:
    config = ExperimentConfig().with_overrides(method.overrides)
    assert config.loss.mining == "hardest"
    if method.name != FULL:
        expected = MARGINS.get(method.name.removesuffix("_on_full_encoder"), 0.2)
        assert config.loss.margin == pytest.approx(expected)
    for path, values in {**COMMON, **method.knobs}.items():
        if path.startswith(("loss.", "model.")):
            assert config.flat()[path] in values, path
