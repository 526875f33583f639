"""The ablation registry: one change to the full model each, and the question it answers."""

from __future__ import annotations

from orchestration.ablation import Ablation

ABLATIONS: tuple[Ablation, ...] = (
    Ablation(
        name="no_fusion",
        question="What does gated cross-modal fusion add over plain mutual attention?",
        overrides={
            "model.alignment.fusion": False,
            "model.alignment.gate": "off",
            "model.alignment.rounds": 1,
        },
    ),
    Ablation(
        name="no_priors",
        question="What do the object labels' text embeddings add to their regions?",
        overrides={"model.regions.prior": False},
    ),
    Ablation(
        name="no_label_confidence",
        question="Does it help to trust a label by the detector's confidence in it?",
        overrides={"model.regions.label_confidence": False},
    ),
    Ablation(
        name="no_gcn",
        question="What do relations among words (the textual graph convolution) add?",
        overrides={"model.words.layers": 0},
    ),
    Ablation(
        name="no_visual_transformer",
        question="What do relations among regions (the visual Transformer) add?",
        overrides={"model.regions.layers": 0},
    ),
    Ablation(
        name="no_prominence",
        question="Does it help that words which many relevant regions name count for more?",
        overrides={"model.alignment.prominence": False},
    ),
    Ablation(
        name="no_global",
        question="How far does the paper's own form come, without the pooled part of the score?",
        overrides={"model.alignment.global_weight": 0.0},
    ),
    Ablation(
        name="dense_regions",
        question="Is attention among overlapping regions better than among all of them?",
        overrides={"model.regions.graph": "dense"},
    ),
    Ablation(
        name="cross_attention",
        question="How does SCAN's cross-attention, alone, compare with prominent fragments?",
        overrides={
            "model.alignment.kind": "cross_attention",
            "model.alignment.global_weight": 0.0,
            "model.alignment.rounds": 1,
        },
    ),
    Ablation(
        name="cross_attention_with_global",
        question="And with the same pooled part of the score beside it?",
        overrides={"model.alignment.kind": "cross_attention", "model.alignment.rounds": 1},
    ),
)
