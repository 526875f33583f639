"""Zero-shot detectors, read by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpfean.errors import CheckpointError, ConfigError
from cpfean.photographs.model_files import find_model
from cpfean.photographs.zero_shot import ZeroShotDetector

Made = Callable[[str], Path]
VOCABULARY = ("dog", "red kite", "traffic light", "snow")


def detector(
    folder: Path, vocabulary: tuple[str, ...] = VOCABULARY, min_score: float = 0.0
) -> ZeroShotDetector:
    files = find_model(str(folder), what="detector")
    return ZeroShotDetector(files, vocabulary, min_score=min_score, device=torch.device("cpu"))


def library(folder: Path) -> tuple[Any, Any, Any]:
    from transformers import (
        AutoImageProcessor,
        AutoModelForZeroShotObjectDetection,
        AutoTokenizer,
    )

    return (
        AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval(),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
    )


def test_owl_finds_what_the_library_finds(made: Made, photographs: list[np.ndarray]) -> None:
    model, processor, tokenizer = library(made("owlv2"))
    texts = tokenizer(list(VOCABULARY), padding="max_length", max_length=16, return_tensors="pt")
    for photograph in photographs[:2]:
        height, width = photograph.shape[:2]
        with torch.no_grad():
            outputs = model(**texts, **processor(images=[photograph], return_tensors="pt"))
        (expected,) = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[(height, width)]
        )
        (found,) = detector(made("owlv2"))([photograph])
        order = np.argsort(-expected["scores"].numpy(), kind="stable")
        np.testing.assert_allclose(found.scores, expected["scores"].numpy()[order], rtol=1e-4)
        np.testing.assert_array_equal(found.labels, expected["labels"].numpy()[order])
        boxes = expected["boxes"].numpy()[order] / [width, height, width, height]
        np.testing.assert_allclose(found.boxes, boxes.clip(0, 1), atol=1e-4)
        np.testing.assert_allclose(found.embeddings, outputs.class_embeds[0].numpy(), atol=1e-4)


def test_grounding_dino_takes_the_surest_token_of_the_surest_name(
    made: Made, photographs: list[np.ndarray]
) -> None:
    model, processor, tokenizer = library(made("grounding_dino"))
    # Word by word: [CLS] dog . red kite . traffic light . snow . [SEP]
    texts = tokenizer("dog. red kite. traffic light. snow.", return_tensors="pt")
    places = [[1], [3, 4], [6, 7], [9]]
    inputs = processor(images=[photographs[0]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**texts, **inputs)
    (found,) = detector(made("grounding_dino"))([photographs[0]])
    confidences = outputs.logits[0].sigmoid()
    best = [
        max((float(confidences[query, p]), -n) for n, of_name in enumerate(places) for p in of_name)
        for query in range(12)
    ]
    expected = sorted(best, key=lambda pair: -pair[0])
    np.testing.assert_allclose(found.scores, [score for score, _ in expected], rtol=1e-4)
    np.testing.assert_array_equal(found.labels, [-name for _, name in expected])
    centre, size = outputs.pred_boxes[0].numpy()[:, :2], outputs.pred_boxes[0].numpy()[:, 2:]
    corners = np.concatenate((centre - size / 2, centre + size / 2), axis=1).clip(0, 1)
    np.testing.assert_allclose(found.query_boxes, corners, atol=1e-5)


@pytest.mark.parametrize("kind", ["owlv2", "grounding_dino"])
def test_what_is_found_does_not_depend_on_the_company(
    kind: str, made: Made, photographs: list[np.ndarray]
) -> None:
    found_by, with_others = detector(made(kind)), detector(made(kind))
    with_others.together = True  # as on a GPU
    together = with_others(photographs)
    for photograph, of_four in zip(photographs, together, strict=True):
        (alone,) = found_by([photograph])
        np.testing.assert_allclose(of_four.scores, alone.scores, atol=1e-4)
        np.testing.assert_allclose(of_four.boxes, alone.boxes, atol=1e-4)


def test_a_vocabulary_that_is_too_long_for_owl_is_looked_for_in_passes(
    made: Made, photographs: list[np.ndarray]
) -> None:
    letters = "abcdefghij"
    names = tuple(a + b for a in letters for b in letters)  # 100, and 64 fit in a pass
    (found,) = detector(made("owlv2"), names)([photographs[0]])
    (first,) = detector(made("owlv2"), names[:64])([photographs[0]])
    (second,) = detector(made("owlv2"), names[64:])([photographs[0]])
    assert len(found.scores) == len(first.scores) + len(second.scores) == 32
    both = np.concatenate((first.scores, second.scores))
    np.testing.assert_allclose(found.scores, np.sort(both)[::-1], rtol=1e-4)
    labels = np.concatenate((first.labels, second.labels + 64))[np.argsort(-both, kind="stable")]
    np.testing.assert_array_equal(found.labels, labels)


def test_a_vocabulary_that_is_too_long_for_grounding_dino_is_looked_for_in_passes(
    made: Made, photographs: list[np.ndarray]
) -> None:
    # 24 tokens a text, of which two are its ends: seven names of two words and a full stop.
    names = tuple(f"{a} {b}" for a in ("red", "a", "snow") for b in ("dog", "kite", "bear"))
    (found,) = detector(made("grounding_dino"), names)([photographs[0]])
    (first,) = detector(made("grounding_dino"), names[:7])([photographs[0]])
    (second,) = detector(made("grounding_dino"), names[7:])([photographs[0]])
    assert len(found.query_boxes) == 24
    both = np.concatenate((first.scores, second.scores))
    np.testing.assert_allclose(found.scores, np.sort(both)[::-1], rtol=1e-4)
    assert found.queries.max() >= 12
    np.testing.assert_array_equal(found.boxes, found.query_boxes[found.queries])


def test_confidences_are_at_least_the_limit(made: Made, photographs: list[np.ndarray]) -> None:
    everything = detector(made("owlv2"))([photographs[0]])[0].scores
    limit = float(np.median(everything))
    (found,) = detector(made("owlv2"), min_score=limit)([photographs[0]])
    assert 0 < len(found.scores) < len(everything)
    assert found.scores.min() >= limit


@pytest.mark.parametrize("kind", ["owlv2", "grounding_dino"])
def test_a_name_that_is_too_long_is_refused_with_its_line(kind: str, made: Made) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary, line 2: 'dog dog.*write it shorter"):
        detector(made(kind), ("kite", " ".join(["dog"] * 30)))


def test_a_detector_with_classes_of_its_own_is_refused(made: Made) -> None:
    with pytest.raises(CheckpointError, match=r"expected a zero-shot.*'rt_detr_v2'"):
        detector(made("rt_detr_v2"))
