"""Named complete configurations, for --config NAME."""

from __future__ import annotations

from cpfean.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    RegionConfig,
    TextConfig,
)

# The generated set: about 80 s on one CPU core. Its features are as noisy as they are long, and
# with larger batches the hardest negatives are hopeless from the start: the training collapses (at
# 64 pairs to a rSum below 130, where 16 reach more than 300).
SYNTHETIC = ExperimentConfig(
    data=DataConfig(path="synthetic", num_regions=24),
    model=ModelConfig(
        dim=64,
        text=TextConfig(encoder="scratch", scratch_dim=64, scratch_layers=1),
        regions=RegionConfig(heads=4),
    ),
    optim=OptimConfig(epochs=6, batch_size=16, learning_rate=1.5e-3, decay_epoch=5),
)

# Own data on a laptop: no download, a word-piece vocabulary and a small encoder of its own.
SMALL = ExperimentConfig(
    data=DataConfig(num_regions=36, region_dropout=0.3333),
    model=ModelConfig(
        dim=256,
        text=TextConfig(encoder="scratch", scratch_dim=256, scratch_layers=2),
        regions=RegionConfig(heads=8),
    ),
    optim=OptimConfig(epochs=9, batch_size=128, learning_rate=5e-4, decay_epoch=6),
)

# Full size, as the field trains: see docs/model.md, section 7. One GPU or several.
FLICKR30K = ExperimentConfig(
    data=DataConfig(num_regions=36),
    model=ModelConfig(
        dim=1024, text=TextConfig(encoder="bert-base-uncased"), regions=RegionConfig(heads=16)
    ),
    optim=OptimConfig(
        epochs=25,
        batch_size=128,
        learning_rate=5e-4,
        text_learning_rate=5e-5,
        weight_decay=1e-4,
        decay_epoch=15,
    ),
)

COCO = ExperimentConfig(
    data=FLICKR30K.data,
    model=FLICKR30K.model,
    optim=FLICKR30K.optim,
    evaluation=EvaluationConfig(protocol="coco-1k"),
)

BASELINES: dict[str, ExperimentConfig] = {
    "synthetic": SYNTHETIC,
    "small": SMALL,
    "flickr30k": FLICKR30K,
    "coco": COCO,
}
