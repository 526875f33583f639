"""Recalls by sorting each query's candidates, one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def naive_recalls(scores: Tensor, image_of_caption: Sequence[int]) -> dict[str, float]:
    """Ranks by walking down sorted lists in which, of equal scores, wrong candidates come first.

    Args:
        scores: of all images with all captions; compared in float64.
        image_of_caption: the row of each column's own image.
    """
    scores = scores.double()
    num_images, num_captions = scores.shape
    ranks: dict[str, list[int]] = {"i2t": [], "t2i": []}
    for i in range(num_images):
        own = [c for c in range(num_captions) if image_of_caption[c] == i]
        line = sorted(range(num_captions), key=lambda c: (-scores[i, c].item(), c in own))
        ranks["i2t"].append(min(line.index(c) for c in own))
    for c in range(num_captions):
        line = sorted(
            range(num_images), key=lambda i: (-scores[i, c].item(), i == image_of_caption[c])
        )
        ranks["t2i"].append(line.index(image_of_caption[c]))
    return {
        f"{way}_r{k}": 100 * sum(rank < k for rank in found) / len(found)
        for way, found in ranks.items()
        for k in (1, 5, 10)
    }
