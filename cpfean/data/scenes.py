"""Made-up scenes: which objects there are, what they look like, where they stand.

A scene has a type (street, kitchen, ...) that says which concepts are likely, so that images of one
type are hard negatives of each other. Within a type, frequencies fall off with the place in the
list: a few concepts are everywhere, many are rare. Objects have three ranks of salience: what
captions talk about, what they mention at times, and what they leave out.

Boxes are (x1, y1, x2, y2) in shares of the image, inside [0, 1]; pixels come later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from cpfean.data.concepts import (
    ATTRIBUTES,
    CONCEPTS,
    MOUNTS,
    PEOPLE,
    SCENES,
    SEATS,
    SURFACES,
    Concept,
)

Box = tuple[float, float, float, float]
T = TypeVar("T")
Salience = Literal["main", "side", "ignored"]


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One thing in one scene.

    Attributes:
        concept: its place in `CONCEPTS`.
        attributes: value by kind of attribute, e.g. {"colour": "red"}.
        mention: objects with the same number are spoken of together ("two dogs").
        salience: how likely a caption names it.
        box: in shares of the image.
        support: the object that it stands on, is held or worn by; None for the ground.
    """

    concept: int
    attributes: dict[str, str]
    mention: int
    salience: Salience
    box: Box
    support: int | None


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is in one image, before anybody detects or describes it."""

    kind: str
    size: tuple[int, int]
    objects: tuple[SceneObject, ...]


_NUMBER = {concept.name: number for number, concept in enumerate(CONCEPTS)}
_SIZES_IN_PIXELS = (
    (640, 480),
    (480, 640),
    (500, 375),
    (375, 500),
    (640, 427),
    (500, 333),
    (512, 512),
)
_SCALE = {"big": 1.35, "small": 0.7}
# Supporters are placed before what they carry.
_PLACING_ORDER = {"furniture": 0, "vehicle": 0, "animal": 0, "adult": 1, "child": 1}


def draw_scene(rng: np.random.Generator, *, num_ignored: int) -> Scene:
    """Draws a scene: its type, its objects, their attributes and boxes.

    Args:
        num_ignored: objects that no caption names; fewer where the scene type knows fewer.
    """
    kind = _choose(rng, tuple(SCENES))
    foreground, surroundings = ([_NUMBER[name] for name in names] for names in SCENES[kind])
    num_main = int(rng.choice((2, 3, 4), p=(0.4, 0.4, 0.2)))
    num_side = int(rng.integers(2, 5))
    drawn = _draw_concepts(rng, foreground, num_main + num_side)
    behind = _draw_concepts(rng, [c for c in surroundings if c not in drawn], num_ignored + 1)

    # (concept, salience, how many of it); the first of the surroundings is mentioned at times.
    cast: list[tuple[int, Salience, int]] = []
    for place, concept in enumerate(drawn):
        is_main = place < num_main
        many = int(rng.choice((2, 3), p=(0.65, 0.35))) if rng.random() < 0.22 else 1
        cast.append((concept, "main" if is_main else "side", many if is_main else 1))
    cast.append((behind[0], "side", 1))
    cast += [(concept, "ignored", 1) for concept in behind[1 : num_ignored + 1]]
    spare = [concept for concept in foreground if concept not in drawn and concept not in behind]
    missing = num_ignored - (len(behind) - 1)
    cast += [(concept, "ignored", 1) for concept in _draw_concepts(rng, spare, missing)]

    width, height = _choose(rng, _SIZES_IN_PIXELS)
    size = (int(width + rng.integers(-20, 21)), int(height + rng.integers(-20, 21)))
    return Scene(kind, size, _place_all(rng, cast, ratio=size[1] / size[0]))


def _choose(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of them; the chance falls off with the place in the list, by Zipf's law."""
    return choices[_draw(rng, len(choices), 1, offset=1.0, fall=0.5)[0]]


def _draw_concepts(rng: np.random.Generator, concepts: list[int], count: int) -> list[int]:
    """Distinct concepts, the first ones likelier."""
    return [concepts[i] for i in _draw(rng, len(concepts), max(count, 0), offset=1.5, fall=0.9)]


def _draw(
    rng: np.random.Generator, total: int, count: int, *, offset: float, fall: float
) -> list[int]:
    # The order of exponential waiting times is a weighted draw without replacement.
    waiting = rng.standard_exponential(total) * (np.arange(total) + offset) ** fall
    return np.argsort(waiting)[:count].tolist()


def _place_all(
    rng: np.random.Generator, cast: list[tuple[int, Salience, int]], *, ratio: float
) -> tuple[SceneObject, ...]:
    placed: list[SceneObject] = []
    order = sorted(
        range(len(cast)), key=lambda i: _PLACING_ORDER.get(CONCEPTS[cast[i][0]].family, 2)
    )
    for mention in order:
        concept, salience, many = cast[mention]
        attributes = {
            kind: _choose(rng, values)
            for kind, values in ATTRIBUTES[CONCEPTS[concept].family].items()
            if rng.random() < 0.8
        }
        scale = _SCALE.get(attributes.get("size", ""), 1.0) * rng.uniform(0.85, 1.15)
        box, support = _place(rng, CONCEPTS[concept], scale, placed, ratio=ratio)
        if support is not None and CONCEPTS[concept].family in PEOPLE:
            seat = CONCEPTS[placed[support].concept].name
            attributes |= {"pose": "sitting"} if seat in SEATS else {}
        for _ in range(many):
            placed.append(SceneObject(concept, attributes, mention, salience, box, support))
            box = _beside(rng, box)
    return tuple(placed)


def _place(
    rng: np.random.Generator,
    concept: Concept,
    scale: float,
    placed: list[SceneObject],
    *,
    ratio: float,
) -> tuple[Box, int | None]:
    """A box where things of this kind are found, and the place in `placed` of what carries it."""
    support = _support(rng, concept, placed)
    if concept.family == "stuff":
        return _band(rng, concept.place), None
    height = concept.height * scale
    if support is not None:
        under = placed[support].box
        wide, high = under[2] - under[0], under[3] - under[1]
        cx = under[0] + wide * rng.uniform(0.2, 0.8)
        if concept.place == "hand":
            cx = under[0] + wide * (0.1 if rng.random() < 0.5 else 0.9)
            bottom = under[1] + high * rng.uniform(0.5, 0.75)
        elif concept.place == "head":
            height = 0.22 * high
            cx, bottom = under[0] + 0.5 * wide, under[1] + 0.7 * height
        else:
            share = 0.5 if concept.family in PEOPLE else 0.15
            bottom = under[1] + high * share
    elif concept.place == "air":
        cx, bottom = rng.uniform(), rng.uniform(0.1, 0.5)
    elif concept.place == "wall":
        cx, bottom = rng.uniform(), rng.uniform(0.3, 0.55)
    elif concept.place == "back":
        cx, bottom = rng.uniform(), rng.uniform(0.5, 0.7)
    else:
        # Lower in the image is nearer to the camera, hence larger.
        cx, bottom = rng.uniform(), rng.uniform(0.6, 0.98)
        height *= 0.65 + 1.6 * (bottom - 0.6)
    return _box(cx, bottom, width=height * concept.aspect * ratio, height=height), support


def _support(rng: np.random.Generator, concept: Concept, placed: list[SceneObject]) -> int | None:
    if concept.place in ("hand", "head"):
        chance, fits = 0.8, lambda other: other.family in PEOPLE
    elif concept.place == "surface":
        chance, fits = 0.9, lambda other: other.name in SURFACES
    elif concept.family in PEOPLE:
        chance, fits = 0.5, lambda other: other.name in SEATS + MOUNTS
    else:
        return None
    candidates = [i for i, thing in enumerate(placed) if fits(CONCEPTS[thing.concept])]
    if not candidates or rng.random() > chance:
        return None
    return candidates[int(rng.integers(len(candidates)))]


def _band(rng: np.random.Generator, place: str) -> Box:
    low, high = {
        "top": ((0.0, 0.05), (0.3, 0.6)),
        "horizon": ((0.1, 0.3), (0.4, 0.6)),
        "low": ((0.4, 0.6), (0.85, 1.0)),
        "bottom": ((0.45, 0.7), (0.97, 1.0)),
    }[place]
    return (rng.uniform(0, 0.2), rng.uniform(*low), rng.uniform(0.8, 1), rng.uniform(*high))


def _box(cx: float, bottom: float, *, width: float, height: float) -> Box:
    """The box moved, and cut where it is too large, to lie inside the image."""
    width, height = min(max(width, 0.03), 0.96), min(max(height, 0.03), 0.96)
    x1 = min(max(cx - width / 2, 0.0), 1 - width)
    y1 = min(max(bottom - height, 0.0), 1 - height)
    return (x1, y1, x1 + width, y1 + height)


def _beside(rng: np.random.Generator, box: Box) -> Box:
    """A box of about the same size next to the given one: another member of a group."""
    width, height = box[2] - box[0], box[3] - box[1]
    step = width * rng.uniform(0.9, 1.3) * (1 if rng.random() < 0.5 else -1)
    cx = (box[0] + box[2]) / 2
    if not width / 2 <= cx + step <= 1 - width / 2:
        step = -step
    scale = rng.uniform(0.85, 1.15)
    bottom = box[3] + height * rng.uniform(-0.08, 0.08)
    return _box(cx + step, bottom, width=width * scale, height=height * scale)


def relations(scene: Scene, subject: int, other: int) -> tuple[str, ...]:
    """What is true of two mentions by their boxes (of a group: the box around it).

    Some of on, in, riding, with, under, left, right, above, below, front, behind, near, the more
    telling ones first; none where nothing can be said.
    """
    subjects = [thing for thing in scene.objects if thing.mention == subject]
    others = [thing for thing in scene.objects if thing.mention == other]
    carriers, carried = (
        {scene.objects[thing.support].mention for thing in things if thing.support is not None}
        for things in (subjects, others)
    )
    first, second = CONCEPTS[subjects[0].concept], CONCEPTS[others[0].concept]
    a, b = around(subjects), around(others)
    a_x, a_y, b_x, b_y = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    inside = b[0] <= a_x <= b[2] and b[1] <= a[3] <= b[3]
    if subject in carried and first.family in PEOPLE and second.place in ("hand", "head"):
        return ("with",)
    if subject in carried and a[0] <= b_x <= a[2] and a[1] <= b[3] <= a[3]:
        return ("under",)
    if other in carriers and second.family not in PEOPLE and inside:
        return ("riding", "on") if second.name in MOUNTS else ("on",)
    if second.family == "stuff":
        if second.place in ("bottom", "low"):
            return ("in" if second.place == "low" else "on",) if inside else ()
        return ("front",) if a[3] > b[3] else ()
    if first.family == "stuff":
        return ("behind",) if a[3] < b[3] else ()
    shared = min(a[2], b[2]) - max(a[0], b[0])
    overlap = shared > 0.3 * min(a[2] - a[0], b[2] - b[0])
    gap = max(-shared, max(a[1], b[1]) - min(a[3], b[3]), 0.0)
    told = {
        "left": a_x < b_x - 0.1 and a[2] < b_x,
        "right": a_x > b_x + 0.1 and a[0] > b_x,
        "above": a[3] < b[1] + 0.02,
        "below": a[1] > b[3] - 0.02,
        "front": overlap and a[3] > b[3] + 0.05 and a_y > b_y,
        "behind": overlap and a[3] < b[3] - 0.05 and a_y < b_y,
        "near": gap < 0.06,
    }
    return tuple(name for name, holds in told.items() if holds)


def around(things: list[SceneObject]) -> Box:
    """The smallest box that holds all of these objects."""
    lefts, tops, rights, bottoms = zip(*(thing.box for thing in things), strict=True)
    return (min(lefts), min(tops), max(rights), max(bottoms))
