"""The methods of `compare.py`: the full model, and the field's scorers in two forms.

As published, a baseline sees no object labels and its fragments do not reason over each other. "On
the full encoder" it has everything that the full model has, and differs in the score and in its
margin alone. Either way it may have words' static vectors, which are searched for all alike.

The first point that a method is tuned at has its published margin and temperature, whatever the
base's are; they lie inside what is searched. All of them were published with hardest negatives.
"""

from __future__ import annotations

from collections.abc import Mapping

from cpfean.analysis.statistics import FULL
from cpfean.config import Plain
from orchestration.proposals.search_space import Choice, Range
from orchestration.study.variants import Method

_MARGIN = "loss.margin"

# Tuned for every method, beside two settings of its own.
COMMON: dict[str, Choice | Range] = {
    "optim.learning_rate": Range(2e-4, 1.5e-3, log=True),
    _MARGIN: Range(0.1, 0.3, step=0.05),
    "model.text.static": Choice((True, False)),
}

_PUBLISHED: Mapping[str, Plain] = {
    "model.regions.prior": False,
    "model.regions.layers": 0,
    "model.words.layers": 0,
}
_ALIGNMENT = "model.alignment."
_DROPOUT: dict[str, Choice | Range] = {"data.region_dropout": Range(0.1, 0.5, step=0.1)}
_DECAY: dict[str, Choice | Range] = {"optim.weight_decay": Range(1e-5, 1e-2, log=True)}
_ATTENTION: dict[str, Choice | Range] = {
    _ALIGNMENT + "region_temperature": Range(4.0, 20.0, log=True)
}
_SUM: dict[str, Choice | Range] = {_ALIGNMENT + "word_temperature": Range(5.0, 20.0, log=True)}


def _baseline(
    name: str,
    source: str,
    overrides: Mapping[str, Plain],
    knobs: Mapping[str, Choice | Range],
    *,
    margin: float = 0.2,
) -> tuple[Method, Method]:
    """As published, and on the full encoder; `margin` is the published one."""
    overrides = {_ALIGNMENT + path: value for path, value in overrides.items()} | {_MARGIN: margin}
    return (
        Method(name=name, source=source, overrides={**overrides, **_PUBLISHED}, knobs=knobs),
        Method(name=f"{name}_on_full_encoder", source=source, overrides=overrides, knobs=knobs),
    )


METHODS: tuple[Method, ...] = (
    Method(
        name=FULL,
        source="arXiv:2311.02183, as docs/model.md reads it",
        overrides={},
        knobs={_ALIGNMENT + "global_weight": Range(0.3, 0.7, step=0.1)} | _DROPOUT,
    ),
    *_baseline(
        "mean_pooling",
        "one cosine of mean fragments, as VSE++ (arXiv:1707.05612) over regions",
        {"global_weight": 1.0},
        _DROPOUT | _DECAY,
    ),
    *_baseline(
        "generalized_pooling",
        "VSE-inf (arXiv:2011.04305)",
        {"global_weight": 1.0, "pooling": "generalized"},
        _DROPOUT | _DECAY,
    ),
    *_baseline(
        "scan",
        "SCAN, text to image (arXiv:1803.08024)",
        {
            "kind": "cross_attention",
            "global_weight": 0.0,
            "rounds": 1,
            "region_temperature": 9.0,
        },
        _DROPOUT | _ATTENTION,
    ),
    *_baseline(
        "chan",
        "CHAN (CVPR 2023) with its log-sum-exp, published with a recurrent text encoder",
        {
            "kind": "hard_coding",
            "global_weight": 0.0,
            "rounds": 1,
            "word_temperature": 10.0,  # 1 / t, t = 0.1
        },
        _DROPOUT | _SUM | {_MARGIN: Range(0.005, 0.2, log=True)},
        margin=0.005,  # published as 0.05 of a score without the factor t
    ),
    *_baseline(
        "chan_mean",
        "CHAN (CVPR 2023) as published with BERT: the mean over the words",
        {"kind": "hard_coding_mean", "global_weight": 0.0, "rounds": 1},
        _DROPOUT | _DECAY | {_MARGIN: Range(0.05, 0.2, step=0.05)},
        margin=0.05,
    ),
)
