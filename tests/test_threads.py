"""How many threads a configuration gets, and who else may say a number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.threads import allot, threads_chosen, threads_for
from experiments.baselines import BASELINES

SMALL_STEP = BASELINES["synthetic"]
# Settings of docs/results.md: 3,800 images, frozen MiniLM.
REAL_DATA = BASELINES["small"].with_overrides(
    {"model.dim": 192, "model.text.encoder": "minilm", "model.text.trainable": False}
)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with two processors, where nobody has said a number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SMALL_STEP, 1),
        (REAL_DATA, 8),
        (REAL_DATA.with_overrides({"optim.batch_size": 16}), 8),
        (SMALL_STEP.with_overrides({"model.text.encoder": "bert-base-uncased"}), 8),
        *((BASELINES[name], 8) for name in ("small", "flickr30k", "coco")),
    ],
)
def test_small_steps_get_one_thread_and_all_others_what_there_is(
    config: ExperimentConfig, expected: int
) -> None:
    assert threads_for(config, available=8) == expected
    assert threads_for(config, available=1) == 1


def test_what_counts_is_the_share_of_a_process() -> None:
    config = SMALL_STEP.with_overrides({"optim.batch_size": 64})
    assert threads_for(config, available=8) == 8
    assert threads_for(config, available=8, workers=2) == 1


def test_the_number_holds_for_a_training_and_not_longer() -> None:
    with threads_chosen(SMALL_STEP) as threads:
        assert threads == torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with threads_chosen(REAL_DATA) as threads:
        assert threads == torch.get_num_threads() == 2


def test_the_variable_wins_over_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # PyTorch has read it
    with threads_chosen(SMALL_STEP) as threads:
        assert threads == torch.get_num_threads() == 2


def test_what_a_worker_is_allotted_is_no_word_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # as Ray sets it beside the four
    allot(4)
    assert torch.get_num_threads() == 4
    with threads_chosen(SMALL_STEP) as threads:
        assert threads == 1

    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    allot(4)
    with threads_chosen(SMALL_STEP) as threads:
        assert threads == 3
