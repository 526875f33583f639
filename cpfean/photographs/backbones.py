"""Vision backbones of transformers: a photograph to a map of features.

Axes:  row, column   cells of the map     feature   of a cell

The whole photograph is seen. Image processors of classifiers cut out the middle, and boxes at the
border would stand for nothing; here it is only resized, so that a box in shares of the photograph
is the same box in shares of the map. Its shape is kept: the number of pixels is that of the square
that the model was trained on, and both sides are whole numbers of patches, by which the shape is
off by half a patch at most.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Tensor

from cpfean.errors import CheckpointError
from cpfean.photographs.detectors import check_outputs
from cpfean.photographs.model_files import ModelFiles
from cpfean.photographs.pretrained import load_config, load_image_processor, load_pretrained

# What makes one vector of a whole photograph; nobody here asks for it.
_HEADS = r"(^|\.)(pooler|head)\."
_SMALLEST_MAP = 2  # cells along the shorter side; a narrow photograph gets more pixels than others


class Backbone:
    """A vision model without its head.

    Attributes:
        files: of the model.
        model: of transformers.
        feature_dim: width of a cell's vector.
        stride: pixels a cell, each way.
        resolution: side in pixels of the square with as many pixels as a photograph is given.
        together: whether photographs of one shape go through the model together, as on a GPU.

    Raises:
        CheckpointError: a model of another kind, or one that cannot be loaded.
    """

    def __init__(
        self, files: ModelFiles, *, device: torch.device, resolution: int | None = None
    ) -> None:
        from transformers import AutoModel

        self.files = files
        config = load_config(files)
        # CLIP and SigLIP are two models in one; the half that sees is wanted.
        config = getattr(config, "vision_config", config)
        _check_sees(config, source=str(files.folder))
        self.stride = _stride(config, source=str(files.folder))
        self._processor = load_image_processor(files)
        self.model = load_pretrained(
            files, AutoModel, device=device, may_lack=_HEADS, config=config
        )
        accepted = inspect.signature(self.model.forward).parameters
        self._takes_patches = "spatial_shapes" in accepted
        self.together = device.type != "cpu"
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        )
        self.resolution = resolution or _resolution(
            self._processor, self.model.config, stride=self.stride
        )
        blank = np.zeros((self.resolution, self.resolution, 3), dtype=np.uint8)
        (probe,) = self([blank])
        self.feature_dim = int(probe.shape[-1])

    def __call__(
        self, photographs: Sequence[UInt8[np.ndarray, "_height _width 3"]]
    ) -> list[Float[Tensor, "_row _column feature"]]:
        """The feature map of each photograph, on the model's device.

        Raises:
            CheckpointError: the model gives something else than a map.
        """
        groups: dict[tuple[tuple[int, int], int], list[int]] = {}
        for place, photograph in enumerate(photographs):
            key = self._size(photograph), 0 if self.together else place
            groups.setdefault(key, []).append(place)
        maps: dict[int, Tensor] = {}
        for (size, _), places in groups.items():
            pixels = np.stack([self._pixels(photographs[place], size) for place in places])
            inputs = torch.from_numpy(pixels).to(self.model.device)
            with torch.inference_mode():
                outputs = self.model(**self._inputs(inputs), **self._options)
            together = self._as_map(outputs.last_hidden_state, size)
            check_outputs(self.files, together)
            maps.update(zip(places, together, strict=True))
        return [maps[place] for place in range(len(photographs))]

    def _size(self, photograph: UInt8[np.ndarray, "height width 3"]) -> tuple[int, int]:
        """Height and width that a photograph is resized to."""
        height, width = photograph.shape[:2]
        shape = math.sqrt(height / width)
        cells = self.resolution / self.stride
        rows = max(_SMALLEST_MAP, round(cells * shape))
        columns = max(_SMALLEST_MAP, round(cells / shape))
        return rows * self.stride, columns * self.stride

    def _pixels(
        self, photograph: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
    ) -> Float32[np.ndarray, "3 row column"]:
        """Resized, and in the range that the model was trained on, by its image processor."""
        processor = self._processor
        resample = getattr(processor, "resample", None)
        image = Image.fromarray(photograph).resize(
            (size[1], size[0]), Image.Resampling.BICUBIC if resample is None else resample
        )
        pixels: np.ndarray = np.asarray(image, dtype=np.float32)
        if getattr(processor, "do_rescale", True):
            pixels = pixels * np.float32(processor.rescale_factor)
        if getattr(processor, "do_normalize", True):
            mean = np.array(processor.image_mean, dtype=np.float32)
            pixels = (pixels - mean) / np.array(processor.image_std, dtype=np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _inputs(self, pixels: Float32[Tensor, "image 3 row column"]) -> dict[str, Tensor]:
        """The photographs themselves, or their patches for a model without a shape (NaFlex)."""
        if not self._takes_patches:
            return {"pixel_values": pixels}
        images, _, height, width = pixels.shape
        rows, columns = height // self.stride, width // self.stride
        patches = pixels.unflatten(2, (rows, self.stride)).unflatten(4, (columns, self.stride))
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(images, rows * columns, -1)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": patches.new_ones(patches.shape[:2], dtype=torch.int64),
            "spatial_shapes": torch.tensor([[rows, columns]] * images, device=pixels.device),
        }

    def _as_map(
        self, states: Tensor, size: tuple[int, int]
    ) -> Float[Tensor, "image row column feature"]:
        rows, columns = size[0] // self.stride, size[1] // self.stride
        if states.ndim == 4 and states.shape[2:] == (rows, columns):
            return states.permute(0, 2, 3, 1)
        # The class token and registers come first, patches after them, row by row.
        others = states.shape[1] - rows * columns if states.ndim == 3 else -1
        if not 0 <= others <= 1 + int(getattr(self.model.config, "num_register_tokens", 0) or 0):
            raise CheckpointError(
                f"{self.files.folder}: expected a map of {rows} x {columns} cells of "
                f"{size[0]} x {size[1]} pixels, found {list(states.shape[1:])}; this kind of "
                f"backbone ({self.files.kind}) is not supported."
            )
        return states[:, others:].unflatten(1, (rows, columns))


def _check_sees(config: Any, *, source: str) -> None:
    """Refuses what takes something else than photographs, before its weights are looked for."""
    from transformers import MODEL_MAPPING

    architecture = MODEL_MAPPING.get(type(config), None)
    if getattr(architecture, "main_input_name", None) != "pixel_values":
        raise CheckpointError(
            f"{source}: expected a vision backbone (DINOv2, SigLIP, ViT, ConvNeXt), found the "
            f"model_type {config.model_type!r}."
        )


def _stride(config: Any, *, source: str) -> int:
    """Pixels a cell: of a convolutional network each stage halves what the one before left."""
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) and len(set(patch)) == 1 else patch
    if not isinstance(patch, int) or patch < 1:
        raise CheckpointError(
            f"{source}: expected a vision backbone with a patch_size (DINOv2, SigLIP, ViT, "
            f"ConvNeXt), found {config.model_type!r} with {patch!r}."
        )
    stages = getattr(config, "depths", None)
    return patch * 2 ** (len(stages) - 1) if stages else patch


def _resolution(processor: Any, config: Any, *, stride: int) -> int:
    """Side of the square that the image processor would make of every square photograph."""
    most = getattr(processor, "max_num_patches", None)
    if most:
        return math.isqrt(most) * stride
    for name in ("crop_size", "size"):
        if name == "crop_size" and not getattr(processor, "do_center_crop", False):
            continue
        size = dict(getattr(processor, name, None) or {})
        sides = [size[key] for key in ("height", "width", "shortest_edge") if size.get(key)]
        if sides:
            return int(min(sides))
    side = getattr(config, "image_size", None)
    return int(side if isinstance(side, int) else min(side) if side else 224)
