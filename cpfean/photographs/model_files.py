"""Pretrained vision models as folders: found, and looked at before anything is loaded.

Weights come from safetensors and nothing else, and no code that lies beside them is run.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cpfean.errors import CheckpointError, message_of
from cpfean.files import is_there, open_file
from cpfean.folders import expanded
from cpfean.json_files import read_object

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_OF_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)
_FETCHED = (CONFIG, *PROCESSORS, _WEIGHTS, _INDEX, "model-*-of-*.safetensors", *_OF_TOKENIZER)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model whose files are on this machine.

    Attributes:
        name: as it was given.
        folder: where the files are.
        revision: the hub's commit; None of a local folder.
        config: what config.json holds.
        weights: the files of the weights.
    """

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """The architecture's name: "rt_detr_v2"."""
        return str(self.config["model_type"])

    @functools.cached_property
    def sha256(self) -> str:
        """Of the weights; of several files, of their names and hashes."""
        return _digest(self.weights)

    @functools.cached_property
    def settings_sha256(self) -> str:
        """Of the other files that are read: configuration, image processor, tokenizer."""
        names = (CONFIG, *PROCESSORS, *_OF_TOKENIZER)
        return _digest([self.folder / name for name in names if (self.folder / name).is_file()])

    def provenance(self, model: nn.Module) -> dict[str, Any]:
        """What tells this model from others, in plain JSON types."""
        return {
            "name": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "settings_sha256": self.settings_sha256,
            "class": type(model).__name__,
        }


def find_model(name: str, *, what: str) -> ModelFiles:
    """Finds a model's files and looks at them, but not at the weights' numbers.

    Args:
        name: a folder; or a hub name, with @REVISION if another than the newest is meant. That is
            fetched if it is not here; with HF_HUB_OFFLINE=1 it has to be.
        what: what it is to be, for messages: "detector".

    Raises:
        CheckpointError: nothing of that name, or files that cannot be used.
    """
    folder = expanded(name, what=what)
    revision = None
    if folder.is_dir():
        # Absolute, so that a name that is also one on the hub is never looked up there.
        folder = folder.absolute()
    elif is_there(folder):
        raise CheckpointError(f"{what} {name!r}: expected a folder, found a file.")
    else:
        folder, revision = _fetched(name, what=what)
    config = read_object(folder / CONFIG, error=CheckpointError)
    source = folder / CONFIG
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{source}: expected the model_type of a model of transformers, found "
            f"{config.get('model_type')!r}."
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: quantized weights are not read; fetch the plain model.")
    if is_there(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: expected a whole {what}, found an adapter to one; "
            "merge them and save the result."
        )
    return ModelFiles(
        name=name,
        folder=folder,
        revision=revision,
        config=config,
        weights=_weights(folder, what=what),
    )


def check_kind(files: ModelFiles, kinds: Collection[str], *, what: str, instead: str = "") -> None:
    """Refuses an architecture that is none of `kinds`.

    Args:
        what: what was expected, with its article: "an object detector".
        instead: what to do.

    Raises:
        CheckpointError: says what was found.
    """
    if files.kind in kinds:
        return
    own = ", which needs code of its own that is not run" if files.config.get("auto_map") else ""
    raise CheckpointError(
        f"{files.folder / CONFIG}: expected {what} that transformers knows, found the model_type "
        f"{files.kind!r}{own}{instead and f'; {instead}'}."
    )


def _fetched(name: str, *, what: str) -> tuple[Path, str]:
    """Folder and commit of a name on the hub."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    repo, _, revision = name.partition("@")
    if looks_local or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{what} {name!r}: no such folder; check the path.")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        folder = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=list(_FETCHED),
            local_files_only=offline,
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise CheckpointError(
            f"{what} {name!r}: no such folder, and no such model in the hub's cache, while {why}; "
            "give a folder, or fetch it where there is a network: hf download "
            f"{repo}{f' --revision {revision}' if revision else ''}"
        ) from None
    except Exception as error:  # the hub's refusals, the network's, the disk's
        raise CheckpointError(f"{what} {name!r}: cannot be fetched: {message_of(error)}") from None
    return Path(folder), Path(folder).name


def _weights(folder: Path, *, what: str) -> tuple[Path, ...]:
    if is_there(folder / _WEIGHTS):
        return (_a_file(folder / _WEIGHTS),)
    if is_there(folder / _INDEX):
        listed = read_object(folder / _INDEX, error=CheckpointError).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{folder / _INDEX}: expected a weight_map, found none.")
        names = set(listed.values())
        for name in names:
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise CheckpointError(
                    f"{folder / _INDEX}: expected names like model-00001-of-00002.safetensors, "
                    f"found {name!r}."
                )
        return tuple(_a_file(folder / name) for name in sorted(names))
    other = next((name for name in _OTHER_WEIGHTS if is_there(folder / name)), None)
    if other:
        raise CheckpointError(
            f"{folder}: expected {_WEIGHTS}, found {other}, which can hold more than numbers and "
            "is not read; where you trust it, load it with transformers and save it by "
            "save_pretrained."
        )
    raise CheckpointError(f"{folder}: expected a {what} with {_WEIGHTS}, found none.")


def _a_file(path: Path) -> Path:
    try:
        open_file(path).close()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return path


def _digest(paths: Collection[Path]) -> str:
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    listed = "".join(f"{name} {digest}\n" for name, digest in sorted(digests))
    return hashlib.sha256(listed.encode()).hexdigest()
