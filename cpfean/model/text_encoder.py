"""Captions to word vectors through a BERT-type encoder.

Axes:  caption    in the batch      piece, word   word pieces and words of a caption, padded
       text_dim   width of the encoder           dim   width of the joint embedding space
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from cpfean.config import TextConfig
from cpfean.errors import ConfigError, message_of
from cpfean.model.pretrained import num_places, read_encoder
from cpfean.model.weights import check_tensor_finite


def pool_words(
    pieces: Float[Tensor, "caption piece text_dim"],
    word_index: Int[Tensor, "caption piece"],
    num_words: int,
) -> Float[Tensor, "caption word text_dim"]:
    """Each word is the mean of its pieces; zero where a caption has fewer words.

    A product with a 0/1 matrix rather than a scatter, whose order of summation on a GPU changes
    from run to run.
    """
    word = torch.arange(num_words, device=word_index.device)
    member = (word_index[:, None, :] == word[None, :, None]).to(pieces.dtype)
    return member @ pieces / member.sum(dim=-1, keepdim=True).clamp(min=1)


# Encoders all of whose layers let every piece see every other, and take a mask of pairs as it is.
_SEE_ALL = frozenset({"albert", "bert", "camembert", "roberta", "xlm-roberta"})
_ALIGNED = 8  # rows of a mask in memory start at a multiple of so many numbers, as kernels ask for


def additive_mask(
    mask: Bool[Tensor, "caption piece"], *, dtype: torch.dtype
) -> Float[Tensor, "caption 1 1 piece"]:
    """What is added to the logits of attention: 0, or -inf where a piece is not real.

    Attention takes True and False as well, and makes this of them in every layer.
    """
    captions, pieces = mask.shape
    row = -(-pieces // _ALIGNED) * _ALIGNED
    room = torch.zeros(captions, 1, 1, row, dtype=dtype, device=mask.device)
    return room[..., :pieces].masked_fill_(~mask[:, None, None, :], -torch.inf)


class TextBackbone(nn.Module):
    """The BERT-type encoder, frozen or trained, and its words."""

    encoder: Any  # a transformers.PreTrainedModel, without importing transformers to say so

    def __init__(self, encoder: nn.Module, *, trainable: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.trainable = trainable
        self._fingerprint = ""
        self.encoder.requires_grad_(trainable)
        self.train(self.training)

    @classmethod
    def build(cls, config: TextConfig, *, vocab_size: int, pad_id: int) -> TextBackbone:
        """From the configuration: "scratch" is initialised at random, others are loaded.

        Raises:
            ConfigError: no such encoder, files that do not belong together, weights that are
                missing or not finite, or a vocabulary that is not the tokenizer's.
        """
        from transformers import AutoModel, BertConfig, BertModel
        from transformers.utils import logging

        if config.encoder == "scratch":
            shape = BertConfig(
                vocab_size=vocab_size,
                pad_token_id=pad_id,
                hidden_size=config.scratch_dim,
                num_hidden_layers=config.scratch_layers,
                num_attention_heads=4,
                intermediate_size=2 * config.scratch_dim,
            )
            return cls(BertModel(shape, add_pooling_layer=False), trainable=True)
        files = read_encoder(config.encoder)
        files.check_knows(vocab_size)
        logging.disable_progress_bar()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # that the pooling layer is left out is meant
        try:
            encoder, told = AutoModel.from_pretrained(
                config.encoder,
                config=files.config,
                add_pooling_layer=False,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # whatever the library trips over in a stranger's files
            raise ConfigError(
                f"model.text.encoder = {config.encoder!r} cannot be loaded: {message_of(error)} "
                "Give a folder with config.json and model.safetensors, a Hugging Face name, or "
                '"scratch".'
            ) from None
        finally:
            logging.set_verbosity(verbosity)
        made_up = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
        if made_up:
            raise ConfigError(
                f"model.text.encoder = {config.encoder!r}: no weights were found for "
                f"{', '.join(made_up[:3])}; they are not made up."
            )
        for name, weights in encoder.state_dict().items():
            check_tensor_finite(weights, name, source=config.encoder, error=ConfigError)
        backbone = cls(encoder, trainable=config.trainable)
        if not config.trainable:
            backbone._fingerprint = _fingerprint_of(encoder)
        return backbone

    @classmethod
    def of_shape(cls, config: TextConfig) -> TextBackbone:
        """An encoder that is not "scratch" in its shape, without memory; no weight of it is read.

        Raises:
            ConfigError: no such encoder.
        """
        return cls(read_encoder(config.encoder).skeleton, trainable=config.trainable)

    @classmethod
    def from_config(cls, config: Any, *, trainable: bool) -> TextBackbone:
        """Untrained, from a `transformers` configuration; the weights are loaded afterwards."""
        from transformers import AutoModel

        encoder = AutoModel.from_config(
            config, add_pooling_layer=False, dtype=torch.float32, trust_remote_code=False
        )
        return cls(encoder, trainable=trainable)

    @property
    def num_places(self) -> int | None:
        """Pieces that a caption may have, specials included; None for any number."""
        return num_places(self.encoder)

    @property
    def shape(self) -> dict[str, Any]:
        """The encoder's own configuration as plain data; `config_of` takes it."""
        shape: dict[str, Any] = self.encoder.config.to_dict()
        shape.pop("_name_or_path", None)  # where it was read, which can be a folder of somebody's
        return shape

    @property
    def text_dim(self) -> int:
        """Width of a contextual word vector."""
        return int(self.encoder.config.hidden_size)

    def word_dim(self, *, static: bool) -> int:
        """Width of a word vector, with the static one beside the contextual one or without."""
        return self.text_dim + (self.piece_embeddings().embedding_dim if static else 0)

    def train(self, mode: bool = True) -> TextBackbone:
        """A frozen encoder has no dropout, in training neither."""
        return super().train(mode and self.trainable)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of a frozen encoder's weights.

        Found by `build`, once: they do not change, there may be hundreds of megabytes of them, and
        later each process may hold a share of them only.

        Raises:
            ValueError: the encoder is trained, or has not been loaded by `build`.
        """
        if not self._fingerprint:
            raise ValueError("only a frozen encoder that was loaded has a fingerprint")
        return self._fingerprint

    def piece_embeddings(self) -> nn.Embedding:
        """The table of the word pieces, without context."""
        table: nn.Embedding = self.encoder.get_input_embeddings()
        return table

    def beside_static(
        self,
        contextual: Float[Tensor, "caption word text_dim"],
        tokens: Int[Tensor, "caption piece"],
        word_index: Int[Tensor, "caption piece"],
    ) -> Float[Tensor, "caption word word_dim"]:
        """Contextual word vectors, and beside each of them its static one, both layer-normalized.

        In context an article before a noun has much of the noun; its static vector is its own.

        Args:
            contextual: as `forward` gives them.
            tokens, word_index: as `forward` takes them.
        """
        pieces = self.piece_embeddings()(tokens)
        with torch.autocast(pieces.device.type, enabled=False):
            static = pool_words(pieces, word_index, contextual.shape[1])
            both = [layer_norm(x.to(pieces.dtype), x.shape[-1:]) for x in (contextual, static)]
        return torch.cat(both, dim=-1)

    def forward(
        self,
        tokens: Int[Tensor, "caption piece"],
        token_mask: Bool[Tensor, "caption piece"],
        word_index: Int[Tensor, "caption piece"],
        num_words: int,
    ) -> Float[Tensor, "caption word text_dim"]:
        """Contextual word vectors.

        Args:
            tokens: ids of the word pieces, specials included.
            token_mask: True where a piece is real.
            word_index: which word a piece belongs to; -1 for specials and padding.
            num_words: words of the longest caption.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            states = self.encoder(
                input_ids=tokens, attention_mask=self._attention_mask(token_mask), return_dict=True
            )
            return pool_words(states.last_hidden_state, word_index, num_words)

    def _attention_mask(self, token_mask: Bool[Tensor, "caption piece"]) -> Tensor:
        """The mask as the encoder takes it.

        Of a mask of pieces `transformers` asks whether it hides any. On a GPU the host would wait
        for the answer, so that there it gets one of pairs, which is taken as it is.
        """
        config = self.encoder.config
        takes_pairs = config.model_type in _SEE_ALL and config._attn_implementation == "sdpa"
        if not token_mask.is_cuda or not takes_pairs:
            return token_mask.long()  # integers, because some encoders subtract it from 1
        dtype: torch.dtype = self.encoder.dtype
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        return additive_mask(token_mask, dtype=dtype)


def _fingerprint_of(encoder: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
