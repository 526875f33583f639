"""The formula of a pair's products is what torch counts, and the benchmark runs."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cpfean.config import AlignmentConfig, ModelConfig, RegionConfig
from cpfean.model.alignment import ProminentAlignment, every_pair
from cpfean.model.baselines import CrossAttention, HardCoding
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from tests.benchmarks.conftest import ROOT

IMAGES, CAPTIONS, REGIONS, WORDS, DIM = 3, 4, 7, 5, 16


@pytest.fixture
def complexity(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("complexity")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"global_weight": 0.0},
        {"fusion": False, "gate": "off"},
        {"prominence": False},
        {"gate": "hard"},
        {"rounds": 2},
        {"rounds": 3, "prominence": False},
        {"kind": "cross_attention"},
        {"kind": "cross_attention", "global_weight": 0.0},
        {"kind": "hard_coding"},
        {"global_weight": 1.0},
    ],
)
def test_the_products_of_pairs_are_those_that_torch_counts(
    complexity: types.ModuleType, settings: dict[str, Any]
) -> None:
    config = AlignmentConfig(**settings)
    scorer: torch.nn.Module
    if config.kind == "prominent":
        scorer = ProminentAlignment(config, dim=DIM)
    elif config.kind == "cross_attention":
        scorer = CrossAttention(inverse_temperature=9.0)
    else:
        scorer = HardCoding(temperature=0.1)
    images = ImageEmbeddings(
        torch.rand(IMAGES, REGIONS, DIM),
        torch.ones(IMAGES, REGIONS, dtype=torch.bool),
        torch.rand(IMAGES, DIM),
        torch.zeros(IMAGES, REGIONS),
    )
    captions = CaptionEmbeddings(
        torch.rand(CAPTIONS, WORDS, DIM),
        torch.ones(CAPTIONS, WORDS, dtype=torch.bool),
        torch.rand(CAPTIONS, DIM),
    )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        if config.global_weight > 0:
            images.pooled @ captions.pooled.T
        if config.global_weight < 1:
            scorer(every_pair(images, captions))
    pair = complexity.pair_products(config, dim=DIM, regions=REGIONS, words=WORDS)
    # The plain path makes both Gram matrices, whether they are needed or not.
    grams = IMAGES * REGIONS**2 + CAPTIONS * WORDS**2 if config.global_weight < 1 else 0
    assert counter.get_total_flops() == 2 * (IMAGES * CAPTIONS * pair + grams * DIM)


def test_gram_matrices_count_where_they_are_needed(complexity: types.ModuleType) -> None:
    def grams(**settings: Any) -> tuple[int, int]:
        config = AlignmentConfig(**settings)
        return (
            complexity.region_gram_products(config, dim=10, regions=3),
            complexity.word_gram_products(config, dim=10, words=2),
        )

    assert grams() == (90, 40)
    assert grams(kind="cross_attention") == (90, 0)
    assert grams(kind="hard_coding") == grams(global_weight=1.0) == (0, 0)


def test_attention_is_counted(complexity: types.ModuleType) -> None:
    from cpfean.model.reasoning import RegionReasoning

    reasoning = RegionReasoning(RegionConfig(heads=2), dim=DIM).eval()
    regions, mask = torch.rand(1, REGIONS, DIM), torch.ones(1, REGIONS, dtype=torch.bool)
    found = complexity.products(lambda: reasoning(regions, mask, None))
    # Query, key, value, output and a feed-forward of twice the width; weights and their sums.
    assert found == REGIONS * (4 + 4) * DIM**2 + 2 * REGIONS**2 * DIM
    assert ModelConfig().regions.layers == 1


def test_every_variant_is_there_once(complexity: types.ModuleType) -> None:
    from experiments.ablations import ABLATIONS
    from experiments.methods import METHODS

    variants = complexity.variants_of()
    names = [name for variant in variants for name in variant.names]
    assert len(names) == len(set(names))
    expected = {"full", *(each.name for each in (*ABLATIONS, *METHODS))} - {"syntax_words"}
    assert set(names) == expected
    (only,) = complexity.chosen(variants, ["full"])
    assert only.overrides == {}
    with pytest.raises(SystemExit, match="no variant nothing"):
        complexity.chosen(variants, ["nothing"])


@pytest.mark.long
def test_the_table_has_counts_times_and_memory(
    run_benchmark: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    printed, result = run_benchmark(
        "complexity",
        *("--batch", 6, "--images", 5, "--captions", 9, "--regions", 6, "--dim", 32),
        *("--feature-dim", 16, "--text-dim", 32, "--runs", 1, "--device", "cpu"),
        *("--only", "full", "no_gcn", "mean_pooling"),
    )
    rows = {row["variant"].split(" = ")[0]: row for row in result["rows"]}
    assert rows.keys() == {"full", "no_gcn", "mean_pooling"}
    # The graph convolution has three square matrices; a pooled pair is one product.
    assert rows["full"]["weights"] - rows["no_gcn"]["weights"] == 3 * 32**2
    assert rows["full"]["caption"] > rows["no_gcn"]["caption"]
    assert rows["mean_pooling"]["pair"] == 32
    assert rows["full"]["v full"] == 1
    for row in rows.values():
        assert min(row["step s"], row["text query ms"], row["image query ms"]) > 0
        assert row["peak MB"] >= 0
    assert "bert-base would add" in printed
    # 12 layers of 14 pieces: 12 d^2 weights a layer, and attention.
    layers = 12 * (14 * 12 * 768**2 + 2 * 14**2 * 768)
    assert result["bert_base_multiply_adds"] == layers
