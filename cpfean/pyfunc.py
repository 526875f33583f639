"""A trained model as rows in, rows out: what MLflow's `python_function` asks of a model.

`mlflow.pyfunc.load_model` calls a function of the module that a logged model names; nothing here
needs MLflow. A logged model is the folder of a run's best model as it stands, so nothing of it is
pickled. The images are those of a data folder: their features come from one detector, are checked
as a folder, and would be hundreds of kilobytes of JSON an image. Whoever loads the model says which
folder (`model_config={"data": DIR}`), and not whoever asks: a server reads no other one.

Axes:  row   of the question or of the answer      image, caption   of one score matrix
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpfean.config import DataConfig, ExperimentConfig, nearest
from cpfean.data.caption_groups import CaptionGroups
from cpfean.data.dataset import RetrievalDataset
from cpfean.data.sources import resolve_data
from cpfean.data.split import Split, check_folder, open_split
from cpfean.errors import CheckpointError, ConfigError, DataError
from cpfean.folders import cache_folder
from cpfean.json_files import read_object
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings
from cpfean.training.setup import check_made_for, default_device, read_model

# What whoever loads a logged model may set; "" is what the model was trained with.
SETTINGS = {"data": "", "split": "test", "text_encoder": ""}
DEFAULT_K = 10
_CAPTION = {"type": "string", "name": "caption", "required": True}
_IMAGE = {"type": "string", "name": "image_id", "required": True}
_SCORE = {"type": "double", "name": "score", "required": True}
_K = {"type": "long", "name": "k", "default": DEFAULT_K, "shape": None}
# What is asked and answered, as MLflow's `ModelSignature.from_dict` reads it.
SIGNATURE = {
    "inputs": json.dumps([_CAPTION, _IMAGE | {"required": False}]),
    "outputs": json.dumps([_CAPTION, _IMAGE, _SCORE]),
    "params": json.dumps([_K]),
}
_AT_A_TIME = 128  # rows, images or captions
# What is imported here, by the names of the packages: MLflow would load a model to find it out.
_NEEDS = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "numba"),
    *("scipy", "pycocotools", "jaxtyping", "s3fs", "filelock", "pandas"),
)


def requirements(folder: Path) -> list[str]:
    """What pip has to install for the logged model of a folder, for CPU or CUDA: the versions here.

    Raises:
        CheckpointError: no model.
    """
    described = read_object(folder / "config.json", error=CheckpointError)
    needs = list(_NEEDS)
    words = described.get("model", {}).get("words", {})
    if words.get("graph") == "syntax":
        needs.append("spacy")
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in needs]


def example(folder: Path) -> Any:
    """A question that the model of a folder can be asked: words of the data's own, if it has some.

    Raises:
        CheckpointError: no model.
    """
    import pandas

    described = read_object(folder / "config.json", error=CheckpointError)
    names: list[str] = described["inputs"]["label_names"] or []
    first, second, *_ = [*names, "dog", "ball"]
    return pandas.DataFrame({"caption": [f"a {first} and a {second}"]})


def load_pyfunc(folder: str, settings: Mapping[str, Any] | None = None) -> CaptionScorer:
    """The model of a folder that was logged; called by MLflow.

    Args:
        folder: with `config.json`, `model.safetensors`, `config.toml` and the tokenizer.
        settings: the `model_config`: what differs from `SETTINGS`.

    Raises:
        ConfigError: another setting.
        CheckpointError, ConfigError: as `CaptionScorer`.
    """
    given = SETTINGS | dict(settings or {})
    for name, value in given.items():
        if name not in SETTINGS or not isinstance(value, str):
            raise ConfigError(
                f"model_config may have the texts {', '.join(SETTINGS)}; got {name} = {value!r:.60}"
            )
    return CaptionScorer(Path(folder), **given)


_load_pyfunc = load_pyfunc  # the name that MLflow knows


class CaptionScorer:
    """Scores captions against the images of a data folder.

    Args:
        folder: of a model, with its `config.toml` and its tokenizer.
        data: a folder in the native format, an s3:// URL of one or "synthetic"; "" for what the
            model was trained on. It is opened by the first question.
        split: whose images.
        text_encoder: where a frozen text encoder is, if it has moved; "" if it has not.

    Raises:
        CheckpointError: no model.
        ConfigError: its configuration or its frozen text encoder cannot be read.
    """

    def __init__(
        self, folder: Path, *, data: str = "", split: str = "test", text_encoder: str = ""
    ) -> None:
        self._config = ExperimentConfig.from_toml(folder / "config.toml")
        self._data = data or self._config.data.path
        self._split_name = split
        self._device = default_device()
        self._model, self._tokenizer = read_model(
            folder, device=self._device, text_encoder=text_encoder or None
        )

    def predict(self, rows: Any, params: Mapping[str, Any] | None = None) -> Any:
        """The score of every row's caption and image; without images, each caption's best ones.

        Args:
            rows: a pandas table with the column `caption` and, for scores of pairs, `image_id`, a
                name of the split's ids.
            params: `k`: without `image_id`, how many images of each caption; all if they are fewer.

        Returns:
            A pandas table with `caption`, `image_id` and `score`, in cosine units: the rows as they
            came, or k rows for each caption, the best first. A tie goes to the image that comes
            first in the split.

        Raises:
            DataError: the data folder, a caption or an id that is none.
            CheckpointError: data without the fields that the model reads.
            ConfigError: another k than a number of images.
        """
        import pandas

        captions = _texts(rows, "caption")
        if "image_id" in rows and not rows["image_id"].isna().all():
            names = _texts(rows, "image_id")
            answers = self._of_pairs(captions, names)
        else:
            k = (params or {}).get("k", DEFAULT_K)
            if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
                raise ConfigError(f"k must be a number of images, 1 or more; got {k!r:.60}.")
            answers = self._best(captions, int(k))
        return pandas.DataFrame(answers, columns=["caption", "image_id", "score"])

    @torch.inference_mode()
    def _of_pairs(self, captions: list[str], names: list[str]) -> list[tuple[str, str, float]]:
        known: dict[str, int] = {}
        for i, name in enumerate(self._split.image_ids):
            known.setdefault(name, i)
        if unknown := next((name for name in names if name not in known), None):
            raise DataError(
                f"image_id: the {self._split_name} split of {self._data} has no image "
                f"{unknown!r:.100}{nearest(unknown[:100], known)}"
            )
        answers = []
        for part in _parts(len(captions)):
            texts, own_text = np.unique(captions[part], return_inverse=True)
            images, own_image = np.unique([known[n] for n in names[part]], return_inverse=True)
            scores = self._asked(texts.tolist()).scores(images)[own_image, own_text]
            answers += list(zip(captions[part], names[part], scores.tolist(), strict=True))
        return answers

    @torch.inference_mode()
    def _best(self, captions: list[str], k: int) -> list[tuple[str, str, float]]:
        ids = self._split.image_ids
        answers = []
        for part in _parts(len(captions)):
            asked = self._asked(captions[part])
            blocks = [asked.scores(np.arange(len(ids))[images]) for images in _parts(len(ids))]
            ranked = torch.cat(blocks).sort(dim=0, descending=True, stable=True)
            for column, caption in enumerate(captions[part]):
                values, images = ranked.values[:k, column], ranked.indices[:k, column]
                for value, image in zip(values.tolist(), images.tolist(), strict=True):
                    answers.append((caption, ids[image], value))
        return answers

    def _asked(self, captions: list[str]) -> _Asked:
        tokens = self._tokenizer.encode(captions)
        # The split's images, described by these captions instead of their own.
        groups = CaptionGroups.even(1, len(captions))
        split = replace(self._split, captions=captions, groups=groups)
        dataset = RetrievalDataset(split, tokens, self._tokenizer)
        batch = dataset.caption_batch(range(len(captions))).to(self._device)
        embedded = self._model.encode_captions(**batch._asdict())
        return _Asked(self._model, dataset, embedded, self._device)

    @functools.cached_property
    def _split(self) -> Split:
        config, cache_dir = self._config.data, cache_folder()
        wanted = DataConfig(
            path=self._data, num_regions=config.num_regions, synthetic=config.synthetic
        )
        folder = resolve_data(wanted, cache_dir=cache_dir)
        names = (self._split_name,)
        check_folder(folder, num_regions=config.num_regions, splits=names, cache_dir=cache_dir)
        split = open_split(folder, self._split_name, num_regions=config.num_regions)
        check_made_for(self._model, split, source=str(folder))
        return split


class _Asked(NamedTuple):
    """Some captions, encoded, and the images to score them with."""

    model: Cpfean
    dataset: RetrievalDataset
    captions: CaptionEmbeddings
    device: torch.device

    def scores(self, images: Int[np.ndarray, " image"]) -> Float[Tensor, "image caption"]:
        """Of images by their positions in the split; on the processor."""
        batch = self.dataset.image_batch(images).to(self.device)
        return self.model.score(self.model.encode_images(**batch._asdict()), self.captions).cpu()


def _texts(rows: Any, column: str) -> list[str]:
    """A column of texts.

    Raises:
        DataError: there is none, or something else in it.
    """
    if column not in rows:
        raise DataError(f"expected a column {column!r}, found {', '.join(map(str, rows))}.")
    values = list(rows[column])
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{column}, row {row}: expected a text, found {value!r:.60}.")
    return values


def _parts(count: int) -> list[slice]:
    return [slice(first, min(first + _AT_A_TIME, count)) for first in range(0, count, _AT_A_TIME)]
