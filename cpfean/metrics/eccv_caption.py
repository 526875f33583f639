"""Retrieval on COCO's test split with the matches that COCO does not know.

A caption of COCO describes other images too, and recalls count them as wrong. ECCV Caption
(arXiv:2204.03359) and CrissCrossed Captions (CxC, arXiv:2004.15020) are judgements of people about
such pairs. The PyPI package `eccv-caption` has both and computes the metrics; here it gets ranked
lists of COCO's ids.

Axes:  image, caption   of the split     best   places of a list, the best candidate first
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

from cpfean import commands
from cpfean.errors import ConfigError, DataError
from cpfean.metrics.best import BestCandidates

# As the package calls them; and as they are shown.
METRICS = {
    "eccv_r1": "ECCV R@1",
    "eccv_map_at_r": "ECCV mAP@R",
    "eccv_rprecision": "ECCV R-P",
    "cxc_r1": "CxC R@1",
}


class EccvCaption:
    """The metrics of one split whose images and captions are known by COCO's ids.

    Attributes:
        captions_each: how many captions of an image the metrics look at, at most.
        images_each: how many images of a caption.
    """

    def __init__(
        self, images: Sequence[int], captions: Sequence[int], *, image_of_caption: Sequence[int]
    ) -> None:
        """Reads the judgements, and sees whether the split is the one that they are about.

        Args:
            images: COCO's id of each image.
            captions: COCO's id of each caption.
            image_of_caption: the position of each caption's image.

        Raises:
            ConfigError: the package is not installed.
            DataError: other images or captions than those of the test split.
        """
        self._judged = _judgements()
        self._images = list(images)
        self._captions = list(captions)
        own = {
            caption: self._images[image]
            for caption, image in zip(self._captions, image_of_caption, strict=True)
        }
        expected = {caption: of[0] for caption, of in self._judged.coco_gts["t2i"].items()}
        if own != expected or len(self._captions) != len(own):
            same = sum(expected.get(caption) == image for caption, image in own.items())
            raise DataError(
                f"ECCV Caption is about COCO's test split of {len(self._judged.coco_gts['i2t']):,} "
                f"images and the first five captions of each, {len(expected):,} in all; found "
                f"{len(self._images):,} images and {len(self._captions):,} captions, {same:,} of "
                "them among those. Convert with Karpathy's dataset_coco.json and --captions-each 5."
            )
        self.captions_each, self.images_each = (
            max(len(matches) for matches in self._judged.eccv_gts[way].values())
            for way in ("i2t", "t2i")
        )

    def metrics(self, best: BestCandidates) -> dict[str, float]:
        """Each of `METRICS` in percent, with "i2t_" or "t2i_" before its name.

        Args:
            best: of the whole split, at least `captions_each` and `images_each`.
        """
        captions_of = {
            image: [self._captions[i] for i in found]
            for image, found in zip(self._images, best.captions.tolist(), strict=True)
        }
        images_of = {
            caption: [self._images[i] for i in found]
            for caption, found in zip(self._captions, best.images.tolist(), strict=True)
        }
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress, asked for or not
            found = self._judged.compute_all_metrics(
                captions_of, images_of, target_metrics=tuple(METRICS), verbose=False
            )
        return {
            f"{way}_{name}": 100.0 * float(found[name][way])
            for way in ("i2t", "t2i")
            for name in METRICS
        }


def _judgements() -> Any:
    """The package's `Metrics`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would rather read JSON with ujson
            import eccv_caption
    except ImportError:
        raise ConfigError(
            "ECCV Caption's judgements are the package eccv-caption, which is not installed: "
            f"{commands.pip_install('eccv-caption')}"
        ) from None
    return eccv_caption.Metrics()
