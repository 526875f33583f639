"""From a configuration and a data folder to a model and the data sets it trains on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cpfean.config import ExperimentConfig, Products
from cpfean.data.consensus import word_consensus
from cpfean.data.dataset import RetrievalDataset
from cpfean.data.split import Split, open_split
from cpfean.data.tokens import CaptionTokenizer, check_known, load_tokenizer
from cpfean.errors import CheckpointError, ConfigError
from cpfean.hub import model_at
from cpfean.metrics.retrieval import RetrievalMetrics
from cpfean.model.cpfean import Cpfean, LabelEmbeddings, ModelInputs
from cpfean.model.text_encoder import TextBackbone
from cpfean.processes import place
from cpfean.threads import threads_chosen
from cpfean.training.evaluation import evaluate
from cpfean.training.precision import AskedPrecision, chosen_precision
from cpfean.training.text_cache import encode_frozen
from cpfean.training.text_check import check_places

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model on its device, and the splits it is trained and chosen on."""

    model: Cpfean
    tokenizer: CaptionTokenizer
    train: RetrievalDataset
    dev: RetrievalDataset


def open_experiment(
    config: ExperimentConfig, *, data_folder: Path, cache_dir: Path, device: torch.device
) -> Experiment:
    """Opens the data and builds the model with the weights of the configuration's seed.

    Raises:
        ConfigError, DataError: what is asked for does not fit the data.
    """
    train = open_split(
        data_folder,
        "train",
        num_regions=config.data.num_regions,
        num_images=config.data.train_images,
    )
    dev = open_split(data_folder, "dev", num_regions=config.data.num_regions)
    tokenizer = load_tokenizer(
        config.model.text,
        train_captions=train.captions,
        max_tokens=config.data.max_tokens,
        graph=config.model.words.graph,
    )
    torch.manual_seed(config.seed)
    model = build_model(config, split=train, tokenizer=tokenizer).to(device)
    training = _dataset(model, train, tokenizer, cache_dir=cache_dir, device=device, config=config)
    if model.consensus is not None:
        image_of = np.asarray(train.image_of(np.arange(train.num_captions)), dtype=np.int64)
        pieces = len(model.consensus)
        told = word_consensus(training.tokens, image_of, num_pieces=pieces)
        told[tokenizer.mask_id] = 0.0  # a word that word noise has masked names nothing
        model.consensus.copy_(torch.from_numpy(told))
    return Experiment(
        model=model,
        tokenizer=tokenizer,
        train=training,
        dev=_dataset(model, dev, tokenizer, cache_dir=cache_dir, device=device),
    )


def build_model(config: ExperimentConfig, *, split: Split, tokenizer: CaptionTokenizer) -> Cpfean:
    """A new model for data like the split's; weights from torch's present random state.

    Raises:
        ConfigError: the model needs what the data does not have, or there is no such text encoder.
    """
    check_data_suffices(config, split)
    backbone = TextBackbone.build(
        config.model.text, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id
    )
    check_places(config, backbone.num_places)
    names = split.label_names if config.model.regions.prior else None
    inputs = ModelInputs(
        feature_dim=split.regions.feature_dim,
        has_boxes=split.regions.geometry is not None,
        label_names=None if names is None else tuple(names),
    )
    labels = None if names is None else _embed_labels(config, names, tokenizer, backbone)
    return Cpfean(config.model, inputs=inputs, backbone=backbone, labels=labels)


def check_data_suffices(config: ExperimentConfig, split: Split) -> None:
    """Refuses a configuration that asks for boxes which the data lacks.

    Data without labels has no prior to bring in, which is said in the log.

    Raises:
        ConfigError: names the setting.
    """
    if split.regions.iou is None and config.model.regions.graph == "filtered":
        raise ConfigError(
            'model.regions.graph = "filtered" needs boxes, and the data has none: choose "dense".'
        )
    if split.label_names is None and config.model.regions.prior:
        logger.info("%s: no object labels, so no textual prior", split.name)
    if split.regions.iou is None and config.model.regions.graph == "iou":
        logger.info("%s: no boxes, so every region neighbours every region", split.name)


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model in evaluation mode on its device, and a split for it to look at."""

    model: Cpfean
    tokenizer: CaptionTokenizer
    dataset: RetrievalDataset


def read_model(
    model: Path | str,
    *,
    revision: str | None = None,
    device: torch.device | None = None,
    text_encoder: str | None = None,
) -> tuple[Cpfean, CaptionTokenizer]:
    """A trained model in evaluation mode, and the tokenizer of its captions.

    Args:
        model: the folder of a training checkpoint, or one that `save_pretrained` wrote with its
            tokenizer; or the name of such a model on the Hugging Face Hub, "user/name".
        revision: of a name: a branch, tag or commit.
        device: where to compute; the processor if None.
        text_encoder: where a frozen text encoder is now, if it has moved.

    Raises:
        CheckpointError: not such a folder, damaged, or a name that cannot be fetched.
        ConfigError: the frozen text encoder cannot be read.
    """
    folder = model_at(model, revision=revision)
    folder = folder / "best" if (folder / "best").is_dir() else folder
    read = Cpfean.from_pretrained(folder, text_encoder=text_encoder)
    tokenizer = CaptionTokenizer.load(folder / "tokenizer")
    _check_tokenizer_fits(read, tokenizer, source=folder)
    return read.to(device or torch.device("cpu")), tokenizer


def open_checkpoint(
    checkpoint: Path | str,
    *,
    data_folder: Path,
    split: str,
    cache_dir: Path,
    device: torch.device,
    num_regions: int,
    text_encoder: str | None = None,
) -> TrainedModel:
    """Reads a checkpoint's best model, and opens a split the way that the model needs it.

    Args:
        checkpoint: a training checkpoint, a folder that `save_pretrained` wrote with its
            tokenizer, or the name of such a model on the Hugging Face Hub.
        data_folder: a checked folder in the native format.
        split: its name.
        cache_dir: for what can be made again.
        device: where to compute.
        num_regions: the region count.
        text_encoder: where a frozen text encoder is now, if it has moved.

    Raises:
        CheckpointError: not such a folder, or made for data with other fields.
        DataError: what is wrong with the data, captions that the vocabulary does not know included.
    """
    model, tokenizer = read_model(checkpoint, device=device, text_encoder=text_encoder)
    opened = open_split(data_folder, split, num_regions=num_regions)
    check_made_for(model, opened, source=str(checkpoint))
    dataset = _dataset(model, opened, tokenizer, cache_dir=cache_dir, device=device)
    return TrainedModel(model=model, tokenizer=tokenizer, dataset=dataset)


def evaluate_checkpoint(
    checkpoint: Path | str,
    *,
    data_folder: Path,
    split: str,
    protocol: Literal["full", "coco-1k"],
    cache_dir: Path,
    device: torch.device,
    num_regions: int,
    batch_size: int = 128,
    products: Products = "fp32",
    precision: AskedPrecision = "fp32",
    text_encoder: str | None = None,
) -> RetrievalMetrics:
    """Metrics of a checkpoint's best model on a split.

    Args:
        checkpoint, data_folder, split, cache_dir, device, num_regions, text_encoder: as in
            `open_checkpoint`.
        protocol: as in `evaluate`.
        batch_size: images or captions encoded at a time.
        products: as in `evaluate`.
        precision: of the encoders: `optim.precision` of the training.

    Raises:
        CheckpointError: not such a folder, or made for data with other fields.
        DataError: what is wrong with the data.
    """
    trained = open_checkpoint(
        checkpoint,
        data_folder=data_folder,
        split=split,
        cache_dir=cache_dir,
        device=device,
        num_regions=num_regions,
        text_encoder=text_encoder,
    )
    return evaluate(
        trained.model,
        trained.dataset,
        protocol=protocol,
        batch_size=batch_size,
        device=device,
        products=products,
        precision=chosen_precision(precision, device),
    )


def test_split_metrics(
    checkpoint: Path,
    config: ExperimentConfig,
    *,
    data_folder: Path,
    cache_dir: Path,
    device: torch.device,
) -> dict[str, float]:
    """Six recalls and rSum of a checkpoint's best model on the test split.

    Args:
        checkpoint: folder of a model or checkpoint.
        config: that it was trained with, which says how it is evaluated.
        data_folder: checked.
        cache_dir: for what can be made again.
        device: to score on.

    Raises:
        CheckpointError, DataError: as in `evaluate_checkpoint`.
    """
    with threads_chosen(config, workers=place()[1]):
        return evaluate_checkpoint(
            checkpoint,
            data_folder=data_folder,
            split="test",
            protocol=config.evaluation.protocol,
            cache_dir=cache_dir,
            device=device,
            num_regions=config.data.num_regions,
            batch_size=config.evaluation.batch_size,
            products=config.evaluation.products,
            precision=config.optim.precision,
        ).as_dict()


def default_device() -> torch.device:
    """The GPU that this process may use, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_made_for(model: Cpfean, split: Split, *, source: str) -> None:
    """Refuses data without the fields that a model reads.

    Raises:
        CheckpointError: names what it expects.
    """
    inputs = model.inputs
    wants = []
    if inputs.feature_dim != split.regions.feature_dim:
        wants.append(f"features of width {inputs.feature_dim}, found {split.regions.feature_dim}")
    if model.image_encoder.geometry is not None and split.regions.geometry is None:
        wants.append("boxes, found none")
    if model.text_prior is not None and (
        split.label_names is None or tuple(split.label_names) != inputs.label_names
    ):
        wants.append("object labels from the vocabulary it was trained with (objects_vocab.txt)")
    if wants:
        raise CheckpointError(f"{source}: the model expects {'; '.join(wants)}.")


def _check_tokenizer_fits(model: Cpfean, tokenizer: CaptionTokenizer, *, source: Path) -> None:
    """Refuses a vocabulary that is not the saved model's."""
    text, rows = model.config.text, model.backbone.piece_embeddings().num_embeddings
    places, wants = model.backbone.num_places, []
    # "scratch" has a row for each piece; encoders of others may have some to spare.
    if tokenizer.vocab_size > rows or (text.encoder == "scratch" and tokenizer.vocab_size < rows):
        wants.append(f"{rows:,} word pieces, found {tokenizer.vocab_size:,}")
    if places is not None and tokenizer.max_tokens > places:
        wants.append(f"captions of at most {places:,} pieces, found {tokenizer.max_tokens:,}")
    if tokenizer.units != text.units:
        wants.append(f"model.text.units = {text.units!r}, found {tokenizer.units!r}")
    if tokenizer.graph != model.config.words.graph:
        wants.append(f"model.words.graph = {model.config.words.graph!r}, found {tokenizer.graph!r}")
    if wants:
        raise CheckpointError(
            f"{source / 'tokenizer'}: not this model's: it expects {'; '.join(wants)}."
        )


def _dataset(
    model: Cpfean,
    split: Split,
    tokenizer: CaptionTokenizer,
    *,
    cache_dir: Path,
    device: torch.device,
    config: ExperimentConfig | None = None,
) -> RetrievalDataset:
    """The split's data set; with a configuration, disturbed as it says, for training."""
    tokens = tokenizer.encode(split.captions)
    made_from = (
        config is not None and split.name == "train" and config.model.text.encoder == "scratch"
    )
    check_known(tokenizer, tokens, split.captions, split=split.name, made_from=made_from)
    word_noise = 0.0 if config is None else config.data.word_noise
    dataset = RetrievalDataset(
        split,
        tokens,
        tokenizer,
        region_dropout=0.0 if config is None else config.data.region_dropout,
        word_noise=word_noise,
        seed=0 if config is None else config.seed,
    )
    if model.backbone.trainable:
        return dataset
    if word_noise:
        logger.info(
            "data.word_noise disturbs the captions anew in every step, so the frozen text encoder "
            "runs in every step; with data.word_noise = 0 it would run once"
        )
    else:
        dataset.word_features = encode_frozen(
            dataset, model.backbone, cache_dir=cache_dir, device=device
        )
    return dataset


def _embed_labels(
    config: ExperimentConfig,
    names: list[str],
    tokenizer: CaptionTokenizer,
    backbone: TextBackbone,
) -> LabelEmbeddings:
    tokens = tokenizer.encode(names)
    lengths = np.diff(tokens.offsets)
    pieces = np.full((len(names), lengths.max()), -1, dtype=np.int64)
    word_index = np.full_like(pieces, -1)
    inside = np.arange(pieces.shape[1]) < lengths[:, None]
    pieces[inside] = tokens.pieces
    word_index[inside] = tokens.word_index
    if config.model.text.encoder == "scratch":
        of_word = np.where(word_index >= 0, pieces, -1)
        return LabelEmbeddings(pieces=torch.from_numpy(of_word))
    was_training = backbone.training
    backbone.eval()
    vectors = []
    with torch.no_grad():
        for start in range(0, len(names), 256):
            rows = slice(start, start + 256)
            ids = torch.from_numpy(np.where(inside[rows], pieces[rows], tokenizer.pad_id))
            index = torch.from_numpy(word_index[rows])
            most_words = int(tokens.num_words[rows].max())
            words = backbone(ids, torch.from_numpy(inside[rows]), index, most_words)
            if config.model.text.static:
                words = backbone.beside_static(words, ids, index)
            counts = torch.from_numpy(tokens.num_words[rows].astype(np.float32))
            vectors.append(words.sum(dim=1) / counts[:, None])
    backbone.train(was_training)
    return LabelEmbeddings(vectors=torch.cat(vectors))
