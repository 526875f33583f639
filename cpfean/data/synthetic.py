"""A made-up data set with a known answer: for tests, checks of the mechanisms, and first runs.

Scenes (`scenes`) are described (`wording`) and detected (here), and written in the native format of
docs/data.md, with the truth beside it: which regions each word is about. What a detector makes of a
scene, all of it sorted by confidence:

    objects      a region each: what captions name (the main ones often), and what they leave out
    duplicates   further regions of an object, overlapping its first by more than half
    distractors  grid cells and random boxes, whose features mix what they cover

    feature      unit( looks + 0.3 what else the box covers + 0.3 scene type ) + noise
    looks        concept prototype + 0.4 for each attribute; prototypes of a family are alike
    noise        normal, of length `feature_noise`; half its variance is common to the regions of
                 one object
    label        the concept, or with probability `label_error` a wrong one, half the time of the
                 same family
    confidence   sigmoid of a normal variable, higher where the label is right or the object a main
                 one; the distributions overlap

Everything follows from the seed, to the byte. An image depends on the seed, its split and its
number only, so that a smaller set is the beginning of a larger one. Two sets that differ in
`feature_noise` or `label_error` show the same scenes in the same words, so that settings can be
compared.

Axes:  image, caption (those of an image next to each other), word (by white space), region, feature
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cpfean.config import SyntheticConfig
from cpfean.data.caption_groups import IMAGE_OF_CAPTION, PER_IMAGE, CaptionGroups
from cpfean.data.concepts import CONCEPTS, FAMILIES, SCENES, VALUES
from cpfean.data.scenes import Scene, draw_scene
from cpfean.data.wording import Caption, describe
from cpfean.errors import DataError
from cpfean.files import is_there, read_file

_SPLITS = ("train", "dev", "test")
_LARGEST_TRUTH = 2**30  # bytes; a thousand images take one million
_SALIENCE = {"main": 0, "side": 1, "ignored": 2}

# By concept, the others of its family.
_RELATIVES = [
    [j for j, other in enumerate(CONCEPTS) if other.family == own.family and j != i]
    for i, own in enumerate(CONCEPTS)
]

Regions = tuple[int, ...]


class StatedRelation(NamedTuple):
    """A relation that a caption states; ("left", (3, 7), (0,)) has regions 3 and 7 left of 0."""

    name: str
    subject: Regions
    other: Regions


@dataclass(frozen=True)
class SyntheticTruth:
    """What the generator knows about a split.

    Attributes:
        concepts: line in objects_vocab.txt of what a region shows; for a distractor, of what it
            covers most.
        objects: number, within its image, of the object that a region shows; regions with the same
            number are duplicates; -1 for a distractor.
        named: by caption and word: regions that the noun names, duplicates included; () for others.
        qualified: by caption and word: regions that an adjective, participle or number describes.
        relations: by caption, the relations that it states, true of the boxes.
        groups: which captions describe which image.
    """

    concepts: Int[np.ndarray, "image region"]
    objects: Int[np.ndarray, "image region"]
    named: list[list[Regions]]
    qualified: list[list[Regions]]
    relations: list[list[StatedRelation]]
    groups: CaptionGroups

    @cached_property
    def described_by(self) -> Bool[np.ndarray, "caption region"]:
        """True where the caption names the region."""
        described = np.zeros((len(self.named), self.objects.shape[1]), dtype=bool)
        for caption, words in enumerate(self.named):
            for regions in words:
                described[caption, list(regions)] = True
        return described

    @property
    def described(self) -> Bool[np.ndarray, "image region"]:
        """True where any caption of the image names the region."""
        return np.logical_or.reduceat(self.described_by, self.groups.edges[:-1], axis=0)


def write_synthetic(
    folder: Path, config: SyntheticConfig, *, captions_each: Sequence[int] = (PER_IMAGE,)
) -> None:
    """Writes the whole set: three splits in the native format, and `{split}_truth.json` for each.

    About 2 ms an image. Files that are there already are replaced.

    Args:
        folder: made if absent.
        config: what to draw.
        captions_each: captions of the first images, and of the next ones by turns. Images do not
            depend on it, and more captions begin with those of fewer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    looks = _Looks(config)
    _write_lines(folder / "objects_vocab.txt", [concept.name for concept in CONCEPTS])
    for number, split in enumerate(_SPLITS):
        images = [
            _draw_image(
                config,
                looks,
                split=number,
                image=image,
                num_captions=captions_each[image % len(captions_each)],
            )
            for image in range(getattr(config, f"{split}_images"))
        ]
        for name, dtype in (
            ("ims", np.float16),
            ("boxes", np.float32),
            ("sizes", np.int32),
            ("labels", np.int16),
            ("scores", np.float16),
        ):
            values = np.stack([getattr(image, name) for image in images]).astype(dtype)
            np.save(folder / f"{split}_{name}.npy", values, allow_pickle=False)
        captions = [caption.text for image in images for caption in image.captions]
        _write_lines(folder / f"{split}_caps.txt", captions)
        groups = CaptionGroups.of_sizes([len(image.captions) for image in images])
        told = folder / f"{split}_{IMAGE_OF_CAPTION}"
        told.unlink(missing_ok=True)
        if not groups.is_default:
            np.save(told, groups.image_of_caption)
        _write_lines(folder / f"{split}_ids.txt", [f"{split}-{i:06d}" for i in range(len(images))])
        _write_truth(folder / f"{split}_truth.json", images)


def load_truth(folder: Path, split: str) -> SyntheticTruth:
    """Reads the truth that `write_synthetic` wrote.

    Raises:
        DataError: no such file, or not one of `write_synthetic`.
    """
    path = folder / f"{split}_truth.json"
    try:
        plain = json.loads(read_file(path, limit=_LARGEST_TRUTH))
        groups = CaptionGroups.even(len(plain["objects"]))
        told = folder / f"{split}_{IMAGE_OF_CAPTION}"
        if is_there(told):
            groups = CaptionGroups(np.load(told, allow_pickle=False))
        return SyntheticTruth(
            concepts=np.array(plain["concepts"], dtype=np.int64),
            objects=np.array(plain["objects"], dtype=np.int64),
            named=[[tuple(regions) for regions in words] for words in plain["named"]],
            qualified=[[tuple(regions) for regions in words] for words in plain["qualified"]],
            relations=[
                [StatedRelation(name, tuple(a), tuple(b)) for name, a, b in stated]
                for stated in plain["relations"]
            ],
            groups=groups,
        )
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; only the synthetic set has its truth.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the truth of a synthetic set: {error!r}") from None


class _Looks:
    """Directions in feature space, common to all splits."""

    def __init__(self, config: SyntheticConfig) -> None:
        rng = np.random.default_rng([config.seed, len(_SPLITS)])
        family, own, values, scenes = (
            _unit(rng.standard_normal((len(names), config.feature_dim)))
            for names in (FAMILIES, CONCEPTS, VALUES, SCENES)
        )
        belongs = [FAMILIES.index(concept.family) for concept in CONCEPTS]
        self.concepts = 0.6 * family[belongs] + 0.8 * own
        self.values = dict(zip(VALUES, values, strict=True))
        self.scenes = dict(zip(SCENES, scenes, strict=True))

    def of_objects(self, scene: Scene) -> Float[np.ndarray, "object feature"]:
        looks = self.concepts[[thing.concept for thing in scene.objects]]
        for row, thing in zip(looks, scene.objects, strict=True):
            for value in thing.attributes.values():
                row += 0.4 * self.values[value]
        return looks


def _unit(rows: Float[np.ndarray, "... feature"]) -> Float[np.ndarray, "... feature"]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@dataclass(frozen=True)
class _Image:
    ims: Float[np.ndarray, "region feature"]
    boxes: Float[np.ndarray, "region 4"]
    sizes: tuple[int, int]
    labels: Int[np.ndarray, "region"]
    scores: Float[np.ndarray, "region"]
    concepts: Int[np.ndarray, "region"]
    objects: Int[np.ndarray, "region"]
    captions: list[Caption]
    scene: Scene

    def showing(self, objects: Iterable[int]) -> list[int]:
        """Regions that show one of these objects."""
        wanted = set(objects)
        return [region for region, shown in enumerate(self._shown) if shown in wanted]

    def mentioned(self, mention: int) -> list[int]:
        """Regions that show an object of this mention."""
        things = enumerate(self.scene.objects)
        return self.showing(place for place, thing in things if thing.mention == mention)

    @cached_property
    def _shown(self) -> list[int]:
        return self.objects.tolist()


def _draw_image(
    config: SyntheticConfig, looks: _Looks, *, split: int, image: int, num_captions: int
) -> _Image:
    scene_rng, box_rng, noise_rng, label_rng = (
        np.random.default_rng([config.seed, split, image, stream]) for stream in range(4)
    )
    scene = draw_scene(scene_rng, num_ignored=max(1, round(0.2 * config.num_regions)))
    captions = describe(scene_rng, scene, num_captions=num_captions)
    boxes, objects = _detect(box_rng, scene, num_regions=config.num_regions)

    covered = _coverage(boxes, np.array([thing.box for thing in scene.objects]))
    shown = objects >= 0
    most = np.where(shown, objects, covered.argmax(axis=1))
    concepts = np.array([scene.objects[i].concept for i in most])
    features = _features(noise_rng, scene, looks, covered, objects, noise=config.feature_noise)
    main = np.array([scene.objects[i].salience == "main" for i in most]) & shown
    labels, scores = _labels(label_rng, concepts, main, shown, error=config.label_error)

    order = np.argsort(-scores.astype(np.float64), kind="stable")
    pixels = boxes * np.array(scene.size * 2)
    return _Image(
        ims=features[order],
        boxes=pixels[order],
        sizes=scene.size,
        labels=labels[order],
        scores=scores[order],
        concepts=concepts[order],
        objects=objects[order],
        captions=captions,
        scene=scene,
    )


def _detect(
    rng: np.random.Generator, scene: Scene, *, num_regions: int
) -> tuple[Float[np.ndarray, "region 4"], Int[np.ndarray, "region"]]:
    """Boxes in shares of the image, and the object that each shows (-1: a distractor)."""
    salience = np.array([_SALIENCE[thing.salience] for thing in scene.objects])
    first = np.argsort(salience, kind="stable")[:num_regions]
    spare = num_regions - len(first)
    num_duplicates = round(0.55 * spare)
    weights = np.array([3.0, 1.5, 1.0])[salience[first]]
    again = rng.choice(first, num_duplicates, p=weights / weights.sum())
    object_boxes = np.array([thing.box for thing in scene.objects])
    boxes = np.concatenate(
        [
            object_boxes[first],
            _jittered(rng, object_boxes[again]),
            _distractors(rng, spare - num_duplicates),
        ]
    )
    return boxes, np.concatenate([first, again, np.full(spare - num_duplicates, -1)])


def _jittered(
    rng: np.random.Generator, boxes: Float[np.ndarray, "region 4"]
) -> Float[np.ndarray, "region 4"]:
    """Boxes whose sides moved by up to a tenth: each keeps an IoU above 0.5 with its own."""
    extent = np.concatenate([boxes[:, 2:] - boxes[:, :2]] * 2, axis=1)
    return np.clip(boxes + rng.uniform(-0.1, 0.1, boxes.shape) * extent, 0, 1)


def _distractors(rng: np.random.Generator, count: int) -> Float[np.ndarray, "region 4"]:
    """Half cells of a grid of 1 to 4 cells a side, half random boxes."""
    cells = rng.integers(1, 5, (count, 1))
    low = rng.integers(0, 4, (count, 2)) % cells / cells
    grid = np.concatenate([low, low + 1 / cells], axis=1)
    extent = rng.uniform(0.1, 0.6, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (1 - extent)
    anywhere = np.concatenate([corner, corner + extent], axis=1)
    return np.clip(np.where(rng.random((count, 1)) < 0.5, grid, anywhere), 0, 1)


def _coverage(
    boxes: Float[np.ndarray, "region 4"], objects: Float[np.ndarray, "object 4"]
) -> Float[np.ndarray, "region object"]:
    """Share of a box's area that an object's box covers."""
    low = np.maximum(boxes[:, None, :2], objects[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], objects[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    return shared / (boxes[:, 2:] - boxes[:, :2]).prod(axis=-1)[:, None]


def _features(
    rng: np.random.Generator,
    scene: Scene,
    looks: _Looks,
    covered: Float[np.ndarray, "region object"],
    objects: Int[np.ndarray, "region"],
    *,
    noise: float,
) -> Float[np.ndarray, "region feature"]:
    object_looks = looks.of_objects(scene)
    dim = object_looks.shape[1]
    shown = objects >= 0
    weights = np.where(shown[:, None], 0.3 * covered, covered)
    weights[shown, objects[shown]] = 1.0
    clean = _unit(weights @ object_looks + 0.3 * looks.scenes[scene.kind])
    # One draw for each object, and one for "no object" that every distractor replaces by its own.
    common = rng.standard_normal((len(scene.objects), dim))[objects]
    own, other = rng.standard_normal((2, len(objects), dim))
    noises = (np.where(shown[:, None], common, other) + own) / np.sqrt(2 * dim)
    return clean + noise * noises


def _labels(
    rng: np.random.Generator,
    concepts: Int[np.ndarray, "region"],
    main: Bool[np.ndarray, "region"],
    shown: Bool[np.ndarray, "region"],
    *,
    error: float,
) -> tuple[Int[np.ndarray, "region"], Float[np.ndarray, "region"]]:
    """Labels, wrong ones among them, and confidences that tend to show it."""
    wrong = rng.random(len(concepts)) < error
    anything = (concepts + rng.integers(1, len(CONCEPTS), len(concepts))) % len(CONCEPTS)
    draws = rng.random(len(concepts))
    alike = [
        _RELATIVES[i][int(u * len(_RELATIVES[i]))] for i, u in zip(concepts, draws, strict=True)
    ]
    mistaken = np.where(rng.random(len(concepts)) < 0.5, alike, anything)
    labels = np.where(wrong, mistaken, concepts)
    mean = np.where(wrong, -1.5, 1.5) + 0.5 * main - 0.8 * ~shown
    log_odds = np.clip(mean + 1.5 * rng.standard_normal(len(concepts)), -6, 6)
    return labels, (1 / (1 + np.exp(-log_odds))).astype(np.float16)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _write_truth(path: Path, images: list[_Image]) -> None:
    captions = [(image, caption) for image in images for caption in image.captions]
    truth = {
        "concepts": [image.concepts.tolist() for image in images],
        "objects": [image.objects.tolist() for image in images],
        "named": [[image.showing(word.names) for word in told.words] for image, told in captions],
        "qualified": [
            [image.showing(word.qualifies) for word in told.words] for image, told in captions
        ],
        "relations": [
            [
                [stated.name, image.mentioned(stated.subject), image.mentioned(stated.other)]
                for stated in told.relations
            ]
            for image, told in captions
        ],
    }
    path.write_text(json.dumps(truth, separators=(",", ":")) + "\n", encoding="utf-8", newline="\n")
