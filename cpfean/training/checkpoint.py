"""Everything that training needs to go on exactly where it stopped, as a folder.

    model.safetensors       weights at that moment, without a frozen text encoder
    optimizer.safetensors   AdamW's moments
    state.json              epoch and step, history, best rSum, the configuration; all plain data
    best/                   the best epoch's model, for `Cpfean.from_pretrained`, and its tokenizer;
                            before the first epoch has ended, the present one
    manifest.json           size and SHA-256 of every other file; written last

A folder without its manifest, or with files that the manifest does not describe, is no checkpoint.
There is no random state: what is drawn in a step depends on the seed, the epoch, the step and the
rank. Nor does it matter how many processes wrote it, or whether they shared the model out: all is
whole, and any number of them reads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpfean.config import ExperimentConfig
from cpfean.data.tokens import CaptionTokenizer
from cpfean.errors import CheckpointError
from cpfean.model.cpfean import Cpfean
from cpfean.training.sharding import like, whole_on_first

logger = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Underway:
    """The part of an epoch that is done.

    Attributes:
        steps: taken.
        loss_sum: over their pairs.
        seconds: that they took.
    """

    steps: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a training run is, as plain data.

    Attributes:
        epoch: finished epochs.
        underway: what is done of the next one.
        best_rsum, best_epoch: of the best epoch so far, by rSum on dev.
        stopped_early: patience has run out.
        history: what each epoch reported, in order.
        config: the experiment.
        data_fingerprint: of the data folder.
    """

    epoch: int
    best_rsum: float
    best_epoch: int
    stopped_early: bool
    history: tuple[dict[str, float], ...]
    config: ExperimentConfig
    data_fingerprint: str
    underway: Underway = Underway()

    @property
    def progress(self) -> tuple[int, int]:
        """Finished epochs, and steps of the next one; grows as training goes on."""
        return self.epoch, self.underway.steps

    @property
    def moment(self) -> str:
        """The same for people."""
        steps = f", step {self.underway.steps} of the next" if self.underway.steps else ""
        return f"epoch {self.epoch}{steps}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A moment of training, to be saved before training goes on.

    Attributes:
        state: where the run is.
        model: for its description.
        weights, best_weights: whole, as `own_state` names them.
        moments: of the optimizer, whole, by parameter and name.
        optimizer_groups: its groups, without the parameters.
        tokenizer: of the captions.
    """

    state: TrainingState
    model: Cpfean
    weights: dict[str, Tensor]
    best_weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    optimizer_groups: list[dict[str, Any]]
    tokenizer: CaptionTokenizer

    def save(self, folder: Path) -> None:
        """Writes the folder, its manifest last.

        Raises:
            CheckpointError: the folder cannot be written, e.g. the disk is full; what was there
                of it is no checkpoint.
        """
        try:
            self._write(folder)
        except Exception as error:
            # safetensors and tokenizers tell of a full disk by errors of their own.
            if not isinstance(error, OSError) and "(os error" not in str(error):
                raise
            raise CheckpointError(
                f"{folder}: the checkpoint of {self.state.moment} cannot be written: {error}."
            ) from error

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MANIFEST).unlink(missing_ok=True)
        save_file(self.weights, folder / "model.safetensors")
        save_file(self.moments, folder / "optimizer.safetensors")
        self.model.save_pretrained(folder / "best", state=self.best_weights or self.weights)
        self.tokenizer.save(folder / "best" / "tokenizer")
        state = self.state
        plain = {
            "format": _FORMAT,
            "epoch": state.epoch,
            "underway": asdict(state.underway),
            "best_rsum": state.best_rsum,
            "best_epoch": state.best_epoch,
            "stopped_early": state.stopped_early,
            "history": list(state.history),
            "config": state.config.to_dict(),
            "data_fingerprint": state.data_fingerprint,
            "optimizer_groups": self.optimizer_groups,
        }
        (folder / "state.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        _write_manifest(folder)


def read_state(folder: Path) -> TrainingState:
    """Reads and verifies a checkpoint, all but the tensors.

    Raises:
        CheckpointError: not a complete, undamaged checkpoint of this release.
    """
    _verify(folder)
    plain = _read_json(folder / "state.json")
    if plain.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {plain.get('format')}, this release reads {_FORMAT}."
        )
    return TrainingState(
        epoch=plain["epoch"],
        underway=Underway(**plain.get("underway", {})),
        best_rsum=plain["best_rsum"],
        best_epoch=plain["best_epoch"],
        stopped_early=plain["stopped_early"],
        history=tuple(plain["history"]),
        config=ExperimentConfig.from_dict(plain["config"]),
        data_fingerprint=plain["data_fingerprint"],
    )


def taken(
    state: TrainingState,
    model: Cpfean,
    optimizer: torch.optim.Optimizer,
    tokenizer: CaptionTokenizer,
    *,
    best_weights: dict[str, Tensor],
) -> Checkpoint:
    """The present moment; every process has to ask for it, the first one gets something to save."""
    plain = optimizer.state_dict()
    return Checkpoint(
        state=state,
        model=model,
        weights=whole_on_first(model.own_state()),
        best_weights=best_weights,
        moments=whole_on_first(
            {
                f"{index}.{name}": tensor.contiguous()
                for index, moments in plain["state"].items()
                for name, tensor in moments.items()
            }
        ),
        optimizer_groups=plain["param_groups"],
        tokenizer=tokenizer,
    )


def restore_weights(folder: Path, model: Cpfean) -> dict[str, Tensor]:
    """Loads the weights into a model that is not sharded yet; returns the best epoch's weights.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    model.load_own_state(load_file(folder / "model.safetensors"), source=str(folder))
    return load_file(folder / "best" / "model.safetensors")


def restore_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the moments, those of sharded parameters in shares.

    Raises:
        CheckpointError: damaged.
    """
    groups = _read_json(folder / "state.json")["optimizer_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        # The number of steps is one number for a parameter, and never sharded.
        same_shape = tensor.shape == parameters[int(index)].shape
        moments.setdefault(int(index), {})[name] = (
            like(tensor, parameters[int(index)]) if same_shape else tensor
        )
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def newest_valid(folders: Iterable[Path]) -> Path | None:
    """Of several checkpoints the latest moment that is complete; damaged ones are logged."""
    valid = []
    for folder in folders:
        try:
            valid.append((read_state(folder).progress, folder))
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return max(valid)[1] if valid else None


def check_same_run(state: TrainingState, config: ExperimentConfig, data_fingerprint: str) -> None:
    """Refuses to continue another experiment; number of epochs, paths and sharding may differ.

    Whether a text encoder that is a folder holds what it held is for the caller to know.

    Raises:
        CheckpointError: names what differs.
    """
    before, now = state.config.flat(), config.flat()
    free = {"optim.epochs", "optim.sharding", "data.path"}
    encoders = (state.config.model.text.encoder, config.model.text.encoder)
    if all(Path(encoder).is_absolute() for encoder in encoders):
        free.add("model.text.encoder")
    differing = [path for path in now if path not in free and before.get(path) != now[path]]
    if differing:
        listed = ", ".join(f"{p} was {before.get(p)!r}, is {now[p]!r}" for p in differing[:5])
        raise CheckpointError(f"the checkpoint is of another configuration: {listed}.")
    if state.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"the checkpoint was trained on data with fingerprint {state.data_fingerprint}, "
            f"{config.data.path} has {data_fingerprint}."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    described = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        described[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": _sha256(path),
        }
    partial = folder / f"{_MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "files": described}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _MANIFEST)


def _verify(folder: Path) -> None:
    if not (folder / _MANIFEST).is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint, it has no {_MANIFEST}.")
    described = _read_json(folder / _MANIFEST).get("files")
    if not isinstance(described, dict) or "state.json" not in described:
        raise CheckpointError(f"{folder / _MANIFEST}: not a checkpoint's manifest.")
    for name, expected in described.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint.")
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: damaged, it is not what was written.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return plain
