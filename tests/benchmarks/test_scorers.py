"""What the benchmarks of scoring compare scores the same; and they run."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.conftest import ROOT

Run = Callable[..., tuple[str, dict[str, Any]]]

# A stand-in with the interface of a published checkout.
PEER = """
import torchvision.models as models
from torch.nn.utils.clip_grad import clip_grad_norm

def xattn_score_t2i(images, captions, cap_lens, opt):
    assert opt.agg_func == "Mean" and len(cap_lens) == len(captions)
    return images.mean(dim=1) @ captions.mean(dim=1).T
"""


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scorers")


def test_the_naive_form_and_bf16_score_what_ours_does(scorers: types.ModuleType) -> None:
    images, captions = scorers.make_embeddings(4, 6, dim=32, num_regions=5)
    compared = scorers.compared(dim=32, device="cpu")
    with torch.inference_mode():
        found = {name: c.score(images, captions) for name, c in compared.items()}
    ours = found["cpfean"]
    torch.testing.assert_close(found["cpfean, naive"], ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["cpfean, bf16 products"], ours, atol=0.02, rtol=0)
    for name in ("scan", "chan", "global"):
        assert found[name].shape == (4, 6)


def test_pair_scoring_compares_with_the_bare_product_and_a_peer(
    run_benchmark: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stood_in_for in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, stood_in_for, types.ModuleType(stood_in_for))
    (tmp_path / "model.py").write_text(PEER)
    printed, result = run_benchmark(
        "pair_scoring",
        *("--sizes", "4x10", "6x20", "--dim", 32, "--regions", 5, "--runs", 2),
        *("--device", "cpu", "--peer", f"scan={tmp_path}"),
    )
    rows = {(row["images"], row["scorer"]): row for row in result["rows"]}
    names = {"bare product", "cpfean", "cpfean, bf16 products", "cpfean, naive", "scan", "chan"}
    names |= {"global", "scan, as published"}
    assert rows.keys() == {(number, name) for number in (4, 6) for name in names}
    for row in result["rows"]:
        assert row["pairs/s"] == pytest.approx(row["pairs timed"] / row["s"])
        assert row["scorer"] in printed
    assert rows[4, "bare product"]["share of bare product"] == 1
    assert rows[6, "cpfean, naive"]["v naive"] == 1
    assert result["slopes"].keys() == names


def test_a_peer_that_is_not_there_is_refused(scorers: types.ModuleType, tmp_path: Path) -> None:
    for text in ("scan", f"scan={tmp_path}", f"other={tmp_path}"):
        with pytest.raises(ValueError, match="NAME one of scan, saf, sgr"):
            scorers.peer(text)


@pytest.mark.long
def test_training_step_measures_time_and_memory_of_both_minings(run_benchmark: Run) -> None:
    _, result = run_benchmark(
        "training_step",
        *("--batch", 8, "--dim", 32, "--regions", 5, "--runs", 2, "--device", "cpu"),
        *("--only", "cpfean", "cpfean, naive"),
    )
    rows = {(row["negatives"], row["scorer"]): row for row in result["rows"]}
    assert rows.keys() == {(m, s) for m in ("hardest", "all") for s in ("cpfean", "cpfean, naive")}
    assert rows["all", "cpfean, naive"]["v naive"] == 1
    assert all(row["s"] > 0 and row["peak MB"] >= 0 for row in result["rows"])


def test_full_training_steps_are_counted(run_benchmark: Run) -> None:
    printed, result = run_benchmark(
        "full_training",
        *("--batch", 4, "--regions", 5, "--dim", 32, "--feature-dim", 16, "--text-dim", 32),
        *("--text-layers", 1, "--steps", 2, "--runs", 1, "--device", "cpu"),
    )
    (row,) = result["rows"]
    assert row["images/s"] == pytest.approx(4 * row["steps/s"])
    assert row["parameters"] > 1000
    assert "steps/s" in printed
