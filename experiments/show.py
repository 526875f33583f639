"""Draw what a trained model sees: regions by their gates and words by who names them, by query."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.errors import ConfigError
from cpfean.training.trained import checked_split, model_folder, trained_configuration
from experiments import command_line
from experiments.trained import MODEL, add_data_flags, cache_folder

if TYPE_CHECKING:
    from cpfean.analysis.views import Gallery, RankChange

_EPILOG = """\
  python experiments/show.py runs/NAME                  some captions: found, nearly found, missed
  python experiments/show.py runs/NAME --data DIR --caption 1200 --photos DIR/images
  python experiments/show.py runs/NAME --data DIR --image 1001773457_577c3a7d70.jpg
  python experiments/show.py runs/NAME --data DIR --against runs/OTHER

A caption is drawn with its own image and with the wrong image that scores highest; an image with
the best of its captions and with the wrong one that scores highest. --against compares two models,
on the queries whose ranks changed most: a table, ranks.csv with every query, ranks.png, and
pictures of the first few with each model's gates. Ranks are those of
`evaluate.py --protocol full`, which on a GPU encodes in the precision of training and not, as here,
in float32.

Exit codes: 0 done, 2 flags or a model without gates, 3 data, 5 checkpoint.
"""
_PICTURED = 2  # of the queries of each direction that either model ranks better


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("model", metavar="MODEL", type=Path, help=MODEL)
    add_data_flags(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--caption", metavar="K", type=int, help="its line in the captions, from 0")
    what.add_argument("--image", metavar="ID", help="its name in the ids")
    what.add_argument("--against", metavar="MODEL", type=Path, help="another model")
    parser.add_argument(
        "--count",
        metavar="N",
        type=int,
        default=6,
        help="captions to pick; with --against, queries to list of each direction for each model "
        "that ranks them better (default: 6)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the captions picked (default: 0)"
    )
    parser.add_argument(
        "--photos", metavar="DIR", type=Path, help="photographs, named as the images' ids"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=command_line.output_folder,
        default=Path("runs/pictures"),
        help="default: runs/pictures",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from cpfean.analysis.pictures.queries import open_gallery
    from cpfean.output_folders import own_folder

    command_line.positive(arguments.count, "--count")
    command_line.positive(arguments.seed, "--seed", least=0)
    folders = [model_folder(path) for path in (arguments.model, arguments.against) if path]
    own_folder(arguments.output, flag="--output")
    configs = [trained_configuration(folder) for folder in folders]
    cache_dir = cache_folder()
    galleries = []
    for folder, config in zip(folders, configs, strict=True):
        # Both models look at the data of the first, each at as many regions as it was trained on.
        looking = configs[0].with_overrides({"data.num_regions": config.data.num_regions})
        data_folder = checked_split(
            looking, arguments.data, split=arguments.split, cache_dir=cache_dir
        )
        galleries.append(
            open_gallery(
                folder,
                config,
                data_folder=data_folder,
                split=arguments.split,
                cache_dir=cache_dir,
            )
        )
    if arguments.photos is not None:
        _check_photos(galleries[0], arguments.photos)
    if arguments.against:
        names = _names(arguments.model, arguments.against)
        _compare((galleries[0], galleries[1]), names, arguments)
    else:
        galleries[0].check_gates(name=str(arguments.model))
        _show(galleries[0], arguments)
    return 0


def _show(gallery: Gallery, arguments: argparse.Namespace) -> None:
    """Draws single queries and says which."""
    from cpfean.analysis.pictures.queries import draw_caption, draw_image
    from cpfean.analysis.views import outcome, pick_captions

    where = {"output": arguments.output, "photos": arguments.photos}
    if arguments.image is not None:
        image = gallery.image_named(arguments.image)
        file = draw_image(gallery, image, **where)
        print(f"{file}  {outcome(int(gallery.ranks.images[image]))}")
        return
    if arguments.caption is not None:
        captions = [gallery.caption_at(arguments.caption)]
    else:
        captions = pick_captions(gallery.ranks, count=arguments.count, seed=arguments.seed)
    for caption in captions:
        file = draw_caption(gallery, caption, **where)
        rank = int(gallery.ranks.captions[caption])
        text = gallery.split.captions[caption]
        print(f"{file}  {outcome(rank)}, rank {rank}: {text}", flush=True)


def _compare(
    galleries: tuple[Gallery, Gallery], names: tuple[str, str], arguments: argparse.Namespace
) -> None:
    """Lists and draws the queries whose ranks changed most."""
    from cpfean.analysis.pictures.queries import draw_change, draw_comparison
    from cpfean.analysis.views import most_changed, rank_changes

    changes = rank_changes(galleries[0].ranks, galleries[1].ranks)
    listed = most_changed(changes, count=arguments.count)
    print(_markdown(list(listed.values()), galleries[0], names))
    print(_write_csv(changes, galleries[0], arguments.output / "ranks.csv"))
    print(draw_comparison(galleries, listed, names=names, output=arguments.output))
    if not any(gallery.has_gates for gallery in galleries):
        print("neither model has gates, so single queries are not drawn.")
        return
    for group in listed.values():
        for change in group[:_PICTURED]:
            file = draw_change(
                change, galleries, names=names, output=arguments.output, photos=arguments.photos
            )
            print(file, flush=True)


def _markdown(groups: Sequence[list[RankChange]], gallery: Gallery, names: tuple[str, str]) -> str:
    """The queries as a table, those that the first model ranks better first."""
    from cpfean.analysis.pictures.queries import query_text

    lines = [
        f"| direction | query | rank by {names[0]} | by {names[1]} | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for group in groups:
        for change in group:
            text = query_text(change, gallery).replace("|", r"\|")
            cells = (change.direction, change.query, *change.ranks, text)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _write_csv(changes: Sequence[RankChange], gallery: Gallery, file: Path) -> Path:
    """Every query of both directions, the most changed first."""
    from cpfean.analysis.pictures.queries import query_text

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["direction", "query", "rank", "rank_against", "text"])
        for change in changes:
            text = query_text(change, gallery)
            writer.writerow([change.direction, change.query, *change.ranks, text])
    return file


def _names(*paths: Path) -> tuple[str, str]:
    """What to call two models: their runs' names, or their paths where those are alike."""
    short = [
        path.parent.name if path.name in ("best_model", "best") else path.name for path in paths
    ]
    first, second = short if len(set(short)) == len(short) else map(str, paths)
    return first, second


def _check_photos(gallery: Gallery, photos: Path) -> None:
    """Says how many images have a photograph.

    Raises:
        ConfigError: none.
    """
    from cpfean.analysis.pictures.queries import photo_of

    ids = gallery.split.image_ids
    there = sum(photo_of(name, photos) is not None for name in ids)
    if not there:
        raise ConfigError(
            f"--photos {photos} has none of the {len(ids)} images of {gallery.split.name}; files "
            f"must be named as the ids, e.g. {ids[0]}, with or without .jpg or .png."
        )
    if there < len(ids):
        print(f"{there} of {len(ids)} images have a photograph; the others get an empty frame.")


if __name__ == "__main__":
    main()
