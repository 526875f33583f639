"""What is known of where a trained model comes from: read from its run's records, never made up.

The model of a run (`runs/NAME/best_model`) has a record beside it with its figures on dev and test.
A training checkpoint knows its epochs and its data. A folder by itself has its configuration alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpfean.config import ExperimentConfig
from cpfean.data.caption_groups import PER_IMAGE
from cpfean.data.provenance import read_provenance
from cpfean.data.split import data_fingerprint, open_split
from cpfean.errors import CheckpointError, DataError
from cpfean.files import is_there
from cpfean.json_files import read_object
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from cpfean.training.checkpoint import read_state

_OF_A_MACHINE = ("data.path", "model.text.encoder")  # settings that can be places on one


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from.

    Attributes:
        config: the experiment.
        run: name of the run; empty if there is no record of one.
        kind: of the run: "sweep", "train", "comparison" ...
        trial: name of its trial.
        dev_rsum: of its best epoch on dev; None if that is not known.
        test: six recalls in percent and rSum on the test split; empty if it was not tested.
        epochs: that it was trained for.
        data: fingerprint of what it was trained on; empty if that is not known.
        commit: of the code, "-dirty" at its end if files differed from it; None if not known.
        versions: of Python, libraries and code.
        drift: how versions changed in between; empty if they did not.
        gallery: images and captions of the test split; None as below.
        provenance: how the data's features were made, from the data folder; None if that is not
            here, holds other data by now, or does not tell.
    """

    config: ExperimentConfig
    run: str = ""
    kind: str = ""
    trial: str = ""
    dev_rsum: float | None = None
    test: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    data: str = ""
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    drift: str = ""
    gallery: tuple[int, int] | None = None
    provenance: Mapping[str, Any] | None = None


def origin_of(model: Path, config: ExperimentConfig) -> Origin:
    """What is known of a model.

    Args:
        model: its folder: of a run, of a checkpoint, or by itself.
        config: the experiment that it comes from.

    Raises:
        CheckpointError: a checkpoint that is damaged, or a data folder's provenance that is.
        RecordError: a record that is.
    """
    if is_there(model / "state.json"):
        state = read_state(model)
        return Origin(
            config=config,
            dev_rsum=state.best_rsum if state.history else None,
            epochs=state.epoch,
            data=state.data_fingerprint,
            **_of_data(config, state.data_fingerprint),
        )
    run = RunFolder(model.absolute().parent)
    identity = run.identity() if model.name == "best_model" else None
    record = None if identity is None else _record_of(run, config)
    if identity is None or record is None:
        return Origin(config=config)
    data = str(identity.get("data_fingerprint", ""))
    return Origin(
        config=config,
        run=run.name,
        kind=str(identity.get("kind", "")),
        trial=record.name,
        dev_rsum=record.best_rsum if record.history else None,
        test=dict(record.test),
        epochs=record.epochs,
        data=data,
        commit=run.commit,
        versions=run.versions,
        drift=record.drift,
        **_of_data(config, data),
    )


def without_places(plain: Any) -> Any:
    """Plain data in which paths of this machine are cut to their last part."""
    if isinstance(plain, Mapping):
        return {name: without_places(value) for name, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [without_places(value) for value in plain]
    return Path(plain).name if isinstance(plain, str) and os.path.isabs(plain) else plain


def published(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What made the features, without what is nobody's business.

    Photographs that were left out are a number, and a model that is a folder here, which has no
    revision, has the last part of its path.
    """
    plain: dict[str, Any] = without_places(dict(provenance))
    plain["skipped"] = len(plain.get("skipped") or ())
    settings = plain["settings"] = dict(plain["settings"])
    for part in ("detector", "backbone"):
        told = plain.get(part)
        if isinstance(told, Mapping) and not told.get("revision"):
            settings[part] = Path(str(told.get("name"))).name
            plain[part] = dict(told) | {"name": settings[part]}
    return plain


def _record_of(run: RunFolder, config: ExperimentConfig) -> TrialRecord | None:
    """The record of the trial whose model a run has kept: the one that its summary calls best."""
    summary = run.path / "summary.json"
    if not is_there(summary):
        return None
    best = read_object(summary, error=CheckpointError).get("best")
    for record in run.records():
        if record.number == best and _settings(record.experiment) == _settings(config):
            return record
    return None


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """All that tells trials apart; data and encoder may have moved since."""
    return {path: value for path, value in config.flat().items() if path not in _OF_A_MACHINE}


def _of_data(config: ExperimentConfig, fingerprint: str) -> dict[str, Any]:
    """What only the data itself tells, if it is here and still what it was."""
    if config.data.path == "synthetic":
        images = config.data.synthetic.test_images
        return {"gallery": (images, PER_IMAGE * images)}
    folder = Path(config.data.path)
    try:
        if not folder.is_dir() or data_fingerprint(folder) != fingerprint:
            return {}
        test = open_split(folder, "test", num_regions=None, overlaps=False)
        made_by = read_provenance(folder)
    except DataError:
        return {}
    return {"gallery": (test.num_images, test.num_captions), "provenance": made_by}
