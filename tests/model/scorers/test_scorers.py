"""Every scorer of the registry equals its naive form, and keeps what it promises.

A scorer that is new is tested here as soon as it has its entry and its line in `naive.NAIVE`.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpfean.config import AlignmentConfig, ExperimentConfig
from cpfean.errors import ConfigError
from cpfean.model import scorers
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, unit
from cpfean.model.scorers.pairs import every_pair, listed_pairs
from cpfean.model.scorers.registry import SCORERS
from cpfean.model.scorers.scorer import Scorer, scorer_class
from tests.model.scorers.fragments import (
    DIM,
    NUM_REGIONS,
    NUM_WORDS,
    embed,
    gradients,
    make_fragments,
)
from tests.model.scorers.naive import NAIVE, SUMS, Pair

# What a kind is tried with besides its defaults.
VARIANTS = {
    "gate hard": {"gate": "hard"},
    "gate off": {"gate": "off"},
    "weighted words": {"prominence": True},
    "no fusion": {"fusion": False, "prominence": True},
    "gate off, weighted words": {"gate": "off", "prominence": True},
    "two rounds": {"rounds": 2},
    "three rounds": {"rounds": 3},
    "three rounds, gate hard, weighted words": {"rounds": 3, "gate": "hard", "prominence": True},
    "two rounds, gate off": {"rounds": 2, "gate": "off"},
    "two rounds, weighted words": {"rounds": 2, "prominence": True},
}
CONFIGS = {
    **{kind: AlignmentConfig(kind=kind) for kind in SCORERS},
    **{
        f"{kind}, other temperatures": AlignmentConfig(
            kind=kind, word_temperature=3.0, region_temperature=20.0
        )
        for kind in SCORERS
    },
    **{f"prominent, {name}": AlignmentConfig(**changed) for name, changed in VARIANTS.items()},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def build(config: AlignmentConfig) -> Scorer:
    return scorer_class(config.kind).from_config(config, dim=DIM).double()


def naive_scores(scorer: Scorer, config: AlignmentConfig, *embedded: object) -> Tensor:
    """The score matrix, one pair at a time, without padding."""
    images, captions = embedded
    assert isinstance(images, ImageEmbeddings)
    assert isinstance(captions, CaptionEmbeddings)
    learned = dict(scorer.named_parameters())
    rows = [
        [
            NAIVE[config.kind](
                Pair(
                    images.regions[i, :r],
                    captions.words[c, :w],
                    images.thresholds[i, :r],
                    captions.salience[c, :w],
                    config,
                    learned,
                )
            )
            for c, w in enumerate(NUM_WORDS)
        ]
        for i, r in enumerate(NUM_REGIONS)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def test_every_entry_has_its_file_its_naive_form_and_a_source() -> None:
    folder = Path(inspect.getfile(scorers)).parent
    assert NAIVE.keys() == SCORERS.keys()
    assert SCORERS.keys() > SUMS
    for kind, entry in SCORERS.items():
        assert (folder / f"{kind}.py").is_file()
        found = scorer_class(kind)
        assert issubclass(found, Scorer)
        assert found.__name__ == entry.scorer
        assert "Source:" in (found.__doc__ or "")


def test_the_choices_of_the_configuration_are_the_registrys() -> None:
    for kind in SCORERS:
        settings = {"model.alignment.kind": kind}
        assert ExperimentConfig().with_overrides(settings).model.alignment.kind == kind
    with pytest.raises(ConfigError, match=f"one of \"{next(iter(SCORERS))}\".*got 'nothing'"):
        AlignmentConfig(kind="nothing")


def test_choosing_among_the_scorers_loads_no_torch() -> None:
    program = "import cpfean.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("seed", [0, 1])
@every_config
def test_scores_and_gradients_equal_those_of_the_naive_form(
    config: AlignmentConfig, seed: int
) -> None:
    scorer = build(config)
    leaves = list(make_fragments(seed))
    images, captions = embed(*leaves)
    # The threshold layer acts before the scorer; here the thresholds themselves are the leaves.
    wanted = leaves + [
        parameter
        for name, parameter in scorer.named_parameters()
        if not name.startswith("threshold")
    ]
    closed = scorer(every_pair(images, captions))
    naive = naive_scores(scorer, config, images, captions)
    torch.testing.assert_close(closed, naive, atol=1e-10, rtol=0)
    for of_closed, of_naive in zip(
        gradients(closed, wanted), gradients(naive, wanted), strict=True
    ):
        torch.testing.assert_close(of_closed, of_naive, atol=1e-8, rtol=0)


@every_config
def test_order_of_regions_and_words_does_not_matter(config: AlignmentConfig) -> None:
    scorer = build(config)
    images, captions = embed(*make_fragments(3))
    region_order, word_order = torch.randperm(max(NUM_REGIONS)), torch.randperm(max(NUM_WORDS))
    shuffled_images = images._replace(
        regions=images.regions[:, region_order],
        mask=images.mask[:, region_order],
        thresholds=images.thresholds[:, region_order],
    )
    shuffled_captions = captions._replace(
        words=captions.words[:, word_order],
        mask=captions.mask[:, word_order],
        salience=captions.salience[:, word_order],
    )
    torch.testing.assert_close(
        scorer(every_pair(shuffled_images, shuffled_captions)),
        scorer(every_pair(images, captions)),
        atol=1e-12,
        rtol=0,
    )


@every_config
def test_scores_are_cosines_and_padding_has_no_say(config: AlignmentConfig) -> None:
    scorer = build(config)
    images, captions = embed(*make_fragments(4))
    scores = scorer(every_pair(images, captions))
    if config.kind not in SUMS:
        assert scores.abs().max() <= 1 + 1e-12
    noise = torch.randn(images.regions.shape, dtype=torch.float64)
    disturbed = images._replace(
        regions=torch.where(images.mask[..., None], images.regions, unit(noise)),
        thresholds=torch.where(images.mask, images.thresholds, -0.9),
    )
    word_noise = unit(torch.randn(captions.words.shape, dtype=torch.float64))
    words = torch.where(captions.mask[..., None], captions.words, word_noise)
    least = torch.where(captions.mask, captions.salience, 0.03)
    torch.testing.assert_close(
        scorer(every_pair(disturbed, captions._replace(words=words, salience=least))),
        scores,
        atol=1e-12,
        rtol=0,
    )


@every_config
def test_listed_pairs_are_entries_of_the_matrix(config: AlignmentConfig) -> None:
    scorer = build(config)
    images, captions = embed(*make_fragments(9))
    rows, columns = torch.tensor([0, 2, 2, 1]), torch.tensor([3, 0, 2, 1])
    listed = scorer(listed_pairs(images.rows(rows), captions.rows(columns)))
    torch.testing.assert_close(
        listed.squeeze(1), scorer(every_pair(images, captions))[rows, columns], atol=1e-12, rtol=0
    )
