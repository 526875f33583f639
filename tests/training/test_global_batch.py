"""The loss of a batch against the definition; on several processes: test_distributed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import GlobalBatches
from cpfean.data.synthetic import write_synthetic
from cpfean.training.global_batch import GlobalBatchLoss
from cpfean.training.setup import open_experiment
from tests.losses.test_triplet import naive_loss
from tests.training.conftest import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("mining", ["hardest", "all"])
@pytest.mark.parametrize("sizes", [(5,), (1,), (10,), (4, 7, 6, 5)])
def test_captions_of_one_image_are_no_negatives_of_each_other(
    sizes: tuple[int, ...],
    mining: Literal["hardest", "all"],
    tiny_config: ExperimentConfig,
    tmp_path: Path,
) -> None:
    write_synthetic(tmp_path / "data", TINY, captions_each=sizes)
    opened = open_experiment(
        tiny_config, data_folder=tmp_path / "data", cache_dir=tmp_path, device=CPU
    )
    model = opened.model.double().eval()
    step = GlobalBatchLoss(model, margin=0.2)
    owners = [image for image in range(16) for _ in range(sizes[image % len(sizes)])]
    assert len(opened.train) == len(owners)
    shared = 0
    for request in GlobalBatches(len(owners), 10, seed=0, epoch=1):
        batch = opened.train.training_batch(request)
        loss = step(batch, mining, len(request.pairs))
        images = torch.tensor([owners[pair] for pair in request.pairs])
        shared += len(images) - len(images.unique())
        scores = model.score(
            model.encode_images(**batch.images._asdict()),
            model.encode_captions(**batch.captions._asdict()),
        )
        torch.testing.assert_close(loss, naive_loss(scores, images, 0.2, mining))
    assert (shared > 0) == (sizes != (1,))  # else nothing was left out
