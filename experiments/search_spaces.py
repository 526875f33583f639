"""Named search spaces, for `sweep.py --space NAME`."""

from __future__ import annotations

from orchestration.proposals.search_space import Choice, Range, SearchSpace

_GATE = "model.alignment.gate"
_THRESHOLD = "model.alignment.gate_threshold"

DEFAULT = SearchSpace(
    name="default",
    question="Which gate, overlap threshold, margin and region count suit this data?",
    parameters={
        _GATE: Choice(("soft", "hard", "off")),
        _THRESHOLD: Range(0.0, 0.4, step=0.05),
        "model.regions.iou_threshold": Range(0.1, 0.6, step=0.1),
        "loss.margin": Range(0.1, 0.4, step=0.05),
        "data.num_regions": Choice((12, 18, 24, 36)),
    },
    only_if={_THRESHOLD: (_GATE, ("soft", "hard"))},  # a gate that is off has no threshold
)

GATE = SearchSpace(
    name="gate",
    question="Which gate, and how much of the score is the pooled one, at fixed data and loss?",
    parameters={
        _GATE: DEFAULT.parameters[_GATE],
        _THRESHOLD: DEFAULT.parameters[_THRESHOLD],
        "model.alignment.gate_sharpness": Range(2.0, 40.0, log=True),
        "model.alignment.global_weight": Range(0.0, 1.0, step=0.1),
    },
    only_if={
        _THRESHOLD: (_GATE, ("soft", "hard")),
        "model.alignment.gate_sharpness": (_GATE, ("soft", "hard")),
    },
)

OPTIMIZER = SearchSpace(
    name="optimizer",
    question="Which learning rate, margin and regularization suit this data?",
    parameters={
        "optim.learning_rate": Range(1e-4, 3e-3, log=True),
        "loss.margin": Range(0.1, 0.4, step=0.05),
        "data.region_dropout": Choice((0.0, 0.2, 0.33)),
        "optim.weight_decay": Range(1e-5, 1e-2, log=True),
    },
)

SEARCH_SPACES: dict[str, SearchSpace] = {space.name: space for space in (DEFAULT, GATE, OPTIMIZER)}
