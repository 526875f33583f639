"""Small search spaces."""

from orchestration.proposals.search_space import Choice, Range, SearchSpace

GATE = "model.alignment.gate"
THRESHOLD = "model.alignment.gate_threshold"
SPACE = SearchSpace(
    name="space",
    question="?",
    parameters={
        GATE: Choice(("soft", "off")),
        THRESHOLD: Range(0.0, 0.4, step=0.1),
        "loss.margin": Range(0.1, 0.4),
    },
    only_if={THRESHOLD: (GATE, ("soft",))},
)
FOUR = SearchSpace(
    name="four",
    question="?",
    parameters={
        "data.num_regions": Choice((2, 4)),
        "model.words.layers": Range(0, 1),
    },
)
