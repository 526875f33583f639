"""Turn released region features and captions into a data folder in the native format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from cpfean import commands
from cpfean.data.boxes import ORDERS, UNITS, Layout
from cpfean.errors import ConfigError
from experiments import command_line

_EPILOG = """\
DIR appears when everything has been converted and checked, or not at all. docs/data.md describes
the formats, docs/reproduce.md where to get the files.

  python experiments/prepare.py DIR --scan f30k_precomp --boxes gsmn/f30k_precomp
  python experiments/prepare.py DIR --table flickr30k.tsv --karpathy dataset_flickr30k.json \\
      --vocabulary objects_vocab.txt
  python experiments/prepare.py DIR --table train2014_obj36.tsv --table val2014_obj36.tsv \\
      --karpathy dataset_coco.json --vocabulary objects_vocab.txt --half
  python experiments/prepare.py DIR --table trainval_36.tsv --karpathy dataset_coco.json \\
      --instances instances_train2014.json --instances instances_val2014.json
  python experiments/prepare.py DIR --table coco2017.tsv \\
      --captions train=captions_train2017.json --captions test=captions_val2017.json
  python experiments/prepare.py DIR --table birds.tsv --karpathy birds.json --captions-each all
  python experiments/prepare.py DIR --scan old/folder --box-order yxyx --labels-from 1

Exit codes: 0 done, 2 flags, 3 faults in the files or no room on the disk, 130 stopped.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder to make")
    features = parser.add_argument_group("features: one of the two")
    features.add_argument(
        "--scan", metavar="DIR", type=Path, help="a folder of SCAN's release, or of our own format"
    )
    features.add_argument(
        "--table",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a TSV of bottom-up attention or LXMERT; may be repeated",
    )
    captions = parser.add_argument_group("captions and splits of tables: one of the two")
    captions.add_argument(
        "--karpathy", metavar="FILE", type=Path, help="dataset_flickr30k.json, dataset_coco.json"
    )
    captions.add_argument(
        "--captions",
        metavar="SPLIT=FILE",
        action="append",
        default=[],
        help="COCO's caption file of a split (train, dev, test); may be repeated",
    )
    captions.add_argument(
        "--no-restval",
        action="store_true",
        help="leave Karpathy's restval images out, which the field trains on",
    )
    captions.add_argument(
        "--captions-each",
        metavar="N|all",
        type=_captions_each,
        help="keep the first N captions of an image, or all (default: 5 if most images have 5, as "
        "published; else all)",
    )
    regions = parser.add_argument_group("what is known of the regions")
    regions.add_argument(
        "--boxes", metavar="DIR", type=Path, help="GSMN's boxes for a folder of SCAN's"
    )
    regions.add_argument(
        "--vocabulary", metavar="FILE", type=Path, help="names of the labels in LXMERT's tables"
    )
    regions.add_argument("--no-labels", action="store_true", help="leave those labels out")
    regions.add_argument(
        "--instances",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="label regions by the human boxes of this COCO file; may be repeated",
    )
    read = parser.add_argument_group("what the numbers are, if not what docs/data.md says")
    read.add_argument(
        "--box-order",
        metavar="ORDER",
        choices=tuple(ORDERS),
        default="xyxy",
        help=f"coordinates of the boxes: {', '.join(ORDERS)} (default: xyxy)",
    )
    read.add_argument(
        "--box-units",
        metavar="UNITS",
        choices=UNITS,
        default="pixels",
        help="pixels, or shares of width and height (default: pixels)",
    )
    read.add_argument(
        "--labels-from",
        metavar="N",
        type=int,
        choices=(0, 1),
        default=0,
        help="the number of the vocabulary's first label, 0 or 1 (default: 0)",
    )
    read.add_argument(
        "--feature-type",
        metavar="TYPE",
        choices=("float16", "float32", "float64"),
        help="of a table's features: float16, float32, float64 (default: found by looking at them)",
    )
    stored = parser.add_argument_group("what is stored")
    stored.add_argument(
        "--regions", metavar="K", type=int, help="the first K of an image (default: 36, or all)"
    )
    stored.add_argument("--half", action="store_true", help="features as float16: half the disk")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.scan is not None:
        from cpfean.data.convert.precomp import convert_precomp

        convert_precomp(
            arguments.scan,
            arguments.folder,
            boxes=arguments.boxes,
            num_regions=arguments.regions,
            half=arguments.half,
            layout=_layout(arguments),
            labels_from=arguments.labels_from,
        )
    else:
        _convert_tables(arguments)
    print(f"{arguments.folder}: done, and nothing wrong.")
    _tell(arguments.folder)
    return 0


def _tell(folder: Path) -> None:
    """What is in the new folder, to be checked by eye, and what to do with it."""
    from cpfean.data.split import SPLITS
    from cpfean.data.summary import summarize

    summary = summarize(folder)
    for line in summary.lines():
        print(line)
    if len(summary.splits) == len(SPLITS):
        print(f"next: {commands.script('train.py', '--data', folder)}")


def _layout(arguments: argparse.Namespace) -> Layout:
    return Layout(arguments.box_order, arguments.box_units)


def _convert_tables(arguments: argparse.Namespace) -> None:
    from cpfean.data.convert.captions import read_coco_captions, read_karpathy
    from cpfean.data.convert.native import check_target
    from cpfean.data.convert.objects import CocoObjects, read_vocabulary
    from cpfean.data.convert.tables import convert_tables

    check_target(arguments.folder)  # before minutes are spent on reading
    vocabulary = None if arguments.vocabulary is None else read_vocabulary(arguments.vocabulary)
    if arguments.karpathy is not None:
        images = read_karpathy(
            arguments.karpathy, restval=not arguments.no_restval, each=arguments.captions_each
        )
    else:
        images = read_coco_captions(_by_split(arguments.captions), each=arguments.captions_each)
    convert_tables(
        arguments.table,
        images,
        arguments.folder,
        num_regions=arguments.regions or 36,
        half=arguments.half,
        vocabulary=vocabulary,
        keep_labels=not arguments.no_labels,
        objects=CocoObjects(arguments.instances) if arguments.instances else None,
        layout=_layout(arguments),
        labels_from=arguments.labels_from,
        features_as=arguments.feature_type,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Flags that need or exclude each other.

    Raises:
        ConfigError: says which.
    """
    if arguments.regions is not None:
        command_line.positive(arguments.regions, "--regions")
    tables = bool(arguments.table)
    if tables == (arguments.scan is not None):
        raise ConfigError("Features come from --scan DIR or from --table FILE: give one of them.")
    if tables and bool(arguments.captions) == (arguments.karpathy is not None):
        raise ConfigError("--table needs captions: --karpathy FILE or --captions SPLIT=FILE.")
    if tables and arguments.boxes is not None:
        raise ConfigError("--boxes goes with --scan; tables have boxes of their own.")
    if arguments.no_restval and arguments.karpathy is None:
        raise ConfigError("--no-restval goes with --karpathy.")
    for name in (
        "karpathy",
        "captions",
        "captions_each",
        "vocabulary",
        "instances",
        "no_labels",
        "feature_type",
    ):
        if not tables and getattr(arguments, name):
            raise ConfigError(f"--{name.replace('_', '-')} goes with --table.")
    labels = [n for n in ("vocabulary", "instances", "no_labels") if getattr(arguments, n)]
    if len(labels) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in labels)
        raise ConfigError(f"{flags} exclude each other: labels come from one source.")


def _captions_each(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f'a number from 1, or "all"; got {text!r}')
    return int(text)


def _by_split(given: list[str]) -> dict[str, Path]:
    """Files by split, in the order of the splits.

    Raises:
        ConfigError: not SPLIT=FILE, or a split twice.
    """
    files: dict[str, Path] = {}
    for text in given:
        split, equals, file = text.partition("=")
        if not equals or not file or split not in ("train", "dev", "test"):
            raise ConfigError(f"--captions needs SPLIT=FILE with train, dev or test; got {text!r}.")
        if split in files:
            raise ConfigError(f"--captions {split} is given twice.")
        files[split] = Path(file)
    return files


if __name__ == "__main__":
    main()
