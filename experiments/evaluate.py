"""Recalls and rSum of a trained model on a split, as JSON on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cpfean.training.trained import checked_split, model_folder, trained_configuration
from experiments import command_line
from experiments.trained import MODEL, add_data_flags, cache_folder

_EPILOG = """\
  python experiments/evaluate.py runs/NAME --data DIR --split test
  python experiments/evaluate.py runs/NAME/best_model --data DIR --protocol coco-1k
  python experiments/evaluate.py USER/NAME --data DIR          a model on the Hugging Face Hub
  python experiments/evaluate.py USER/NAME@v1 --data DIR       a branch, tag or commit of it

Six recalls in percent and their sum, rSum (0 to 600); among how many images and captions they were
ranked, and of how many such folds it is the mean. Everything else goes to standard error.
Exit codes: 0 done, 2 flags, 3 data, 5 checkpoint.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=MODEL)
    add_data_flags(parser)
    parser.add_argument(
        "--protocol",
        choices=("full", "coco-1k"),
        help="rank among the whole split, or mean over folds of 1000 images (default: the model's)",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="NAME|DIR",
        type=command_line.place,
        help="where a frozen text encoder is now, if it has moved; its weights are compared",
    )
    parser.add_argument(
        "--products",
        choices=("fp32", "bf16"),
        help="type of the matrix products of scoring (default: the model's)",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    import torch

    from cpfean.training.evaluation import COCO_FOLD, evaluate
    from cpfean.training.setup import open_checkpoint

    model = model_folder(arguments.checkpoint)
    config = trained_configuration(model)
    cache_dir = cache_folder()
    folder = checked_split(config, arguments.data, split=arguments.split, cache_dir=cache_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_checkpoint(
        model,
        data_folder=folder,
        split=arguments.split,
        cache_dir=cache_dir,
        device=device,
        num_regions=config.data.num_regions,
        text_encoder=arguments.text_encoder,
    )
    split = trained.dataset.split
    protocol = arguments.protocol or config.evaluation.protocol
    metrics = evaluate(
        trained.model,
        trained.dataset,
        protocol=protocol,
        batch_size=config.evaluation.batch_size,
        device=device,
        products=arguments.products or config.evaluation.products,
    )
    images = COCO_FOLD if protocol == "coco-1k" else split.num_images
    captions = len(split.groups.of_images(range(images)))
    folds = split.num_images // images
    mean = f", the mean of {folds} such folds" if protocol == "coco-1k" else ""
    print(
        f"{split.name}: ranked among {images:,} images and {captions:,} captions{mean}",
        file=sys.stderr,
    )
    told = metrics.as_dict() | {"images": images, "captions": captions, "folds": folds}
    json.dump(told, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    main()
