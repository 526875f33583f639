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
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpfean.config import ExperimentConfig
from cpfean.data.tokens import CaptionTokenizer
from cpfean.errors import CheckpointError, ConfigError
from cpfean.files import is_there, open_file
from cpfean.json_files import read_object
from cpfean.model.cpfean import Cpfean
from cpfean.model.weights import Spec, check_finite, read_header, specs
from cpfean.training.precision import LossScale
from cpfean.training.sharding import like, whole_on_first

logger = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST = "manifest.json"
_NEEDED = {
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "best/config.json",
    "best/model.safetensors",
}
_LARGEST_STATE = 2**28  # bytes: its history grows by a few hundred with every epoch
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's


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
        loss_scale: of the newest step, and the precision in which that was computed.
    """

    epoch: int
    best_rsum: float
    best_epoch: int
    stopped_early: bool
    history: tuple[dict[str, float], ...]
    config: ExperimentConfig
    data_fingerprint: str
    underway: Underway = Underway()
    loss_scale: LossScale = field(default_factory=LossScale)

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
            "loss_scale": asdict(state.loss_scale),
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
    source = folder / "state.json"
    plain = read_object(source, error=CheckpointError, limit=_LARGEST_STATE)
    if plain.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {plain.get('format')!r:.60}, this release reads "
            f"{_FORMAT}."
        )
    try:
        underway = Underway(**plain.get("underway", {}))
        state = TrainingState(
            epoch=plain["epoch"],
            underway=underway,
            best_rsum=plain["best_rsum"],
            best_epoch=plain["best_epoch"],
            stopped_early=plain["stopped_early"],
            history=tuple(plain["history"]),
            config=ExperimentConfig.from_dict(plain["config"]),
            data_fingerprint=plain["data_fingerprint"],
            loss_scale=LossScale(**plain.get("loss_scale", {})),
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{source}: not a checkpoint's state: {reason}") from None
    _check_state(state, source)
    return state


def _check_state(state: TrainingState, source: Path) -> None:
    """Refuses what no training has written."""
    underway = state.underway
    counts = {"epoch": state.epoch, "best_epoch": state.best_epoch, "steps": underway.steps}
    numbers = {
        "best_rsum": state.best_rsum,
        "loss_sum": underway.loss_sum,
        "seconds": underway.seconds,
    }
    wrong = [
        name
        for name, value in counts.items()
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31
    ]
    wrong += [name for name, value in numbers.items() if not _is_number(value)]
    if not isinstance(state.stopped_early, bool):
        wrong.append("stopped_early")
    if not isinstance(state.data_fingerprint, str):
        wrong.append("data_fingerprint")
    if not all(
        isinstance(epoch, dict) and all(_is_number(value) for value in epoch.values())
        for epoch in state.history
    ):
        wrong.append("history")
    if not wrong and (state.best_epoch > state.epoch or len(state.history) > state.epoch):
        wrong.append("the number of epochs")
    if wrong:
        raise CheckpointError(
            f"{source}: not a checkpoint's state: {', '.join(wrong)} cannot be so."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    weights = model.read_own_state(folder / "model.safetensors")
    best_weights = model.read_own_state(folder / "best" / "model.safetensors")
    model.load_own_state(weights, source=str(folder))
    return best_weights


def restore_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the moments, those of sharded parameters in shares.

    Raises:
        CheckpointError: damaged, or of another optimizer.
    """
    source = folder / "state.json"
    groups = read_object(source, error=CheckpointError, limit=_LARGEST_STATE).get(
        "optimizer_groups"
    )
    own = json.loads(json.dumps(optimizer.state_dict()["param_groups"], default=str))
    if not _same_groups(groups, own):
        raise CheckpointError(f"{source}: optimizer_groups are not those of this model.")
    path = folder / "optimizer.safetensors"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own_specs = specs({str(index): parameter for index, parameter in enumerate(parameters)})
    for key, spec in read_header(path, error=CheckpointError).items():
        index, _, name = key.partition(".")
        fits = {"step": Spec("F32", ())}.get(name, own_specs.get(index))
        if index not in own_specs or name not in _MOMENTS or spec != fits:
            raise CheckpointError(f"{path}: moments of another model: {key} is {spec}.")
    check_finite(path, error=CheckpointError)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        # The number of steps is one number for a parameter, and never sharded.
        same_shape = tensor.shape == parameters[int(index)].shape
        moments.setdefault(int(index), {})[name] = (
            like(tensor, parameters[int(index)]) if same_shape else tensor
        )
    if any(names.keys() != _MOMENTS for names in moments.values()):
        raise CheckpointError(f"{path}: moments are missing.")
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _same_groups(found: Any, own: list[dict[str, Any]]) -> bool:
    """Whether an optimizer's groups are those of another, as far as both releases know of them.

    The learning rate is that of the epoch.
    """
    if not isinstance(found, list) or len(found) != len(own):
        return False
    return all(
        isinstance(group, dict)
        and {"params", "initial_lr"} <= group.keys()
        and all(group[k] == mine[k] for k in group.keys() & mine.keys() - {"lr"})
        for group, mine in zip(found, own, strict=True)
    )


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


def _write_manifest(folder: Path) -> None:
    described = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        described[path.relative_to(folder).as_posix()] = _described(path)
    partial = folder / f"{_MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "files": described}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _MANIFEST)


def _verify(folder: Path) -> None:
    if not (folder / _MANIFEST).is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint, it has no {_MANIFEST}.")
    manifest = folder / _MANIFEST
    described = read_object(manifest, error=CheckpointError).get("files")
    if not isinstance(described, dict) or not described.keys() >= _NEEDED:
        raise CheckpointError(f"{manifest}: not a checkpoint's manifest.")
    for name, expected in described.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{manifest}: {name!r} is outside the checkpoint.")
        path = folder / name
        if not is_there(path):
            raise CheckpointError(f"{path}: missing from the checkpoint.")
        if not isinstance(expected, dict) or _described(path) != expected:
            raise CheckpointError(f"{path}: damaged, it is not what was written.")


def _described(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a regular file."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            return {"size": size, "sha256": digest.hexdigest()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from None
