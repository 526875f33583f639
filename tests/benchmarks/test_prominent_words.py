"""Prominent words are counted as the alignment of each single pair has them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.prominent_words import (
    FUNCTION_WORDS,
    Chosen,
    chosen_words,
    content_share,
    table,
)
from cpfean.training.setup import TrainedModel, open_experiment
from tests.training.tiny import tiny_experiment


def test_function_words_are_not_content() -> None:
    assert {"a", "the", "with", "in", "two", "is"} <= FUNCTION_WORDS
    assert not {"dog", "man", "red", "running", "grass"} & FUNCTION_WORDS
    assert content_share(Counter({"Dog": 3, "THE": 1})) == pytest.approx(0.75)
    assert content_share(Counter({".": 3, "dog": 1})) == pytest.approx(0.25)
    assert content_share(Counter()) == 0


def test_every_open_region_of_a_matching_pair_has_its_word_counted(
    data_folder: Path, tmp_path: Path
) -> None:
    experiment = open_experiment(
        tiny_experiment(), data_folder=data_folder, cache_dir=tmp_path, device=torch.device("cpu")
    )
    model, tokenizer, dataset = experiment.model.eval(), experiment.tokenizer, experiment.dev
    found = chosen_words(TrainedModel(model=model, tokenizer=tokenizer, dataset=dataset), batch=7)
    prominent: Counter[str] = Counter()
    words: Counter[str] = Counter()
    open_regions = regions = 0
    for pair, caption in enumerate(dataset.split.captions):
        image = int(dataset.split.image_of(pair))
        with torch.inference_mode():
            seen = model.encode_images(**dataset.image_batch([image])._asdict())
            told = model.encode_captions(**dataset.caption_batch([pair])._asdict())
            alignment = model.align(seen, told)
        texts = tokenizer.words(caption)
        words.update(texts)
        for region in range(int(seen.mask.sum())):
            regions += 1
            if alignment.gates[0, 0, region] > 0.5:
                open_regions += 1
                prominent[texts[int(alignment.prominence[0, 0, :, region].argmax())]] += 1
    assert found == Chosen(prominent, words, open_regions, regions)
    assert 0 < open_regions < regions
    share = f"{content_share(prominent):.0%}"
    assert f"| tiny | {share} |" in table([("tiny", found)])
