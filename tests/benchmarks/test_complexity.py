"""The products that are counted are those of the equations, and the benchmark runs."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpfean.config import AlignmentConfig, ModelConfig, RegionConfig
from tests.benchmarks.conftest import ROOT

REGIONS, WORDS, DIM = 7, 5, 16


@pytest.fixture
def complexity(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("complexity")


def expected_products(config: AlignmentConfig) -> tuple[int, int, int]:
    """Of a pair, an image and a caption, from the equations.

    global      D
    S           R L D
    |c_k|       L R^2         CPFEAN and cross-attention; K, R^2 D for an image
    |d_r|       L^2 R         CPFEAN; G, L^2 D for a caption
    n_k         L R           with prominent words
    a round     L^2 R         each after the first; and, if there is any, once
                2 L^2 R + L^3 for the contexts of regions that have taken words in
    """
    pooled = DIM if config.global_weight > 0 else 0
    if config.global_weight == 1:
        return pooled, 0, 0
    pair = pooled + REGIONS * WORDS * DIM
    image, caption = REGIONS**2 * DIM, WORDS**2 * DIM
    if config.kind in ("hard_coding", "hard_coding_mean"):
        return pair, 0, 0
    pair += WORDS * REGIONS**2
    if config.kind == "cross_attention":
        return pair, image, 0
    pair += WORDS**2 * REGIONS
    if config.prominence and config.fusion:
        pair += WORDS * REGIONS
    if config.rounds > 1:
        pair += (config.rounds - 1) * WORDS**2 * REGIONS + 2 * WORDS**2 * REGIONS + WORDS**3
    return pair, image, caption


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"global_weight": 0.0},
        {"fusion": False, "gate": "off", "prominence": True},
        {"prominence": True},
        {"gate": "hard"},
        {"rounds": 2},
        {"rounds": 3, "prominence": True},
        {"kind": "cross_attention"},
        {"kind": "cross_attention", "global_weight": 0.0},
        {"kind": "hard_coding"},
        {"kind": "hard_coding_mean"},
        {"global_weight": 1.0},
    ],
)
def test_the_products_that_torch_counts_are_those_of_the_equations(
    complexity: types.ModuleType, settings: dict[str, Any]
) -> None:
    config = AlignmentConfig(**settings)
    found = complexity.score_products(config, dim=DIM, regions=REGIONS, words=WORDS)
    assert found == expected_products(config)


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
