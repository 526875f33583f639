"""The ablation registry: one change to the full model each, and the question it answers."""

from __future__ import annotations

from orchestration.study.variants import Ablation

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
        name="no_consensus",
        question="Does it help that words on which an image's captions agree are prominent first?",
        overrides={"model.words.consensus": False},
    ),
    Ablation(
        name="no_static_words",
        question="What do words' static vectors add to their contextual ones?",
        overrides={"model.text.static": False},
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
        name="no_reasoning",
        question="What do both kinds of reasoning within a modality add together?",
        overrides={"model.words.layers": 0, "model.regions.layers": 0},
    ),
    Ablation(
        name="prominent_words_weigh_more",
        question="Does it help that words which many relevant regions name count for more?",
        overrides={"model.alignment.prominence": True},
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
        name="filtered_regions",
        question="Is dropping overlapping regions better than reasoning over them?",
        overrides={"model.regions.graph": "filtered"},
    ),
    Ablation(
        name="window_words",
        question="Is it enough for a word to see its two neighbours on either side?",
        overrides={"model.words.graph": "window"},
    ),
    Ablation(
        name="syntax_words",
        question="Are dependency edges better than all words seeing each other?",
        overrides={"model.words.graph": "syntax"},
    ),
    Ablation(
        name="hard_gate",
        question="Is a gate that is either open or closed better than a soft one?",
        overrides={"model.alignment.gate": "hard"},
    ),
    Ablation(
        name="two_rounds",
        question="Does fusing twice bring more than fusing once?",
        overrides={"model.alignment.rounds": 2},
    ),
    Ablation(
        name="three_rounds",
        question="And three times?",
        overrides={"model.alignment.rounds": 3},
    ),
    *(
        Ablation(
            name=f"regions_{count}",
            question=f"How far do the {count} surest regions of an image go?",
            overrides={"data.num_regions": count},
        )
        for count in (12, 18, 24, 30, 36)
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
