"""The model as a whole, on random fragments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cpfean.config import ExperimentConfig, ModelConfig
from cpfean.model.cpfean import Cpfean, LabelEmbeddings, ModelInputs
from cpfean.model.embeddings import masked_mean, unit
from cpfean.model.reasoning import overlap_graph, suppress_overlapping, word_window
from cpfean.model.text_encoder import TextBackbone, pool_words

NUM_LABELS = 6
VOCABULARY = 50

SWITCHES: dict[str, dict[str, Any]] = {
    "the default": {},
    "no fusion": {"alignment.fusion": False, "alignment.prominence": True},
    "gate hard": {"alignment.gate": "hard"},
    "gate off": {"alignment.gate": "off"},
    "weighted words": {"alignment.prominence": True},
    "cross attention": {"alignment.kind": "cross_attention", "alignment.global_weight": 0.0},
    "global only": {"alignment.global_weight": 1.0},
    "local only": {"alignment.global_weight": 0.0},
    "two rounds": {"alignment.rounds": 2},
    "no priors": {"regions.prior": False},
    "no confidence": {"regions.label_confidence": False},
    "no geometry": {"regions.geometry": False},
    "no visual Transformer": {"regions.layers": 0},
    "dense regions": {"regions.graph": "dense"},
    "filtered regions": {"regions.graph": "filtered"},
    "no consensus": {"words.consensus": False},
    "no static words": {"text.static": False},
    "no GCN": {"words.layers": 0},
    "word window": {"words.graph": "window"},
    "syntax": {"words.graph": "syntax"},
}


def make_config(overrides: dict[str, Any]) -> ModelConfig:
    base = {
        "dim": 16,
        "regions.heads": 4,
        "text.scratch_dim": 16,
        "regions.dropout": 0.0,
    }
    changes = {f"model.{path}": value for path, value in (base | overrides).items()}
    return ExperimentConfig().with_overrides(changes).model


def make_model(overrides: dict[str, Any] | None = None, *, seed: int = 0) -> Cpfean:
    config = make_config(overrides or {})
    torch.manual_seed(seed)
    backbone = TextBackbone.build(config.text, vocab_size=VOCABULARY, pad_id=0)
    pieces = torch.randint(1, VOCABULARY, (NUM_LABELS, 2))
    pieces[::2, 1] = -1
    model = Cpfean(
        config,
        inputs=ModelInputs(
            feature_dim=10, has_boxes=True, label_names=tuple("abcdef"[:NUM_LABELS])
        ),
        backbone=backbone,
        labels=LabelEmbeddings(pieces=pieces),
    )
    return model.double().eval()


def make_batch(seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three images of 5, 3 and 4 regions; four captions of 2, 4, 1 and 3 words."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    region_mask = torch.arange(5)[None, :] < torch.tensor([[5], [3], [4]])
    iou = random(3, 5, 5)
    iou = torch.maximum(iou, iou.transpose(1, 2))
    iou.diagonal(dim1=1, dim2=2).fill_(1.0)
    images = {
        "features": random(3, 5, 10) - 0.5,
        "geometry": random(3, 5, 5),
        "iou": iou.half(),
        "labels": torch.randint(0, NUM_LABELS, (3, 5), generator=generator),
        "shown_labels": torch.arange(NUM_LABELS),
        "confidences": random(3, 5),
        "region_mask": region_mask,
    }
    num_words = torch.tensor([2, 4, 1, 3])
    word_mask = torch.arange(4)[None, :] < num_words[:, None]
    token_mask = torch.arange(6)[None, :] < num_words[:, None] + 2
    word_index = torch.arange(6).expand(4, 6) - 1
    word_index = torch.where(word_index < num_words[:, None], word_index, -1)
    tokens = torch.randint(1, VOCABULARY, (4, 6), generator=generator)
    links = random(4, 4, 4) > 0.5
    captions = {
        "tokens": torch.where(token_mask, tokens, 0),
        "token_mask": token_mask,
        "word_index": word_index,
        "word_mask": word_mask,
        "word_links": links | links.transpose(1, 2),
    }
    return images, captions


@pytest.mark.parametrize("switch", SWITCHES)
def test_only_what_is_used_is_built(switch: str) -> None:
    """Data-parallel training waits for the gradient of every weight that was built."""
    model = make_model(SWITCHES[switch])
    images, captions = make_batch()
    scores = model(images, captions)
    (scores * torch.randn_like(scores)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("switch", SWITCHES)
def test_pairs_do_not_depend_on_their_company(switch: str) -> None:
    model = make_model(SWITCHES[switch])
    images, captions = make_batch()
    scores = model(images, captions)
    one_image = {key: value[1:2] for key, value in images.items() if key != "shown_labels"}
    one_image["shown_labels"] = one_image["labels"].unique()
    one_caption = {key: value[3:4] for key, value in captions.items()}
    torch.testing.assert_close(model(one_image, captions), scores[1:2], atol=1e-10, rtol=0)
    torch.testing.assert_close(model(images, one_caption), scores[:, 3:4], atol=1e-10, rtol=0)


@pytest.mark.parametrize("switch", SWITCHES)
def test_scores_are_cosines(switch: str) -> None:
    model = make_model(SWITCHES[switch])
    assert model(*make_batch()).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "filtered regions"])
def test_order_of_the_regions_does_not_matter(switch: str) -> None:
    """But for suppression, which goes by confidence."""
    model = make_model(SWITCHES[switch])
    images, captions = make_batch()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    shown = {"shown_labels": images["shown_labels"]}
    shuffled = {key: value[:, order] for key, value in images.items() if key not in shown} | shown
    shuffled["iou"] = shuffled["iou"][:, :, order]
    torch.testing.assert_close(
        model(shuffled, captions), model(images, captions), atol=1e-10, rtol=0
    )


def test_many_images_and_captions_score_as_few_do() -> None:
    """Blocks and length groups are invisible."""
    model = make_model()
    images, captions = make_batch()
    encoded_images = model.encode_images(**images).rows(torch.arange(40) % 3)
    encoded_captions = model.encode_captions(**captions).rows(torch.arange(70) % 4)
    few = model(images, captions)
    many = model.score(encoded_images, encoded_captions)
    expected = few[torch.arange(40) % 3][:, torch.arange(70) % 4]
    torch.testing.assert_close(many, expected, atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            model.score(encoded_images, encoded_captions), many, atol=1e-12, rtol=0
        )


def test_confident_labels_move_a_region_more() -> None:
    model = make_model()
    images, _ = make_batch()
    regions = torch.zeros(1, 2, 16, dtype=torch.float64)
    labels = torch.ones(1, 2, 16, dtype=torch.float64)
    confidences = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    assert model.text_prior is not None
    moved = model.text_prior(regions, labels, confidences)
    torch.testing.assert_close(moved[0, :, 0], 2 * confidences[0])
    unknown = model.text_prior(regions, labels, None)
    torch.testing.assert_close(unknown, torch.ones_like(unknown))
    assert torch.isfinite(model.text_prior(regions, labels, torch.ones_like(confidences))).all()
    assert images["labels"].shape == (3, 5)


def test_mixed_precision_tells_confidences_near_1_apart() -> None:
    """Those above 0.998 are all 1 in bfloat16, and those below may be a 256th off."""
    model = make_model().float()
    assert model.text_prior is not None
    regions, labels = torch.zeros(1, 4, 16), torch.ones(1, 4, 16)
    confidences = torch.tensor([[0.99, 0.994, 0.996, 0.9985]])
    odds = confidences / (1 - confidences)
    for trust in (model.text_prior.trust.weight, model.text_prior.trust.bias):
        torch.nn.init.constant_(trust, -0.5)  # so that no sigmoid is flat
    expected = model.text_prior(regions, labels, confidences)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.text_prior(regions, labels, confidences)
    assert (odds.diff() > 0).all()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_words_are_means_of_their_pieces() -> None:
    pieces = torch.arange(10.0).reshape(1, 5, 2)
    words = pool_words(pieces, torch.tensor([[-1, 0, 0, 1, -1]]), 3)
    torch.testing.assert_close(words, torch.tensor([[[3.0, 4.0], [6.0, 7.0], [0.0, 0.0]]]))


def test_a_word_is_its_contextual_vector_beside_its_static_one() -> None:
    model = make_model()
    _, captions = make_batch()
    arguments = captions["tokens"], captions["token_mask"], captions["word_index"]
    contextual = model.backbone(*arguments, 4)
    both = model.backbone.beside_static(contextual, captions["tokens"], captions["word_index"])
    table = model.backbone.piece_embeddings().weight

    def normalized(vector: Tensor) -> Tensor:
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt()

    for caption, (ids, index) in enumerate(zip(arguments[0], arguments[2], strict=True)):
        for word in range(int(index.max()) + 1):
            static = torch.stack([table[i] for i, w in zip(ids, index, strict=True) if w == word])
            expected = [normalized(contextual[caption, word]), normalized(static.mean(dim=0))]
            torch.testing.assert_close(both[caption, word], torch.cat(expected))
    assert model.word_projection.in_features == both.shape[-1] == 2 * contextual.shape[-1]
    # What a frozen encoder made of the tokens may be given in its place.
    given = model.encode_captions(**captions, word_features=contextual)
    torch.testing.assert_close(given.words, model.encode_captions(**captions).words)


def test_salience_is_the_squared_share_of_the_captions_largest_consensus() -> None:
    model = make_model()
    _, captions = make_batch()
    assert model.consensus is not None
    assert (model.encode_captions(**captions).salience == 1).all()  # before anything is known
    generator = torch.Generator().manual_seed(1)
    model.consensus.copy_(torch.rand(VOCABULARY, generator=generator))
    model.consensus[captions["tokens"][1, 1]] = 0.0
    found = model.encode_captions(**captions).salience
    for caption in range(4):
        index, ids = captions["word_index"][caption], captions["tokens"][caption]
        words = [model.consensus[ids[index == k]].mean() for k in range(int(index.max()) + 1)]
        consensus = torch.stack(words).clamp(min=0.02)
        torch.testing.assert_close(found[caption, : len(words)], (consensus / consensus.max()) ** 2)
        assert (found[caption, len(words) :] == 1).all()
    state = model.own_state()
    torch.testing.assert_close(state["consensus"], model.consensus)
    plain = make_model({"words.consensus": False})
    assert "consensus" not in plain.own_state()
    assert (plain.encode_captions(**captions).salience == 1).all()


def test_without_its_static_vector_a_word_depends_on_its_context_alone() -> None:
    model = make_model({"text.static": False})
    assert model.word_projection.in_features == model.backbone.text_dim


def test_pooled_fragments_leave_padding_out() -> None:
    fragments = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]]])
    mean = masked_mean(fragments, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(mean, torch.tensor([[2.0, 2.0]]))
    torch.testing.assert_close(unit(mean).norm(dim=1), torch.ones(1))


def test_neighbours_overlap_by_more_than_the_threshold() -> None:
    iou = torch.tensor([[[1.0, 0.2, 0.3], [0.2, 1.0, 0.0], [0.3, 0.0, 1.0]]])
    edges = overlap_graph(iou, threshold=0.2)
    assert edges[0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    nothing = overlap_graph(torch.zeros(1, 2, 2), threshold=1.0)
    assert nothing[0].tolist() == [[True, False], [False, True]]


def test_suppression_keeps_the_first_of_what_overlaps() -> None:
    """Region 1 goes because of region 0; region 2, which only overlaps region 1, stays."""
    iou = torch.eye(4).repeat(1, 1, 1)
    for one, other in ((0, 1), (1, 2)):
        iou[0, one, other] = iou[0, other, one] = 0.8
    mask = torch.tensor([[True, True, True, False]])
    assert suppress_overlapping(iou, mask, threshold=0.5).tolist() == [[True, False, True, False]]
    assert torch.equal(suppress_overlapping(iou, mask, threshold=0.8), mask)


def test_window_reaches_two_words_each_way() -> None:
    window = word_window(5, radius=2, device=torch.device("cpu"))
    assert window[0].tolist() == [True, True, True, False, False]
    assert window[2].all()
