"""Detectors that look for what they are told to: OWL-ViT, OWLv2, Grounding DINO.

Axes:  query   of one pass over a photograph     name   of the vocabulary     token   of a text
       dim     width of a query's embedding

A vocabulary that is too long for one pass is looked for in several. Each pass has queries of its
own; of a query the best of the pass's names counts, and what several passes find in one place is
left to the suppression that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cpfean.errors import ConfigError
from cpfean.photographs.detectors import (
    Detections,
    check_outputs,
    corners,
    ordered,
    prepared,
)
from cpfean.photographs.model_files import ModelFiles, check_kind
from cpfean.photographs.pretrained import load_image_processor, load_pretrained, load_tokenizer

_OWL = ("owlv2", "owlvit")
_GROUNDING = ("grounding-dino", "mm-grounding-dino")
KINDS = (*_OWL, *_GROUNDING)
_NAMES_A_PASS = 64  # of OWL: each is a text of its own for the text encoder, for each photograph


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A part of the vocabulary that is looked for together.

    Attributes:
        texts: inputs of the model, with a first axis to be repeated for each photograph.
        first: number of its first name in the vocabulary.
        tokens: of each name, where its tokens are in the text; None where a name is a text.
    """

    texts: dict[str, Tensor]
    first: int
    tokens: list[list[int]] | None


class ZeroShotDetector:
    """A detector that has read what to look for.

    Attributes:
        files: of the model.
        model: of transformers.
        label_names: the vocabulary.
        together: whether photographs of one shape go through the model together (`prepared`).

    Raises:
        CheckpointError: another kind of model, or one that cannot be loaded.
        ConfigError: a name of the vocabulary that is too long for it.
    """

    label_names: list[str]

    def __init__(
        self,
        files: ModelFiles,
        vocabulary: Sequence[str],
        *,
        min_score: float,
        device: torch.device,
    ) -> None:
        from transformers import AutoModelForZeroShotObjectDetection

        check_kind(files, KINDS, what="a zero-shot object detector (OWLv2, Grounding DINO)")
        self.files = files
        self.label_names = list(vocabulary)
        self.processor = load_image_processor(files)
        tokenizer = load_tokenizer(files)
        self.model = load_pretrained(files, AutoModelForZeroShotObjectDetection, device=device)
        self.together = device.type != "cpu"
        self._min_score = min_score
        self._is_owl = files.kind in _OWL
        passes = _passes_of_owl if self._is_owl else _passes_of_grounding
        self._passes = list(passes(self.label_names, tokenizer, self.model.config))

    def __call__(
        self, photographs: Sequence[UInt8[np.ndarray, "_height _width 3"]]
    ) -> list[Detections]:
        """What of the vocabulary is in each photograph."""
        found: list[list[Detections]] = [[] for _ in photographs]
        for places, inputs in prepared(
            self.processor, photographs, device=self.model.device, together=self.together
        ):
            for each in self._passes:
                texts = {
                    name: value.repeat(len(places), *[1] * (value.ndim - 1)).to(self.model.device)
                    for name, value in each.texts.items()
                }
                with torch.inference_mode():
                    outputs = self.model(**inputs, **texts)
                scores, labels = self._judged(outputs, each)
                boxes = outputs.pred_boxes.float().cpu()
                check_outputs(self.files, scores, boxes)
                embeddings = self._embeddings(outputs)
                for row, place in enumerate(places):
                    found[place].append(
                        ordered(
                            scores=scores[row].numpy(),
                            labels=(labels[row] + each.first).numpy(),
                            queries=np.arange(boxes.shape[1]),
                            query_boxes=self._in_shares(boxes[row], photographs[place]),
                            embeddings=embeddings[row].numpy(),
                            min_score=self._min_score,
                        )
                    )
        return [_together(of_passes) for of_passes in found]

    def _judged(self, outputs: Any, each: Pass) -> tuple[Tensor, Tensor]:
        """Confidence and name, within the pass, of every query: "image query" each."""
        logits = outputs.logits.float().cpu()
        if each.tokens is not None:
            # A name is as sure as the surest of its tokens.
            logits = torch.stack(
                [logits[:, :, places].amax(dim=-1) for places in each.tokens], dim=-1
            )
        best = logits.max(dim=-1)
        return best.values.sigmoid(), best.indices

    def _embeddings(self, outputs: Any) -> Float[Tensor, "image query dim"]:
        """What each query saw: OWL's class embeddings, Grounding DINO's last decoder layer."""
        states = outputs.class_embeds if self._is_owl else outputs.last_hidden_state
        return states.float().cpu()

    def _in_shares(
        self, boxes: Float[Tensor, "query 4"], photograph: UInt8[np.ndarray, "height width 3"]
    ) -> np.ndarray:
        """OWLv2 pads a photograph to a square, below or at its right; boxes are shares of that."""
        shares = boxes.numpy().astype(np.float64)
        if self.files.kind == "owlv2":
            height, width = photograph.shape[:2]
            side = max(height, width)
            shares = shares * np.array([side / width, side / height] * 2)
        return corners(shares)


def _passes_of_owl(names: list[str], tokenizer: Any, config: Any) -> Iterator[Pass]:
    most = config.text_config.max_position_embeddings
    for first in range(0, len(names), _NAMES_A_PASS):
        some = names[first : first + _NAMES_A_PASS]
        for number, ids in enumerate(tokenizer(some)["input_ids"], start=first):
            _check_length(names[number], number, len(ids), most)
        texts = tokenizer(some, padding="max_length", max_length=most, return_tensors="pt")
        kept = {name: texts[name] for name in ("input_ids", "attention_mask")}
        yield Pass(texts=kept, first=first, tokens=None)


def _passes_of_grounding(names: list[str], tokenizer: Any, config: Any) -> Iterator[Pass]:
    """Names in one text, each with a full stop behind it, as many as there is room for."""
    most = config.max_text_len
    lengths = [
        len(tokenizer(f"{name.lower()}.", add_special_tokens=False)["input_ids"]) for name in names
    ]
    first = 0
    while first < len(names):
        last, length = first, 2  # the two at the ends
        while last < len(names) and length + lengths[last] <= most:
            length += lengths[last]
            last += 1
        if last == first:
            _check_length(names[first], first, 2 + lengths[first], most)
        yield _pass_of_grounding(names, first, last, tokenizer)
        first = last


def _pass_of_grounding(names: list[str], first: int, last: int, tokenizer: Any) -> Pass:
    text, spans = "", []
    for name in names[first:last]:
        start = len(text)
        text += f"{name.lower()}. "
        spans.append((start, start + len(name.lower())))
    texts = tokenizer(text.rstrip(), return_tensors="pt", return_offsets_mapping=True)
    offsets = texts["offset_mapping"][0].tolist()
    tokens = [
        [place for place, (begin, end) in enumerate(offsets) if start <= begin < end <= stop]
        for start, stop in spans
    ]
    for name, places in zip(names[first:last], tokens, strict=True):
        if not places:
            raise ConfigError(f"the vocabulary's {name!r} is nothing to the detector's tokenizer.")
    kept = ("input_ids", "token_type_ids", "attention_mask")
    return Pass(
        texts={name: texts[name] for name in kept if name in texts}, first=first, tokens=tokens
    )


def _check_length(name: str, number: int, length: int, most: int) -> None:
    if length > most:
        raise ConfigError(
            f"vocabulary, line {number + 1}: {name!r} is {length} word pieces long, and the "
            f"detector reads {most}; write it shorter."
        )


def _together(passes: list[Detections]) -> Detections:
    """What all passes found, their queries one behind the other."""
    if len(passes) == 1:
        return passes[0]
    offsets = np.cumsum([0, *(len(each.query_boxes) for each in passes[:-1])])
    return ordered(
        scores=np.concatenate([each.scores for each in passes]),
        labels=np.concatenate([each.labels for each in passes]),
        queries=np.concatenate(
            [each.queries + offset for each, offset in zip(passes, offsets, strict=True)]
        ),
        query_boxes=np.concatenate([each.query_boxes for each in passes]),
        embeddings=np.concatenate([each.embeddings for each in passes]),
    )


__all__ = ["KINDS", "ZeroShotDetector"]
