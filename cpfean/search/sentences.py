"""A sentence that somebody types, as the model reads it, or a plain word on why it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpfean.data.dataset import sentence_batch
from cpfean.data.texts import says_something
from cpfean.errors import ConfigError, DataError
from cpfean.model.embeddings import CaptionEmbeddings
from cpfean.training.setup import TrainedModel

_MOST_QUOTED = 5  # unknown words in a message


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence and what the model made of it.

    Attributes:
        text: as it was given.
        words: those that are read, as they stand in it.
        unknown: those that the vocabulary cannot spell, each once: to the model they are all the
            same word.
        is_cut: whether it goes on behind the last word that is read.
        encoded: the one caption.
    """

    text: str
    words: list[str]
    unknown: list[str]
    is_cut: bool
    encoded: CaptionEmbeddings


@torch.inference_mode()
def read_sentence(text: str, trained: TrainedModel) -> Sentence:
    """Encodes a sentence.

    Args:
        text: anything; what is too long for the model is cut, as captions are.
        trained: the model.

    Raises:
        ConfigError: there is nothing in it that the model could look for.
    """
    # Half of a surrogate pair, which some keyboards and all attackers send, is no text.
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    if not says_something(text):
        raise _says_nothing("nothing" if not text else "no word and no sign")
    tokenizer, model = trained.tokenizer, trained.model
    try:
        tokens = tokenizer.encode([text])
    except DataError:  # which speaks of files of captions
        raise _says_nothing("no word that the text encoder knows") from None
    unknown = tokenizer.unknown_words(text)
    if len(tokenizer.unknown_captions(tokens)):
        listed = ", ".join(repr(word[:40]) for word in unknown[:_MOST_QUOTED])
        more = ", ..." if len(unknown) > _MOST_QUOTED else ""
        raise ConfigError(
            f"the model's vocabulary knows none of these words: {listed}{more}. Write in the "
            "language of the captions that it was trained on."
        )
    device = next(model.parameters()).device
    batch = sentence_batch(tokens, pad_id=tokenizer.pad_id).to(device)
    return Sentence(
        text=text,
        words=tokenizer.words(text),
        unknown=unknown,
        is_cut=bool(tokens.num_truncated),
        encoded=model.encode_captions(**batch._asdict()),
    )


def _says_nothing(found: str) -> ConfigError:
    return ConfigError(
        f"expected a sentence, found {found}; write what the image shows, such as "
        '"a dog in the snow".'
    )
