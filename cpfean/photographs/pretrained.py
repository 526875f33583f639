"""Pretrained vision models, loaded: what `transformers` would make up with a warning is refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from cpfean.errors import CheckpointError, message_of
from cpfean.files import is_there
from cpfean.photographs.model_files import CONFIG, PROCESSORS, ModelFiles, check_kind

_LARGEST_SIDE = 4096  # pixels, of what a model is given


def load_config(files: ModelFiles) -> Any:
    """The configuration, as an object of transformers.

    Raises:
        CheckpointError: an architecture that transformers does not know, or settings it refuses.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    check_kind(files, set(CONFIG_MAPPING), what="a model")
    try:
        with _quiet():
            return AutoConfig.from_pretrained(
                files.folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever the library trips over in a stranger's settings
        raise CheckpointError(
            f"{files.folder / CONFIG}: no configuration of a {files.kind}: {message_of(error)}"
        ) from None


def load_pretrained(
    files: ModelFiles, auto: Any, *, device: torch.device, may_lack: str = "", **options: Any
) -> Any:
    """The model, float32, for inference only.

    Args:
        auto: an auto class of transformers.
        may_lack: a pattern of names of weights that are not asked for.
        options: handed to its `from_pretrained`.

    Raises:
        CheckpointError: weights that are missing, damaged, not finite or of another model, or a
            package that is not installed.
    """
    try:
        with _quiet():
            model, info = auto.from_pretrained(
                files.folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except ImportError as error:
        hint = ""
        if "timm" in str(error).lower():
            hint = (
                " Or take a release without it: of DETR's those are under the revision no_timm "
                "(NAME@no_timm)."
            )
        raise CheckpointError(
            f"{files.name}: needs a package that is not here: {message_of(error)}{hint}"
        ) from None
    except Exception as error:  # whatever the library trips over in a stranger's files
        raise CheckpointError(
            f"{files.folder}: cannot be loaded: {message_of(error)} Fetch it again, or name "
            "another."
        ) from None
    missing = sorted(
        key for key in info["missing_keys"] if not (may_lack and re.search(may_lack, key))
    )
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{files.folder}: the weights lack {', '.join(missing[:3])}{more}; weights are not "
            "made up: fetch the whole model, or the config.json that belongs to it."
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{files.folder}: {name} has numbers that are not finite (NaN or infinite)."
            )
    return model.to(device).eval().requires_grad_(False)


def load_image_processor(files: ModelFiles) -> Any:
    """The image processor that belongs to a model, in the form that works on Pillow images.

    Always that one, also where torchvision is installed: the two resize differently, and the same
    photograph has to give the same regions on every machine.

    Raises:
        CheckpointError: there is none, or one that cannot be used.
    """
    from transformers import AutoImageProcessor

    if not any(is_there(files.folder / name) for name in PROCESSORS):
        raise CheckpointError(
            f"{files.folder}: expected {PROCESSORS[0]}, found none; without it nobody knows the "
            "size and the range of pixels that the model was trained on: fetch it from where the "
            "weights are from."
        )
    try:
        with _quiet():
            processor = AutoImageProcessor.from_pretrained(
                files.folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
        sizes = [dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size")]
    except Exception as error:  # whatever the library trips over in a stranger's files
        raise CheckpointError(
            f"{files.folder / PROCESSORS[0]}: no image processor: {message_of(error)}"
        ) from None
    for side in (side for size in sizes for side in size.values() if side is not None):
        if not isinstance(side, int) or not 1 <= side <= _LARGEST_SIDE:
            raise CheckpointError(
                f"{files.folder / PROCESSORS[0]}: expected sizes from 1 to {_LARGEST_SIDE:,} "
                f"pixels, found {side!r}."
            )
    return processor


def load_tokenizer(files: ModelFiles) -> Any:
    """The tokenizer of a model that reads text.

    Raises:
        CheckpointError: there is none, or one that cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                files.folder, use_fast=True, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever the library trips over in a stranger's files
        raise CheckpointError(f"{files.folder}: no tokenizer: {message_of(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings and bars: what it would warn of is judged here."""
    from transformers.utils import logging as library

    library.disable_progress_bar()
    before = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(before)
