"""What the text encoder and the captions have to be, checked before anything is started."""

from __future__ import annotations

from pathlib import Path

from cpfean.config import ExperimentConfig
from cpfean.data.split import SPLITS, read_captions
from cpfean.data.tokens import check_vocabulary, load_tokenizer
from cpfean.errors import ConfigError


def check_text(config: ExperimentConfig, *, data_folder: Path) -> None:
    """Refuses a text encoder that training would refuse, and captions of which it knows nothing.

    Args:
        config: the experiment.
        data_folder: checked, in the native format.

    Raises:
        ConfigError: names the encoder's file, and what is wrong with it.
        DataError: a split whose captions the vocabulary does not know.
    """
    text, tokenizer = config.model.text, None
    if text.encoder != "scratch":
        from cpfean.model.pretrained import num_places, read_encoder  # seconds to import

        files = read_encoder(text.encoder)
        tokenizer = load_tokenizer(
            text,
            train_captions=[],
            max_tokens=config.data.max_tokens,
            graph=config.model.words.graph,
        )
        files.check_knows(tokenizer.vocab_size)
        check_places(config, num_places(files.skeleton))
        files.check_finite()
    captions = {
        split: read_captions(
            data_folder, split, num_images=config.data.train_images if split == "train" else 0
        )
        for split in SPLITS
    }
    check_vocabulary(text, captions, max_tokens=config.data.max_tokens, tokenizer=tokenizer)


def check_places(config: ExperimentConfig, places: int | None) -> None:
    """Refuses captions that may become longer than the text encoder has positions for.

    Args:
        config: the experiment.
        places: of the encoder; None for any number.

    Raises:
        ConfigError: names both numbers.
    """
    if places is not None and config.data.max_tokens > places:
        raise ConfigError(
            f"data.max_tokens = {config.data.max_tokens}, but the text encoder "
            f"{config.model.text.encoder!r} has places for {places}."
        )
