"""Recalls and rSum of a trained model on a split, as JSON on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cpfean.config import DataConfig, ExperimentConfig
from cpfean.errors import CheckpointError
from experiments import command_line

_EPILOG = """\
  python experiments/evaluate.py runs/NAME --data DIR --split test
  python experiments/evaluate.py runs/NAME/best_model --data DIR --protocol coco-1k

Six recalls in percent and their sum, rSum (0 to 600). Everything else goes to standard error.
Exit codes: 0 done, 2 flags, 3 data, 5 checkpoint.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a run, checkpoint or model"
    )
    parser.add_argument(
        "--data",
        metavar="DIR|URL|synthetic",
        help="default: the data that the model was trained on",
    )
    parser.add_argument(
        "--split", choices=("train", "dev", "test"), default="test", help="default: test"
    )
    parser.add_argument(
        "--protocol",
        choices=("full", "coco-1k"),
        help="rank among the whole split, or mean over folds of 1000 images (default: the model's)",
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

    from cpfean.training.setup import evaluate_checkpoint

    model = model_folder(arguments.checkpoint)
    config = trained_configuration(model)
    cache_dir = cache_folder()
    folder = checked_split(config, arguments.data, split=arguments.split, cache_dir=cache_dir)
    metrics = evaluate_checkpoint(
        model,
        data_folder=folder,
        split=arguments.split,
        protocol=arguments.protocol or config.evaluation.protocol,
        cache_dir=cache_dir,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        num_regions=config.data.num_regions,
        batch_size=config.evaluation.batch_size,
        products=arguments.products or config.evaluation.products,
    )
    json.dump(metrics.as_dict(), sys.stdout, indent=1)
    print()
    return 0


def cache_folder() -> Path:
    """Where what can be made again is kept on this machine."""
    from orchestration.settings import Settings

    return Settings.resolve(output=Path("runs"), address="local").cache_dir


def checked_split(
    config: ExperimentConfig, data: str | None, *, split: str, cache_dir: Path
) -> Path:
    """Fetches or makes the data for a trained model, and checks one split of it.

    Args:
        config: that the model was trained with.
        data: folder, URL or "synthetic"; None for what the model was trained on.
        split: its name.
        cache_dir: for what can be made again.

    Raises:
        DataError: every fault that was found.
    """
    from cpfean.data.sources import resolve_data
    from cpfean.data.split import check_folder

    wanted = config.data
    if data is not None:
        wanted = DataConfig(path=data, num_regions=wanted.num_regions, synthetic=wanted.synthetic)
    folder = resolve_data(wanted, cache_dir=cache_dir)
    check_folder(folder, num_regions=wanted.num_regions, splits=(split,), cache_dir=cache_dir)
    return folder


def model_folder(path: Path) -> Path:
    """The model in the folder of a run, a checkpoint or a model.

    Raises:
        CheckpointError: none of these.
    """
    for folder in (path / "best_model", path):
        if (folder / "config.toml").is_file() or (folder / "state.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} is no folder of a finished run (with best_model/), of a checkpoint or of a model."
    )


def trained_configuration(folder: Path) -> ExperimentConfig:
    """The experiment that a model or checkpoint comes from."""
    from cpfean.training.checkpoint import read_state

    if (folder / "config.toml").is_file():
        return ExperimentConfig.from_toml(folder / "config.toml")
    return read_state(folder).config


if __name__ == "__main__":
    main()
