"""GPU kernels can be built without a GPU, within what one has; and scoring moves few bytes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version

from cpfean.model.scorers.prominent_plan import shared_memory
from tests.benchmarks.conftest import ROOT

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: it has no build for this system"
)

OPTIONS = ("80 89 90 100", "90 --prominence")
KERNELS = {"forward", "words_backward", "regions_backward"}


def built(folder: Path, *, places: str, options: str) -> list[dict[str, Any]]:
    """What the script finds, in a process whose Triton compiles, with an empty cache."""
    output = folder / "result.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "kernels_ahead_of_time.py"),
            *("--archs", *options.split(), "--places", places, "--products", "fp16"),
            *("--images", "0", "--output", output),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(folder / "cache"),
        },
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["rows"]
    archs = {int(arch) for arch in options.removesuffix(" --prominence").split()}
    assert {(row["kernel"], row["sm"]) for row in found} == {
        (name, arch) for name in KERNELS for arch in archs
    }
    return found


@pytest.fixture(
    scope="module",
    params=[pytest.param(options, marks=pytest.mark.long) for options in OPTIONS],
)
def rows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Of captions of up to 16 words and 64 regions."""
    return built(tmp_path_factory.mktemp("kernels"), places="16x64", options=request.param)


def test_the_kernels_multiply_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    # An instruction is at least a 16 x 8 x 16 product of a warp; an H100 has larger ones.
    least = {"forward": 16, "words_backward": 8, "regions_backward": 6}
    for row in rows:
        assert row["tensor"] >= least[row["kernel"]], row


def test_the_kernels_keep_to_what_a_gpu_has(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        programs = 2 if row["kernel"] == "forward" else 1  # at least, on a multiprocessor
        assert programs * row["registers"] * 32 * row["warps"] <= 65536, row
        assert programs * row["shared"] <= 100 * 1024, row  # of an RTX 40; others have more
        assert row["shared"] <= shared_memory(64, 16, width=2), row


def test_the_kernels_do_not_spill(rows: list[dict[str, Any]]) -> None:
    # On a B200 what tensor cores make comes out of a memory of their own, all at once; on an A100
    # two constants of the loop are read again in each round.
    few = {("forward", 100): 512, ("words_backward", 80): 16, ("words_backward", 89): 16}
    # Triton 3.7 makes the weights of this kernel twice, as two products want them.
    if Version(triton.__version__) < Version("3.9"):
        few |= {("regions_backward", arch): 1024 for arch in (80, 89, 90, 100)}
    for row in rows:
        assert row["stack"] <= few.get((row["kernel"], row["sm"]), 0), row


def test_a_pair_takes_fewer_instructions_than_the_estimate_can_bear(
    rows: list[dict[str, Any]],
) -> None:
    """0.6 s for 5,000 x 25,000, of which 0.22 s are the product and what is around it."""
    for row in rows:
        if row["kernel"] == "forward" and row["sm"] == 90:
            assert 5000 * 25000 * row["a pair"] / (0.7 * 132 * 4 * 1.755e9) < 0.38


def test_a_pair_s_gradient_takes_no_more_than_four_times_its_score(
    rows: list[dict[str, Any]],
) -> None:
    """Both of its kernels together, which make more if warps do each other's work over again."""
    taken = {(row["kernel"], row["sm"]): row["a pair"] for row in rows}
    for (name, arch), instructions in taken.items():
        if name == "forward":
            gradient = taken["words_backward", arch] + taken["regions_backward", arch]
            assert gradient <= 4 * instructions


# With 4 warps a program the assembler took 32 registers a thread for the last kernel; for a B200
# Triton broke off at 64 words.
@pytest.mark.long
@pytest.mark.parametrize(("places", "arch", "spilled"), [("32x64", 90, 0), ("64x64", 100, None)])
def test_longer_captions_have_registers_too(
    tmp_path: Path, places: str, arch: int, spilled: int | None
) -> None:
    for row in built(tmp_path, places=places, options=str(arch)):
        assert row["registers"] > 128, row
        if row["kernel"] == "forward" and spilled is not None:
            assert row["stack"] == spilled, row


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("kernels_ahead_of_time")


def test_scoring_coco_moves_at_most_half_a_terabyte(script: ModuleType) -> None:
    work = script.count(5000, torch.full((25000,), 13), products="fp16")
    cosines = 5000 * 40 * 25000 * 13 * 2
    # They are written once and read once, and little else comes to them.
    assert work.bytes["mm"] > cosines
    assert work.bytes["score_pairs"] > cosines
    assert 2 * cosines < work.bytes.total() < 0.5e12
    # A tile has four captions with one image.
    assert work.tiles.total() >= 5000 * 25000 / 4
    assert work.flops == 2 * cosines / 2 * 1024


def test_counted_bytes_are_those_of_the_operations(script: ModuleType) -> None:
    """Two images of three regions, three captions of two words, width 16: by hand."""
    work = script.count(2, torch.full((3,), 2), products="fp16", num_regions=3, dim=16)
    slots, rows = 8, 3 * 2
    product = 2 * (rows * 16 + 2 * slots * 16 + rows * 2 * slots)
    assert work.bytes["mm"] == product
    grams = 2 * 2 * slots * slots + 2 * 3 * 2 * 2
    small = 4 * (2 * slots + 3 * 2 + 4 + 4 + 2 + 2 * 3)  # theta, lead, constants, starts, scores
    assert work.bytes["score_pairs"] == 2 * rows * 2 * slots + grams + small
    assert work.launches["mm"] == work.launches["score_pairs"] == 1
