"""Recalls by sorting each query's candidates, one by one."""

from __future__ import annotations

from torch import Tensor


def naive_recalls(scores: Tensor, *, per_image: int = 5) -> dict[str, float]:
    """Ranks by walking down sorted lists in which, of equal scores, wrong candidates come first."""
    num_images, num_captions = scores.shape
    ranks: dict[str, list[int]] = {"i2t": [], "t2i": []}
    for i in range(num_images):
        own = range(i * per_image, (i + 1) * per_image)
        line = sorted(range(num_captions), key=lambda c: (-scores[i, c].item(), c in own))
        ranks["i2t"].append(min(line.index(c) for c in own))
    for c in range(num_captions):
        own_image = c // per_image
        line = sorted(range(num_images), key=lambda i: (-scores[i, c].item(), i == own_image))
        ranks["t2i"].append(line.index(own_image))
    return {
        f"{way}_r{k}": 100 * sum(rank < k for rank in found) / len(found)
        for way, found in ranks.items()
        for k in (1, 5, 10)
    }
