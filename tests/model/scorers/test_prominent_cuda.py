"""Scores and gradients of the GPU's kernels equal those of the scorer itself, in float64.

Triton's interpreter takes the kernels, on the processor: tests/conftest.py asks for it. On a
machine with a GPU, TRITON_INTERPRET=0 makes the same tests run there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cpfean.config import AlignmentConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, unit
from cpfean.model.scorers.pairs import every_pair
from cpfean.model.scorers.prominent import ProminentAlignment
from cpfean.model.scorers.prominent_cuda import cuda_scores

pytest.importorskip("triton", reason="Triton is not installed: it has no build for this system")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DIM = 24
REGIONS, WORDS = (5, 36, 1), (1, 4, 9, 17)

SWITCHES = {
    "the default": {},
    "gate hard": {"gate": "hard"},
    "gate off": {"gate": "off"},
    "weighted words": {"prominence": True},
    "gate off, weighted words": {"gate": "off", "prominence": True},
    "no fusion": {"fusion": False, "prominence": True},
    "other temperatures": {"word_temperature": 3.0, "region_temperature": 20.0},
}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


class Case(NamedTuple):
    """Embeddings in float64; regions, words and thresholds are leaves."""

    images: ImageEmbeddings
    captions: CaptionEmbeddings

    @property
    def leaves(self) -> list[Tensor]:
        return [self.images.regions, self.captions.words, self.images.thresholds]

    def of_type(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same with leaves of its own."""
        images, captions = (
            type(part)(
                *(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in part)
            )
            for part in self
        )
        images = images._replace(
            regions=images.regions.detach().requires_grad_(),
            thresholds=images.thresholds.detach().requires_grad_(),
        )
        return Case(images, captions._replace(words=captions.words.detach().requires_grad_()))


def make(
    num_regions: tuple[int, ...],
    num_words: tuple[int, ...],
    *,
    scattered: bool = False,
    salience: bool = True,
    dim: int = DIM,
) -> Case:
    """A common part makes the cosines positive. What is masked is far too large to go unseen."""
    generator = torch.Generator().manual_seed(len(num_regions) + max(num_regions) + max(num_words))
    common = torch.randn(dim, generator=generator)

    def fragments(lengths: tuple[int, ...], scattered: bool) -> tuple[Tensor, Tensor]:
        most = max(lengths)
        vectors = torch.randn(len(lengths), most, dim, generator=generator) + common
        place = torch.arange(most).expand(len(lengths), most)
        if scattered:
            place = torch.rand(len(lengths), most, generator=generator).argsort(dim=1)
        mask = place < torch.tensor(lengths)[:, None]
        return unit(vectors.double()).masked_fill(~mask[..., None], 1e3), mask

    regions, region_mask = fragments(num_regions, scattered)
    words, word_mask = fragments(num_words, False)
    thresholds = 0.3 * torch.randn(region_mask.shape, generator=generator).double() + 0.4
    s = torch.rand(word_mask.shape, generator=generator).double().clamp(min=0.02)
    s = s if salience else torch.ones_like(s)
    images = ImageEmbeddings(regions, region_mask, regions[:, 0, :0], thresholds)
    captions = CaptionEmbeddings(words, word_mask, words[:, 0, :0], s)
    return Case(images, captions).of_type(torch.float64)


def scorer_of(switches: dict[str, object], dim: int = DIM) -> ProminentAlignment:
    return ProminentAlignment(AlignmentConfig(**switches), dim=dim).double()


def score(scorer: ProminentAlignment, case: Case, product_type: torch.dtype) -> Tensor:
    """By the kernels."""
    found = cuda_scores(
        case.images,
        case.captions,
        lead=case.captions.salience.log() / scorer.word_temperature,
        constants=scorer.constants(like=case.images.regions),
        gate=scorer.gate,
        prominence=scorer.prominence,
        product_type=product_type,
    )
    assert found is not None
    return found


def upstream_of(case: Case, *, share: float) -> Tensor:
    """Of so many of the pairs."""
    shape = len(case.images.mask), len(case.captions.mask)
    generator = torch.Generator().manual_seed(7)
    drawn = torch.rand(shape, generator=generator) < share
    return torch.randn(shape, generator=generator).double() * drawn


def learned(scorer: ProminentAlignment) -> list[Tensor]:
    """The scorer's own, without what makes the thresholds, which are leaves here."""
    return [p for name, p in scorer.named_parameters() if not name.startswith("threshold")]


def gradients(scores: Tensor, upstream: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """In float64, on the processor."""
    total = (scores * upstream.to(scores)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [
        torch.zeros_like(x, device="cpu").double() if g is None else g.double().cpu()
        for x, g in zip(leaves, found, strict=True)
    ]


class Errors(NamedTuple):
    """The largest of the scores, and of each gradient relative to its own norm."""

    scores: float
    gradients: list[float]


def errors(
    switches: dict[str, object],
    case: Case,
    *,
    product_type: torch.dtype = torch.float32,
    share: float = 1.0,
    scale: float = 1.0,
    dim: int = DIM,
    smallest: float = 0.01,
) -> Errors:
    """How far the kernels are from the scorer in float64.

    A gradient that cancels is held to `smallest` times the scale of `upstream`, not to its norm.
    """
    scorer = scorer_of(switches, dim)
    upstream = scale * upstream_of(case, share=share)
    exact = scorer(every_pair(case.images, case.captions))
    expected = gradients(exact, upstream, case.leaves + learned(scorer))
    scorer = scorer.to(DEVICE, torch.float32)
    single = case.of_type(torch.float32, DEVICE)
    scores = score(scorer, single, product_type)
    found = gradients(scores, upstream, single.leaves + learned(scorer))
    relative = []
    for x, y in zip(found, expected, strict=True):
        assert x.isfinite().all()
        relative.append(float((x - y).norm() / y.norm().clamp(min=smallest * scale)))
    return Errors(float((scores.double().cpu() - exact).abs().max().detach()), relative)


@pytest.mark.parametrize("name", SWITCHES)
def test_kernels_equal_the_scorer_for_every_switch(name: str) -> None:
    found = errors(SWITCHES[name], make(REGIONS, WORDS))
    assert found.scores < 1e-6
    assert max(found.gradients) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_regions", "num_words"),
    [
        ((1,), (1,)),
        ((36, 36), (13, 13, 13, 16, 16)),
        ((64, 1), (1, 16, 17, 33)),
        ((100, 36, 65), (2, 80)),
        ((128,), (128,)),
    ],
)
def test_kernels_equal_the_scorer_at_the_edges_of_their_tiles(
    num_regions: tuple[int, ...], num_words: tuple[int, ...]
) -> None:
    # A lone region's gate leaves no gradient but the rounding of terms that cancel, which differs
    # from one processor to another.
    smallest = 0.1 if num_regions == (1,) else 0.01
    found = errors({"prominence": True}, make(num_regions, num_words), smallest=smallest)
    assert found.scores < 1e-6
    assert max(found.gradients) < 1e-5


def test_kernels_equal_the_scorer_with_regions_anywhere_and_few_upstream_gradients() -> None:
    case = make((9, 3, 20, 14), (2, 3, 3, 5, 8, 11), scattered=True)
    found = errors({"prominence": True}, case, share=0.2)
    assert found.scores < 1e-6
    assert max(found.gradients) < 1e-5


def test_kernels_equal_the_scorer_without_salience() -> None:
    found = errors({}, make(REGIONS, WORDS, salience=False))
    assert found.scores < 1e-6
    assert max(found.gradients) < 1e-5


@pytest.mark.long
def test_kernels_equal_the_scorer_over_several_programs_of_a_block() -> None:
    found = errors({}, make((2,) * 9, (1, 1, 2, 2, 3)), share=0.5)
    assert found.scores < 1e-6
    assert max(found.gradients) < 1e-5


# Not of hard gates: a cosine next to its threshold, rounded, opens or closes one.
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "gate hard"])
@pytest.mark.parametrize(
    ("product_type", "of_scores", "of_gradients"),
    [(torch.float16, 5e-4, 1e-2), (torch.bfloat16, 4e-3, 8e-2)],
)
def test_half_the_bits_keep_their_bounds(
    name: str, product_type: torch.dtype, of_scores: float, of_gradients: float
) -> None:
    """At width 24, where a cosine is the sum of few rounded numbers: more than at a real width."""
    found = errors(SWITCHES[name], make(REGIONS, WORDS), product_type=product_type)
    assert found.scores < of_scores
    assert max(found.gradients[:3]) < of_gradients


@pytest.mark.long
def test_half_products_follow_the_size_of_the_upstream_gradient() -> None:
    case = make((9, 6), (3, 5))
    plain = errors({}, case, product_type=torch.float16)
    for scale in (1e-7, 1e7):
        found = errors({}, case, product_type=torch.float16, scale=scale)
        assert max(found.gradients[:3]) < 1.5 * max(plain.gradients[:3])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_an_image_without_regions_gives_what_the_scorer_gives() -> None:
    case = make((4, 3), (2, 5)).of_type(torch.float32, DEVICE)
    case.images.mask[1] = False
    scorer = scorer_of({}).to(DEVICE, torch.float32)
    expected = scorer(every_pair(case.images, case.captions))
    assert expected[1].isnan().all()
    torch.testing.assert_close(
        score(scorer, case, torch.float32), expected, atol=1e-6, rtol=0, equal_nan=True
    )


def test_an_image_with_every_gate_closed_gives_what_the_scorer_gives() -> None:
    for gate in ("hard", "soft"):
        case = make((4, 3), (2, 5))
        with torch.no_grad():
            case.images.thresholds.fill_(2.0)
        found = errors({"gate": gate}, case)
        assert found.scores < 1e-6
        assert max(found.gradients[:2]) < 1e-5


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("product_type", [torch.float32, torch.float16])
def test_what_is_not_finite_is_not_hidden(bad: float, product_type: torch.dtype) -> None:
    case = make((4, 3, 6), (2, 5)).of_type(torch.float32, DEVICE)
    with torch.no_grad():
        case.images.regions[1, 0, 3] = bad
    scores = score(scorer_of({}).to(DEVICE, torch.float32), case, product_type)
    assert not scores[1].isfinite().any()
    assert scores[[0, 2]].isfinite().all()


@pytest.mark.long
def test_ten_calls_are_equal_to_the_last_bit() -> None:
    scorer = scorer_of({}).to(DEVICE, torch.float32)
    first: list[Tensor] = []
    for _ in range(10):
        case = make((9, 4), (2, 5)).of_type(torch.float32, DEVICE)
        scores = score(scorer, case, torch.float16)
        found = [scores.detach().cpu()]
        found += gradients(scores, upstream_of(case, share=1.0), case.leaves + learned(scorer))
        first = first or found
        assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True))


def test_scores_need_no_graph() -> None:
    case = make((9, 4), (2, 5)).of_type(torch.float32, DEVICE)
    scorer = scorer_of({}).to(DEVICE, torch.float32)
    expected = score(scorer, case, torch.float32)
    with torch.inference_mode():
        found = score(scorer, case, torch.float32)
    assert torch.equal(found.clone(), expected.detach())


def test_what_the_kernels_are_not_made_for_is_left_to_others() -> None:
    scorer = scorer_of({}).float()

    def asked(case: Case, product_type: torch.dtype) -> Tensor | None:
        return cuda_scores(
            case.images,
            case.captions,
            lead=case.captions.salience,
            constants=scorer.constants(like=case.images.regions),
            gate="soft",
            prominence=True,
            product_type=product_type,
        )

    few = make((2,), (2,))
    assert asked(few, torch.float64) is None
    assert asked(few.of_type(torch.float32), torch.float64) is None
    assert asked(make((129,), (2,)).of_type(torch.float32), torch.float32) is None
    assert asked(make((2,), (129,)).of_type(torch.float32), torch.float32) is None


def operator_inputs(case: Case) -> tuple[object, ...]:
    scorer = scorer_of({}).to(DEVICE, torch.float32)
    constants = scorer.constants(like=case.images.regions).detach().requires_grad_()
    counts = [case.images.mask.sum(dim=1).cpu(), case.captions.mask.sum(dim=1).cpu()]
    lead = case.captions.salience.log() / scorer.word_temperature
    regions, words, thresholds = case.leaves
    return regions, words, *counts, thresholds, lead, constants, "soft", True, torch.float32


def test_the_operator_is_one_that_torch_can_trust() -> None:
    inputs = operator_inputs(make((5, 3), (2, 4)).of_type(torch.float32, DEVICE))
    torch.library.opcheck(torch.ops.cpfean.prominent_scores, inputs)
    fixed = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    upstream = torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    torch.library.opcheck(torch.ops.cpfean.prominent_gradients, (upstream, *fixed))


def test_operations_are_counted() -> None:
    inputs = operator_inputs(make((5, 5), (4, 4, 4)).of_type(torch.float32, DEVICE))
    pairs, cosines = 2 * 3, 5 * 4
    grams = 2 * DIM * (2 * 5 * 5 + 3 * 4 * 4)
    # A pair: S, a K and G e.
    forward = 2 * pairs * cosines * (DIM + 5 + 4) + grams
    # S again, dV and dW; a K, G e, dK and dG. The Gram matrices are made, and go back.
    backward = 2 * pairs * cosines * (3 * DIM + 2 * (5 + 4)) + 2 * grams
    with FlopCounterMode(display=False) as counter:
        scores = torch.ops.cpfean.prominent_scores(*inputs)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        scores.sum().backward()
    assert counter.get_total_flops() == backward


def test_the_package_can_be_imported_and_used_without_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import cpfean.model.cpfean, cpfean.model.scorers.prominent_cuda\n"
        "assert not [name for name in sys.modules if 'kernels.triton' in name]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
