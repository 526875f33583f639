"""Pictures of queries: which pairs are drawn, and under which title and file name.

`cpfean.analysis.views` has what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpfean.analysis.pair_views import PairView
from cpfean.analysis.pictures.pairs import Panel, lay_out_panels
from cpfean.analysis.pictures.ranks import NamedQuery, RankPanel, lay_out_ranks
from cpfean.analysis.views import (
    Direction,
    Gallery,
    RankChange,
    image_sizes,
    outcome,
    pick_captions,
)
from cpfean.config import ExperimentConfig
from cpfean.metrics.retrieval import RecallAtK
from cpfean.training.setup import open_checkpoint

_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_STUDY_CAPTIONS = 3  # one that was found, one nearly, one missed
_STUDY_IMAGES = 1000  # all of Flickr's dev splits, a part of COCO's


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
        num_images=_STUDY_IMAGES,
    )
    gallery.check_gates(name="the best model")
    partial = output.with_name(f".{output.name}.partial")
    for caption in pick_captions(gallery.ranks, count=_STUDY_CAPTIONS, seed=config.seed):
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
    rank = int(gallery.ranks.captions[caption])
    sheet = lay_out_panels(
        caption_panels(gallery, caption, photos=photos),
        heading=f"Caption {caption} of {gallery.split.name}: {_outcome_text(rank)} (its image has "
        f"rank {rank} of {gallery.num_images})",
    )
    return sheet.save(output / f"caption-{caption:05d}.png")


def caption_panels(gallery: Gallery, caption: int, *, photos: Path | None = None) -> list[Panel]:
    """What `draw_caption` draws side by side."""
    own, wrong = int(gallery.split.image_of(caption)), gallery.wrong_image(caption)
    views = gallery.view(own, caption), gallery.view(wrong, caption)
    return _panels(("its own image", "the wrong image that scores highest"), views, photos)


def draw_image(gallery: Gallery, image: int, *, output: Path, photos: Path | None = None) -> Path:
    """An image with the best of its own captions, and with the wrong one that scores highest.

    Args:
        gallery: whose model has gates.
        image: its position in the split.
        output, photos: as in `draw_caption`.

    Raises:
        DataError: a photograph that cannot be read.
    """
    name = gallery.split.image_ids[image]
    rank = int(gallery.ranks.images[image])
    sheet = lay_out_panels(
        image_panels(gallery, image, photos=photos),
        heading=f"Image {name} of {gallery.split.name}: {_outcome_text(rank)} (a caption of its "
        f"own has rank {rank} of {gallery.scores.shape[1]})",
    )
    return sheet.save(output / f"image-{_file_name(name)}.png")


def image_panels(gallery: Gallery, image: int, *, photos: Path | None = None) -> list[Panel]:
    """What `draw_image` draws side by side."""
    own, wrong = gallery.best_caption(image), gallery.wrong_caption(image)
    views = gallery.view(image, own), gallery.view(image, wrong)
    titles = (
        f"the best of its own captions, {own}",
        f"the wrong caption that scores highest, {wrong}",
    )
    return _panels(titles, views, photos)


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
    first, second = change.ranks
    sheet = lay_out_panels(
        change_panels(change, galleries, names=names, photos=photos),
        heading=f"{query} of {split.name}, with its match: rank {first} by {names[0]}, "
        f"{second} by {names[1]}",
    )
    return sheet.save(output / f"{stem}.png")


def change_panels(
    change: RankChange,
    galleries: Sequence[Gallery],
    *,
    names: Sequence[str],
    photos: Path | None = None,
) -> list[Panel]:
    """What `draw_change` draws side by side."""
    titles, views = [], []
    for gallery, name, rank in zip(galleries, names, change.ranks, strict=True):
        if gallery.has_gates:
            image, caption = change.query, change.query
            if change.direction == "text to image":
                image = int(gallery.split.image_of(caption))
            else:
                caption = gallery.best_caption(image)
            titles.append(f"by {name}: rank {rank}")
            views.append(gallery.view(image, caption))
    return _panels(titles, views, photos)


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
    sheet = lay_out_ranks(
        panels,
        names=names,
        heading=f"Ranks on {split.name}: {names[0]} (rSum {metrics[0].rsum:.1f}) and {names[1]} "
        f"(rSum {metrics[1].rsum:.1f})",
    )
    return sheet.save(output / "ranks.png")


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


def _outcome_text(rank: int) -> str:
    return {"found": "found", "near": "nearly found", "missed": "missed"}[outcome(rank)]


def _file_name(image_id: str) -> str:
    return re.sub(r"[^\w.-]", "_", image_id)
