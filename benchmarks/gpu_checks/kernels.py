"""Are the scores, their gradients and their repeats what float64 says, for every switch?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from scorers import make_embeddings
from torch import Tensor

from cpfean.config import AlignmentConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import every_pair
from cpfean.model.scorers.prominent import ProminentAlignment
from cpfean.model.scoring import local_scores
from gpu_checks.report import TYPES, Check, Given

SWITCHES: dict[str, dict[str, object]] = {
    "the default": {},
    "gate hard": {"gate": "hard"},
    "gate off": {"gate": "off"},
    "weighted words": {"prominence": True},
    "gate off, weighted words": {"gate": "off", "prominence": True},
    "other temperatures": {"word_temperature": 3.0, "region_temperature": 20.0},
    "two rounds": {"rounds": 2},
}
# What a type of the products may add to a score, by the rounding of unit vectors.
_BOUNDS = {"fp32": 2e-6, "fp16": 3e-4, "bf16": 3e-3}
_GRADIENT = 1e-3
_SMALL = 0.1
_REPEATS = 10

_Embeddings = TypeVar("_Embeddings", ImageEmbeddings, CaptionEmbeddings)


def kernels(given: Given) -> list[Check]:
    """The largest error of a score, for every switch and every type of the products."""
    images, captions = _embeddings(given)
    checks = []
    for name, scorer in _scorers(given):
        exact = _exact_scores(scorer, images, captions)
        for type_name, most in _BOUNDS.items():
            _poison(given)
            with torch.no_grad():
                found = _scores(scorer, images, captions, TYPES[type_name])
            error = _largest_error(found, exact)
            what = f"{name}, {type_name} products"
            if scorer.gate == "hard":
                note = "no bound: a relevance beside its threshold falls on its other side"
                checks.append(Check(section="kernels", what=what, found=error, note=note))
            else:
                checks.append(Check.at_most("kernels", what, error, most))
    return checks


def gradients(given: Given) -> list[Check]:
    """The largest error of a gradient, relative to its norm, for every switch."""
    images, captions = _embeddings(given)
    checks = []
    for name, scorer in _scorers(given):
        _poison(given)
        found = _gradients(scorer, images, captions, torch.float32)
        exact_scorer = _in_float64(scorer)
        wide = _wide(images), _wide(captions)
        exact = _gradients(exact_scorer, *wide, torch.float64)
        errors = {of: _relative_error(found[of], exact[of]) for of in exact}
        worst = max(errors, key=errors.__getitem__)
        checks.append(
            Check.at_most("gradients", name, errors[worst], _GRADIENT, note=f"worst: of {worst}")
        )
    return checks


def repeats(given: Given) -> list[Check]:
    """Whether ten repeats of scores and gradients are the same to the last bit."""
    images, captions = _embeddings(given)
    checks = []
    for name, scorer in _scorers(given):
        first: dict[str, Tensor] | None = None
        different = 0
        for _ in range(_REPEATS):
            found = _gradients(scorer, images, captions, torch.float16)
            if first is None:
                first = found
            different += any(not torch.equal(found[of], first[of]) for of in first)
        checks.append(Check.at_most("repeats", f"{name}: differ, of {_REPEATS}", different, 0))
    return checks


def _embeddings(given: Given) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    """Random ones, some regions of which are padding."""
    num_images, num_captions, dim = given.sizes.checked
    images, captions = make_embeddings(num_images, num_captions, dim=dim, device=str(given.device))
    images.mask[1, 20:] = False
    images.mask[2, 1:] = False
    captions.mask[3, 1:] = False
    return images, captions


def _scorers(given: Given) -> Iterator[tuple[str, ProminentAlignment]]:
    dim = given.sizes.checked[2]
    for name, settings in SWITCHES.items():
        torch.manual_seed(0)
        scorer = ProminentAlignment(AlignmentConfig(**settings), dim=dim)  # type: ignore[arg-type]
        if scorer.gate != "off":
            torch.nn.init.normal_(scorer.threshold.weight, std=0.1)
        yield name, scorer.to(given.device)


def _scores(
    scorer: ProminentAlignment,
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    kind: torch.dtype,
) -> Tensor:
    """As training and evaluation ask for them."""
    device = images.regions.device.type
    with torch.autocast(device, kind, enabled=kind in (torch.float16, torch.bfloat16)):
        return local_scores(scorer, images, captions)


def _exact_scores(
    scorer: ProminentAlignment, images: ImageEmbeddings, captions: CaptionEmbeddings
) -> Tensor:
    with torch.no_grad():
        return _in_float64(scorer)(every_pair(_wide(images), _wide(captions)))


def _gradients(
    scorer: ProminentAlignment,
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    kind: torch.dtype,
) -> dict[str, Tensor]:
    """Of a fixed sum of all scores, by what they are of; and the scores."""
    leaves = {
        "regions": images.regions.detach().clone().requires_grad_(),
        "thresholds": images.thresholds.detach().clone().requires_grad_(),
        "words": captions.words.detach().clone().requires_grad_(),
    }
    leaves |= {
        name: parameter
        for name, parameter in scorer.named_parameters()
        if not name.startswith("threshold.")
    }
    images = images._replace(regions=leaves["regions"], thresholds=leaves["thresholds"])
    captions = captions._replace(words=leaves["words"])
    if kind == torch.float64:
        scores = scorer(every_pair(images, captions))
    else:
        scores = _scores(scorer, images, captions, kind)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(scores.shape, generator=generator).to(scores)
    found = torch.autograd.grad(
        scores, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
    )
    result = dict(zip(leaves, found, strict=True))
    if scorer.gate == "off":
        del result["thresholds"]  # nothing depends on them
    return result | {"scores": scores.detach()}


def _in_float64(scorer: ProminentAlignment) -> ProminentAlignment:
    """The same scorer on the processor, in float64."""
    settings = AlignmentConfig(
        gate=scorer.gate,
        prominence=scorer.prominence,
        rounds=scorer.rounds,
        word_temperature=scorer.word_temperature,
        region_temperature=scorer.region_temperature,
    )
    twin = ProminentAlignment(settings, dim=1 if scorer.gate == "off" else _width(scorer))
    twin.load_state_dict({name: value.cpu() for name, value in scorer.state_dict().items()})
    return twin.double()


def _width(scorer: ProminentAlignment) -> int:
    return scorer.threshold.in_features


def _wide(embeddings: _Embeddings) -> _Embeddings:
    """The same on the processor, in float64."""
    fields = (field.detach().cpu() for field in embeddings)
    return type(embeddings)(*(f.double() if f.is_floating_point() else f for f in fields))


def _largest_error(found: Tensor, exact: Tensor) -> float:
    """What is not a number is an error without end."""
    error = (found.detach().cpu().double() - exact.detach().cpu()).abs()
    return float(error.nan_to_num(nan=torch.inf).max())


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """By norms: two words that are all but as near may change places in a single number.

    What cancels, as the sums for single numbers do, is held to a share of what is summed.
    """
    exact = exact.detach().cpu()
    error = (found.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=_SMALL)
    return float(error.nan_to_num(nan=torch.inf))


def _poison(given: Given) -> None:
    """Leaves NaN in memory that is given out next, so that what nobody writes is seen."""
    for size in (2**12, 2**16, 2**20, 2**22):
        torch.full((size,), torch.nan, device=given.device)
