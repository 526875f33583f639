"""Extract region features from photographs: a data folder to train on, or a gallery to search."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean import commands
from cpfean.errors import ConfigError
from experiments import command_line

if TYPE_CHECKING:
    from cpfean.extraction.run import Extraction
    from cpfean.photographs.settings import ExtractionSettings

_EPILOG = """\
PHOTOS is a folder or an s3:// URL: with train/, dev/ or validation/, and test/, each with
metadata.csv or .jsonl (file_name, text); or of photographs whose captions are in such a file or in
that of --captions; without captions it becomes a gallery that can be searched. OUT appears when all
of it is made and checked. Killed or stopped, the same command again goes on with what is missing in
OUT.unfinished, and comes to the same bytes, in this process and on any number of workers.

  python experiments/extract.py PHOTOS OUT                      RT-DETR v2 and DINOv2 of the hub
  python experiments/extract.py PHOTOS OUT --detector grid      no detector: fixed boxes
  python experiments/extract.py PHOTOS OUT --detector models/detr --backbone models/vit
  python experiments/extract.py PHOTOS OUT --features both --regions 50
  python experiments/extract.py PHOTOS OUT --detector google/owlv2-base-patch16-ensemble \\
      --vocabulary words.txt
  python experiments/extract.py PHOTOS OUT --captions captions.csv --split 0.7,0.15,0.15
  python experiments/extract.py s3://bucket/photos OUT --address HOST:PORT --workers 8
  python experiments/extract.py PHOTOS OUT --in-process --skip-broken

Exit codes: 0 done, 2 flags, 3 photographs that cannot be read, faults in the files or no room on
the disk, 4 no memory, 5 models, cluster or storage, 130 or 143 stopped.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("photos", metavar="PHOTOS", type=command_line.place, help="the photographs")
    parser.add_argument("folder", metavar="OUT", type=Path, help="the data folder to make")
    captions = parser.add_argument_group("captions of photographs in one folder")
    captions.add_argument(
        "--captions",
        metavar="FILE",
        type=Path,
        help="CSV or JSONL (file_name, text), COCO's captions, or Karpathy's JSON",
    )
    captions.add_argument(
        "--split",
        metavar="A,B,C",
        type=_shares,
        default=(0.8, 0.1, 0.1),
        help="shares of train, dev and test, where no file says (default: 0.8,0.1,0.1)",
    )
    captions.add_argument("--seed", metavar="N", type=int, default=0, help="of that split")
    regions = parser.add_argument_group("regions")
    regions.add_argument(
        "--detector",
        metavar="NAME|FOLDER|grid",
        type=command_line.place,
        help="an object detector of transformers by hub name or folder, or fixed boxes (default: "
        "PekingU/rtdetr_v2_r50vd)",
    )
    regions.add_argument(
        "--vocabulary",
        metavar="FILE",
        type=Path,
        help="what a zero-shot detector looks for, a name a line",
    )
    regions.add_argument(
        "--regions", metavar="R", type=int, help="most regions of a photograph (default: 36)"
    )
    regions.add_argument(
        "--fill",
        action=argparse.BooleanOptionalAction,
        help="fill up with fixed boxes where fewer are found (default: --fill)",
    )
    regions.add_argument(
        "--min-score", metavar="P", type=float, help="least confidence (default: 0.1)"
    )
    regions.add_argument(
        "--max-overlap", metavar="IOU", type=float, help="most IoU of two regions (default: 0.7)"
    )
    features = parser.add_argument_group("features")
    features.add_argument(
        "--features",
        choices=("detector", "backbone", "both"),
        help="the detector's own, a backbone's inside each box, or both (default: backbone)",
    )
    features.add_argument(
        "--backbone",
        metavar="NAME|FOLDER",
        type=command_line.place,
        help="a vision model of transformers (default: facebook/dinov2-small)",
    )
    features.add_argument(
        "--resolution",
        metavar="PIXELS",
        type=int,
        help="side of the square that the backbone sees (default: as it was trained)",
    )
    where = parser.add_argument_group("how and where")
    where.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out photographs that cannot be read, with their captions; provenance.json "
        "names them",
    )
    where.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=8,
        help="photographs that are looked at together (default: 8)",
    )
    where.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="on a GPU each, or a CPU where there is none (default: as many as there are)",
    )
    where.add_argument(
        "--in-process", action="store_true", help="workers are threads of this process, without Ray"
    )
    where.add_argument(
        "--address",
        metavar="HOST:PORT",
        help='a running Ray cluster; "local" uses this machine alone (default: RAY_ADDRESS, else '
        "the cluster whose head runs here, else this machine)",
    )
    where.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    target = _target(arguments.folder)

    from cpfean.data.convert.photographs import find_photographs
    from cpfean.extraction.work_folder import WorkFolder

    photographs = find_photographs(
        arguments.photos,
        captions=arguments.captions,
        shares=arguments.split,
        seed=arguments.seed,
    )
    try:
        done = _extract(arguments, settings, photographs, target)
    except KeyboardInterrupt:
        if WorkFolder(target).folder.exists():
            line = commands.script("extract.py", *arguments.typed)
            told = f"stopped; what is done is kept, and this goes on:\n  {line}"
            print(told, file=sys.stderr, flush=True)
        raise
    _tell(arguments, done)
    return 0


def _extract(
    arguments: argparse.Namespace,
    settings: ExtractionSettings,
    photographs: Any,
    target: Path,
) -> Extraction:
    import torch

    from cpfean.extraction.batches import Description
    from cpfean.extraction.run import extract
    from cpfean.photographs.extractor import RegionExtractor

    # It says what those of the workers have to be, and refuses what none could load.
    ready = [RegionExtractor(settings, device=torch.device("cpu"))]
    extractor = Description.of(ready[0])
    elsewhere = _absolute(settings)
    if not arguments.in_process:
        ready.clear()  # models take memory

    def make(device: torch.device) -> RegionExtractor:
        if ready and device.type == "cpu":
            return ready.pop()
        return RegionExtractor(elsewhere, device=device)

    given: dict[str, Any] = {
        "extractor": extractor,
        "batch_size": arguments.batch_size,
        "skip_broken": arguments.skip_broken,
    }
    from cpfean.threads import usable_cpus
    from orchestration.settings import Settings

    if arguments.in_process:
        from cpfean.extraction.in_process import Threads

        workers = arguments.workers or torch.cuda.device_count() or usable_cpus()
        here = Threads(make, workers=workers)
        return extract(photographs, target, run=here, device=here.device, **given)
    from orchestration.extraction import OnRay

    # Nothing is tracked, so that an address of MLflow cannot be wrong.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MLFLOW_")}
    where = Settings.resolve(
        output=target.parent, address=arguments.address, environment=environment
    )
    folders = [
        name for name in (elsewhere.detector, elsewhere.backbone) if name and os.path.isdir(name)
    ]
    with OnRay(
        where,
        workers=arguments.workers,
        make_extractor=make,
        provenance=extractor.provenance(),
        folders=folders,
        say=command_line.say,
    ) as ray:
        return extract(photographs, target, run=ray, device=ray.device, **given)


def _tell(arguments: argparse.Namespace, done: Extraction) -> None:
    """What is in the folder, to be checked by eye, and what to do with it."""
    from cpfean.data.split import SPLITS
    from cpfean.data.summary import summarize
    from cpfean.progress import duration

    folder = arguments.folder
    if done.was_finished:
        print(f"{folder}: finished before, of the same photographs; nothing was made.")
    else:
        print(f"{folder}: done, and nothing wrong.")
    summary = summarize(folder)
    for line in summary.lines():
        print(line)
    if done.made:
        rate = done.made / done.seconds
        took = duration(done.seconds) if done.seconds >= 10 else f"{done.seconds:.1f} s"
        print(f"{done.made:,} photographs in {took}, {rate:.1f} a second, with what starting took")
    if len(summary.splits) >= len(SPLITS):
        print(f"next: {commands.script('train.py', '--data', folder)}")
    else:
        photos = () if "://" in arguments.photos else ("--photos", arguments.photos)
        line = commands.script("search.py", "runs/NAME/best_model", "--data", folder, *photos)
        print(f"next, with a model that was trained on such features: {line}")


def _settings(arguments: argparse.Namespace) -> ExtractionSettings:
    """What the flags ask of an extraction.

    Raises:
        ConfigError: values that cannot be, or do not go together.
        DataError: a vocabulary that cannot be read.
    """
    command_line.positive(arguments.batch_size, "--batch-size", most=4096)
    if arguments.workers is not None:
        command_line.positive(arguments.workers, "--workers")
    if arguments.in_process and arguments.address is not None:
        raise ConfigError("--in-process and --address exclude each other: with or without Ray.")
    command_line.positive(arguments.seed, "--seed", least=0, most=2**31 - 1)

    from cpfean.photographs.settings import ExtractionSettings

    given: dict[str, Any] = {
        "detector": arguments.detector,
        "features": arguments.features,
        "backbone": arguments.backbone,
        "resolution": arguments.resolution,
        "num_regions": arguments.regions,
        "fill": arguments.fill,
        "min_score": arguments.min_score,
        "max_overlap": arguments.max_overlap,
    }
    if arguments.vocabulary is not None:
        from cpfean.data.convert.objects import read_vocabulary

        given["vocabulary"] = tuple(read_vocabulary(arguments.vocabulary))
    return ExtractionSettings(**{name: v for name, v in given.items() if v is not None})


def _absolute(settings: ExtractionSettings) -> ExtractionSettings:
    """The same models for workers that run in other folders."""
    places = {
        name: str(Path(place).absolute())
        for name in ("detector", "backbone")
        if (place := getattr(settings, name)) and os.path.isdir(place)
    }
    return replace(settings, **places)  # type: ignore[arg-type]


def _target(folder: Path) -> Path:
    """Raises ConfigError for what cannot be a folder of this machine."""
    if "://" in str(folder) or str(folder).startswith("s3:/"):
        raise ConfigError(f"OUT {folder}: expected a folder of this machine; copy it afterwards.")
    target = folder.absolute()
    if not target.name:
        raise ConfigError(f"OUT {folder}: expected a new folder, found the root of all.")
    return target


def _shares(text: str) -> tuple[float, float, float]:
    try:
        a, b, c = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected three shares such as 0.8,0.1,0.1; got {text!r}"
        ) from None
    return a, b, c


if __name__ == "__main__":
    main()
