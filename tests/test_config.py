"""Configurations: what they accept, what they refuse and how they say so, and how they travel."""

import json
import math
import subprocess
import sys
import typing
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpfean.config import (
    AlignmentConfig,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    RegionConfig,
    field_types,
    nearest,
)
from cpfean.errors import ConfigError

DEFAULT = ExperimentConfig()
TYPES = dict(field_types(ExperimentConfig))
PATHS = sorted(TYPES)
PARTS = sorted({path.rsplit(".", 1)[0] for path in PATHS if "." in path})

numbers = st.integers() | st.floats()
plain = st.none() | st.booleans() | numbers | st.text(max_size=12)
junk = st.recursive(
    plain | st.sampled_from(PATHS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["loss", "margin", "seed", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, most of them in the ranges that fields allow."""
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    return {
        bool: st.booleans(),
        int: st.integers(0, 300) | st.integers(),
        float: st.floats(0, 1) | st.floats(),
        str: st.text(max_size=12),
    }[hint]


overrides = st.lists(st.sampled_from(PATHS), max_size=4, unique=True).flatmap(
    lambda paths: st.fixed_dictionaries({path: values_of(TYPES[path]) for path in paths})
)


def accepted(values: dict[str, Any]) -> ExperimentConfig | None:
    """The configuration, or None where it is refused; any other error fails the test."""
    try:
        return DEFAULT.with_overrides(values)
    except ConfigError:
        return None


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        DEFAULT.with_overrides(values)
    return str(caught.value)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "experiment.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def file_refusal(folder: Path, text: str | bytes) -> str:
    path = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        ExperimentConfig.from_toml(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Travelling: TOML, plain data, flat paths, texts.


@given(values=overrides)
def test_what_is_accepted_survives_every_way_of_travelling(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = accepted(values)
    if config is None:
        return
    path = written(tmp_path_factory.getbasetemp(), config.to_toml())
    assert ExperimentConfig.from_toml(path) == config
    assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DEFAULT.with_overrides(config.flat()) == config


@given(values=overrides)
def test_a_text_is_read_as_the_type_of_its_field(values: dict[str, Any]) -> None:
    assert accepted({path: str(value) for path, value in values.items()}) == accepted(values)


def test_the_flat_form_has_every_field_once_in_the_order_of_the_classes() -> None:
    assert list(DEFAULT.flat()) == list(TYPES)
    assert DEFAULT.flat()["model.alignment.gate"] == DEFAULT.model.alignment.gate


def test_what_a_file_leaves_out_takes_its_default(tmp_path: Path) -> None:
    config = ExperimentConfig.from_toml(written(tmp_path, "[loss]\nmargin = 0.3\n"))
    assert config == DEFAULT.with_overrides({"loss.margin": 0.3})
    assert ExperimentConfig.from_toml(written(tmp_path, "")) == DEFAULT


def test_a_file_that_an_editor_marked_as_utf8_is_read(tmp_path: Path) -> None:
    config = ExperimentConfig.from_toml(written(tmp_path, "\ufeffseed = 3\n"))
    assert config.seed == 3


def test_a_path_in_any_script_survives_a_file(tmp_path: Path) -> None:
    config = DEFAULT.with_overrides({"data.path": 'été/猫/🐈 "a" \\b'})
    assert ExperimentConfig.from_toml(written(tmp_path, config.to_toml())) == config


def test_overriding_leaves_the_original_and_all_other_fields_alone() -> None:
    changed = DEFAULT.with_overrides({"model.regions.iou_threshold": 0.4})
    assert DEFAULT.model.regions.iou_threshold == 0.2
    before, after = DEFAULT.flat(), changed.flat()
    assert {path for path in before if before[path] != after[path]} == {
        "model.regions.iou_threshold"
    }


def test_overrides_that_are_valid_only_together_are_taken_together() -> None:
    together = {"model.dim": 24, "model.regions.heads": 3}
    assert accepted({"model.regions.heads": 3}) is None
    assert DEFAULT.with_overrides(together).model.dim == 24


def test_a_configuration_cannot_be_changed_after_its_birth() -> None:
    with pytest.raises(FrozenInstanceError):
        DEFAULT.loss.margin = 0.5  # type: ignore[misc]


# Fingerprints.


@given(first=overrides, second=overrides)
def test_fingerprints_are_equal_exactly_when_configurations_are(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, other = accepted(first), accepted(second)
    if one is not None and other is not None:
        same = json.dumps(one.to_dict()) == json.dumps(other.to_dict())
        assert (one.fingerprint() == other.fingerprint()) == same


@pytest.mark.parametrize("path", PATHS)
def test_every_field_moves_the_fingerprint(path: str) -> None:
    others: dict[Any, list[Any]] = {
        bool: [True, False],
        int: [2, 4, 32, 128, 256],
        float: [0.5, 0.25],
        str: ["one", "two"],
    }
    values = list(typing.get_args(TYPES[path])) or others[TYPES[path]]
    # With a pretrained encoder and a plain scorer no field is held back by another one.
    base = DEFAULT.with_overrides({"model.text.encoder": "bert", "model.dim": 2048})
    prints = {
        config.fingerprint()
        for value in values
        if (config := _try(base, {path: value})) is not None
    }
    assert len(prints) >= 2


def _try(base: ExperimentConfig, values: dict[str, Any]) -> ExperimentConfig | None:
    try:
        return base.with_overrides(values)
    except ConfigError:
        return None


def test_a_fingerprint_does_not_depend_on_the_process() -> None:
    program = "from cpfean.config import ExperimentConfig; print(ExperimentConfig().fingerprint())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == DEFAULT.fingerprint()
    assert len(DEFAULT.fingerprint()) == 12


# Refusals: always a ConfigError, always with the path, the rule and the value.


@given(path=st.sampled_from(PATHS), value=junk)
def test_any_value_is_taken_or_refused_with_its_path(path: str, value: Any) -> None:
    try:
        config = DEFAULT.with_overrides({path: value})
    except ConfigError as error:
        assert path.split(".")[0] in str(error)
    else:
        assert config.flat()[path] == value or isinstance(value, str)


@given(data=junk)
def test_any_plain_data_is_taken_or_refused(data: Any) -> None:
    try:
        config = ExperimentConfig.from_dict(data)
    except ConfigError:
        return
    assert isinstance(config, ExperimentConfig)


@given(noise=st.binary(max_size=40), place=st.integers(0, 2000), cut=st.integers(0, 40))
def test_any_bytes_in_a_file_end_in_a_configuration_or_a_refusal(
    noise: bytes, place: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = DEFAULT.to_toml().encode()
    damaged = text[:place] + noise + text[place + cut :]
    path = written(tmp_path_factory.getbasetemp(), damaged)
    try:
        assert isinstance(ExperimentConfig.from_toml(path), ExperimentConfig)
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("data.path", ["", "  ", "a\nb", "a\x00b", "a\x7f", "\ud800"]),
        ("data.num_regions", [0, -1]),
        ("data.train_images", [-1]),
        ("data.max_tokens", [3, 1001]),
        ("data.region_dropout", [-0.1, 1.0, math.nan]),
        ("data.word_noise", [-0.1, 1.0, math.nan]),
        ("data.synthetic.train_images", [1, -5]),
        ("data.synthetic.dev_images", [1]),
        ("data.synthetic.test_images", [1]),
        ("data.synthetic.num_regions", [3, 257]),
        ("data.synthetic.feature_dim", [7, 4097]),
        ("data.synthetic.feature_noise", [-0.1, math.inf]),
        ("data.synthetic.label_error", [-0.1, 1.1]),
        ("data.synthetic.seed", [-1]),
        ("model.dim", [0, 7, 16400, 100]),
        ("model.text.encoder", ["", "\t"]),
        ("model.text.scratch_dim", [0, 24]),
        ("model.text.scratch_layers", [0, 25]),
        ("model.text.scratch_vocabulary", [99]),
        ("model.regions.iou_threshold", [-0.01, 1.01, math.nan, math.inf]),
        ("model.regions.layers", [-1, 25]),
        ("model.regions.heads", [0, -16]),
        ("model.regions.dropout", [-0.1, 1.0]),
        ("model.words.layers", [-1, 9]),
        ("model.alignment.gate_threshold", [-1.1, 1.1, math.nan]),
        ("model.alignment.gate_sharpness", [0.0, -1.0, 1001.0]),
        ("model.alignment.prominence_weight", [-0.1, 101.0]),
        ("model.alignment.word_temperature", [0.0, -9.0, 1001.0]),
        ("model.alignment.region_temperature", [0.0, -9.0, math.inf]),
        ("model.alignment.rounds", [0, 9]),
        ("model.alignment.global_weight", [-0.1, 1.1]),
        ("loss.margin", [0.0, -0.2, 2.1, math.nan]),
        ("loss.warmup_epochs", [-1]),
        ("optim.epochs", [0, -3]),
        ("optim.batch_size", [1, 0]),
        ("optim.learning_rate", [0.0, -1e-4, 1.1, math.nan, math.inf, 10**400]),
        ("optim.text_learning_rate", [0.0, -1e-4, 1.1]),
        ("optim.weight_decay", [-1e-4, 1.1]),
        ("optim.decay_epoch", [0]),
        ("optim.decay_factor", [0.0, 1.1]),
        ("optim.clip_norm", [0.0, -2.0, math.nan]),
        ("optim.patience", [-1]),
        ("evaluation.batch_size", [0]),
        ("seed", [-1, 2**31]),
    ],
)
def test_a_value_out_of_range_is_refused_with_path_and_value(path: str, values: list[Any]) -> None:
    for value in values:
        message = refusal({path: value})
        assert path in message
        assert repr(value) in message or str(value) in message


def test_the_edges_of_the_ranges_are_allowed() -> None:
    edges = {
        "data.region_dropout": 0.0,
        "model.regions.iou_threshold": 1.0,
        "model.regions.layers": 0,
        "model.alignment.gate_threshold": -1.0,
        "model.alignment.prominence_weight": 0.0,
        "model.alignment.global_weight": 0.0,
        "loss.margin": 2.0,
        "loss.warmup_epochs": 0,
        "optim.batch_size": 2,
        "optim.weight_decay": 0.0,
        "optim.decay_factor": 1.0,
        "seed": 2**31 - 1,
    }
    flat = DEFAULT.with_overrides(edges).flat()
    assert {path: flat[path] for path in edges} == edges


@pytest.mark.parametrize("path", PATHS)
def test_a_value_of_the_wrong_type_is_refused(path: str) -> None:
    wrong: dict[Any, list[Any]] = {
        bool: [0, 1, 1.0, None],
        int: [True, 2.0, None, [3]],
        float: [True, None, [0.1], {"a": 1}],
        str: [3, True, None],
    }
    for value in wrong.get(TYPES[path], ["no such choice", 3, None, ["soft"]]):
        assert path in refusal({path: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("0.0001", 1e-4), ("1E-4", 1e-4), (" 1 ", 1.0), ("+.5", 0.5)],
)
def test_a_number_typed_in_any_usual_form_is_a_number(text: str, value: float) -> None:
    assert DEFAULT.with_overrides({"optim.learning_rate": text}).optim.learning_rate == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, True) for text in ("true", "Yes", "on", "1")],
        *[(text, False) for text in ("false", "No", "OFF", "0")],
    ],
)
def test_yes_and_no_are_read_as_such_where_a_switch_is_asked_for(text: str, value: bool) -> None:
    assert DEFAULT.with_overrides({"model.regions.prior": text}).model.regions.prior is value


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("optim.learning_rate", "fast"),
        ("optim.learning_rate", ""),
        ("optim.learning_rate", "nan"),
        ("optim.learning_rate", "1,5"),
        ("optim.epochs", "1.5"),
        ("optim.epochs", "ten"),
        ("model.regions.prior", "maybe"),
        ("model.alignment.gate", "Soft"),
    ],
)
def test_a_text_that_is_not_of_the_type_is_refused(path: str, text: str) -> None:
    message = refusal({path: text})
    assert message.startswith(path)
    assert repr(text) in message or text in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model.alignment.fusion": False, "model.alignment.gate": "hard"}, "fusion"),
        ({"model.alignment.fusion": False, "model.alignment.rounds": 2}, "fusion"),
        ({"model.alignment.kind": "cross_attention", "model.alignment.rounds": 2}, "replaced"),
        ({"model.words.graph": "syntax", "model.text.units": "pieces"}, "choose one"),
        ({"model.text.trainable": False}, "scratch"),
        ({"model.dim": 200}, "model.regions.heads"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_reason(
    overrides: dict[str, Any], named: str
) -> None:
    assert named in refusal(overrides)


def test_heads_do_not_matter_where_there_is_no_transformer() -> None:
    assert accepted({"model.dim": 200, "model.regions.layers": 0}) is not None


# Names that are not known.


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("margin", "loss.margin"),
        ("gate", "model.alignment.gate"),
        ("model.gate", "model.alignment.gate"),
        ("loss.margn", "loss.margin"),
        ("optim.lerning_rate", "optim.learning_rate"),
        ("model.alignment.gate_treshold", "model.alignment.gate_threshold"),
        ("data.num_region", "data.num_regions"),
    ],
)
def test_an_unknown_path_is_refused_with_the_one_that_was_meant(path: str, meant: str) -> None:
    message = refusal({path: 1})
    assert repr(path) in message
    assert f"did you mean {meant!r}" in message


def test_a_bare_name_that_several_parts_share_names_them_all() -> None:
    message = refusal({"layers": 1})
    assert "'model.regions.layers'" in message
    assert "'model.words.layers'" in message


@given(path=st.text(max_size=30))
def test_an_unknown_path_is_never_taken(path: str) -> None:
    if path not in TYPES:
        assert repr(path) in refusal({path: 1})


@pytest.mark.parametrize("part", PARTS)
def test_a_whole_part_is_not_a_setting(part: str) -> None:
    assert repr(part) in refusal({part: {}})


@pytest.mark.parametrize(
    ("text", "wrong", "meant"),
    [
        ("sed = 3", "'sed'", "'seed'"),
        ("[los]\nmargin = 0.1", "'los'", "'loss'"),
        ("[loss]\nmargni = 0.1", "'loss.margni'", "'margin'"),
        ("[model.allignment]\ngate = 'soft'", "'model.allignment'", "'alignment'"),
    ],
)
def test_an_unknown_key_of_a_file_is_refused_with_the_nearest(
    text: str, wrong: str, meant: str, tmp_path: Path
) -> None:
    message = file_refusal(tmp_path, text)
    assert wrong in message
    assert meant in message


def test_far_from_every_name_the_known_ones_are_listed_if_they_are_few() -> None:
    assert nearest("zzz", ["soft", "hard"]) == "; known: soft, hard."
    assert nearest("zzz", [f"name{place}" for place in range(50)]) == "."


# Files.


@pytest.mark.parametrize(
    "text",
    [
        "seed = 1\nseed = 2\n",
        "[loss]\nmargin = 0.1\nmargin = 0.2\n",
        "[loss]\nmargin = 0.1\n[optim]\nepochs = 3\n[loss]\nmining = 'all'\n",
        "loss.margin = 0.1\n[loss]\nmining = 'all'\n",
    ],
)
def test_a_repeated_key_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    assert "line" in file_refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe",
        b"seed",
        b"seed = ",
        b"seed = 1" + b"0" * 5000,
        b"seed = " + b"[" * 5000,
        b"optim = 3",
        b"[optim]\nlearning_rate = 1" + b"0" * 400,
        b"[optim]\nlearning_rate = '1e-4'",
        b"[optim]\nlearning_rate = nan",
        b"[model.regions]\nprior = 'no'",
        b"seed = 2026-01-01",
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(text: bytes, tmp_path: Path) -> None:
    file_refusal(tmp_path, text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            ExperimentConfig.from_toml(path)


# The classes themselves.


@pytest.mark.parametrize(
    ("part", "arguments", "path"),
    [
        (LossConfig, {"margin": -1.0}, "loss.margin"),
        (RegionConfig, {"graph": "sparse"}, "model.regions.graph"),
        (AlignmentConfig, {"gate": None}, "model.alignment.gate"),
        (DataConfig, {"synthetic": {"seed": 1}}, "data.synthetic"),
        (ModelConfig, {"text": None}, "model.text"),
        (ExperimentConfig, {"loss": DataConfig()}, "loss"),
    ],
)
def test_a_part_built_by_hand_is_checked_with_its_full_path(
    part: type, arguments: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        part(**arguments)
    assert str(caught.value).startswith(path)


def classes(cls: Any) -> typing.Iterator[Any]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if is_dataclass(hint):
            yield from classes(hint)


@pytest.mark.parametrize("cls", list(classes(ExperimentConfig)), ids=lambda cls: cls.__name__)
def test_every_setting_is_explained_in_its_class(cls: Any) -> None:
    parts = {name for name, hint in typing.get_type_hints(cls).items() if is_dataclass(hint)}
    names = {item.name for item in fields(cls)} - (parts if cls is ExperimentConfig else set())
    assert {name for name in names if name not in cls.__doc__} == set()


def test_a_whole_number_is_taken_where_a_number_is_asked_for() -> None:
    config = DEFAULT.with_overrides({"loss.margin": 1})
    assert isinstance(config.loss.margin, float)
    assert config == DEFAULT.with_overrides({"loss.margin": 1.0})
    assert config.fingerprint() == DEFAULT.with_overrides({"loss.margin": 1.0}).fingerprint()


def test_reading_a_configuration_needs_no_other_library() -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        "import cpfean.config, cpfean.errors\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'cpfean'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
