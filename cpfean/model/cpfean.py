"""CPFEAN, composed: padded fragments and masks in, a score matrix out.

Axes:  image, caption   in the batch      region, word, piece   fragments of each, padded
       dim              width of the joint embedding space
       feature          width of the detector's features        text_dim   of the text encoder
                                                        word_dim   of a word before it is projected
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpfean.config import ExperimentConfig, ModelConfig
from cpfean.errors import CheckpointError, ConfigError
from cpfean.hub import model_at
from cpfean.json_files import read_object
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, masked_mean, unit
from cpfean.model.image_encoder import ImageEncoder
from cpfean.model.pooling import POOLINGS
from cpfean.model.pretrained import config_of, skeleton_of
from cpfean.model.reasoning import RegionReasoning, WordReasoning
from cpfean.model.scorers.pairs import every_pair
from cpfean.model.scorers.prominent import Alignment, ProminentAlignment
from cpfean.model.scorers.scorer import Scorer, scorer_class
from cpfean.model.scoring import local_scores
from cpfean.model.text_encoder import TextBackbone, pool_words
from cpfean.model.text_prior import TextPrior
from cpfean.model.weights import (
    Spec,
    check_same,
    check_tensor_finite,
    read_header,
    read_metadata,
    specs,
)

_FORMAT = 2
_LEAST_SALIENCE = 0.02  # a word on which nobody agrees still counts a little
_DESCRIBED_BY = "config_sha256"  # in the header of the weights


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
            vectors: (label, word_dim) frozen embeddings.
        """
        super().__init__()
        self.register_buffer("pieces", pieces)
        self.register_buffer("vectors", vectors)

    def forward(
        self, labels: Int[Tensor, " label"], backbone: TextBackbone, *, word_dim: int
    ) -> Float[Tensor, "label word_dim"]:
        """The embeddings of these labels' names, as wide as words before they are projected."""
        if self.vectors is not None:
            return self.vectors[labels]
        assert self.pieces is not None
        pieces = self.pieces[labels]
        vectors = backbone.piece_embeddings()(pieces.clamp(min=0))
        scaled = nn.functional.layer_norm(vectors, vectors.shape[-1:])
        names = masked_mean(scaled, pieces >= 0)
        # Without a context a name has its static vector in either half.
        return names.repeat(1, word_dim // names.shape[1])


class Cpfean(nn.Module):
    """Cross-modal Prominent Fragments Enhancement Aligning Network.

    score = (1 - eta) local + eta global: `local` from the fragments (`ProminentAlignment`, or a
    scorer of the field), `global` the cosine of the pooled regions and the pooled words. In cosine
    units, in [-1, 1].

    Source: arXiv:2311.02183; docs/model.md says what is the paper's, the peers' and ours.
    """

    consensus: Tensor | None

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
        word_dim = backbone.word_dim(static=config.text.static)
        self.word_projection = nn.Linear(word_dim, config.dim)  # FC_w
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
        # Of each word piece; all alike until training captions have told.
        pieces = backbone.piece_embeddings().num_embeddings
        self.register_buffer("consensus", torch.ones(pieces) if config.words.consensus else None)
        self.global_weight = config.alignment.global_weight
        self.region_pooling = POOLINGS[config.alignment.pooling]()
        self.word_pooling = POOLINGS[config.alignment.pooling]()
        self.scorer: Scorer | None = None
        if self.global_weight < 1:
            scorer = scorer_class(config.alignment.kind)
            self.scorer = scorer.from_config(config.alignment, dim=config.dim)

    def encode_images(
        self,
        features: Float[Tensor, "image region feature"],
        geometry: Float[Tensor, "image region 5"] | None,
        iou: Float[Tensor, "image region region"] | None,
        labels: Int[Tensor, "image region"] | None,
        shown_labels: Int[Tensor, " label"] | None,
        confidences: Float[Tensor, "image region"] | None,
        region_mask: Bool[Tensor, "image region"],
    ) -> ImageEmbeddings:
        """Regions with their textual prior, aware of each other.

        Args:
            features: of the detector, any floating type.
            geometry: (x1/W, y1/H, x2/W, y2/H, area/(W H)).
            iou: intersection over union of the boxes.
            labels: index of the object's label.
            shown_labels: those that occur, each once, in rising order.
            confidences: the detector's, in the label, in [0, 1].
            region_mask: True where a region is real; every image has one.
        """
        regions = self.image_encoder(features, geometry)
        if self.text_prior is not None and self.labels is not None:
            assert labels is not None, "the model was built for data with labels"
            assert shown_labels is not None, "a batch with labels says which of them it shows"
            # Each name once: a batch shows few of the vocabulary's, and most of them often.
            word_dim = self.word_projection.in_features
            vectors = self.labels(shown_labels, self.backbone, word_dim=word_dim)
            names = self.word_projection(vectors)
            place = torch.searchsorted(shown_labels, labels)
            regions = self.text_prior(regions, names[place], confidences)
        dtype = self.word_projection.weight.dtype
        overlap = None if iou is None else iou.to(dtype)
        mask = self.region_reasoning.keep(region_mask, overlap)
        pooled = unit(self.region_pooling(regions, mask)).to(dtype)
        thresholds = regions.new_zeros(regions.shape[:2], dtype=dtype)
        if self.scorer is not None:
            thresholds = self.scorer.thresholds(regions).to(dtype)
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
        words = word_features
        if words is None:
            words = self.backbone(tokens, token_mask, word_index, word_mask.shape[1])
        if self.config.text.static:
            words = self.backbone.beside_static(words, tokens, word_index)
        words = self.word_projection(words.to(self.word_projection.weight.dtype))
        words = unit(self.word_reasoning(words, word_mask, word_links))
        words = words.to(self.word_projection.weight.dtype)
        pooled = unit(self.word_pooling(words, word_mask))
        salience = self._salience(tokens, word_index, word_mask)
        return CaptionEmbeddings(words, word_mask, pooled, salience.to(words.dtype))

    def _salience(
        self,
        tokens: Int[Tensor, "caption piece"],
        word_index: Int[Tensor, "caption piece"],
        word_mask: Bool[Tensor, "caption word"],
    ) -> Float[Tensor, "caption word"]:
        """s: the mean consensus of a word's pieces over its caption's largest, squared."""
        if self.consensus is None:
            return torch.ones_like(word_mask, dtype=torch.float32)
        pieces = self.consensus[tokens][..., None]
        with torch.autocast(pieces.device.type, enabled=False):
            words = pool_words(pieces, word_index, word_mask.shape[1]).squeeze(-1)
        words = words.clamp(min=_LEAST_SALIENCE).masked_fill(~word_mask, 0.0)
        shares = words / words.amax(dim=1, keepdim=True)
        return shares.square().masked_fill(~word_mask, 1.0)

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
        config = folder / "config.json"
        config.write_text(text + "\n", encoding="utf-8")
        # Many settings leave no trace in the weights, and change every score.
        described = {_DESCRIBED_BY: hashlib.sha256(config.read_bytes()).hexdigest()}
        save_file(state or self.own_state(), folder / "model.safetensors", metadata=described)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, revision: str | None = None, text_encoder: str | None = None
    ) -> Cpfean:
        """Reads what `save_pretrained` wrote.

        Args:
            folder: with `config.json` and `model.safetensors`; or the name of a model on the
                Hugging Face Hub, "user/name", which is fetched (`cpfean.hub.model_at`).
            revision: of a name: a branch, tag or commit.
            text_encoder: where a frozen text encoder is now, if it has moved.

        Raises:
            CheckpointError: the folder is not such a model, is damaged, holds weights that are not
                finite, or its frozen text encoder is not the one it was trained with; a name that
                cannot be fetched.
            ConfigError: the frozen text encoder cannot be read.
        """
        folder = model_at(folder, revision=revision)
        described = _Described.read(folder / "config.json")
        weights = folder / "model.safetensors"
        header = read_header(weights, error=CheckpointError)
        config = described.config
        source = str(folder / "config.json")
        # Nothing of a size that only config.json tells of is built before the header agrees.
        if described.text_fingerprint is None:
            shape = config_of(
                described.text_encoder,
                most_layers=len(header),
                source=source,
                error=CheckpointError,
            )
            skeleton = skeleton_of(shape, source=source, error=CheckpointError)
            backbone = TextBackbone(skeleton, trainable=True)
        else:
            if text_encoder is not None:
                changed = {"model.text.encoder": text_encoder}
                config = ExperimentConfig(model=config).with_overrides(changed).model
            backbone = TextBackbone.build(config.text, vocab_size=0, pad_id=0)
            if backbone.fingerprint() != described.text_fingerprint:
                raise CheckpointError(
                    f"{folder}: the text encoder {config.text.encoder!r} has fingerprint "
                    f"{backbone.fingerprint()}, the model was trained with "
                    f"{described.text_fingerprint}."
                )
        with torch.device("meta"):
            word_dim = backbone.word_dim(static=config.text.static)
            labels = _empty_labels(header, described.inputs, word_dim=word_dim, source=source)
            empty = cls(config, inputs=described.inputs, backbone=backbone, labels=labels)
        check_same(header, specs(empty.own_state()), source=weights, error=CheckpointError)
        if read_metadata(weights).get(_DESCRIBED_BY, described.sha256) != described.sha256:
            raise CheckpointError(
                f"{source}: not the one that model.safetensors was saved with; copy both again "
                "from where they are from."
            )
        if described.text_fingerprint is None:
            backbone = TextBackbone.from_config(shape, trainable=True)
        tensors = _read_weights(weights)
        if labels is not None:
            labels = LabelEmbeddings(
                pieces=tensors.get("labels.pieces"), vectors=tensors.get("labels.vectors")
            )
        model = cls(config, inputs=described.inputs, backbone=backbone, labels=labels)
        model.load_own_state(tensors, source=str(folder))
        if labels is not None and labels.pieces is not None:
            rows = backbone.piece_embeddings().num_embeddings
            if int(labels.pieces.max()) >= rows or int(labels.pieces.min()) < -1:
                raise CheckpointError(f"{weights}: labels.pieces are not among {rows:,} pieces.")
        return model.eval()

    def own_state(self) -> dict[str, Tensor]:
        """The weights that training changes, and the label embeddings; contiguous, by name."""
        frozen = () if self.backbone.trainable else ("backbone.",)
        return {
            name: tensor.detach().contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith(frozen)
        }

    def read_own_state(self, path: Path) -> dict[str, Tensor]:
        """Reads weights of this model that `own_state` gave; the file is judged by its header.

        Raises:
            CheckpointError: damaged, of another model, or not finite.
        """
        header = read_header(path, error=CheckpointError)
        check_same(header, specs(self.own_state()), source=path, error=CheckpointError)
        return _read_weights(path)

    def load_own_state(self, tensors: dict[str, Tensor], *, source: str) -> None:
        """Takes back what `own_state` gave.

        Raises:
            CheckpointError: names, types or shapes are not this model's.
        """
        check_same(specs(tensors), specs(self.own_state()), source=source, error=CheckpointError)
        self.load_state_dict(tensors, strict=False)


@dataclass(frozen=True, kw_only=True)
class _Described:
    """What `config.json` says of a saved model.

    Attributes:
        config, inputs: of the model.
        text_encoder: the encoder's own configuration.
        text_fingerprint: of a frozen encoder's weights, which are elsewhere; None for a trained
            one, which is among the model's.
        sha256: of the file.
    """

    config: ModelConfig
    inputs: ModelInputs
    text_encoder: dict[str, Any]
    text_fingerprint: str | None
    sha256: str

    @classmethod
    def read(cls, path: Path) -> _Described:
        """Reads the file.

        Raises:
            CheckpointError: it is not one that this release wrote.
        """
        plain = read_object(path, error=CheckpointError)
        found = plain.get("format")
        if found != _FORMAT:
            raise CheckpointError(
                f"{path}: not a saved model of this release: format {found!r}, expected {_FORMAT}."
            )
        try:
            config = ExperimentConfig.from_dict({"model": plain.get("model")}).model
        except ConfigError as error:
            raise CheckpointError(f"{path}: not a saved model: {error}") from None
        fingerprint, shape = plain.get("text_fingerprint"), plain.get("text_encoder")
        if not isinstance(fingerprint, str | None) or not isinstance(shape, dict):
            raise CheckpointError(f"{path}: not a saved model: it describes no text encoder.")
        if (fingerprint is None) != config.text.trainable:
            frozen = "has none" if fingerprint is None else "has one"
            raise CheckpointError(
                f"{path}: a frozen text encoder alone has a fingerprint; with model.text.trainable "
                f"= {json.dumps(config.text.trainable)} this {frozen}."
            )
        return cls(
            config=config,
            inputs=_inputs(plain.get("inputs"), source=path),
            text_encoder=shape,
            text_fingerprint=fingerprint,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )


def _inputs(plain: Any, *, source: Path) -> ModelInputs:
    """What a saved model has to know of its data."""
    fields = {"feature_dim", "has_boxes", "label_names"}
    if not isinstance(plain, dict) or plain.keys() != fields:
        raise CheckpointError(f"{source}: inputs must be {', '.join(sorted(fields))}.")
    width, names = plain["feature_dim"], plain["label_names"]
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width < 2**31:
        raise CheckpointError(f"{source}: inputs.feature_dim must be a width; got {width!r:.60}.")
    if not isinstance(plain["has_boxes"], bool):
        raise CheckpointError(f"{source}: inputs.has_boxes must be true or false.")
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    ):
        raise CheckpointError(f"{source}: inputs.label_names must be null or a list of names.")
    return ModelInputs(
        feature_dim=width,
        has_boxes=plain["has_boxes"],
        label_names=None if names is None else tuple(names),
    )


def _empty_labels(
    header: Mapping[str, Spec], inputs: ModelInputs, *, word_dim: int, source: str
) -> LabelEmbeddings | None:
    """The label embeddings that a header tells of, without numbers.

    Raises:
        CheckpointError: they are not of the vocabulary, or there are none for it.
    """
    pieces, vectors = header.get("labels.pieces"), header.get("labels.vectors")
    spec = pieces or vectors
    if inputs.label_names is None or spec is None:
        if spec is not None or inputs.label_names is not None:
            named = 0 if inputs.label_names is None else len(inputs.label_names)
            embedded = "has embeddings" if spec else "has no embeddings"
            raise CheckpointError(
                f"{source}: {named:,} labels, and the model {embedded} of labels."
            )
        return None
    rows = len(inputs.label_names)
    fits = spec.shape[:1] == (rows,) and len(spec.shape) == 2 and 0 not in spec.shape
    if (pieces and vectors) or not fits or (vectors and spec.shape[1] != word_dim):
        raise CheckpointError(
            f"{source}: {rows:,} labels for words of width {word_dim:,}, but the embeddings of "
            f"labels are {spec}."
        )
    empty = torch.empty(spec.shape, dtype=torch.int64 if pieces else torch.float32)
    return LabelEmbeddings(**{"pieces" if pieces else "vectors": empty})


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file whose header is sound."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        check_tensor_finite(tensor, name, source=path, error=CheckpointError)
    return tensors
