"""Where a trained model lies, what it was trained with, and the data that it is shown."""

from __future__ import annotations

from pathlib import Path

from cpfean.config import DataConfig, ExperimentConfig
from cpfean.errors import CheckpointError, ConfigError
from cpfean.files import read_file
from cpfean.hub import model_at
from cpfean.json_files import read_object

_LONGEST_TOML = 2**20  # bytes


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
    folder = data_folder(config, data, cache_dir=cache_dir)
    check_split(folder, split, config=config, cache_dir=cache_dir)
    return folder


def data_folder(config: ExperimentConfig, data: str | None, *, cache_dir: Path) -> Path:
    """Fetches or makes the data for a trained model; otherwise as `checked_split`."""
    from cpfean.data.sources import resolve_data

    wanted = config.data
    if data is not None:
        wanted = DataConfig(path=data, num_regions=wanted.num_regions, synthetic=wanted.synthetic)
    return resolve_data(wanted, cache_dir=cache_dir)


def check_split(folder: Path, split: str, *, config: ExperimentConfig, cache_dir: Path) -> None:
    """Checks one split of a folder for a trained model; otherwise as `checked_split`."""
    from cpfean.data.split import check_folder

    regions = config.data.num_regions
    check_folder(folder, num_regions=regions, splits=(split,), cache_dir=cache_dir)


def model_folder(path: Path | str) -> Path:
    """The model in the folder of a run, a checkpoint or a model, or of a name on the Hub.

    A name, "user/name" or "user/name@revision", is fetched unless there is a folder of that name.

    Raises:
        CheckpointError: none of these, or a name that cannot be fetched.
    """
    path = model_at(path)
    for folder in (path / "best_model", path):
        if (folder / "config.toml").is_file() or (folder / "state.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} is no folder of a finished run (with best_model/), of a checkpoint or of a model."
    )


def trained_configuration(folder: Path) -> ExperimentConfig:
    """The experiment that a model or checkpoint comes from.

    Raises:
        CheckpointError: it cannot be read, or is not the model's beside it.
    """
    from cpfean.training.checkpoint import read_state

    path = folder / "config.toml"
    if not path.is_file():
        return read_state(folder).config
    try:
        read_file(path, limit=_LONGEST_TOML)
        config = ExperimentConfig.from_toml(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    _check_of_model(config, folder)
    return config


def _check_of_model(config: ExperimentConfig, folder: Path) -> None:
    """Refuses an experiment whose model is not the one that lies beside it."""
    plain = read_object(folder / "config.json", error=CheckpointError).get("model")
    try:
        saved = ExperimentConfig.from_dict({"model": plain})
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: not a saved model: {error}") from None
    told, found = config.flat(), saved.flat()
    # Where an encoder lies says nothing.
    differing = [
        f"{path} is {told[path]!r} and {found[path]!r}"
        for path in told
        if path.startswith("model.") and path != "model.text.encoder" and told[path] != found[path]
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: config.toml and config.json are not of one model: "
            f"{', '.join(differing[:3])}."
        )
