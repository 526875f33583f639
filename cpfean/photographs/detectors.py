"""Object detectors of transformers: where things are in photographs, and what they are called.

Axes:  detection   of a photograph, the most confident first     query   of a detector, all of them
       dim         width of a query's embedding
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

from cpfean.errors import CheckpointError
from cpfean.photographs.model_files import ModelFiles, check_kind
from cpfean.photographs.pretrained import load_image_processor, load_pretrained

_NO_NAME = re.compile(r"label[_ ]?\d+", re.IGNORECASE)  # what transformers calls them without names
_GAPS = frozenset({"n/a", "na", "none", "background", "no object", "no-object", "__background__"})


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What was found in one photograph, with confidence above a limit.

    Attributes:
        boxes: x1, y1, x2, y2 as shares of the upright photograph, within it.
        scores: confidence, falling.
        labels: lines of the detector's `label_names`.
        queries: which query each is from; a query may speak several times, with several labels.
        query_boxes: where every query looked, as shares too.
        embeddings: what every query saw; of width 0 where a detector does not tell.
    """

    boxes: Float64[np.ndarray, "detection 4"]
    scores: Float32[np.ndarray, " detection"]
    labels: Int64[np.ndarray, " detection"]
    queries: Int64[np.ndarray, " detection"]
    query_boxes: Float64[np.ndarray, "query 4"]
    embeddings: Float32[np.ndarray, "query dim"]


class ObjectDetector:
    """A detector with classes of its own: RT-DETR, D-FINE, DETR and their kin.

    Attributes:
        files: of the model.
        model: of transformers.
        label_names: what things are called; None if it knows no names.
        together: whether photographs of one shape go through the model together (`prepared`).

    Raises:
        CheckpointError: another kind of model, or one that cannot be loaded.
    """

    def __init__(self, files: ModelFiles, *, min_score: float, device: torch.device) -> None:
        from transformers import AutoModelForObjectDetection
        from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

        check_kind(files, MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, what="an object detector")
        self.files = files
        self.processor = load_image_processor(files)
        if not hasattr(self.processor, "post_process_object_detection"):
            raise CheckpointError(
                f"{files.folder}: expected the image processor of an object detector, found "
                f"{type(self.processor).__name__}."
            )
        self.model = load_pretrained(files, AutoModelForObjectDetection, device=device)
        self._lines, self.label_names = _vocabulary(self.model.config.id2label)
        self.together = device.type != "cpu"
        self._min_score = min_score

    def __call__(
        self, photographs: Sequence[UInt8[np.ndarray, "_height _width 3"]]
    ) -> list[Detections]:
        """What is in each photograph."""
        found: list[Detections | None] = [None] * len(photographs)
        for places, inputs in prepared(
            self.processor, photographs, device=self.model.device, together=self.together
        ):
            with torch.inference_mode():
                outputs = self.model(**inputs)
            for place, detections in zip(places, self._read(outputs), strict=True):
                found[place] = detections
        return [detections for detections in found if detections is not None]

    def _read(self, outputs: Any) -> Iterator[Detections]:
        logits, boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()
        check_outputs(self.files, logits, boxes)
        states = getattr(outputs, "last_hidden_state", None)
        # A detector with a class token (YOLOS) has its queries last; some hand out none.
        embeddings = boxes[:, :, :0] if states is None else states[:, -boxes.shape[1] :]
        embeddings = embeddings.float().cpu()
        # How logits become confidences and labels is the library's own rule for each detector. It
        # does not tell which query a detection is from, so the queries' numbers go through it in
        # place of their boxes: the same detections in the same order, with boxes of no size.
        num_queries = boxes.shape[1]
        numbers = (torch.arange(num_queries, dtype=boxes.dtype) + 0.5) / num_queries
        stand_ins = torch.zeros_like(boxes)
        stand_ins[:, :, 0] = numbers
        read = self.processor.post_process_object_detection(
            SimpleNamespace(logits=logits, pred_boxes=stand_ins), threshold=self._min_score
        )
        for image, result in enumerate(read):
            queries = (result["boxes"][:, 0] * num_queries).long().numpy()
            labels = result["labels"].numpy()
            # Classes that config.json has no name for are gaps as well.
            lines = np.where(
                labels < len(self._lines), self._lines[labels.clip(max=len(self._lines) - 1)], -1
            )
            yield ordered(
                scores=result["scores"].numpy(),
                labels=lines,
                queries=queries,
                query_boxes=corners(boxes[image].numpy()),
                embeddings=embeddings[image].numpy(),
            )


def ordered(
    *,
    scores: Float32[np.ndarray, " detection"],
    labels: Int64[np.ndarray, " detection"],
    queries: Int64[np.ndarray, " detection"],
    query_boxes: Float64[np.ndarray, "query 4"],
    embeddings: Float32[np.ndarray, "query dim"],
    min_score: float = 0.0,
) -> Detections:
    """Detections by falling confidence, without those whose label is a gap (below 0)."""
    order = np.argsort(-scores, kind="stable")
    order = order[(labels[order] >= 0) & (scores[order] >= min_score)]
    return Detections(
        boxes=query_boxes[queries[order]],
        scores=scores[order],
        labels=labels[order],
        queries=queries[order],
        query_boxes=query_boxes,
        embeddings=embeddings,
    )


def corners(boxes: Float[np.ndarray, "query 4"]) -> Float64[np.ndarray, "query 4"]:
    """x1, y1, x2, y2 within [0, 1] from the middle, width and height, all in shares."""
    exact = boxes.astype(np.float64)
    half = exact[:, 2:].clip(min=0) / 2
    return np.concatenate((exact[:, :2] - half, exact[:, :2] + half), axis=1).clip(0, 1)


def prepared(
    processor: Any,
    photographs: Sequence[UInt8[np.ndarray, "_height _width 3"]],
    *,
    device: torch.device,
    together: bool,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """The model's inputs: for each photograph, or together for those that come out equally large.

    A processor pads photographs of different shapes to the largest of a batch, and what surrounds
    a photograph shows in its features. Here none is padded because of another one.

    On a CPU each goes alone: that takes the memory of one, gives the same bits whatever it came
    with, and is faster for a large detector (in the shape of RT-DETR v2 with ResNet-50 on one core
    of a busy machine, 2.2 s a photograph against 2.8 s in batches of eight). A GPU wants many.

    Yields:
        Positions of the photographs, and their inputs.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, dict[str, Tensor]]]] = {}
    for place, photograph in enumerate(photographs):
        inputs = dict(
            processor(images=[photograph], return_tensors="pt", input_data_format="channels_last")
        )
        inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(inputs.items()))
        key = shape if together else (place,)
        groups.setdefault(key, []).append((place, inputs))
    for group in groups.values():
        stacked = {
            name: torch.cat([inputs[name] for _, inputs in group]).to(device)
            for name in group[0][1]
        }
        yield [place for place, _ in group], stacked


def check_outputs(files: ModelFiles, *outputs: Tensor) -> None:
    """Refuses what is no number: a comparison with it would pass for "nothing was found".

    Raises:
        CheckpointError: names the model.
    """
    if not all(bool(torch.isfinite(each).all()) for each in outputs):
        raise CheckpointError(
            f"{files.name}: its results are not finite (NaN or infinite); are the weights whole?"
        )


def _vocabulary(id2label: dict[int, str]) -> tuple[Int64[np.ndarray, " number"], list[str] | None]:
    """The line of each of the detector's label numbers, -1 of a gap; and the names, line by line.

    DETR's numbers are those of COCO's list with its gaps, called "N/A"; nothing is ever to be
    called so. Numbers with one name share a line.
    """
    names = {int(number): " ".join(str(name).split()) for number, name in id2label.items()}
    most = max(names, default=-1)
    lines = np.full(most + 1, -1, dtype=np.int64)
    if all(_NO_NAME.fullmatch(name) for name in names.values()):
        lines[list(names)] = 0
        return lines, None
    known: dict[str, int] = {}
    for number in sorted(names):
        name = "".join(letter for letter in names[number] if letter.isprintable())
        if name and name.casefold() not in _GAPS:
            lines[number] = known.setdefault(name, len(known))
    return lines, list(known)
