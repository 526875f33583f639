"""How fast are all pairs scored, against the product that has to be made, and what types cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args, get_type_hints

import torch
from measure import in_turns
from scorers import make_embeddings
from torch import Tensor

from cpfean.config import AlignmentConfig, EvaluationConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.cross_attention import CrossAttention
from cpfean.model.scorers.hard_coding import HardCoding
from cpfean.model.scorers.prominent import ProminentAlignment
from cpfean.model.scorers.scorer import Scorer
from cpfean.model.scoring import local_scores
from cpfean.training.setup import evaluate_checkpoint
from cpfean.training.trained import trained_configuration
from gpu_checks.report import TYPES, Check, Given

# At most so many bytes of cosines at a time.
_ROOM = 2**30
# The plain path is timed on so many pairs at most, and the rest is reckoned.
_PLAIN_PAIRS = 2_000_000


class _Plain(ProminentAlignment):
    """Without the kernel: blocks go through torch's own operators."""

    def compiled_scores(
        self, images: ImageEmbeddings, captions: CaptionEmbeddings, *, product_type: torch.dtype
    ) -> None:
        return None


def scoring(given: Given) -> list[Check]:
    """Seconds, and share of the bare product, at each size."""
    return [check for size in given.sizes.scored for check in _of_size(given, *size)]


def _of_size(given: Given, num_images: int, num_captions: int) -> list[Check]:
    images, captions = make_embeddings(
        num_images, num_captions, dim=given.sizes.dim, device=str(given.device)
    )
    few = captions.rows(slice(0, max(1, _PLAIN_PAIRS // num_images)))
    config = AlignmentConfig()
    ours = ProminentAlignment(config, dim=given.sizes.dim).to(given.device)
    others: dict[str, Scorer] = {
        "plain path": _Plain(config, dim=given.sizes.dim).to(given.device),
        "SCAN's attention": CrossAttention(inverse_temperature=9.0),
        "CHAN's score": HardCoding(temperature=0.1),
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, kind in TYPES.items():
        calls[f"bare product, {name}"] = partial(_bare_product, images, captions, kind)
        calls[f"kernel, {name} products"] = partial(_score, ours, images, captions, kind)
    for name, scorer in others.items():
        calls[f"{name}, bf16 products"] = partial(_score, scorer, images, few, torch.bfloat16)
    timings = in_turns(calls, runs=given.runs, device=given.device.type)
    checks = []
    for name, timing in timings.items():
        whole = name.startswith(("bare", "kernel"))
        seconds = timing.median * (1 if whole else num_captions / len(few.mask))
        kind_name = next(kind for kind in TYPES if kind in name)
        product = timings[f"bare product, {kind_name}"].median
        notes = [] if "bare" in name else [f"{product / seconds:.2f} of the bare product"]
        if not whole and len(few.mask) < num_captions:
            notes.append(f"reckoned from {len(few.mask)} captions")
        what = f"{num_images:,} x {num_captions:,}: {name}"
        checks.append(
            Check(section="scoring", what=what, found=seconds, unit="s", note="; ".join(notes))
        )
    return checks


def _score(
    scorer: Scorer,
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    kind: torch.dtype,
) -> Tensor:
    device = images.regions.device.type
    with torch.inference_mode(), torch.autocast(device, kind, enabled=kind != torch.float32):
        return local_scores(scorer, images, captions)


def _bare_product(images: ImageEmbeddings, captions: CaptionEmbeddings, kind: torch.dtype) -> None:
    """All real words with all regions, in large blocks, dropped."""
    with torch.inference_mode():
        words = captions.words[captions.mask].to(kind)
        regions = images.regions.to(kind).flatten(0, 1)
        rows = max(1, _ROOM // (len(regions) * words.element_size()))
        for some in words.split(rows):
            _ = some @ regions.T


def rsum_by_type(given: Given) -> list[Check]:
    """rSum of a trained model by the type of the products of scoring."""
    if given.model is None or given.data is None:
        return [Check.left_out("rsum", "give --model and --data")]
    config = trained_configuration(given.model)
    found = {
        products: evaluate_checkpoint(
            given.model,
            data_folder=given.data,
            split="test",
            protocol=config.evaluation.protocol,
            cache_dir=given.folder / "cache",
            device=given.device,
            num_regions=config.data.num_regions,
            products=products,
        ).rsum
        for products in get_args(get_type_hints(EvaluationConfig)["products"])
    }
    return [
        Check(
            section="rsum",
            what=f"products in {products}",
            found=rsum,
            note="" if products == "fp32" else f"{rsum - found['fp32']:+.2f} v. fp32",
        )
        for products, rsum in found.items()
    ]
