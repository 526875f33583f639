"""What commands that look at trained models share: their flags, and the way to model and data."""

from __future__ import annotations

from pathlib import Path

from cpfean.config import DataConfig, ExperimentConfig
from cpfean.errors import CheckpointError
from experiments import command_line

MODEL = "folder of a run, checkpoint or model"  # what every such command takes


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
