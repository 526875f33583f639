"""What is true of CPFEAN's own scorer alone."""

from __future__ import annotations

import torch

from cpfean.config import AlignmentConfig
from cpfean.model.scorers.pairs import every_pair
from cpfean.model.scorers.prominent import ProminentAlignment
from tests.model.scorers.fragments import DIM, embed, gradients, make_fragments


def test_hard_gate_is_the_limit_of_a_sharp_soft_gate() -> None:
    images, captions = embed(*make_fragments(5))
    hard = ProminentAlignment(AlignmentConfig(gate="hard"), dim=DIM).double()
    soft = ProminentAlignment(AlignmentConfig(gate_sharpness=1000.0), dim=DIM).double()
    with torch.no_grad():
        soft.log_sharpness += 5
    gap = (
        hard.align(every_pair(images, captions)).gates
        - soft.align(every_pair(images, captions)).gates
    ).abs()
    assert gap.max() < 1e-3


def test_an_image_with_every_gate_closed_still_has_a_finite_score_and_gradient() -> None:
    leaves = list(make_fragments(6))
    images, captions = embed(*leaves)
    images = images._replace(thresholds=torch.full_like(images.thresholds, 2.0))
    for gate in ("hard", "soft"):
        scorer = ProminentAlignment(AlignmentConfig(gate=gate), dim=DIM).double()
        scores = scorer(every_pair(images, captions))
        assert scores.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(scores, leaves[:2]))


def test_gates_prominence_and_weights_are_what_they_claim_to_be() -> None:
    images, captions = embed(*make_fragments(8))
    alignment = (
        ProminentAlignment(AlignmentConfig(), dim=DIM).double().align(every_pair(images, captions))
    )
    assert (alignment.gates[~images.mask[:, None, :].expand_as(alignment.gates)] == 0).all()
    assert ((alignment.gates >= 0) & (alignment.gates <= 1)).all()
    torch.testing.assert_close(
        alignment.prominence.sum(dim=2), torch.ones_like(alignment.prominence[:, :, 0])
    )
    torch.testing.assert_close(alignment.word_weights.sum(dim=2), torch.ones_like(alignment.local))
    hidden = ~captions.mask[None].expand_as(alignment.word_weights)
    assert (alignment.word_weights[hidden] == 0).all()
