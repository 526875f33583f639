"""Training, evaluation and resume on a pretended GPU: nothing misplaced, and hardly any waiting."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import GlobalBatches
from cpfean.model.text_encoder import TextBackbone
from cpfean.training import evaluation
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.evaluation import evaluate, score_matrix
from cpfean.training.global_batch import GlobalBatchLoss, find_gradients
from cpfean.training.loop import EpochReport, FitResult, fit
from cpfean.training.optimizer import build_optimizer
from cpfean.training.setup import evaluate_checkpoint, open_checkpoint, open_experiment
from cpfean.training.text_cache import encode_frozen
from experiments.ablations import ABLATIONS
from experiments.methods import METHODS
from tests.model.encoders import write_encoder
from tests.pretended_cuda.device import Record, pretended
from tests.training.tiny import tiny_experiment

pytestmark = pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MOST_WAITS = 2  # of a step, on average: one for the sizes of what is scored, one for a look
# Of the registry those that run other code on the device; the sizes do not.
QUICK = ("generalized_pooling", "hard_gate")
LONG = (
    *("no_fusion", "no_priors", "no_consensus", "no_static_words", "no_reasoning", "no_global"),
    *(
        "window_words",
        "prominent_words_weigh_more",
        "two_rounds",
        "mean_pooling",
        "scan",
        "chan",
        "chan_mean",
        "filtered_regions",
    ),
)
REGISTRY = {entry.name: dict(entry.overrides) for entry in (*ABLATIONS, *METHODS)}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, fp32": {"optim.precision": "fp32"},
} | {name: REGISTRY[name] for name in QUICK}
LONG_VARIANTS: dict[str, dict[str, Any]] = {
    "late_interaction": {"model.alignment.kind": "late_interaction"},
    "nothing disturbed": {"data.word_noise": 0.0, "data.region_dropout": 0.0},
} | {name: REGISTRY[name] for name in LONG}
# Of a tiny BERT, which is written first.
FROZEN = {"model.text.trainable": False, "data.word_noise": 0.0}


class Watch:
    """Keeps every epoch's checkpoint, and how often the host had waited whenever it was asked."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder = folder
        self.waits: list[int] = []
        self.most = 0.0
        self._record = record

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None
        checkpoint.save(self.folder / f"epoch-{report.epoch}")
        steps = 2
        # First asked before the steps, with a wait for the answer, and last after them.
        self.most = max(self.most, (self.waits[-1] - self.waits[0] - 1) / steps)
        self.waits.clear()

    def given(self) -> bool:
        self.waits.append(sum(self._record.waits.values()))
        return False

    def save(self, checkpoint: Checkpoint | None) -> None:
        raise AssertionError("no notice was given")


def small(overrides: dict[str, Any]) -> ExperimentConfig:
    """Two steps an epoch, the first one's of all negatives, the second one's of the hardest."""
    changes = {"optim.epochs": 2, "loss.warmup_epochs": 1}
    return tiny_experiment().with_overrides(changes | overrides)


def train(
    config: ExperimentConfig, data: Path, watch: Watch, *, resume_from: Path | None = None
) -> FitResult:
    return fit(
        config,
        data_folder=data,
        cache_dir=data.parent,
        reporter=watch,
        notice=watch,
        device=CUDA,
        resume_from=resume_from,
    )


def scores(checkpoint: Path, data: Path, device: torch.device) -> Tensor:
    opened = open_checkpoint(
        checkpoint,
        data_folder=data,
        split="test",
        cache_dir=data.parent,
        device=device,
        num_regions=8,
    )
    return score_matrix(opened.model, opened.dataset, gallery=range(3), batch_size=2, device=device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_on_the_device_and_hardly_waited_for(
    variant: str, data: Path, tmp_path: Path
) -> None:
    check_whole_way(small(VARIANTS[variant]), data, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("variant", LONG_VARIANTS)
def test_the_same_of_the_rest_of_the_registry(variant: str, data: Path, tmp_path: Path) -> None:
    check_whole_way(small(LONG_VARIANTS[variant]), data, tmp_path)


@pytest.mark.parametrize(
    "overrides", [FROZEN, pytest.param({}, marks=pytest.mark.long)], ids=["frozen", "trained"]
)
def test_the_same_of_a_pretrained_text_encoder(
    overrides: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    check_whole_way(small({"model.text.encoder": str(encoder)} | overrides), data, tmp_path)


def check_whole_way(config: ExperimentConfig, data: Path, tmp_path: Path) -> None:
    """Training, the same resumed after an epoch, evaluation; and scores as on a processor."""
    with pretended() as record:
        watch = Watch(tmp_path / "run", record)
        result = train(config, data, watch)
        again = Watch(tmp_path / "again", record)
        resumed = train(config, data, again, resume_from=tmp_path / "run" / "epoch-1")
        metrics = evaluate_checkpoint(
            tmp_path / "run" / "epoch-2",
            data_folder=data,
            split="test",
            protocol="full",
            cache_dir=data.parent,
            device=CUDA,
            num_regions=8,
            batch_size=4,
            products="bf16",
            precision=config.optim.precision,
        )
        found = scores(tmp_path / "run" / "epoch-2", data, CUDA)
    losses = [epoch["train/loss"] for epoch in result.history]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert [epoch["train/loss"] for epoch in resumed.history] == losses
    assert 0 < metrics.rsum <= 600
    assert 0 < max(watch.most, again.most) <= MOST_WAITS
    expected = scores(tmp_path / "run" / "epoch-2", data, CPU)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def one_step(data: Path, *, plant: Callable[[nn.Module], None]) -> Record:
    """A step with a fault in it, and what was waited for in it."""
    config = small({})
    with pretended() as record:
        experiment = open_experiment(config, data_folder=data, cache_dir=data.parent, device=CUDA)
        plant(experiment.model)
        optimizer = build_optimizer(experiment.model, config.optim)
        step = GlobalBatchLoss(experiment.model, margin=0.2)
        (request, *_) = GlobalBatches(len(experiment.train), 10, seed=0, epoch=1)
        batch = experiment.train.training_batch(request).pin_memory()
        record.clear()
        loss = step(batch.to(CUDA, non_blocking=True), "hardest", 10)
        find_gradients(step, loss, experiment.model.parameters(), clip_norm=2.0)
        optimizer.step()
    return record


def test_a_planted_wait_is_found(data: Path) -> None:
    def plant(model: nn.Module) -> None:
        model.word_projection.register_forward_hook(
            lambda *made: print(made[-1].abs().max().item())
        )

    without = one_step(data, plant=lambda model: None).waits
    assert without.total() == 1
    found = one_step(data, plant=plant).waits - without
    assert len(found) == 1
    assert "test_training.py" in str(found)
    assert found.total() + without.total() > MOST_WAITS


def test_a_planted_tensor_of_the_host_is_refused(data: Path) -> None:
    def plant(model: nn.Module) -> None:
        model.word_projection.register_forward_hook(lambda *made: made[-1] + torch.zeros(32))

    with pytest.raises(RuntimeError, match=r"same device.*test_training\.py"):
        one_step(data, plant=plant)


def test_evaluation_waits_at_its_beginning_and_end_and_once_a_block_of_scores(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small({})
    waits, blocks, metrics = [], [], []
    with pretended() as record:
        experiment = open_experiment(config, data_folder=data, cache_dir=data.parent, device=CUDA)
        for batch_size, scored in ((3, 1024), (1, 1024), (1, 2), (1, 0)):
            monkeypatch.setattr(evaluation, "SCORED_ON_GPU", scored)
            record.clear()
            metrics.append(
                evaluate(
                    experiment.model,
                    experiment.dev,
                    protocol="full",
                    batch_size=batch_size,
                    device=CUDA,
                    precision="bf16",
                )
            )
            found = record.waits.copy()
            of_blocks = [line for line in found if "prominent_cuda.py" in line]
            blocks.append(sum(found.pop(line) for line in of_blocks))
            waits.append(found)
    assert all(found == waits[0] for found in waits)
    assert blocks == [1, 1, 2, 3]  # of three images, whose captions are one group
    assert all(found == metrics[0] for found in metrics)


@pytest.mark.parametrize("kind", ["albert", "bert", "camembert", "mpnet", "roberta", "xlm-roberta"])
def test_text_encoders_read_their_mask_without_waiting(kind: str, tmp_path: Path) -> None:
    """All but MPNet, whose attention is of another form; it is right all the same."""
    folder = write_encoder(tmp_path / kind, kind=kind)
    config = small({"model.text.encoder": str(folder)}).model.text
    backbone = TextBackbone.build(config, vocab_size=0, pad_id=0).eval()
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    tokens = torch.where(mask, 5 + torch.arange(21).view(3, 7), 0)
    words = torch.where(mask, torch.arange(7), -1)
    expected = backbone(tokens, mask, words, 7)
    with pretended() as record:
        backbone.to(CUDA)
        given = [tensor.to(CUDA) for tensor in (tokens, mask, words)]
        record.clear()
        found = backbone(*given, 7)
        assert record.waits.total() == (kind == "mpnet"), record.waits
        torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=0)


def test_a_frozen_encoder_copies_a_batch_at_a_time(data: Path, tmp_path: Path) -> None:
    encoder = {"model.text.encoder": str(write_encoder(tmp_path / "encoder"))}
    with pretended() as record:
        experiment = open_experiment(
            small(encoder | FROZEN), data_folder=data, cache_dir=tmp_path, device=CUDA
        )
        experiment.model.backbone.to(CUDA)
        record.clear()
        features = encode_frozen(
            experiment.dev,
            experiment.model.backbone,
            cache_dir=tmp_path / "others",
            device=CUDA,
            batch_size=4,
        )
    file = "cpfean/training/text_cache.py"
    copies = [times for where, times in record.waits.items() if where.startswith(file)]
    assert sum(copies) == 4  # of 15 captions
    assert experiment.dev.word_features is not None
    torch.testing.assert_close(
        torch.tensor(features.values), torch.tensor(experiment.dev.word_features.values)
    )
