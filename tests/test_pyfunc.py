"""Rows in, rows out: the scores are those of the model's own encoders and `Cpfean.score`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.split import open_split
from cpfean.data.synthetic import write_synthetic
from cpfean.errors import CheckpointError, ConfigError, CpfeanError, DataError
from cpfean.pyfunc import SETTINGS, CaptionScorer, example, load_pyfunc, requirements
from cpfean.training.setup import open_checkpoint
from tests.model.encoders import write_encoder
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained, tiny_experiment

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pyfunc") / "data"
    write_synthetic(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def config(data: Path) -> ExperimentConfig:
    return tiny_experiment().with_overrides({"data.path": str(data)})


@pytest.fixture(scope="module")
def model(data: Path, config: ExperimentConfig) -> Path:
    return save_untrained(config, data, data.parent / "model")


@pytest.fixture
def scorer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaptionScorer:
    monkeypatch.setenv("CPFEAN_CACHE", str(tmp_path / "cache"))
    return CaptionScorer(model)


def plain_scores(model: Path, data: Path, cache: Path) -> pandas.DataFrame:
    """Every image of the test split with every caption of it, without anything of ours above it."""
    opened = open_checkpoint(
        model,
        data_folder=data,
        split="test",
        cache_dir=cache,
        device=torch.device("cpu"),
        num_regions=8,
    )
    split, dataset = opened.dataset.split, opened.dataset
    with torch.inference_mode():
        images = opened.model.encode_images(
            **dataset.image_batch(range(split.num_images))._asdict()
        )
        texts = dataset.caption_batch(range(split.num_captions))
        captions = opened.model.encode_captions(**texts._asdict())
        scores = opened.model.score(images, captions)
    return pandas.DataFrame(scores.double().numpy(), index=split.image_ids, columns=split.captions)


def test_pairs_have_the_scores_of_the_model(
    scorer: CaptionScorer, model: Path, data: Path, tmp_path: Path
) -> None:
    plain = plain_scores(model, data, tmp_path / "cache")
    # Captions that stand twice in the split have one score.
    plain = plain.loc[:, ~plain.columns.duplicated()]
    pairs = [(caption, name) for caption in plain.columns for name in plain.index]
    assert len(pairs) > 128  # more than are scored at a time
    rows = pandas.DataFrame(pairs, columns=["caption", "image_id"])
    rows = rows.sample(frac=1, random_state=0, ignore_index=True)
    answers = scorer.predict(rows)
    assert list(answers.columns) == ["caption", "image_id", "score"]
    assert answers[["caption", "image_id"]].equals(rows)
    expected = [plain.at[name, caption] for caption, name in rows.itertuples(index=False)]
    torch.testing.assert_close(
        torch.tensor(answers["score"].tolist()), torch.tensor(expected).float(), atol=2e-6, rtol=0
    )


def test_without_images_each_caption_gets_its_best_ones(
    scorer: CaptionScorer, model: Path, data: Path, tmp_path: Path
) -> None:
    plain = plain_scores(model, data, tmp_path / "cache").iloc[:, :3]
    rows = pandas.DataFrame({"caption": list(plain.columns)})
    for k in (1, 4, 100):
        answers = scorer.predict(rows, params={"k": k})
        kept = min(k, len(plain))
        assert len(answers) == 3 * kept
        for i, caption in enumerate(plain.columns):
            own = answers.iloc[i * kept : (i + 1) * kept]
            best = plain.iloc[:, i].sort_values(ascending=False)
            assert set(own["caption"]) == {caption}
            assert list(own["image_id"]) == list(best.index[:kept])
            torch.testing.assert_close(
                torch.tensor(own["score"].tolist()),
                torch.tensor(best.tolist()[:kept]),
                atol=2e-6,
                rtol=0,
            )
    assert len(scorer.predict(rows.assign(image_id=None), params={"k": 2})) == 6
    assert len(scorer.predict(rows)) == 3 * len(plain)  # ten, and there are six


def test_what_is_logged_answers_about_the_data_that_it_is_loaded_with(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPFEAN_CACHE", str(tmp_path / "cache"))
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    for settings, split in (
        (None, "test"),
        (SETTINGS, "test"),
        ({"data": str(moved), "split": "dev"}, "dev"),
    ):
        answers = load_pyfunc(str(model), settings).predict(example(model))
        assert set(answers["image_id"]) <= set(open_split(data, split, num_regions=8).image_ids)


def test_a_frozen_text_encoder_that_has_moved_is_named_by_whoever_loads(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPFEAN_CACHE", str(tmp_path / "cache"))
    encoder = write_encoder(tmp_path / "encoder")
    config = tiny_experiment().with_overrides(
        {
            "data.path": str(data),
            "data.word_noise": 0,
            "model.text.encoder": str(encoder),
            "model.text.trainable": False,
        }
    )
    model = save_untrained(config, data, tmp_path / "model")
    rows = pandas.DataFrame({"caption": ["a dog on the beach"]})
    before = load_pyfunc(str(model)).predict(rows)
    encoder.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"model\.text\.encoder"):
        load_pyfunc(str(model))
    settings = {"text_encoder": str(tmp_path / "elsewhere")}
    assert load_pyfunc(str(model), settings).predict(rows).equals(before)


@pytest.mark.parametrize(
    ("rows", "params", "error", "words"),
    [
        ({"text": ["a dog"]}, {}, DataError, "expected a column 'caption', found text"),
        ({"caption": ["a dog", None]}, {}, DataError, "caption, row 1: expected a text"),
        ({"caption": ["a dog", " "]}, {}, DataError, "caption, row 1: expected a text"),
        ({"caption": ["\u0301"]}, {}, DataError, "expected words"),
        ({"caption": ["a dog"], "image_id": ["no"]}, {}, DataError, "has no image 'no'"),
        ({"caption": ["a", "b"], "image_id": ["x", None]}, {}, DataError, "image_id, row 1"),
        ({"caption": ["a dog"]}, {"k": 0}, ConfigError, "k must be a number of images"),
    ],
)
def test_a_question_that_is_none_is_refused(
    scorer: CaptionScorer,
    rows: dict[str, list[str]],
    params: dict[str, int],
    error: type[CpfeanError],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        scorer.predict(pandas.DataFrame(rows), params=params)


def test_what_does_not_fit_is_refused_when_it_is_loaded_or_first_asked(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPFEAN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="model_config may have the texts data, split"):
        load_pyfunc(str(model), {"folder": "x"})
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    (damaged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_pyfunc(str(damaged))
    rows = pandas.DataFrame({"caption": ["a dog"]})
    with pytest.raises(DataError, match="expected a folder, found none"):
        load_pyfunc(str(model), {"data": str(tmp_path / "none")}).predict(rows)
    other = tmp_path / "other"
    write_synthetic(other, replace(TINY, feature_dim=8))
    with pytest.raises(CheckpointError, match="features of width 16, found 8"):
        load_pyfunc(str(model), {"data": str(other)}).predict(rows)


def test_what_it_needs_has_versions(model: Path) -> None:
    needs = dict(line.split("==") for line in requirements(model))
    assert needs["torch"] == torch.__version__.split("+")[0]
    assert {"transformers", "numpy", "pandas"} <= needs.keys()
