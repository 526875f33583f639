"""Recalls and rSum of trained models on a split, as JSON on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from cpfean.training.trained import check_split, data_folder, model_folder, trained_configuration
from experiments import command_line
from experiments.trained import MODEL, add_data_flags, cache_folder

if TYPE_CHECKING:
    from cpfean.data.split import Split
    from cpfean.metrics.eccv_caption import EccvCaption
    from cpfean.training.evaluation import Protocol

_EPILOG = """\
  python experiments/evaluate.py runs/NAME --data DIR --split test
  python experiments/evaluate.py runs/NAME/best_model --data DIR --protocol coco-1k
  python experiments/evaluate.py USER/NAME --data DIR          a model on the Hugging Face Hub
  python experiments/evaluate.py USER/NAME@v1 --data DIR       a branch, tag or commit of it
  python experiments/evaluate.py runs/A runs/B --data DIR      each, and the mean of their scores
  python experiments/evaluate.py runs/NAME --data data/coco --eccv dataset_coco.json

Six recalls in percent and their sum, rSum (0 to 600); among how many images and captions they were
ranked, and of how many such folds it is the mean. Everything else goes to standard error.
Of several models "models" has each one's and "ensemble of N" those of the mean of their scores.
--eccv adds "eccv_caption", percentages of its own that are no part of rSum.
Exit codes: 0 done, 2 flags, 3 data, 5 checkpoint.
"""
_WAYS = ("i2t", "t2i")


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        type=Path,
        nargs="+",
        help=f"{MODEL}; of several also the mean of their scores, an ensemble",
    )
    add_data_flags(parser)
    parser.add_argument(
        "--protocol",
        choices=("full", "coco-1k"),
        help="rank among the whole split, or mean over folds of 1000 images (default: the model's)",
    )
    parser.add_argument(
        "--eccv",
        metavar="FILE",
        type=Path,
        help="on COCO's 5,000 test images: also ECCV Caption's R@1, mAP@R and R-Precision and "
        "CxC's R@1, which know matches that COCO counts as wrong; FILE has the captions' ids, "
        "dataset_coco.json or captions_val2014.json; ranks among the whole split",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="NAME|DIR",
        type=command_line.place,
        help="where a frozen text encoder is now, if it has moved, for all models; its weights are "
        "compared",
    )
    parser.add_argument(
        "--products",
        choices=("auto", "fp32", "fp16", "bf16"),
        help="type of the matrix products of scoring; auto: fp16 on a GPU, fp32 elsewhere "
        "(default: the model's)",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from cpfean.metrics.eccv_caption import METRICS
    from cpfean.training.evaluation import COCO_FOLD, Kept, Member, evaluate_together
    from cpfean.training.precision import chosen_precision
    from cpfean.training.setup import default_device, open_checkpoint

    models = _models(arguments.checkpoints)
    configs = [trained_configuration(model) for model in models]
    protocol = _protocol(arguments, configs)
    cache_dir = cache_folder()
    folder = _folder(arguments, configs, cache_dir=cache_dir)
    device = default_device()
    members = []
    for model, config in zip(models, configs, strict=True):
        trained = open_checkpoint(
            model,
            data_folder=folder,
            split=arguments.split,
            cache_dir=cache_dir,
            device=device,
            num_regions=config.data.num_regions,
            text_encoder=arguments.text_encoder,
        )
        products = arguments.products or config.evaluation.products
        precision = chosen_precision(config.optim.precision, device)
        members.append(Member(trained.model, trained.dataset, products, precision))
    split = members[0].dataset.split
    judged = None if arguments.eccv is None else _eccv_caption(split, arguments.eccv)
    evaluated = evaluate_together(
        members,
        protocol=protocol,
        batch_size=min(config.evaluation.batch_size for config in configs),
        device=device,
        keep=None if judged is None else Kept(judged.captions_each, judged.images_each),
    )
    images = COCO_FOLD if protocol == "coco-1k" else split.num_images
    captions = len(split.groups.of_images(range(images)))
    folds = split.num_images // images
    mean = f", the mean of {folds} such folds" if protocol == "coco-1k" else ""
    print(
        f"{split.name}: ranked among {images:,} images and {captions:,} captions{mean}",
        file=sys.stderr,
    )
    names = [str(path) for path in arguments.checkpoints]
    if len(models) > 1:
        names.append(f"ensemble of {len(models)}")
    told: list[dict[str, Any]] = [each.metrics.as_dict() for each in evaluated]
    if len(models) > 1:
        titles = {f"{way}_r{k}": f"{way} R@{k}" for way in _WAYS for k in (1, 5, 10)}
        _show(names, told, titles | {"rsum": "  rSum"})
    if judged is not None:
        judgements = [judged.metrics(each.best) for each in evaluated if each.best is not None]
        print("ECCV Caption and CxC, in percent, no part of rSum:", file=sys.stderr)
        titles = {
            f"{way}_{key}": f"{way} {title}" for way in _WAYS for key, title in METRICS.items()
        }
        _show(names, judgements, titles)
        for found, more in zip(told, judgements, strict=True):
            found["eccv_caption"] = more
    result = told[0]
    if len(models) > 1:
        result = {"models": dict(zip(names[:-1], told[:-1], strict=True)), names[-1]: told[-1]}
    result |= {"images": images, "captions": captions, "folds": folds}
    json.dump(result, sys.stdout, indent=1)
    print()
    return 0


def _models(given: Sequence[Path]) -> list[Path]:
    """The folders of the models.

    Raises:
        ConfigError: one is given twice.
        CheckpointError: as `model_folder`.
    """
    found: dict[Path, Path] = {}
    for path in given:
        folder = model_folder(path)
        same = found.setdefault(folder.resolve(), path)
        if same is not path:
            raise ConfigError(
                f"{path} and {same} are the same model, {folder}: an ensemble counts each once."
            )
    return list(found)


def _protocol(arguments: argparse.Namespace, configs: Sequence[ExperimentConfig]) -> Protocol:
    """The one that is asked for, or that of all models.

    Raises:
        ConfigError: --eccv with folds, or models with different ones.
    """
    if arguments.eccv is not None:
        if arguments.protocol == "coco-1k":
            raise ConfigError(
                "--eccv ranks among all 5,000 images, and --protocol coco-1k among folds of 1,000: "
                "leave out one of them."
            )
        return "full"
    protocol: Protocol = arguments.protocol or configs[0].evaluation.protocol
    if arguments.protocol is None and any(c.evaluation.protocol != protocol for c in configs):
        raise ConfigError(
            "the models were evaluated by different protocols; say which: --protocol full or "
            "--protocol coco-1k."
        )
    return protocol


def _folder(
    arguments: argparse.Namespace, configs: Sequence[ExperimentConfig], *, cache_dir: Path
) -> Path:
    """The data that all models are shown, checked for each.

    Raises:
        ConfigError: no --data, and models that were trained on different data.
        DataError: as `check_split`.
    """
    folders = {data_folder(config, arguments.data, cache_dir=cache_dir) for config in configs}
    if len(folders) > 1:
        raise ConfigError(
            f"the models were trained on different data, {' and '.join(map(str, sorted(folders)))};"
            " say what to evaluate on: --data DIR."
        )
    (folder,) = folders
    for config in configs:
        check_split(folder, arguments.split, config=config, cache_dir=cache_dir)
    return folder


def _eccv_caption(split: Split, file: Path) -> EccvCaption:
    """What judges the split; ids and package are looked for before anything is scored."""
    from cpfean.data.convert.coco_ids import coco_ids
    from cpfean.metrics.eccv_caption import EccvCaption

    ids = coco_ids(split, file)
    owners = split.groups.image_of_caption.tolist()
    return EccvCaption(ids.images, ids.captions, image_of_caption=owners)


def _show(
    names: Sequence[str], rows: Sequence[Mapping[str, float]], titles: Mapping[str, str]
) -> None:
    """A table on standard error, a row for each model; titles by the keys of the rows."""
    width = max(map(len, names))
    print(f"{'':{width}}  {'  '.join(titles.values())}", file=sys.stderr)
    for name, row in zip(names, rows, strict=True):
        cells = [f"{row[key]:{len(title)}.2f}" for key, title in titles.items()]
        print(f"{name:{width}}  {'  '.join(cells)}", file=sys.stderr)


if __name__ == "__main__":
    main()
