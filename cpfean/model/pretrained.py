"""A pretrained text encoder as files: what it is, judged before it is built or loaded.

`transformers` trusts what it reads: it warns where it makes up weights that are missing, leaves
layers out that `config.json` does not tell of, and builds what the numbers there ask for. So the
numbers are compared with the headers of the weights first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpfean.errors import ConfigError, CpfeanError, message_of
from cpfean.files import is_there
from cpfean.json_files import read_object
from cpfean.model.weights import FLOATS, Spec, check_finite, read_header, specs

_MOST_LAYERS = 512
_LARGEST = 2**31 - 1
# A size -> the least it may be; what the encoder's type does not have is left out.
_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "embedding_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 0,
}
# Settings of heads that we do not build; a number of labels becomes a table of so many names.
_OF_HEADS = frozenset({"num_labels", "id2label", "label2id"})
# Settings that make of the weights something else than what stands in the file.
_FOREIGN = ("quantization_config", "transformers_weights", "fusion_config")
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")
# Names of BERT's first releases.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
# Saved by older releases; computed by newer ones.
_COMPUTED = re.compile(r"(^|\.)(position_ids|token_type_ids)$")


@dataclass(frozen=True, kw_only=True)
class EncoderFiles:
    """An encoder whose files belong together.

    Attributes:
        name: as the configuration has it.
        config: a `transformers` configuration.
        skeleton: the encoder without its weights.
        tensors: where each of its weights is: the file, and the name in it.
    """

    name: str
    config: Any
    skeleton: nn.Module
    tensors: dict[str, tuple[Path, str]]

    def check_knows(self, num_pieces: int) -> None:
        """Refuses a tokenizer that makes more pieces than the encoder has vectors for.

        Raises:
            ConfigError: says how many of each.
        """
        if self.config.vocab_size < num_pieces:
            raise ConfigError(
                f"model.text.encoder = {self.name!r} knows {self.config.vocab_size} word pieces, "
                f"its tokenizer makes {num_pieces}: they are not of one release."
            )

    def check_finite(self) -> None:
        """Reads all weights once.

        Raises:
            ConfigError: some are no finite numbers.
        """
        of_file: dict[Path, list[str]] = {}
        for file, name in self.tensors.values():
            of_file.setdefault(file, []).append(name)
        for file, names in of_file.items():
            check_finite(file, names, error=ConfigError)


def read_encoder(name: str) -> EncoderFiles:
    """Looks at an encoder's files, at no more of the weights than their headers.

    Args:
        name: a folder, or a Hugging Face name; that is fetched if it is not here.

    Raises:
        ConfigError: names the file, what was expected and what was found.
    """
    folder = Path(name)
    local = folder.is_dir()
    if not local and is_there(folder):
        raise ConfigError(f"model.text.encoder = {name!r}: expected a folder, found a file.")
    files = _Files(name, folder if local else None)
    shape = read_object(files.need("config.json"), error=ConfigError)
    source = str(files.need("config.json"))
    if local and is_there(folder / "adapter_config.json"):
        raise ConfigError(
            f"{folder / 'adapter_config.json'}: expected a whole encoder, found an adapter to one; "
            "merge them and save the result."
        )
    found = _headers(files)
    config = config_of(shape, most_layers=len(found), source=source, error=ConfigError)
    skeleton = skeleton_of(config, source=source, error=ConfigError)
    tensors = _assigned(skeleton, found, source=source)
    return EncoderFiles(name=name, config=config, skeleton=skeleton, tensors=tensors)


def config_of(
    shape: Mapping[str, Any], *, most_layers: int, source: str, error: type[CpfeanError]
) -> Any:
    """The `transformers` configuration in what a `config.json` holds; its sizes are sensible.

    Args:
        shape: the file's object.
        most_layers: that the weights can be of, the number of tensors for one.
        source: what to name in messages.
        error: what to raise.

    Raises:
        CpfeanError: of the type `error`.
    """
    from transformers import CONFIG_MAPPING

    kind = shape.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise error(
            f"{source}: expected the model_type of a BERT-type encoder, found {_short(kind)}."
        )
    for key in _FOREIGN:
        if shape.get(key) is not None:
            raise error(f"{source}: {key} is not supported; save the encoder as plain weights.")
    attention = shape.get("attn_implementation", shape.get("_attn_implementation"))
    if attention not in _ATTENTION:
        raise error(f"{source}: attn_implementation {_short(attention)} is not supported.")
    if shape.get("is_decoder") or shape.get("is_encoder_decoder"):
        raise error(f"{source}: expected an encoder alone, found a decoder.")
    wanted = CONFIG_MAPPING[kind]
    settings = {k: v for k, v in shape.items() if k not in _OF_HEADS | {"model_type"}}
    for key in settings:
        if callable(getattr(wanted, key, None)):
            raise error(f"{source}: {key!r} is no setting.")
    try:
        config = wanted(**settings)
    except Exception as reason:  # whatever the library trips over in a stranger's settings
        raise error(f"{source}: no configuration of a {kind}: {message_of(reason)}") from None
    _check_sizes(config, most_layers=most_layers, source=source, error=error)
    return config


def skeleton_of(config: Any, *, source: str, error: type[CpfeanError]) -> nn.Module:
    """The encoder without memory for its weights; draws nothing from the random state.

    Raises:
        CpfeanError: of the type `error`: it cannot be built, or gives no word vectors.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        try:
            skeleton: nn.Module = AutoModel.from_config(
                config, add_pooling_layer=False, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as reason:  # whatever the library trips over in a stranger's settings
            if "add_pooling_layer" in str(reason) or "AutoModel" in str(reason):
                raise error(
                    f"{source}: expected a BERT-type encoder, found the model_type "
                    f"{config.model_type!r}."
                ) from None
            raise error(f"{source}: no encoder can be built: {message_of(reason)}") from None
        try:
            skeleton.eval()
            tokens = torch.zeros(1, 2, dtype=torch.int64)
            states = skeleton(input_ids=tokens, return_dict=True).last_hidden_state
        except NotImplementedError:
            return skeleton  # one that looks at the values
        except Exception as reason:
            raise error(f"{source}: no encoder that can run: {message_of(reason)}") from None
    if tuple(states.shape) != (1, 2, config.hidden_size):
        raise error(
            f"{source}: expected vectors of width {config.hidden_size}, found {states.shape[-1]}."
        )
    return skeleton


def num_places(encoder: nn.Module) -> int | None:
    """Pieces that a caption may have, specials included; None without a table of positions."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count from the place after the padding's.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return None


class _Files:
    """The files of a local folder, or of a name on the hub, which are fetched when asked for."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name = name
        self._folder = folder

    def find(self, file: str) -> Path | None:
        """Where a file is; None if there is none."""
        if self._folder is not None:
            path = self._folder / file
            return path if is_there(path) else None
        from transformers.utils import cached_file

        try:
            found = cached_file(self.name, file)
        except (OSError, ValueError) as reason:
            self._why = message_of(reason)
            return None
        return None if found is None else Path(found)

    def need(self, file: str) -> Path:
        """Where a file is.

        Raises:
            ConfigError: there is none.
        """
        path = self.find(file)
        if path is None:
            why = self._why if self._folder is None else f"it has no {file}."
            raise ConfigError(
                f"model.text.encoder = {self.name!r} cannot be loaded: {why} Give a folder "
                'with config.json and model.safetensors, a Hugging Face name, or "scratch".'
            )
        return path

    _why = "it was not found."


def _headers(files: _Files) -> dict[str, tuple[Path, Spec]]:
    """File and header of every tensor."""
    single = files.find(_WEIGHTS)
    if single is not None:
        return {k: (single, spec) for k, spec in read_header(single, error=ConfigError).items()}
    index = files.find(_INDEX)
    if index is None:
        other = next((name for name in _OTHER_WEIGHTS if files.find(name)), None)
        if other is not None:
            raise ConfigError(
                f"model.text.encoder = {files.name!r}: expected {_WEIGHTS}, found {other}, which "
                "can hold more than numbers and is not read; where you trust it, load it with "
                "transformers and save it by save_pretrained."
            )
        files.need(_WEIGHTS)
    assert index is not None
    plain = read_object(index, error=ConfigError)
    listed = plain.get("weight_map")
    if not isinstance(plain.get("metadata"), dict):
        raise ConfigError(f"{index}: expected metadata, found {_short(plain.get('metadata'))}.")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{index}: expected a weight_map, found {_short(listed)}.")
    headers: dict[str, dict[str, Spec]] = {}
    paths: dict[str, Path] = {}
    found: dict[str, tuple[Path, Spec]] = {}
    for tensor, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith("safetensors"):
            raise ConfigError(
                f"{index}: expected files of weights beside it, found {_short(file)} for {tensor}."
            )
        if file not in headers:
            paths[file] = files.need(file)
            headers[file] = read_header(paths[file], error=ConfigError)
        if tensor not in headers[file]:
            raise ConfigError(f"{index}: expected {tensor} in {file}, found none there.")
        found[tensor] = (paths[file], headers[file][tensor])
    return found


def _assigned(
    skeleton: nn.Module, found: Mapping[str, tuple[Path, Spec]], *, source: str
) -> dict[str, tuple[Path, str]]:
    """The tensor in the files for each weight of the encoder."""
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    result: dict[str, tuple[Path, str]] = {}
    missing, wrong = [], []
    for name, spec in specs(skeleton.state_dict()).items():
        called = next((each for each in _spellings(name, prefix) if each in found), None)
        if called is None:
            if not _COMPUTED.search(name):
                missing.append(name)
            continue
        file, has = found[called]
        if has.shape != spec.shape or has.dtype not in FLOATS:
            wrong.append(f"{called} is {has} and not {spec}")
        result[name] = (file, called)
    files = ", ".join(sorted({path.name for path, _ in found.values()})) or "the weights"
    if missing:
        raise ConfigError(
            f"{source}: {files} {_listed('lacks', missing)}; weights are not made up: fetch "
            "the whole encoder, or the config.json that belongs to it."
        )
    if wrong:
        raise ConfigError(f"{source}: {files} is of another encoder: {_listed('', wrong).strip()}.")
    # Heads may go unused, layers may not.
    parts = {name.split(".")[0] for name in result}
    used = {called for _, called in result.values()}
    unused = [
        name
        for name in found
        if name not in used
        and name.removeprefix(f"{prefix}.").split(".")[0] in parts
        and not _COMPUTED.search(name)
    ]
    if unused:
        raise ConfigError(
            f"{source}: {files} has more than config.json tells of ({_listed('', unused).strip()}):"
            " they are not of one encoder."
        )
    return result


def _spellings(name: str, prefix: str) -> list[str]:
    spelled = [name]
    for new, old in _OLD_NAMES.items():
        if name.endswith(new):
            spelled.append(name.removesuffix(new) + old)
    return spelled + [f"{prefix}.{each}" for each in spelled if prefix]


def _check_sizes(config: Any, *, most_layers: int, source: str, error: type[CpfeanError]) -> None:
    sizes = {}
    for name, least in _SIZES.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
            raise error(
                f"{source}: {name} must be a whole number from {least} to {_LARGEST:,}; got "
                f"{_short(value)}."
            )
        sizes[name] = value
    layers, heads = sizes.get("num_hidden_layers", 1), sizes.get("num_attention_heads", 1)
    if layers > min(most_layers, _MOST_LAYERS):
        raise error(
            f"{source}: num_hidden_layers = {layers:,}, but the weights are {most_layers:,} "
            f"tensors; at most {_MOST_LAYERS} layers are supported."
        )
    width = sizes.get("hidden_size")
    if width is None:
        raise error(f"{source}: expected a BERT-type encoder, found one without hidden_size.")
    if width % heads:
        raise error(
            f"{source}: hidden_size must be a multiple of num_attention_heads; got {width:,} and "
            f"{heads:,}."
        )
    epsilon = getattr(config, "layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float | int) or not 0 < epsilon < 1:
        raise error(f"{source}: layer_norm_eps must be between 0 and 1; got {_short(epsilon)}.")


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply; a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = [
    "EncoderFiles",
    "config_of",
    "num_places",
    "read_encoder",
    "skeleton_of",
]
