"""The scores' operators, of the kernels for processors: Triton's own run on no pretended card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import cpfean.model.scorers.prominent_cuda  # noqa: F401  defines the operators
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.prominent_compiled import compiled_scores


def _scores(
    regions: Tensor,
    words: Tensor,
    num_regions: Tensor,
    num_words: Tensor,
    thresholds: Tensor,
    lead: Tensor,
    constants: Tensor,
    gate: Any,
    prominence: bool,
    product_type: torch.dtype,
) -> Tensor:
    def mask(fragments: Tensor, counts: Tensor) -> Tensor:
        return torch.arange(fragments.shape[1]) < counts[:, None]

    images = ImageEmbeddings(regions, mask(regions, num_regions), regions[:, 0], thresholds)
    word_mask = mask(words, num_words)
    captions = CaptionEmbeddings(words, word_mask, words[:, 0], word_mask.to(words.dtype))
    return compiled_scores(
        images,
        captions,
        lead=lead,
        constants=constants,
        gate=gate,
        product_type=product_type,
    )


def _gradients(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Of regions, words, thresholds and constants."""

    def found() -> tuple[Tensor, ...]:
        given = list(inputs)
        of = 0, 1, 4, 6
        for place in of:
            given[place] = given[place].detach().requires_grad_()
        with torch.enable_grad():
            scores = _scores(*given)
        return torch.autograd.grad(
            scores,
            [given[place] for place in of],
            upstream,
            allow_unused=True,
            materialize_grads=True,
        )

    # In a thread of its own: where operators are dispatched, nothing is recorded for a way back.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(found).result()


KERNELS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.cpfean.prominent_scores.default: _scores,
    torch.ops.cpfean.prominent_gradients.default: _gradients,
}
