"""Evaluation against the plain one: the whole score matrix at once, and lists sorted by hand.

The same on several processes: test_distributed.py.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from cpfean import progress
from cpfean.config import ExperimentConfig, Products
from cpfean.data.caption_groups import CaptionGroups
from cpfean.data.dataset import RetrievalDataset
from cpfean.errors import DataError, DivergedError
from cpfean.model.cpfean import Cpfean
from cpfean.training import evaluation
from cpfean.training.evaluation import (
    Kept,
    Member,
    check_protocol,
    evaluate,
    evaluate_together,
    length_groups,
)
from cpfean.training.setup import open_experiment
from tests.metrics.naive import naive_recalls

CPU = torch.device("cpu")
FOLD = 4
UNEVEN = (4, 7, 6, 5, 1, 10, 2, 3, 12, 1, 1, 4, 6, 7, 5, 6)  # captions of the 16 images
PROTOCOLS: tuple[Literal["full", "coco-1k"], ...] = ("full", "coco-1k")


def model_and_split(
    config: ExperimentConfig,
    folder: Path,
    cache: Path,
    *,
    ties: bool = False,
    sizes: Sequence[int] = (5,) * 16,
) -> tuple[Cpfean, RetrievalDataset]:
    """An untrained model and the 16 images of "train", some of their regions missing.

    Args:
        ties: round the scores, so that many are equal.
        sizes: captions of each image, of the 80 there are.
    """
    experiment = open_experiment(config, data_folder=folder, cache_dir=cache, device=CPU)
    model = experiment.model.double().eval()
    if ties:
        exact = model.score

        def rounded(*embeddings: Any) -> Tensor:
            return (exact(*embeddings) * 32).round() / 32

        model.score = rounded  # type: ignore[method-assign]
    split = experiment.train.split
    counts = np.random.default_rng(0).integers(1, 9, split.num_images)
    split = replace(
        split,
        regions=replace(split.regions, counts=counts),
        groups=CaptionGroups.of_sizes(sizes),
    )
    return model, RetrievalDataset(split, experiment.train.tokens, experiment.tokenizer)


class Watched:
    """A model of which each call that embeds or scores is seen before it is made."""

    def __init__(self, model: Cpfean, seen: Callable[[str, Any, Any], None]) -> None:
        self._model = model
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if name not in ("encode_images", "encode_captions", "score"):
            return value

        def call(*given: Any, **fields: Any) -> Any:
            self._seen(name, given, fields)
            return value(*given, **fields)

        return call


def plain_scores(model: Cpfean, dataset: RetrievalDataset) -> Tensor:
    """All scores in one go."""
    split = dataset.split
    with torch.no_grad():
        return model.score(
            model.encode_images(**dataset.image_batch(range(split.num_images))._asdict()),
            model.encode_captions(**dataset.caption_batch(range(split.num_captions))._asdict()),
        )


def plain_evaluation(
    scores: Tensor, *, fold: int, sizes: Sequence[int] = (5,) * 16
) -> dict[str, float]:
    """The mean over folds of what sorting gives."""
    image_of_caption = np.repeat(np.arange(len(sizes)), sizes)
    blocks = []
    for start in range(0, len(scores), fold):
        own = (image_of_caption >= start) & (image_of_caption < start + fold)
        block = scores[start : start + fold][:, torch.from_numpy(own)]
        blocks.append(naive_recalls(block, (image_of_caption[own] - start).tolist()))
    mean = {key: sum(block[key] for block in blocks) / len(blocks) for key in blocks[0]}
    return mean | {"rsum": sum(mean.values())}


def evaluations(config: ExperimentConfig, folder: Path, cache: Path) -> dict[str, dict[str, float]]:
    """What `evaluate` finds, in this process's company, by protocol, with and without ties."""
    found = {}
    for ties in (False, True):
        model, dataset = model_and_split(config, folder, cache, ties=ties)
        for protocol in PROTOCOLS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(evaluation, "_FEW", 10)  # some lengths have more captions, some fewer
                metrics = evaluate(
                    model, dataset, protocol=protocol, batch_size=3, device=CPU, fold=FOLD
                )
            found[f"{protocol}, {ties}"] = metrics.as_dict()
        model, dataset = model_and_split(config, folder, cache, ties=ties, sizes=UNEVEN)
        metrics = evaluate(model, dataset, protocol="full", batch_size=3, device=CPU)
        found[f"uneven, {ties}"] = metrics.as_dict()
    return found


def refusals(config: ExperimentConfig, folder: Path, cache: Path) -> list[str]:
    """What `evaluate` says to a split whose last image but one is broken, by protocol."""
    model, dataset = model_and_split(config, folder, cache)
    regions = dataset.split.regions
    features = np.array(regions.features)
    features[14] = np.nan
    dataset.split = replace(dataset.split, regions=replace(regions, features=features))
    messages = []
    for protocol in PROTOCOLS:
        with pytest.raises(DivergedError) as caught:
            evaluate(model, dataset, protocol=protocol, batch_size=3, device=CPU, fold=FOLD)
        messages.append(str(caught.value))
    return messages


def test_evaluation_equals_the_plain_one(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    found = evaluations(tiny_config, data_folder, tmp_path)
    for ties in (False, True):
        model, dataset = model_and_split(tiny_config, data_folder, tmp_path, ties=ties)
        scores = plain_scores(model, dataset)
        equal = [len(column) - len(column.unique()) for column in scores.T]
        assert (sum(equal) > len(equal)) == ties
        for protocol, fold in zip(PROTOCOLS, (16, FOLD), strict=True):
            expected = plain_evaluation(scores, fold=fold)
            assert found[f"{protocol}, {ties}"] == pytest.approx(expected)
            assert 0 < expected["rsum"] < 600
        expected = plain_evaluation(scores, fold=16, sizes=UNEVEN)
        assert found[f"uneven, {ties}"] == pytest.approx(expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_is_encoded_once_and_scored_once(
    tiny_config: ExperimentConfig,
    data_folder: Path,
    tmp_path: Path,
    protocol: Literal["full", "coco-1k"],
) -> None:
    model, dataset = model_and_split(tiny_config, data_folder, tmp_path)
    sizes: dict[str, list[int]] = {"images": [], "captions": [], "pairs": []}

    def seen(name: str, given: Sequence[Any], fields: dict[str, Any]) -> None:
        if name == "encode_images":
            sizes["images"].append(len(fields["features"]))
        elif name == "encode_captions":
            sizes["captions"].append(len(fields["tokens"]))
        else:
            images, captions = given
            sizes["pairs"].append(len(images.mask) * len(captions.mask))

    watched: Any = Watched(model, seen)
    evaluate(watched, dataset, protocol=protocol, batch_size=3, device=CPU, fold=FOLD)
    assert sum(sizes["images"]) == 16
    assert sum(sizes["captions"]) == 80
    assert max(sizes["images"] + sizes["captions"]) == 3
    # Of the score matrix, the folds need the blocks on the diagonal.
    assert sum(sizes["pairs"]) == (16 * 80 if protocol == "full" else 16 * FOLD * 5)


def test_score_that_is_not_finite_is_named_by_its_place_in_the_split(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    of_split, of_fold = refusals(tiny_config, data_folder, tmp_path)
    assert "image 14, caption 0 is not finite" in of_split
    assert "image 14, caption 60 is not finite" in of_fold


def test_model_is_left_as_it_was(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    model, dataset = model_and_split(tiny_config, data_folder, tmp_path)
    for training in (True, False):
        model.train(training)
        evaluate(model, dataset, protocol="full", batch_size=5, device=CPU)
        assert model.training == training


def test_split_that_is_no_number_of_folds_is_refused(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    model, dataset = model_and_split(tiny_config, data_folder, tmp_path)
    with pytest.raises(DataError, match="16 images do not divide into folds of 1000"):
        evaluate(model, dataset, protocol="coco-1k", batch_size=5, device=CPU)


def test_the_protocol_of_coco_asks_for_five_captions_an_image(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    model, dataset = model_and_split(tiny_config, data_folder, tmp_path, sizes=UNEVEN)
    with pytest.raises(DataError, match=r"5 captions each.*have 1 to 12.*--captions-each 5"):
        evaluate(model, dataset, protocol="coco-1k", batch_size=5, device=CPU)
    check_protocol(data_folder, "full")
    with pytest.raises(DataError, match="6 images do not divide into folds of 1000"):
        check_protocol(data_folder, "coco-1k")


def test_progress_says_which_fold(
    tiny_config: ExperimentConfig,
    data_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Talkative(progress.Progress):
        def __init__(self, what: str, *, total: int) -> None:
            super().__init__(what, total=total, interval=0)

    monkeypatch.setattr(evaluation, "Progress", Talkative)
    model, dataset = model_and_split(tiny_config, data_folder, tmp_path)
    with caplog.at_level(logging.INFO):
        evaluate(model, dataset, protocol="coco-1k", batch_size=3, device=CPU, fold=FOLD)
        evaluate(model, dataset, protocol="full", batch_size=3, device=CPU)
    assert "encoding captions of train, fold 2 of 4: 3/7, " in caplog.text
    assert "scoring train, fold 4 of 4: 3/4, " in caplog.text
    assert "scoring train: 15/16, " in caplog.text


def test_captions_are_grouped_by_length_unless_they_are_few() -> None:
    lengths = np.array([4, 4, 4, 4, 5, 6, 6, 7, 7, 7, 9])
    groups = [lengths[part].tolist() for part in length_groups(lengths, few=3)]
    assert groups == [[4, 4, 4, 4], [5, 6, 6], [7, 7, 7], [9]]
    assert [part.start for part in length_groups(lengths[:1])] == [0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scoring_has_its_own_precision_and_encoders_that_of_training(
    tiny_config: ExperimentConfig,
    data_folder: Path,
    tmp_path: Path,
    precision: Literal["fp32", "bf16"],
) -> None:
    model, dataset = model_and_split(tiny_config, data_folder, tmp_path)
    encoding = {precision == "bf16"}
    cases: list[tuple[Products, bool]]
    cases = [("bf16", True), ("fp16", True), ("fp32", False), ("auto", False)]
    for products, autocast in cases:
        found: dict[str, set[bool]] = defaultdict(set)

        def seen(name: str, *_: Any, found: dict[str, set[bool]] = found) -> None:
            found[name].add(torch.is_autocast_enabled("cpu"))

        watched: Any = Watched(model, seen)
        evaluate(
            watched,
            dataset,
            protocol="full",
            batch_size=5,
            device=CPU,
            products=products,
            precision=precision,
        )
        expected = {"encode_images": encoding, "encode_captions": encoding, "score": {autocast}}
        assert found == expected


def two_members(config: ExperimentConfig, folder: Path, cache: Path) -> list[Member]:
    """Two models of float32 on the 16 images, of different widths and scorers."""
    others = config.with_overrides({"seed": 9, "model.alignment.kind": "cross_attention"})
    pairs = (model_and_split(each, folder, cache) for each in (config, others))
    return [Member(model.float(), dataset) for model, dataset in pairs]


@pytest.mark.parametrize(("protocol", "fold"), [("full", 16), ("coco-1k", FOLD)])
def test_an_ensemble_ranks_by_the_mean_of_its_models_scores(
    tiny_config: ExperimentConfig,
    data_folder: Path,
    tmp_path: Path,
    protocol: Literal["full", "coco-1k"],
    fold: int,
) -> None:
    members = two_members(tiny_config, data_folder, tmp_path)
    found = evaluate_together(members, protocol=protocol, batch_size=3, device=CPU, fold=FOLD)
    matrices = [plain_scores(member.model, member.dataset).double() for member in members]
    matrices.append((matrices[0] + matrices[1]) / 2)
    expected = [plain_evaluation(scores, fold=fold) for scores in matrices]
    assert [each.metrics.as_dict() for each in found] == [pytest.approx(each) for each in expected]
    assert [each.best for each in found] == [None] * 3
    assert len({each["rsum"] for each in expected}) == 3
    alone = [
        evaluate(*member[:2], protocol=protocol, batch_size=3, device=CPU, fold=FOLD)
        for member in members
    ]
    assert alone == [each.metrics for each in found[:2]]


def test_the_best_candidates_of_each_model_and_of_the_ensemble_are_kept(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    members = two_members(tiny_config, data_folder, tmp_path)
    found = evaluate_together(
        members,
        protocol="full",
        batch_size=3,
        device=CPU,
        keep=Kept(captions_each=9, images_each=4),
    )
    matrices = [plain_scores(member.model, member.dataset).double() for member in members]
    for each, scores in zip(found, [*matrices, (matrices[0] + matrices[1]) / 2], strict=True):
        assert each.best is not None
        assert torch.equal(each.best.captions, scores.argsort(dim=1, descending=True)[:, :9])
        assert torch.equal(each.best.images, scores.T.argsort(dim=1, descending=True)[:, :4])


def test_a_model_of_an_ensemble_that_diverged_is_told(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    members = two_members(tiny_config, data_folder, tmp_path)
    members[1].model.score = lambda images, captions: torch.full(  # type: ignore[method-assign]
        (len(images.mask), len(captions.mask)), torch.nan
    )
    with pytest.raises(DivergedError, match="image 0, caption 0"):
        evaluate_together(members, protocol="full", batch_size=3, device=CPU, keep=Kept(3, 3))
