"""Scores in blocks, compiled or not, equal those of the scorer itself; so do their gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from cpfean.config import AlignmentConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, masked_mean, unit
from cpfean.model.scorers.pairs import every_pair
from cpfean.model.scorers.registry import SCORERS
from cpfean.model.scorers.scorer import Scorer, scorer_class
from cpfean.model.scoring import local_scores

DIM = 24
NUM_REGIONS, NUM_WORDS = 19, 9  # more regions than one vector of either type holds
FEW = (7, 11)  # images and captions
# More than a block holds: of the kernel, and of what goes through `forward`.
SEVERAL_BLOCKS, SEVERAL_PLAIN_BLOCKS = (66, 104), (20, 40)

COMPILED = {
    "the default": {},
    "gate hard": {"gate": "hard"},
    "gate off": {"gate": "off"},
    "weighted words": {"prominence": True},
    "no fusion": {"fusion": False, "prominence": True},
    "gate off, weighted words": {"gate": "off", "prominence": True},
    "other temperatures": {"word_temperature": 3.0, "region_temperature": 20.0},
    "sharp": {
        "gate_sharpness": 900.0,
        "word_temperature": 500.0,
        "region_temperature": 500.0,
        "prominence": True,
    },
}


OTHERS = [kind.replace("_", " ") for kind in SCORERS if kind != "prominent"]


def scorer_of(name: str) -> Scorer:
    if name in OTHERS:
        config = AlignmentConfig(kind=name.replace(" ", "_"))
    else:
        config = AlignmentConfig(**({"rounds": 2} if name == "two rounds" else COMPILED[name]))
    return scorer_class(config.kind).from_config(config, dim=DIM).double()


def make_leaves(
    seed: int, dtype: torch.dtype = torch.float64, *, sizes: tuple[int, int] = FEW
) -> list[Tensor]:
    """Unnormalized regions, words and thresholds. A common part makes the cosines positive."""
    num_images, num_captions = sizes
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(DIM, generator=generator)
    regions = torch.randn(num_images, NUM_REGIONS, DIM, generator=generator) + common
    words = torch.randn(num_captions, NUM_WORDS, DIM, generator=generator) + common
    thresholds = 0.3 * torch.randn(num_images, NUM_REGIONS, generator=generator) + 0.4
    return [leaf.to(dtype).requires_grad_() for leaf in (regions, words, thresholds)]


def mask_of(count: int, most: int, *, seed: int, prefix: bool) -> Tensor:
    """Real fragments, at least one each; the first ones, or scattered."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (count, 1), generator=generator)
    lengths[0] = most
    place = torch.arange(most).expand(count, most)
    if not prefix:
        place = torch.rand(count, most, generator=generator).argsort(dim=1)
    return place < lengths


def embed(leaves: list[Tensor], *, prefix: bool) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    regions, words, thresholds = leaves
    region_mask = mask_of(len(regions), NUM_REGIONS, seed=1, prefix=prefix)
    word_mask = mask_of(len(words), NUM_WORDS, seed=2, prefix=True)
    images = ImageEmbeddings(
        unit(regions), region_mask, unit(masked_mean(regions, region_mask)), thresholds
    )
    pooled = unit(masked_mean(words, word_mask))
    salience = torch.rand(word_mask.shape, generator=torch.Generator().manual_seed(3)) + 0.02
    captions = CaptionEmbeddings(unit(words), word_mask, pooled, salience.to(words.dtype))
    return images, captions


def gradients(scores: Tensor, leaves: list[Tensor], *, share: float) -> list[Tensor]:
    """Of a weighted sum in which a share of the pairs have a weight."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(scores.shape, generator=generator).to(scores)
    weights *= torch.rand(scores.shape, generator=generator) < share
    total = (weights * scores).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def learned(scorer: Scorer) -> list[Tensor]:
    """The scorer's own, without what makes the thresholds, which are leaves here."""
    return [p for name, p in scorer.named_parameters() if not name.startswith("threshold")]


@pytest.mark.parametrize("share", [1.0, 0.1], ids=["all pairs", "few pairs"])
@pytest.mark.parametrize("prefix", [True, False], ids=["padded", "scattered"])
@pytest.mark.parametrize("name", [*COMPILED, "two rounds", *OTHERS])
def test_blocks_equal_the_scorer_with_gradients(name: str, prefix: bool, share: float) -> None:
    scorer = scorer_of(name)
    leaves = make_leaves(0, sizes=SEVERAL_BLOCKS if name in COMPILED else SEVERAL_PLAIN_BLOCKS)
    images, captions = embed(leaves, prefix=prefix)
    reference = scorer(every_pair(images, captions))
    scores = local_scores(scorer, images, captions)
    torch.testing.assert_close(scores, reference, atol=1e-12, rtol=0)
    wanted = leaves + learned(scorer)
    for found, expected in zip(
        gradients(scores, wanted, share=share),
        gradients(reference, wanted, share=share),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_threads_change_nothing_but_the_order_of_sums() -> None:
    scorer = scorer_of("the default")
    results = []
    for threads in (1, 1, 2, 3, 3):
        torch.set_num_threads(threads)
        try:
            leaves = make_leaves(3, sizes=SEVERAL_BLOCKS)
            scores = local_scores(scorer, *embed(leaves, prefix=True))
            results.append([scores.detach(), *gradients(scores, leaves, share=1.0)])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_calls_are_equal_to_the_last_bit_wherever_their_scratch_lies(threads: int) -> None:
    scorer = scorer_of("the default")
    torch.set_num_threads(threads)
    try:
        first: list[Tensor] = []
        taken = []
        for call in range(60):
            # Memory of many sizes that is held or given back puts the scratch elsewhere.
            taken += [np.empty(8 + 24 * (call % 11)) for _ in range(call % 5)]
            del taken[::3]
            leaves = make_leaves(3)
            scores = local_scores(scorer, *embed(leaves, prefix=True))
            found = [scores.detach(), *gradients(scores, leaves, share=1.0)]
            first = first or found
            assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True)), call
    finally:
        torch.set_num_threads(1)


def test_threads_can_be_used_from_any_thread_and_without_gradients() -> None:
    scorer = scorer_of("the default")
    images, captions = embed(make_leaves(4), prefix=True)
    expected = local_scores(scorer, images, captions).detach()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            found = local_scores(scorer, images, captions)
        with ThreadPoolExecutor(2) as pool:
            others = list(pool.map(lambda _: local_scores(scorer, images, captions), range(4)))
    finally:
        torch.set_num_threads(1)
    for scores in (found, *others):
        torch.testing.assert_close(scores.detach().clone(), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", COMPILED)
def test_float32_is_close_to_float64(name: str) -> None:
    scorer = scorer_of(name)
    exact = local_scores(scorer, *embed(make_leaves(5), prefix=True))
    single = local_scores(scorer.float(), *embed(make_leaves(5, torch.float32), prefix=True))
    # A gate as sharp as 900 turns the rounding of a cosine into a part of a thousand.
    limit = 2e-4 if name in ("sharp", "gate hard") else 2e-6
    torch.testing.assert_close(single.double(), exact, atol=limit, rtol=0)


@pytest.mark.parametrize("name", ["the default", *OTHERS])
def test_products_follow_autocast_and_reductions_do_not(name: str) -> None:
    scorer = scorer_of(name).float()
    images, captions = embed(make_leaves(6, torch.float32), prefix=True)
    plain = local_scores(scorer, images, captions)
    rounded = images._replace(regions=images.regions.bfloat16().float())
    rounded_words = captions._replace(words=captions.words.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = local_scores(scorer, images, captions)
        assert torch.isfinite(torch.autograd.grad(found.sum(), images.regions)[0]).all()
    assert found.dtype == torch.float32
    assert 0 < (found - plain).abs().max() < 0.02
    # What is left after rounding the embeddings is that of S itself: half a unit of 2^-8.
    close = local_scores(scorer, rounded, rounded_words)
    torch.testing.assert_close(found, close, atol=0.01, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["the default", "gate off", "two rounds"])
def test_what_is_not_finite_is_not_hidden(name: str, bad: float) -> None:
    scorer = scorer_of(name)
    regions, words, thresholds = (leaf.detach() for leaf in make_leaves(8))
    images, captions = embed([regions, words, thresholds], prefix=True)
    images.regions[2, 0, 3] = bad
    finite = local_scores(scorer, images, captions).isfinite()
    assert not finite[2].any()
    assert finite[[0, 1, 3, 4, 5, 6]].all()


def test_without_a_gradient_anywhere_the_gradient_is_zero() -> None:
    scorer = scorer_of("the default")
    leaves = make_leaves(9)
    scores = local_scores(scorer, *embed(leaves, prefix=True))
    found = torch.autograd.grad((0 * scores).sum(), leaves)
    assert all((gradient == 0).all() for gradient in found)
