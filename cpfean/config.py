"""Everything that defines a run, as frozen dataclasses that are checked once, at birth.

`ExperimentConfig` is the only thing two machines have to agree on to train the same model. It
travels as plain data (nested dictionaries), as TOML for people, and as dotted paths
(`loss.margin`) on command lines, in search spaces, in ablations and in the tracker.

TOML and not YAML: a repeated key is an error of the format, `1e-4` is a number, `off` is not False.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from cpfean.errors import ConfigError
from cpfean.files import read_file
from cpfean.model.scorers.registry import SCORERS

if TYPE_CHECKING:
    ScorerName = str
else:
    ScorerName = Literal[tuple(SCORERS)]

Plain = bool | int | float | str

_LARGEST_TOML = 1_000_000  # bytes; ours take two thousand
_LARGEST = 2**31 - 1  # what every library that gets a whole number of ours can hold


class _Part:
    """Checks the type of every field, then what `_validate` of the subclass adds."""

    __slots__ = ()
    _prefix: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if not is_dataclass(hints[item.name]):
                checked = typed(value, hints[item.name], path=self._path(item.name))
                object.__setattr__(self, item.name, checked)
            elif not isinstance(value, hints[item.name]):
                raise ConfigError(
                    f"{self._path(item.name)} must be a table of settings; got {value!r}."
                )
        self._validate()

    def _validate(self) -> None:
        """Ranges, and fields that exclude each other."""

    def _path(self, name: str) -> str:
        return f"{self._prefix}.{name}" if self._prefix else name

    def _need(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{self._path(name)} must be {rule}; got {getattr(self, name)!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig(_Part):
    """The generated data set; see `cpfean.data.synthetic`.

    Attributes:
        train_images, dev_images, test_images: images of each split, five captions each.
        num_regions: regions stored for an image.
        feature_dim: width of a region's feature vector.
        feature_noise: length of the noise added to a unit-length feature.
        label_error: share of regions whose object label is replaced by a wrong one.
        seed: of the whole set; the same seed makes the same files.
    """

    _prefix: typing.ClassVar[str] = "data.synthetic"

    train_images: int = 800
    dev_images: int = 200
    test_images: int = 300
    num_regions: int = 24
    feature_dim: int = 64
    feature_noise: float = 1.0
    label_error: float = 0.15
    seed: int = 0

    def _validate(self) -> None:
        for name in ("train_images", "dev_images", "test_images"):
            self._need(getattr(self, name) >= 2, name, "at least 2")
        self._need(4 <= self.num_regions <= 256, "num_regions", "from 4 to 256")
        self._need(8 <= self.feature_dim <= 4096, "feature_dim", "from 8 to 4096")
        self._need(self.feature_noise >= 0, "feature_noise", "0 or more")
        self._need(0 <= self.label_error <= 1, "label_error", "from 0 to 1")
        self._need(self.seed >= 0, "seed", "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Part):
    """Which images and captions, and how much of them a training step sees.

    Attributes:
        path: "synthetic", a folder in the native format (docs/data.md), or an s3:// URL of one.
        num_regions: the region count: the first so many regions of an image, by confidence.
        train_images: train on the first so many images only; 0 means all.
        max_tokens: word pieces a caption is cut to, specials included.
        region_dropout: share of an image's regions left out at random in a training step.
        word_noise: share of a caption's words disturbed in a training step: half of them masked,
            a tenth replaced, the others deleted.
        synthetic: the generated set, used when `path` is "synthetic".
    """

    _prefix: typing.ClassVar[str] = "data"

    path: str = "synthetic"
    num_regions: int = 36
    train_images: int = 0
    max_tokens: int = 64
    region_dropout: float = 0.2
    word_noise: float = 0.2
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def _validate(self) -> None:
        self._need(bool(self.path.strip()), "path", '"synthetic", a folder or an s3:// URL')
        self._need(self.num_regions >= 1, "num_regions", "at least 1")
        self._need(self.train_images >= 0, "train_images", "0 (all) or a number of images")
        self._need(4 <= self.max_tokens <= 1000, "max_tokens", "from 4 to 1000")
        self._need(0 <= self.region_dropout < 1, "region_dropout", "in [0, 1)")
        self._need(0 <= self.word_noise < 1, "word_noise", "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(_Part):
    """The text encoder.

    Attributes:
        encoder: "scratch" (a small BERT with a WordPiece vocabulary, both trained on the training
            captions), or a Hugging Face name or local folder of a BERT-type encoder.
        trainable: fine-tune the encoder; False keeps it frozen. "scratch" is always trained.
        units: "words" are means of their pieces, without [CLS] and [SEP]; "pieces" takes every
            piece and both specials as words, as the field's published code does.
        static: a word is its contextual vector beside its static one, which is the mean of its
            pieces in the encoder's own table; False leaves the static one out.
        scratch_dim, scratch_layers, scratch_vocabulary: size of "scratch".
    """

    _prefix: typing.ClassVar[str] = "model.text"

    encoder: str = "scratch"
    trainable: bool = True
    units: Literal["words", "pieces"] = "words"
    static: bool = True
    scratch_dim: int = 128
    scratch_layers: int = 1
    scratch_vocabulary: int = 4000

    def _validate(self) -> None:
        self._need(
            bool(self.encoder.strip()), "encoder", '"scratch", a Hugging Face name or a folder'
        )
        self._need(
            self.trainable or self.encoder != "scratch",
            "trainable",
            'true for encoder "scratch", which knows nothing before it is trained',
        )
        self._need(
            self.scratch_dim >= 16 and self.scratch_dim % 16 == 0, "scratch_dim", "a multiple of 16"
        )
        self._need(1 <= self.scratch_layers <= 24, "scratch_layers", "from 1 to 24")
        self._need(self.scratch_vocabulary >= 100, "scratch_vocabulary", "at least 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionConfig(_Part):
    """Regions: their textual prior and the relations among them.

    Attributes:
        geometry: add the projected box coordinates.
        prior: bring the object label's text embedding into its region.
        label_confidence: trust a label by the detector's confidence in it.
        graph: "iou" (neighbours overlap by more than `iou_threshold`), "dense" (all are
            neighbours), "filtered" (non-maximum suppression at `iou_threshold`, then all).
        iou_threshold: tau_iou of the graph, in [0, 1].
        layers: of the visual Transformer; 0 leaves it out.
        heads: attention heads of a layer; `model.dim` must be a multiple of it.
        dropout: inside the Transformer.
    """

    _prefix: typing.ClassVar[str] = "model.regions"

    geometry: bool = True
    prior: bool = True
    label_confidence: bool = True
    graph: Literal["iou", "dense", "filtered"] = "iou"
    iou_threshold: float = 0.2
    layers: int = 1
    heads: int = 16
    dropout: float = 0.1

    def _validate(self) -> None:
        self._need(0 <= self.iou_threshold <= 1, "iou_threshold", "an overlap, in [0, 1]")
        self._need(0 <= self.layers <= 24, "layers", "from 0 to 24")
        self._need(self.heads >= 1, "heads", "at least 1")
        self._need(0 <= self.dropout < 1, "dropout", "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class WordConfig(_Part):
    """Relations among the words of a caption.

    Attributes:
        graph: "dense" (all words are neighbours), "window" (within two places), "syntax"
            (dependency edges; needs the `syntax` extra and a spaCy model).
        layers: of the textual GCN; 0 leaves it out.
        consensus: which word is prominent for a region depends on how far training captions of an
            image agree on the word, too; False takes all words alike. Only `kind` "prominent" asks.
    """

    _prefix: typing.ClassVar[str] = "model.words"

    graph: Literal["dense", "window", "syntax"] = "dense"
    layers: int = 1
    consensus: bool = True

    def _validate(self) -> None:
        self._need(0 <= self.layers <= 8, "layers", "from 0 to 8")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentConfig(_Part):
    """From fragments to a score; symbols as in docs/model.md, section 4.

    Attributes:
        kind: the scorer, one of `cpfean.model.scorers.registry`: "prominent" is CPFEAN's own.
        fusion: False sets every gate to 1 and weighs all words alike.
        gate: "soft" (a sigmoid), "hard" (0 or 1, straight-through gradient) or "off".
        gate_threshold: theta0 at the start, a cosine: relevance at which a gate is half open.
        gate_sharpness: kappa at the start.
        prominence: False weighs all words alike.
        prominence_weight: beta at the start.
        word_temperature: tau, inverse temperature of the softmax over words; of "hard_coding", of
            its sum over words.
        region_temperature: lambda, inverse temperature of the softmax over regions.
        rounds: how often fusion is repeated.
        global_weight: eta, share of the pooled, global cosine in the score.
        pooling: of that part: "mean", or VSE-inf's "generalized" pooling.
    """

    _prefix: typing.ClassVar[str] = "model.alignment"

    kind: ScorerName = "prominent"
    fusion: bool = True
    gate: Literal["soft", "hard", "off"] = "soft"
    gate_threshold: float = 0.2
    gate_sharpness: float = 10.0
    prominence: bool = True
    prominence_weight: float = 1.0
    word_temperature: float = 10.0
    region_temperature: float = 9.0
    rounds: int = 1
    global_weight: float = 0.5
    pooling: Literal["mean", "generalized"] = "mean"

    def _validate(self) -> None:
        self._need(-1 <= self.gate_threshold <= 1, "gate_threshold", "a cosine, in [-1, 1]")
        self._need(0 < self.gate_sharpness <= 1000, "gate_sharpness", "in (0, 1000]")
        self._need(0 <= self.prominence_weight <= 100, "prominence_weight", "in [0, 100]")
        self._need(0 < self.word_temperature <= 1000, "word_temperature", "in (0, 1000]")
        self._need(0 < self.region_temperature <= 1000, "region_temperature", "in (0, 1000]")
        self._need(1 <= self.rounds <= 8, "rounds", "from 1 to 8")
        self._need(0 <= self.global_weight <= 1, "global_weight", "a share, in [0, 1]")
        self._need(
            self.pooling == "mean" or self.global_weight > 0,
            "pooling",
            '"mean" where global_weight is 0: nothing is pooled',
        )
        repeats = self.rounds == 1 or (self.fusion and SCORERS[self.kind].fuses)
        self._need(
            repeats, "rounds", "1 where fusion is off or replaced: there is nothing to repeat"
        )
        self._need(
            self.fusion or self.gate != "hard",
            "gate",
            '"soft" or "off" where fusion is off: no gate acts',
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Part):
    """The model.

    Attributes:
        dim: D, width of the joint embedding space.
        text, regions, words, alignment: its parts.
    """

    _prefix: typing.ClassVar[str] = "model"

    dim: int = 1024
    text: TextConfig = field(default_factory=TextConfig)
    regions: RegionConfig = field(default_factory=RegionConfig)
    words: WordConfig = field(default_factory=WordConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    def _validate(self) -> None:
        self._need(8 <= self.dim <= 16384, "dim", "from 8 to 16384")
        if self.regions.layers and self.dim % self.regions.heads:
            raise ConfigError(
                f"model.dim must be a multiple of model.regions.heads; got {self.dim} and "
                f"{self.regions.heads}."
            )
        if self.words.graph == "syntax" and self.text.units == "pieces":
            raise ConfigError(
                'model.words.graph = "syntax" links words and model.text.units = "pieces" has '
                "none: choose one."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(_Part):
    """The ranking loss.

    Attributes:
        margin: gap a match must keep over a negative, in cosine units.
        mining: "hardest" takes one negative per query, "all" sums over every one.
        warmup_epochs: first epochs in which "hardest" takes all negatives.
    """

    _prefix: typing.ClassVar[str] = "loss"

    margin: float = 0.2
    mining: Literal["hardest", "all"] = "hardest"
    warmup_epochs: int = 1

    def _validate(self) -> None:
        self._need(0 < self.margin <= 2, "margin", "in (0, 2], a cosine gap")
        self._need(self.warmup_epochs >= 0, "warmup_epochs", "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(_Part):
    """Training.

    Attributes:
        epochs: passes over the training captions.
        batch_size: image-caption pairs in a step, over all workers together.
        learning_rate: of everything but a pretrained text encoder.
        text_learning_rate: of a pretrained text encoder that is fine-tuned.
        weight_decay: AdamW's, on matrices.
        decay_epoch: epochs trained before the learning rates are multiplied by `decay_factor`.
        clip_norm: largest norm of the gradient.
        patience: stop after so many epochs without a better rSum; 0 never stops early.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 on a GPU, fp32 elsewhere; of the
            encoders in evaluation too, whose scoring has `evaluation.products`.
        sharding: "none" keeps all weights, gradients and moments on every worker; "full" spreads
            them over the workers, for text encoders that do not fit. The results are the same.
    """

    _prefix: typing.ClassVar[str] = "optim"

    epochs: int = 25
    batch_size: int = 128
    learning_rate: float = 5e-4
    text_learning_rate: float = 5e-5
    weight_decay: float = 1e-4
    decay_epoch: int = 15
    decay_factor: float = 0.1
    clip_norm: float = 2.0
    patience: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    sharding: Literal["none", "full"] = "none"

    def _validate(self) -> None:
        self._need(self.epochs >= 1, "epochs", "at least 1")
        self._need(self.batch_size >= 2, "batch_size", "at least 2: a match needs a negative")
        self._need(0 < self.learning_rate <= 1, "learning_rate", "in (0, 1]")
        self._need(0 < self.text_learning_rate <= 1, "text_learning_rate", "in (0, 1]")
        self._need(0 <= self.weight_decay <= 1, "weight_decay", "in [0, 1]")
        self._need(self.decay_epoch >= 1, "decay_epoch", "at least 1")
        self._need(0 < self.decay_factor <= 1, "decay_factor", "in (0, 1]")
        self._need(self.clip_norm > 0, "clip_norm", "above 0")
        self._need(self.patience >= 0, "patience", "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(_Part):
    """Recall on a split.

    Attributes:
        protocol: "full" ranks among the whole split; "coco-1k" is the mean over consecutive folds
            of 1000 images with five captions each, every fold ranked by itself.
        batch_size: images or captions encoded at a time.
        products: type of the matrix products that the cosines of regions and words come from;
            docs/performance.md tells what "bf16" does to speed and to rSum.
    """

    _prefix: typing.ClassVar[str] = "evaluation"

    protocol: Literal["full", "coco-1k"] = "full"
    batch_size: int = 128
    products: Literal["fp32", "bf16"] = "fp32"

    def _validate(self) -> None:
        self._need(self.batch_size >= 1, "batch_size", "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentConfig(_Part):
    """All that defines a run; where it runs and how many workers share it does not.

    Attributes:
        seed: of weights, data order and everything drawn while training.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0

    def _validate(self) -> None:
        self._need(0 <= self.seed < 2**31, "seed", "from 0 to 2147483647")

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with some fields changed.

        Args:
            overrides: values by dotted path, e.g. {"loss.margin": 0.3}; a text is read as the
                field's type, so {"loss.margin": "0.3"} is the same.

        Raises:
            ConfigError: unknown path (the nearest known one is named), or a value that the field
                refuses.
        """
        known = dict(field_types(type(self)))
        tree: dict[str, Any] = {}
        for path, value in overrides.items():
            if path not in known:
                raise ConfigError(f"no setting {path!r}{_nearest(path, known)}")
            if isinstance(value, str):
                value = _from_text(value, known[path], path=path)
            *tables, name = path.split(".")
            node = tree
            for table in tables:
                node = node.setdefault(table, {})
            node[name] = value
        return _replaced(self, tree)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data; `from_dict` takes it back."""
        return _plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds a configuration from nested plain data; what is absent takes its default.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), a wrong type or value.
        """
        return _built(cls, data, path="")

    def flat(self) -> dict[str, Plain]:
        """Values by dotted path, in the order of the fields."""
        return dict(_flat(self))

    def to_toml(self) -> str:
        """TOML text; `from_toml` takes it back."""
        lines: list[str] = []
        _write_toml(_plain(self), "", lines)
        return "\n".join(lines).lstrip("\n") + "\n"

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Reads a configuration file.

        Raises:
            ConfigError: unreadable file, or not TOML (a repeated key included: the line is named),
                and what `from_dict` raises.
        """
        try:
            text = read_file(path, limit=_LARGEST_TOML).decode("utf-8-sig")
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read as a configuration: {error.strerror}; name a TOML file."
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: cannot be read as a configuration: {error}; save it as UTF-8."
            ) from None
        try:
            return cls.from_dict(tomllib.loads(text))
        except (ValueError, RecursionError) as error:  # a TOMLDecodeError is a ValueError
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that two configurations share only if they are equal."""
        canonical = json.dumps(_plain(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def field_types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration class: its dotted path and its type."""
    hints = _type_hints(cls)
    for item in fields(cls):
        path = f"{prefix}.{item.name}" if prefix else item.name
        if is_dataclass(hints[item.name]):
            yield from field_types(hints[item.name], path)
        else:
            yield path, hints[item.name]


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """A closing half-sentence that names the known words nearest to an unknown one."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if not matches:
        return f"; known: {', '.join(known)}." if len(known) <= 12 else "."
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?"


def _nearest(path: str, known: Mapping[str, Any]) -> str:
    # A bare field name is the likeliest slip: `margin` for `loss.margin`.
    same_name = [other for other in known if other.split(".")[-1] == path.split(".")[-1]]
    if same_name:
        return f"; did you mean {' or '.join(repr(match) for match in same_name[:3])}?"
    return nearest(path, known)


def _type_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {
        name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar
    }


def typed(value: Any, hint: Any, *, path: str) -> Plain:
    """A value as the type of its field.

    Args:
        hint: bool, int, float, str or a Literal.
        path: of the field, for the message.

    Raises:
        ConfigError: it is of another type, not finite, or not printable.
    """
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            listed = ", ".join(json.dumps(choice) for choice in choices)
            raise ConfigError(f"{path} must be one of {listed}; got {value!r}.")
        return value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path} must be a number; got {value!r}.")
        try:
            number = float(value)
        except OverflowError:  # a whole number may have more digits than a float can hold
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{path} must be finite; got {value!r}.")
        return number
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        names = {int: "a whole number", bool: "true or false", str: "a text"}
        raise ConfigError(f"{path} must be {names[hint]}; got {value!r}.")
    if hint is int and abs(value) > _LARGEST:
        got = value if abs(value) < 10**20 else "a larger one"
        raise ConfigError(f"{path} must be a whole number within ±{_LARGEST}; got {got}.")
    if hint is str and not value.isprintable():
        raise ConfigError(f"{path} must be a text of printable characters; got {value!r}.")
    return value


def _from_text(text: str, hint: Any, *, path: str) -> Plain:
    """Reads what was typed after `path=` as the field's type."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    if hint is bool:
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        if text.strip().lower() not in words:
            raise ConfigError(f"{path} must be true or false; got {text!r}.")
        return words[text.strip().lower()]
    try:
        return hint(text)
    except ValueError:
        kind = "a whole number" if hint is int else "a number"
        raise ConfigError(f"{path} must be {kind}; got {text!r}.") from None


def _replaced(part: Any, tree: Mapping[str, Any]) -> Any:
    changes = {
        name: _replaced(getattr(part, name), value) if is_dataclass(getattr(part, name)) else value
        for name, value in tree.items()
    }
    return replace(part, **changes)


def _built(cls: type, data: Any, *, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{path or 'the configuration'} must be a table of settings; got {data!r}."
        )
    hints = _type_hints(cls)
    values = {}
    for name, value in data.items():
        full = f"{path}.{name}" if path else str(name)
        if name not in hints:
            raise ConfigError(f"no setting {full!r}{nearest(str(name), hints)}")
        values[name] = _built(hints[name], value, path=full) if is_dataclass(hints[name]) else value
    return cls(**values)


def _plain(part: Any) -> dict[str, Any]:
    values = ((item.name, getattr(part, item.name)) for item in fields(part))
    return {name: _plain(value) if is_dataclass(value) else value for name, value in values}


def _flat(part: Any, prefix: str = "") -> Iterator[tuple[str, Plain]]:
    for name, value in _plain(part).items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(getattr(part, name), f"{path}.")
        else:
            yield path, value


def _write_toml(table: Mapping[str, Any], path: str, lines: list[str]) -> None:
    scalars = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    if path and scalars:
        lines += ["", f"[{path}]"]
    # A JSON string, number or boolean is written the same way in TOML.
    lines += [
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in scalars.items()
    ]
    for name, value in table.items():
        if isinstance(value, Mapping):
            _write_toml(value, f"{path}.{name}" if path else name, lines)


__all__ = [
    "AlignmentConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Plain",
    "RegionConfig",
    "SyntheticConfig",
    "TextConfig",
    "WordConfig",
    "field_types",
    "nearest",
    "typed",
]
