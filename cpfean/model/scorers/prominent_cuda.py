"""CPFEAN's scores on a GPU: blocks of cosines, reduced by Triton kernels, and their gradients.

Axes:  image, caption   given               region, word   fragments of each, padded
       dim              width of the joint embedding space

A block is one matrix product, which gives the cosines S of some words with some regions in the
products' type, and reductions over S by `cpfean.kernels.triton_forward`; on the way back,
`cpfean.kernels.triton_backward` makes dS, from which two more products give the gradients of words
and regions. `cpfean.model.scorers.prominent_cuda_blocks` goes through them.

PyTorch sees two operators, `cpfean::prominent_scores` and its gradient. Triton is imported when
one of them first runs. They run on processors too, where Triton's interpreter takes the kernels,
one operation at a time, for tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.prominent_cuda_blocks import Inputs, Scoring, sent
from cpfean.model.scorers.prominent_plan import MOST_FRAGMENTS, bucket, shared_memory

_SINCE = (8, 0)  # compute capability from which Triton builds for a card
PRODUCT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def cuda_scores(
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    *,
    lead: Float[Tensor, "caption word"],
    constants: Float[Tensor, "4"],
    gate: Literal["soft", "hard", "off"],
    prominence: bool,
    product_type: torch.dtype,
) -> Float[Tensor, "image caption"] | None:
    """Scores every image with every caption, as `ProminentAlignment` with one round does.

    The lengths of images and captions are fetched from the GPU, the one time that it is waited for.

    Args:
        images, captions: fragments, in float32.
        lead: log(s) / tau of each word; no gradient is made for it.
        constants: kappa, tau, lambda and beta; of kappa and beta there are gradients.
        gate: how gates work.
        prominence: whether prominent words weigh more; without, beta is not looked at.
        product_type: S comes from matrix products in this type, summed in float32, and is kept in
            it.

    Returns:
        None for what the kernels are not made for: other types, more than 128 fragments, or more
        than the GPU's shared memory has room for; where Triton is not installed, or breaks off.
    """
    if find_spec("triton") is None:
        return None
    if images.regions.dtype != torch.float32 or product_type not in PRODUCT_TYPES:
        return None
    most = images.mask.shape[1], captions.mask.shape[1]
    if max(most) > MOST_FRAGMENTS:
        return None
    if not _runs_on(images.regions.device, *most, width=product_type.itemsize):
        return None
    counts, first = _sizes(images.mask, captions.mask)
    num_regions, num_words = counts.split([len(images.mask), len(captions.mask)])
    regions, thresholds = images.regions, images.thresholds
    if not first:
        order = images.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        regions = regions.gather(1, order[..., None].expand_as(regions))
        thresholds = thresholds.gather(1, order)
    words, lead = captions.words, lead.detach()
    # Those of like size next to each other: blocks are large, and their tiles as small as it goes.
    images_by_size, captions_by_size = _by_size(num_regions), _by_size(num_words)
    if images_by_size is not None:
        rows = sent(images_by_size, regions.device)
        regions, thresholds = regions[rows], thresholds[rows]
        num_regions = num_regions[images_by_size]
    if captions_by_size is not None:
        rows = sent(captions_by_size, words.device)
        words, lead = words[rows], lead[rows]
        num_words = num_words[captions_by_size]
    scores: Tensor = torch.ops.cpfean.prominent_scores(
        regions,
        words,
        num_regions,
        num_words,
        thresholds,
        lead,
        constants,
        gate,
        prominence,
        product_type,
    )
    if images_by_size is not None:
        scores = scores[sent(images_by_size.argsort(), scores.device)]
    if captions_by_size is not None:
        scores = scores[:, sent(captions_by_size.argsort(), scores.device)]
    return scores


def _by_size(counts: Int64[Tensor, "n"]) -> Int64[Tensor, "n"] | None:
    """An order in which sizes only grow; None if they do so already."""
    sizes = bucket(counts)
    return sizes.argsort(stable=True) if bool((sizes.diff() < 0).any()) else None


def _runs_on(device: torch.device, most_regions: int, most_words: int, *, width: int) -> bool:
    """Whether Triton builds for such a GPU, and its shared memory has room for a program."""
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) < _SINCE:
        return False
    properties = torch.cuda.get_device_properties(device)
    available = int(getattr(properties, "shared_memory_per_block_optin", 0))
    return shared_memory(most_regions, most_words, width=width) <= available


def _sizes(region_mask: Tensor, word_mask: Tensor) -> tuple[Int64[Tensor, "n"], bool]:
    """Real fragments of each image and then of each caption, and whether an image's come first."""
    counts = region_mask.sum(dim=1)
    first = torch.arange(region_mask.shape[1], device=counts.device) < counts[:, None]
    like = (region_mask == first).all().long()[None]
    fetched = torch.cat([counts, word_mask.sum(dim=1), like]).cpu()
    return fetched[:-1], bool(fetched[-1])


_INPUTS = (
    "Tensor regions, Tensor words, Tensor num_regions, Tensor num_words, Tensor thresholds, "
    "Tensor lead, Tensor constants, str gate, bool prominence, ScalarType product_type"
)


@torch.library.custom_op(
    "cpfean::prominent_scores", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def prominent_scores(
    regions: Float[Tensor, "image region dim"],
    words: Float[Tensor, "caption word dim"],
    num_regions: Int64[Tensor, "image"],
    num_words: Int64[Tensor, "caption"],
    thresholds: Float[Tensor, "image region"],
    lead: Float[Tensor, "caption word"],
    constants: Float[Tensor, "4"],
    gate: str,
    prominence: bool,
    product_type: torch.dtype,
) -> Float[Tensor, "image caption"]:
    """The operator: `cuda_scores` of images and captions whose real fragments come first.

    Args:
        num_regions, num_words: how many those are, on the processor.
    """
    inputs = Inputs(
        regions, words, num_regions, num_words, thresholds, lead, constants, gate, prominence,
        product_type,
    )  # fmt: skip
    return Scoring(inputs).scores()


@torch.library.custom_op(
    "cpfean::prominent_gradients",
    mutates_args=(),
    schema=f"(Tensor upstream, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def prominent_gradients(
    upstream: Float[Tensor, "image caption"],
    regions: Float[Tensor, "image region dim"],
    words: Float[Tensor, "caption word dim"],
    num_regions: Int64[Tensor, "image"],
    num_words: Int64[Tensor, "caption"],
    thresholds: Float[Tensor, "image region"],
    lead: Float[Tensor, "caption word"],
    constants: Float[Tensor, "4"],
    gate: str,
    prominence: bool,
    product_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its gradient: of regions, words, thresholds and constants (0 for tau and lambda)."""
    inputs = Inputs(
        regions, words, num_regions, num_words, thresholds, lead, constants, gate, prominence,
        product_type,
    )  # fmt: skip
    return Scoring(inputs).gradients(upstream)


@prominent_scores.register_fake
def _(regions: Tensor, words: Tensor, *others: Any) -> Tensor:
    return regions.new_empty(regions.shape[0], words.shape[0])


@prominent_gradients.register_fake
def _(upstream: Tensor, regions: Tensor, words: Tensor, *others: Any) -> tuple[Tensor, ...]:
    thresholds, constants = others[2], others[4]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (regions, words, thresholds, constants)
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _propagate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    d_regions, d_words, d_thresholds, d_constants = torch.ops.cpfean.prominent_gradients(
        upstream, *ctx.saved_tensors, *ctx.settings
    )
    return d_regions, d_words, None, None, d_thresholds, None, d_constants, None, None, None


prominent_scores.register_autograd(_propagate, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.cpfean.prominent_scores)
def _flops(
    regions: torch.Size, words: torch.Size, *others: Any, out_shape: Any = None, **settings: Any
) -> int:
    """S, K, G and the two lengths; what is padded counts as if it were real."""
    images, most_regions, dim = regions
    captions, most_words, _ = words
    pair = most_regions * most_words * (dim + most_regions + most_words)
    grams = (images * most_regions**2 + captions * most_words**2) * dim
    return 2 * (images * captions * pair + grams)


@register_flop_formula(torch.ops.cpfean.prominent_gradients)
def _flops_back(
    upstream: torch.Size,
    regions: torch.Size,
    words: torch.Size,
    *others: Any,
    out_shape: Any = None,
    **settings: Any,
) -> int:
    """S again and two products with dS; the lengths again, and dK and dG; the Gram matrices twice.

    The tiles without an upstream gradient, of which nothing is reduced, count too.
    """
    images, most_regions, dim = regions
    captions, most_words, _ = words
    pair = most_regions * most_words * (3 * dim + 2 * (most_regions + most_words))
    grams = 2 * (images * most_regions**2 + captions * most_words**2) * dim
    return 2 * (images * captions * pair + grams)
