"""What commands that look at trained models share: their flags, and the cache."""

from __future__ import annotations

from pathlib import Path

from experiments import command_line

# What every such command takes.
MODEL = "folder of a run, checkpoint or model, or a model on the Hugging Face Hub: USER/NAME"


def add_data_flags(parser: command_line.Parser) -> None:
    """Which data to look at, and at which split of it."""
    parser.add_argument(
        "--data",
        metavar="DIR|URL|synthetic",
        type=command_line.place,
        help="default: the data that the model was trained on",
    )
    parser.add_argument(
        "--split", choices=("train", "dev", "test"), default="test", help="default: test"
    )


def cache_folder() -> Path:
    """Where what can be made again is kept on this machine."""
    from orchestration.settings import Settings

    return Settings.resolve(output=Path("runs"), address="local").cache_dir
