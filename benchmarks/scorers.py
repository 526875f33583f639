"""Scorers to compare: ours, ours written naively, those of the field, and the least one can do.

Axes:  image, caption   compared               region, word   fragments of each
       dim              width of the joint embedding space

All are given the same random embeddings: 36 unit-norm regions an image, 8 to 16 words a caption.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpfean.config import AlignmentConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, masked_mean, unit
from cpfean.model.scorers.cross_attention import CrossAttention
from cpfean.model.scorers.hard_coding import HardCoding
from cpfean.model.scorers.prominent import ProminentAlignment
from cpfean.model.scorers.scorer import Scorer
from cpfean.model.scoring import local_scores

Score = Callable[[ImageEmbeddings, CaptionEmbeddings], Tensor]
# The bare product takes as much at a time as the blocks of CPFEAN's kernel.
_BLOCK_IMAGES, _BLOCK_WORDS = 16, 448


def make_embeddings(
    num_images: int,
    num_captions: int,
    *,
    dim: int,
    num_regions: int = 36,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    """Random unit vectors around a common direction, so that cosines are like those of a model."""
    generator = torch.Generator().manual_seed(seed)
    common = 0.4 * torch.randn(dim, generator=generator)
    lengths = torch.randint(8, 17, (num_captions,), generator=generator)
    regions = torch.randn(num_images, num_regions, dim, generator=generator).add_(common)
    words = torch.randn(num_captions, 16, dim, generator=generator).add_(common)
    region_mask = torch.ones(num_images, num_regions, dtype=torch.bool)
    word_mask = torch.arange(16) < lengths[:, None]
    thresholds = torch.full((num_images, num_regions), 0.2)
    regions, words = unit(regions), unit(words)
    images = ImageEmbeddings(
        regions, region_mask, unit(masked_mean(regions, region_mask)), thresholds
    )
    salience = torch.rand(num_captions, 16, generator=generator).clamp(min=0.02)
    captions = CaptionEmbeddings(words, word_mask, unit(masked_mean(words, word_mask)), salience)
    return (
        ImageEmbeddings(*(field.to(device) for field in images)),
        CaptionEmbeddings(*(field.to(device) for field in captions)),
    )


class Compared(NamedTuple):
    """Something to time.

    Attributes:
        score: of every image with every caption.
        module: holds its parameters.
        pairs_at_most: more pairs than this are too slow to wait for; a sample is timed.
    """

    score: Score
    module: nn.Module
    pairs_at_most: float = math.inf


def compared(*, dim: int, device: str, peers: dict[str, Path] | None = None) -> dict[str, Compared]:
    """All that is compared, by name."""
    ours = ProminentAlignment(AlignmentConfig(), dim=dim).to(device)
    scan, chan = CrossAttention(inverse_temperature=9.0), HardCoding(temperature=0.1)
    few = 5e5 if device == "cpu" else math.inf
    found = {
        "bare product": Compared(bare_product, nn.Module()),
        "cpfean": Compared(lambda i, c: local_scores(ours, i, c), ours),
        "cpfean, bf16 products": Compared(
            in_bf16(ours), ours, 2e6 if device == "cpu" else math.inf
        ),
        "cpfean, naive": Compared(lambda i, c: naive_scores(ours, i, c), ours, 5e4),
        "scan": Compared(lambda i, c: local_scores(scan, i, c), scan, few),
        "chan": Compared(lambda i, c: local_scores(chan, i, c), chan, few),
        "global": Compared(lambda i, c: i.pooled @ c.pooled.T, nn.Module()),
    }
    for name, folder in (peers or {}).items():
        found[f"{name}, as published"] = load_peer(name, folder, dim=dim, device=device)
    return found


def bare_product(images: ImageEmbeddings, captions: CaptionEmbeddings) -> Tensor:
    """The cosines of all real words with all regions, dropped block by block: the least there is.

    Returns the mean of one block, so that gradients can be asked for.
    """
    words = captions.words[captions.mask]
    last = words.new_zeros(())
    for block in images.regions.split(_BLOCK_IMAGES):
        regions = block.flatten(0, 1)
        for some in words.split(_BLOCK_WORDS):
            last = (some @ regions.T).mean() if torch.is_grad_enabled() else some @ regions.T
    return last


def in_bf16(scorer: Scorer) -> Score:
    """The scorer, matrix products made in bfloat16."""

    def score(images: ImageEmbeddings, captions: CaptionEmbeddings) -> Tensor:
        with torch.autocast(images.regions.device.type, dtype=torch.bfloat16):
            return local_scores(scorer, images, captions)

    return score


def naive_scores(
    scorer: ProminentAlignment, images: ImageEmbeddings, captions: CaptionEmbeddings
) -> Tensor:
    """CPFEAN as the field writes such scores: caption by caption, with a context for every pair.

    The equations of docs/model.md, section 4, in their order; soft gates, all regions real. Images
    in shards of 128, as published evaluations take them.
    """
    constants = scorer.constants(like=images.regions)
    shards = [
        torch.stack(
            [
                _naive_column(constants, regions, thresholds, words[mask], salience[mask])
                for words, mask, _, salience in zip(*captions, strict=True)
            ],
            dim=1,
        )
        for regions, thresholds in zip(
            images.regions.split(128), images.thresholds.split(128), strict=True
        )
    ]
    return torch.cat(shards)


def _naive_column(
    constants: Tensor, regions: Tensor, thresholds: Tensor, words: Tensor, salience: Tensor
) -> Tensor:
    """Scores of some images with one caption, (image,)."""
    kappa, tau, lam, beta = constants
    cosines = regions @ words.T  # image region word
    ahead = cosines + salience.log() / tau
    gates = torch.sigmoid(kappa * (ahead.amax(dim=2) - thresholds))
    prominence = (tau * ahead).softmax(dim=2)
    named_by = (gates[..., None] * prominence).sum(dim=1)
    weights = 1 + beta * named_by
    weights = weights / weights.sum(dim=1, keepdim=True)
    attention = (lam * cosines + gates.log()[..., None]).softmax(dim=1)
    contexts = attention.transpose(1, 2) @ regions  # image word dim
    prominent = prominence @ words  # image region dim
    # Regions and words are of length 1, contexts are not.
    to_words = (contexts * words).sum(dim=2) / contexts.norm(dim=2)
    to_regions = (prominent * regions).sum(dim=2) / prominent.norm(dim=2)
    of_words = (weights * to_words).sum(dim=1)
    of_regions = (gates * to_regions).sum(dim=1) / gates.sum(dim=1)
    return 0.5 * of_words + 0.5 * of_regions


def peer(text: str) -> tuple[str, Path]:
    """NAME=PATH of an option."""
    name, _, path = text.partition("=")
    folder = Path(path).expanduser()
    if name not in PEERS or not (folder / "model.py").is_file():
        raise ValueError(
            f"expected NAME=PATH, NAME one of {', '.join(PEERS)} and PATH a checkout of it, with "
            f"its model.py; got {text!r}"
        )
    return name, folder


def _scan(module: types.ModuleType, dim: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    options = types.SimpleNamespace(
        raw_feature_norm="clipped_l2norm", agg_func="Mean", lambda_softmax=9.0, lambda_lse=6.0
    )
    return nn.Module(), lambda *given: module.xattn_score_t2i(*given, options)


def _sgraf(part: str) -> Callable[[types.ModuleType, int], tuple[nn.Module, Callable[..., Tensor]]]:
    def build(module: types.ModuleType, dim: int) -> tuple[nn.Module, Callable[..., Tensor]]:
        similarity = module.EncoderSimilarity(dim, 256, part, 3).eval()
        return similarity, similarity

    return build


# Which of a checkout's functions scores: (images, captions, lengths) to a matrix.
PEERS = {"scan": _scan, "saf": _sgraf("SAF"), "sgr": _sgraf("SGR")}


def load_peer(name: str, folder: Path, *, dim: int, device: str) -> Compared:
    """A published scorer, run from where its user has it.

    SCAN: github.com/kuanghuei/SCAN (arXiv:1803.08024); SAF and SGR: github.com/Paranioar/SGRAF
    (arXiv:2101.01368).
    """
    for absent in ("torchvision", "torchvision.models"):  # imported for encoders that are not used
        try:
            importlib.import_module(absent)
        except ImportError:
            sys.modules[absent] = types.ModuleType(absent)
    # A name that current versions of torch have dropped and these files still ask for.
    if not hasattr(nn.utils.clip_grad, "clip_grad_norm"):
        nn.utils.clip_grad.clip_grad_norm = nn.utils.clip_grad_norm_
    spec = importlib.util.spec_from_file_location(f"peer_{name}", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights, function = PEERS[name](module, dim)
    weights.to(device)

    def score(images: ImageEmbeddings, captions: CaptionEmbeddings) -> Tensor:
        return function(images.regions, captions.words, captions.mask.sum(dim=1).tolist())

    return Compared(score, weights, 2e4)
