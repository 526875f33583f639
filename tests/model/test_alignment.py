"""The closed forms equal the naive ones, for every switch; and what every scorer must satisfy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from cpfean.config import AlignmentConfig
from cpfean.model.alignment import ProminentAlignment, every_pair, listed_pairs
from cpfean.model.baselines import CrossAttention, HardCoding
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, masked_mean, unit
from tests.model.naive import cross_attention_pair, hard_coding_pair, prominent_pair

DIM = 12
NUM_REGIONS = (5, 3, 6)
NUM_WORDS = (4, 1, 7, 3)

SWITCHES = {
    "the default": {},
    "gate hard": {"gate": "hard"},
    "gate off": {"gate": "off"},
    "no prominence": {"prominence": False},
    "no fusion": {"fusion": False},
    "gate off, no prominence": {"gate": "off", "prominence": False},
    "two rounds": {"rounds": 2},
    "three rounds": {"rounds": 3},
    "three rounds, gate hard": {"rounds": 3, "gate": "hard"},
    "two rounds, gate off": {"rounds": 2, "gate": "off"},
    "two rounds, no prominence": {"rounds": 2, "prominence": False},
    "other temperatures": {"word_temperature": 3.0, "region_temperature": 20.0},
}


def make_fragments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalized regions, words and thresholds; leaves of the graph, in float64."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.randn(len(NUM_REGIONS), max(NUM_REGIONS), DIM, generator=generator).double()
    words = torch.randn(len(NUM_WORDS), max(NUM_WORDS), DIM, generator=generator).double()
    thresholds = 0.3 * torch.randn(regions.shape[:2], generator=generator).double() + 0.2
    return regions.requires_grad_(), words.requires_grad_(), thresholds.requires_grad_()


def mask_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def embed(
    regions: Tensor, words: Tensor, thresholds: Tensor
) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    region_mask, word_mask = mask_of(NUM_REGIONS), mask_of(NUM_WORDS)
    images = ImageEmbeddings(
        unit(regions), region_mask, unit(masked_mean(regions, region_mask)), thresholds
    )
    captions = CaptionEmbeddings(unit(words), word_mask, unit(masked_mean(words, word_mask)))
    return images, captions


def pairwise(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
) -> Tensor:
    """The score matrix, one pair at a time, without padding."""
    rows = [
        [
            score(images.regions[i, :r], captions.words[c, :w], images.thresholds[i, :r])
            for c, w in enumerate(NUM_WORDS)
        ]
        for i, r in enumerate(NUM_REGIONS)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def gradients(scores: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(scores.shape, generator=generator).double()
    total = (weights * scores).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("switch", SWITCHES)
def test_closed_form_equals_naive_form_with_gradients(switch: str, seed: int) -> None:
    config = AlignmentConfig(**SWITCHES[switch])
    scorer = ProminentAlignment(config, dim=DIM).double()
    leaves = list(make_fragments(seed))
    images, captions = embed(*leaves)
    # The threshold layer acts before the scorer; here the thresholds themselves are the leaves.
    learned = [p for name, p in scorer.named_parameters() if not name.startswith("threshold")]
    sharpness = scorer.log_sharpness.exp() if scorer.gate != "off" else None
    beta = softplus(scorer.raw_prominence_weight) if scorer.prominence else None

    closed = scorer(every_pair(images, captions))
    naive = pairwise(
        lambda v, w, theta: prominent_pair(
            v, w, theta, config, sharpness=sharpness, prominence_weight=beta
        ),
        images,
        captions,
    )

    torch.testing.assert_close(closed, naive, atol=1e-10, rtol=0)
    for of_closed, of_naive in zip(
        gradients(closed, leaves + learned), gradients(naive, leaves + learned), strict=True
    ):
        torch.testing.assert_close(of_closed, of_naive, atol=1e-8, rtol=0)


FIELD = {
    "cross attention": (CrossAttention(inverse_temperature=9.0), cross_attention_pair, 9.0),
    "hard coding": (HardCoding(temperature=0.1), hard_coding_pair, 0.1),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FIELD)
def test_scorers_of_the_field_equal_their_naive_forms_with_gradients(name: str, seed: int) -> None:
    scorer, naive_pair, temperature = FIELD[name]
    leaves = list(make_fragments(seed))
    images, captions = embed(*leaves)
    closed = scorer(every_pair(images, captions))
    naive = pairwise(lambda v, w, _: naive_pair(v, w, temperature), images, captions)
    torch.testing.assert_close(closed, naive, atol=1e-10, rtol=0)
    for of_closed, of_naive in zip(
        gradients(closed, leaves[:2]), gradients(naive, leaves[:2]), strict=True
    ):
        torch.testing.assert_close(of_closed, of_naive, atol=1e-8, rtol=0)


def scorers() -> list[nn.Module]:
    own = [ProminentAlignment(AlignmentConfig(**s), dim=DIM).double() for s in SWITCHES.values()]
    return [*own, *(scorer for scorer, _, _ in FIELD.values())]


@pytest.mark.parametrize("scorer", scorers(), ids=[*SWITCHES, *FIELD])
def test_order_of_regions_and_words_does_not_matter(scorer: nn.Module) -> None:
    images, captions = embed(*make_fragments(3))
    region_order, word_order = torch.randperm(max(NUM_REGIONS)), torch.randperm(max(NUM_WORDS))
    shuffled_images = images._replace(
        regions=images.regions[:, region_order],
        mask=images.mask[:, region_order],
        thresholds=images.thresholds[:, region_order],
    )
    shuffled_captions = captions._replace(
        words=captions.words[:, word_order], mask=captions.mask[:, word_order]
    )
    torch.testing.assert_close(
        scorer(every_pair(shuffled_images, shuffled_captions)),
        scorer(every_pair(images, captions)),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("scorer", scorers(), ids=[*SWITCHES, *FIELD])
def test_scores_are_cosines_and_padding_has_no_say(scorer: nn.Module) -> None:
    images, captions = embed(*make_fragments(4))
    scores = scorer(every_pair(images, captions))
    if not isinstance(scorer, HardCoding):  # whose sum over words is no mean
        assert scores.abs().max() <= 1 + 1e-12
    noise = torch.randn(images.regions.shape, dtype=torch.float64)
    disturbed = images._replace(
        regions=torch.where(images.mask[..., None], images.regions, unit(noise)),
        thresholds=torch.where(images.mask, images.thresholds, -0.9),
    )
    word_noise = unit(torch.randn(captions.words.shape, dtype=torch.float64))
    words = torch.where(captions.mask[..., None], captions.words, word_noise)
    torch.testing.assert_close(
        scorer(every_pair(disturbed, captions._replace(words=words))), scores, atol=1e-12, rtol=0
    )


def test_hard_gate_is_the_limit_of_a_sharp_soft_gate() -> None:
    images, captions = embed(*make_fragments(5))
    hard = ProminentAlignment(AlignmentConfig(gate="hard"), dim=DIM).double()
    soft = ProminentAlignment(AlignmentConfig(gate_sharpness=1000.0), dim=DIM).double()
    with torch.no_grad():
        soft.log_sharpness += 5
    gap = (
        hard.align(every_pair(images, captions)).gates
        - soft.align(every_pair(images, captions)).gates
    ).abs()
    assert gap.max() < 1e-3


def test_an_image_with_every_gate_closed_still_has_a_finite_score_and_gradient() -> None:
    leaves = list(make_fragments(6))
    images, captions = embed(*leaves)
    images = images._replace(thresholds=torch.full_like(images.thresholds, 2.0))
    for gate in ("hard", "soft"):
        scorer = ProminentAlignment(AlignmentConfig(gate=gate), dim=DIM).double()
        scores = scorer(every_pair(images, captions))
        assert scores.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(scores, leaves[:2]))


def test_gates_prominence_and_weights_are_what_they_claim_to_be() -> None:
    images, captions = embed(*make_fragments(8))
    alignment = (
        ProminentAlignment(AlignmentConfig(), dim=DIM).double().align(every_pair(images, captions))
    )
    assert (alignment.gates[~images.mask[:, None, :].expand_as(alignment.gates)] == 0).all()
    assert ((alignment.gates >= 0) & (alignment.gates <= 1)).all()
    torch.testing.assert_close(
        alignment.prominence.sum(dim=2), torch.ones_like(alignment.prominence[:, :, 0])
    )
    torch.testing.assert_close(alignment.word_weights.sum(dim=2), torch.ones_like(alignment.local))
    hidden = ~captions.mask[None].expand_as(alignment.word_weights)
    assert (alignment.word_weights[hidden] == 0).all()


@pytest.mark.parametrize("scorer", scorers(), ids=[*SWITCHES, *FIELD])
def test_listed_pairs_are_entries_of_the_matrix(scorer: nn.Module) -> None:
    images, captions = embed(*make_fragments(9))
    rows, columns = torch.tensor([0, 2, 2, 1]), torch.tensor([3, 0, 2, 1])
    listed = scorer(listed_pairs(images.rows(rows), captions.rows(columns)))
    torch.testing.assert_close(
        listed.squeeze(1), scorer(every_pair(images, captions))[rows, columns], atol=1e-12, rtol=0
    )
