"""CPFEAN, composed: padded fragments and masks in, a score matrix out.

Axes:  image, caption   in the batch      region, word, piece   fragments of each, padded
       dim              width of the joint embedding space
       feature          width of the detector's features        text_dim   of the text encoder
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpfean.config import ExperimentConfig, ModelConfig
from cpfean.errors import CheckpointError
from cpfean.model.alignment import (
    Alignment,
    ProminentAlignment,
    every_pair,
)
from cpfean.model.baselines import CrossAttention, GeneralizedPooling, HardCoding
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, masked_mean, unit
from cpfean.model.image_encoder import ImageEncoder
from cpfean.model.reasoning import RegionReasoning, WordReasoning
from cpfean.model.scoring import local_scores
from cpfean.model.text_encoder import TextBackbone
from cpfean.model.text_prior import TextPrior

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What the model has to know of the data it is built for.

    Attributes:
        feature_dim: width of a region's feature vector.
        has_boxes: whether regions come with boxes, hence geometry and overlaps.
        label_names: the object vocabulary; None for data without labels.
    """

    feature_dim: int
    has_boxes: bool
    label_names: tuple[str, ...] | None


class LabelEmbeddings(nn.Module):
    """A text embedding for each name of the object vocabulary.

    For a pretrained encoder: its contextual embedding of the name before any training, frozen. An
    encoder that starts from nothing has none worth freezing; there a name is the mean of its word
    pieces in the encoder's own table, as far as that is trained, scaled as the encoder's outputs
    are: the rows of a fresh table are fifty times shorter.
    """

    pieces: Tensor | None
    vectors: Tensor | None

    def __init__(self, *, pieces: Tensor | None = None, vectors: Tensor | None = None) -> None:
        """Takes either.

        Args:
            pieces: (label, piece) ids of the word pieces of each name, padded with -1.
            vectors: (label, text_dim) frozen embeddings.
        """
        super().__init__()
        self.register_buffer("pieces", pieces)
        self.register_buffer("vectors", vectors)

    def forward(
        self, labels: Int[Tensor, " label"], backbone: TextBackbone
    ) -> Float[Tensor, "label text_dim"]:
        """The embeddings of these labels' names."""
        if self.vectors is not None:
            return self.vectors[labels]
        assert self.pieces is not None
        pieces = self.pieces[labels]
        vectors = backbone.piece_embeddings()(pieces.clamp(min=0))
        scaled = nn.functional.layer_norm(vectors, vectors.shape[-1:])
        return masked_mean(scaled, pieces >= 0)


class Cpfean(nn.Module):
    """Cross-modal Prominent Fragments Enhancement Aligning Network.

    score = (1 - eta) local + eta global: `local` from the fragments (`ProminentAlignment`, or a
    scorer of the field), `global` the cosine of the pooled regions and the pooled words. In cosine
    units, in [-1, 1].

    Source: arXiv:2311.02183; docs/model.md says what is the paper's, the peers' and ours.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        inputs: ModelInputs,
        backbone: TextBackbone,
        labels: LabelEmbeddings | None,
    ) -> None:
        """Builds only what the configuration uses.

        Args:
            config: the model.
            inputs: of the data.
            backbone: the text encoder.
            labels: embedded object vocabulary; None for data without labels.
        """
        super().__init__()
        self.config = config
        self.inputs = inputs
        self.backbone = backbone
        self.image_encoder = ImageEncoder(
            feature_dim=inputs.feature_dim,
            dim=config.dim,
            geometry=config.regions.geometry and inputs.has_boxes,
        )
        self.word_projection = nn.Linear(backbone.text_dim, config.dim)  # FC_w
        self.labels = labels if config.regions.prior else None
        self.text_prior = (
            TextPrior(dim=config.dim, use_confidence=config.regions.label_confidence)
            if self.labels is not None
            else None
        )
        # The pooled regions are those before reasoning: a score of them alone needs no Transformer.
        layers = config.regions.layers if config.alignment.global_weight < 1 else 0
        self.region_reasoning = RegionReasoning(
            replace(config.regions, layers=layers), dim=config.dim
        )
        self.word_reasoning = WordReasoning(config.words, dim=config.dim)
        self.global_weight = config.alignment.global_weight
        generalized = config.alignment.pooling == "generalized"
        self.region_pooling = GeneralizedPooling() if generalized else masked_mean
        self.word_pooling = GeneralizedPooling() if generalized else masked_mean
        self.scorer: nn.Module | None = None
        if self.global_weight < 1:
            if config.alignment.kind == "prominent":
                self.scorer = ProminentAlignment(config.alignment, dim=config.dim)
            elif config.alignment.kind == "cross_attention":
                self.scorer = CrossAttention(
                    inverse_temperature=config.alignment.region_temperature
                )
            else:
                self.scorer = HardCoding(temperature=1 / config.alignment.word_temperature)

    def encode_images(
        self,
        features: Float[Tensor, "image region feature"],
        geometry: Float[Tensor, "image region 5"] | None,
        iou: Float[Tensor, "image region region"] | None,
        labels: Int[Tensor, "image region"] | None,
        confidences: Float[Tensor, "image region"] | None,
        region_mask: Bool[Tensor, "image region"],
    ) -> ImageEmbeddings:
        """Regions with their textual prior, aware of each other.

        Args:
            features: of the detector, any floating type.
            geometry: (x1/W, y1/H, x2/W, y2/H, area/(W H)).
            iou: intersection over union of the boxes.
            labels: index of the object's label.
            confidences: the detector's, in the label, in [0, 1].
            region_mask: True where a region is real; every image has one.
        """
        regions = self.image_encoder(features, geometry)
        if self.text_prior is not None and self.labels is not None:
            assert labels is not None, "the model was built for data with labels"
            # Each name once: a batch shows few of the vocabulary's, and most of them often.
            shown, place = labels.unique(return_inverse=True)
            names = self.word_projection(self.labels(shown, self.backbone))
            regions = self.text_prior(regions, names[place], confidences)
        dtype = self.word_projection.weight.dtype
        overlap = None if iou is None else iou.to(dtype)
        mask = self.region_reasoning.keep(region_mask, overlap)
        pooled = unit(self.region_pooling(regions, mask)).to(dtype)
        thresholds = (
            self.scorer.thresholds(regions).to(dtype)
            if isinstance(self.scorer, ProminentAlignment)
            else regions.new_zeros(regions.shape[:2], dtype=dtype)
        )
        if self.scorer is not None:
            regions = unit(self.region_reasoning(regions, mask, overlap))
        return ImageEmbeddings(regions.to(dtype), mask, pooled, thresholds)

    def encode_captions(
        self,
        tokens: Int[Tensor, "caption piece"],
        token_mask: Bool[Tensor, "caption piece"],
        word_index: Int[Tensor, "caption piece"],
        word_mask: Bool[Tensor, "caption word"],
        word_links: Bool[Tensor, "caption word word"] | None = None,
        word_features: Float[Tensor, "caption word text_dim"] | None = None,
    ) -> CaptionEmbeddings:
        """Words, aware of each other.

        Args:
            tokens: ids of the word pieces.
            token_mask: True where a piece is real.
            word_index: which word a piece belongs to, -1 for none.
            word_mask: True where a word is real; every caption has one.
            word_links: dependency edges, for the syntax graph.
            word_features: what the frozen text encoder made of the tokens; used in its place.
        """
        if word_features is None:
            word_features = self.backbone(tokens, token_mask, word_index, word_mask.shape[1])
        words = self.word_projection(word_features.to(self.word_projection.weight.dtype))
        words = unit(self.word_reasoning(words, word_mask, word_links))
        words = words.to(self.word_projection.weight.dtype)
        return CaptionEmbeddings(words, word_mask, unit(self.word_pooling(words, word_mask)))

    def score(
        self, images: ImageEmbeddings, captions: CaptionEmbeddings
    ) -> Float[Tensor, "image caption"]:
        """Scores every image against every caption; neither order matters.

        Under autocast the products of regions and words are made in its type, nothing else is.
        """
        with torch.autocast(images.pooled.device.type, enabled=False):
            pooled = images.pooled @ captions.pooled.T
        if self.scorer is None:
            return pooled
        local = local_scores(self.scorer, images, captions)
        return (1 - self.global_weight) * local + self.global_weight * pooled

    def align(self, images: ImageEmbeddings, captions: CaptionEmbeddings) -> Alignment:
        """Gates, prominent words and word weights behind the local scores of every pair.

        Raises:
            ValueError: the model's alignment is not CPFEAN's own, so it has none.
        """
        if not isinstance(self.scorer, ProminentAlignment):
            raise ValueError('only alignment.kind = "prominent" has gates and prominent words')
        return self.scorer.align(every_pair(images, captions))

    def forward(self, images: dict[str, Any], captions: dict[str, Any]) -> Tensor:
        """The score matrix of a batch: the arguments of both encoders, by name."""
        return self.score(self.encode_images(**images), self.encode_captions(**captions))

    def save_pretrained(self, folder: Path, *, state: dict[str, Tensor] | None = None) -> None:
        """Writes `config.json` and `model.safetensors`.

        A frozen text encoder is named by its fingerprint and not written: `from_pretrained` loads
        it from where the configuration says.

        Args:
            folder: made if absent.
            state: weights to write in place of the present ones, as `own_state` gave them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format": _FORMAT,
            "model": ExperimentConfig(model=self.config).to_dict()["model"],
            "inputs": asdict(self.inputs),
            "text_encoder": self.backbone.shape,
            "text_fingerprint": None if self.backbone.trainable else self.backbone.fingerprint(),
        }
        text = json.dumps(description, indent=1, ensure_ascii=False, default=str)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(state or self.own_state(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path, *, text_encoder: str | None = None) -> Cpfean:
        """Reads what `save_pretrained` wrote.

        Args:
            folder: with `config.json` and `model.safetensors`.
            text_encoder: where a frozen text encoder is now, if it has moved.

        Raises:
            CheckpointError: the folder is not such a model, is damaged, or its frozen text encoder
                is not the one it was trained with.
        """
        try:
            description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "model.safetensors")
            found = description["format"]
            if found != _FORMAT:
                raise CheckpointError(f"{folder}: format {found}, this release reads {_FORMAT}.")
            config = ExperimentConfig.from_dict({"model": description["model"]}).model
            names = description["inputs"].pop("label_names")
            inputs = ModelInputs(
                **description["inputs"], label_names=None if names is None else tuple(names)
            )
            expected, shape = description["text_fingerprint"], description["text_encoder"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{folder}: not a saved model ({reason}).") from None
        except Exception as error:  # safetensors has an exception of its own for damaged files
            if type(error).__name__ != "SafetensorError":
                raise
            raise CheckpointError(f"{folder}/model.safetensors: damaged ({error}).") from None
        if expected is None:
            backbone = TextBackbone.from_shape(shape, trainable=True)
        else:
            if text_encoder is not None:
                config = (
                    ExperimentConfig(model=config)
                    .with_overrides({"model.text.encoder": text_encoder})
                    .model
                )
            backbone = TextBackbone.build(config.text, vocab_size=0, pad_id=0)
            if backbone.fingerprint() != expected:
                raise CheckpointError(
                    f"{folder}: the text encoder {config.text.encoder!r} has fingerprint "
                    f"{backbone.fingerprint()}, the model was trained with {expected}."
                )
        labels = LabelEmbeddings(
            pieces=tensors.get("labels.pieces"), vectors=tensors.get("labels.vectors")
        )
        has_labels = any(name.startswith("labels.") for name in tensors)
        model = cls(config, inputs=inputs, backbone=backbone, labels=labels if has_labels else None)
        model.load_own_state(tensors, source=str(folder))
        return model.eval()

    def own_state(self) -> dict[str, Tensor]:
        """The weights that training changes, and the label embeddings; contiguous, by name."""
        frozen = () if self.backbone.trainable else ("backbone.",)
        return {
            name: tensor.detach().contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith(frozen)
        }

    def load_own_state(self, tensors: dict[str, Tensor], *, source: str) -> None:
        """Takes back what `own_state` gave.

        Raises:
            CheckpointError: names or shapes are not this model's.
        """
        own = self.own_state()
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [
            name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape
        ]
        if wrong:
            raise CheckpointError(f"{source}: weights of another model: {', '.join(wrong[:5])}.")
        self.load_state_dict(tensors, strict=False)
