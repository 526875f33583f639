"""Pictures of queries: which pairs are drawn, and under which title and file name.

`cpfean.training.views` has what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpfean.config import ExperimentConfig
from cpfean.metrics.retrieval import RecallAtK
from cpfean.training.setup import open_checkpoint
from cpfean.training.views import (
    Direction,
    Gallery,
    PairView,
    RankChange,
    image_sizes,
    outcome,
    pick_captions,
)
from orchestration.pictures.pairs import Panel, draw_panels
from orchestration.pictures.ranks import NamedQuery, RankPanel, draw_ranks

_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_OF_STUDY = 3  # a caption that was found, one nearly, one missed
_GALLERY = 1000  # images that a study looks at: all of Flickr's dev splits, a part of COCO's


def open_gallery(
    model: Path,
    config: ExperimentConfig,
    *,
    data_folder: Path,
    split: str,
    cache_dir: Path,
    num_images: int | None = None,
) -> Gallery:
    """A trained model before a split, on the GPU if there is one.

    Args:
        model: folder of a checkpoint or model.
        config: that it was trained with.
        data_folder: checked, in the native format.
        split: its name.
        cache_dir: for what can be made again.
        num_images: the first so many are the gallery; None takes all.

    Raises:
        CheckpointError, DataError: as `open_checkpoint`.
    """
    trained = open_checkpoint(
        model,
        data_folder=data_folder,
        split=split,
        cache_dir=cache_dir,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        num_regions=config.data.num_regions,
    )
    total = trained.dataset.split.num_images
    return Gallery(
        trained,
        sizes=image_sizes(data_folder, split, num_images=total),
        num_images=num_images,
        batch_size=config.evaluation.batch_size,
        products=config.evaluation.products,
    )


def draw_study_pictures(
    model: Path,
    config: ExperimentConfig,
    *,
    data_folder: Path,
    cache_dir: Path,
    output: Path,
) -> list[Path]:
    """Three captions of the dev split, found, nearly found and missed, for the record of a study.

    Not of the test split, which is no place to look for what to change next.

    Args:
        model, config, data_folder, cache_dir: as in `open_gallery`.
        output: folder for the PNGs. If it is there, so are they: nothing is drawn again.

    Raises:
        CpfeanError: nothing can be drawn; the message says why.
    """
    if output.is_dir():
        return sorted(output.glob("*.png"))
    gallery = open_gallery(
        model,
        config,
        data_folder=data_folder,
        split="dev",
        cache_dir=cache_dir,
        num_images=_GALLERY,
    )
    gallery.check_gates(name="the best model")
    partial = output.with_name(f".{output.name}.partial")
    for caption in pick_captions(gallery.ranks, count=_OF_STUDY, seed=config.seed):
        draw_caption(gallery, caption, output=partial)
    partial.rename(output)
    return sorted(output.glob("*.png"))


def draw_caption(
    gallery: Gallery, caption: int, *, output: Path, photos: Path | None = None
) -> Path:
    """A caption with its own image, and with the wrong image that scores highest.

    Args:
        gallery: whose model has gates.
        caption: its position in the split.
        output: folder for the PNG.
        photos: folder of photographs, named as the images.

    Raises:
        DataError: a photograph that cannot be read.
    """
    split = gallery.split
    rank = int(gallery.ranks.captions[caption])
    own, wrong = int(split.image_of(caption)), gallery.wrong_image(caption)
    views = gallery.view(own, caption), gallery.view(wrong, caption)
    titles = "its own image", "the wrong image that scores highest"
    return draw_panels(
        _panels(titles, views, photos),
        heading=f"Caption {caption} of {split.name}: {_told(rank)} (its image has rank {rank} of "
        f"{gallery.num_images})",
        file=output / f"caption-{caption:05d}.png",
    )


def draw_image(gallery: Gallery, image: int, *, output: Path, photos: Path | None = None) -> Path:
    """An image with the best of its own captions, and with the wrong one that scores highest.

    Args:
        gallery: whose model has gates.
        image: its position in the split.
        output, photos: as in `draw_caption`.

    Raises:
        DataError: a photograph that cannot be read.
    """
    split = gallery.split
    rank = int(gallery.ranks.images[image])
    own, wrong = gallery.best_caption(image), gallery.wrong_caption(image)
    views = gallery.view(image, own), gallery.view(image, wrong)
    titles = (
        f"the best of its own captions, {own}",
        f"the wrong caption that scores highest, {wrong}",
    )
    return draw_panels(
        _panels(titles, views, photos),
        heading=f"Image {split.image_ids[image]} of {split.name}: {_told(rank)} (a caption of its "
        f"own has rank {rank} of {gallery.scores.shape[1]})",
        file=output / f"image-{_file_name(split.image_ids[image])}.png",
    )


def draw_change(
    change: RankChange,
    galleries: Sequence[Gallery],
    *,
    names: Sequence[str],
    output: Path,
    photos: Path | None = None,
) -> Path:
    """A query's match as two models see it: a panel for each model that has gates.

    An image is shown with the caption of its own that the model likes best.

    Args:
        change: the query and its ranks.
        galleries: of both models; one of them has gates.
        names: of the models.
        output, photos: as in `draw_caption`.

    Raises:
        DataError: a photograph that cannot be read.
    """
    split = galleries[0].split
    if change.direction == "text to image":
        query = f"Caption {change.query}"
        stem = f"changed-caption-{change.query:05d}"
    else:
        query = f"Image {split.image_ids[change.query]}"
        stem = f"changed-image-{_file_name(split.image_ids[change.query])}"
    titles, views = [], []
    for gallery, name, rank in zip(galleries, names, change.ranks, strict=True):
        if gallery.has_gates:
            image, caption = change.query, change.query
            if change.direction == "text to image":
                image = int(split.image_of(caption))
            else:
                caption = gallery.best_caption(image)
            titles.append(f"by {name}: rank {rank}")
            views.append(gallery.view(image, caption))
    first, second = change.ranks
    return draw_panels(
        _panels(titles, views, photos),
        heading=f"{query} of {split.name}, with its match: rank {first} by {names[0]}, "
        f"{second} by {names[1]}",
        file=output / f"{stem}.png",
    )


def draw_comparison(
    galleries: tuple[Gallery, Gallery],
    changes: dict[tuple[Direction, int], list[RankChange]],
    *,
    names: tuple[str, str],
    output: Path,
) -> Path:
    """The ranks of all queries by both models, with the ones that changed most named.

    Args:
        galleries: of both models, over the same split.
        changes: as `most_changed` gave them.
        names: of the models.
        output: folder for ranks.png.
    """
    first, second = (gallery.ranks for gallery in galleries)
    metrics = [gallery.ranks.metrics() for gallery in galleries]
    split = galleries[0].split
    named = {
        kind: [NamedQuery(change.ranks, query_text(change, galleries[0])) for change in group]
        for kind, group in changes.items()
    }

    def panel(direction: Direction, *ranks: Tensor, recalls: Sequence[RecallAtK]) -> RankPanel:
        r1, other_r1 = (recall.r1 for recall in recalls)
        return RankPanel(
            title=f"{direction}: {len(ranks[0]):,} queries, R@1 {r1:.1f} and {other_r1:.1f}",
            ranks=torch.stack(ranks, dim=1).numpy(),
            candidates=split.num_captions if direction == "image to text" else split.num_images,
            better=(named[direction, 0], named[direction, 1]),
        )

    to_image = [one.text_to_image for one in metrics]
    to_text = [one.image_to_text for one in metrics]
    panels = (
        panel("text to image", first.captions, second.captions, recalls=to_image),
        panel("image to text", first.images, second.images, recalls=to_text),
    )
    return draw_ranks(
        panels,
        names=names,
        heading=f"Ranks on {split.name}: {names[0]} (rSum {metrics[0].rsum:.1f}) and {names[1]} "
        f"(rSum {metrics[1].rsum:.1f})",
        file=output / "ranks.png",
    )


def query_text(change: RankChange, gallery: Gallery) -> str:
    """A query for people: a caption as it stands, an image by its id."""
    split = gallery.split
    if change.direction == "text to image":
        return split.captions[change.query]
    return split.image_ids[change.query]


def photo_of(image_id: str, photos: Path | None) -> Path | None:
    """The file of an image's photograph: its id, with or without a suffix; None if not there."""
    if photos is None:
        return None
    files = (photos / f"{image_id}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _panels(titles: Sequence[str], views: Sequence[PairView], photos: Path | None) -> list[Panel]:
    return [
        Panel(title=title, view=view, photo=photo_of(view.image_id, photos))
        for title, view in zip(titles, views, strict=True)
    ]


def _told(rank: int) -> str:
    return {"found": "found", "near": "nearly found", "missed": "missed"}[outcome(rank)]


def _file_name(image_id: str) -> str:
    return re.sub(r"[^\w.-]", "_", image_id)
