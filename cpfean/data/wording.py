"""Captions of made-up scenes, with a note at every word of what it is about.

Captions are lower-case words separated by single blanks, without punctuation, so that words by
white space are words for any tokenizer. They disagree as people do: about what is worth a mention,
what it is called, and in which order; some are vague.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cpfean.data.concepts import CONCEPTS, PEOPLE, Concept
from cpfean.data.scenes import Scene, SceneObject, relations

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a caption.

    Attributes:
        names: objects (places in `Scene.objects`) that this noun stands for.
        qualifies: objects that this adjective, participle or number says something about.
    """

    text: str
    names: tuple[int, ...] = ()
    qualifies: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation that a caption states: `subject` and `other` are mentions of the scene."""

    name: str
    subject: int
    other: int


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption and what it says."""

    words: tuple[Word, ...]
    relations: tuple[Relation, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


_PHRASES = {
    "on": ("on", "on", "on top of"),
    "in": ("in",),
    "riding": ("riding", "riding on"),
    "with": ("with", "with", "holding", "carrying"),
    "wearing": ("with", "wearing"),
    "under": ("under", "below"),
    "left": ("to the left of", "left of", "next to", "beside"),
    "right": ("to the right of", "right of", "next to", "beside"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "front": ("in front of",),
    "behind": ("behind",),
    "near": ("near", "next to", "by", "close to"),
}
_PLACES = {
    "street": ("on the street", "in the city", "on a city street", "downtown"),
    "park": ("in the park", "in a park", "outdoors"),
    "living room": ("in the living room", "in a living room", "at home", "inside"),
    "kitchen": ("in the kitchen", "in a kitchen", "inside"),
    "beach": ("at the beach", "on a beach", "by the sea", "outdoors"),
    "farm": ("on a farm", "in the country", "outdoors"),
    "restaurant": ("in a restaurant", "at a restaurant", "inside"),
    "office": ("in an office", "at work", "inside"),
    "playground": ("at the playground", "in a playground", "outdoors"),
    "bedroom": ("in the bedroom", "in a bedroom", "at home", "inside"),
}
_VAGUE = (
    "a nice view {place}",
    "people spend their time {place}",
    "a normal day {place}",
    "many different things can be seen {place}",
    "a photo taken {place}",
)
_VALUE_WORDS = {
    "big": ("big", "large"),
    "small": ("small", "little", "tiny"),
    "gray": ("gray", "grey"),
    "old": ("old", "elderly"),
    "lying": ("lying", "resting"),
    "jumping": ("jumping", "leaping"),
    "walking": ("walking", "strolling"),
}
_HYPERNYMS = {
    "adult": ("person", "people"),
    "child": ("child", "children"),
    "animal": ("animal", "animals"),
    "vehicle": ("vehicle", "vehicles"),
}
_NUMBERS = {
    2: ("two", "two", "a couple of", "some"),
    3: ("three", "three", "several", "a group of"),
}


def describe(rng: np.random.Generator, scene: Scene, *, num_captions: int = 5) -> list[Caption]:
    """Draws captions of a scene.

    The main objects are named often, those on the side rarely, the ignored ones never. Every
    statement is true of the boxes.
    """
    writer = _Writer(rng, scene)
    return [writer.caption() for _ in range(num_captions)]


class _Writer:
    def __init__(self, rng: np.random.Generator, scene: Scene) -> None:
        self._rng = rng
        self._scene = scene
        self._mentions: dict[int, list[int]] = {}
        for place, thing in enumerate(scene.objects):
            if thing.salience != "ignored":
                self._mentions.setdefault(thing.mention, []).append(place)

    def caption(self) -> Caption:
        rng = self._rng
        place = self._pick(_PLACES[self._scene.kind])
        if rng.random() < 0.04:
            return Caption(_plain(self._pick(_VAGUE).format(place=place)), ())
        subject, *others = self._choose_mentions()
        opening, be = self._opening(len(self._mentions[subject]) > 1)
        words = opening + self._phrase(subject, verb=be)
        told: list[Relation] = []
        for step, other in enumerate(others):
            link, relation = self._link(subject, other)
            if step == 1:
                link = _plain("and") if relation is None else _plain("and") + link
            words += link + self._phrase(other)
            told += [relation] if relation else []
        # "two dogs are" wants an ending.
        if rng.random() < 0.3 or words[-1].text == be:
            words += _plain(place)
        return Caption(tuple(words), tuple(told))

    def _choose_mentions(self) -> list[int]:
        """Two mentions or so, those with people or animals first."""
        rng = self._rng
        numbers = list(self._mentions)
        main = sorted(number for number in numbers if self._thing(number).salience == "main")
        weights = np.array(
            [1.0 / (1 + main.index(n)) if n in main else 0.07 for n in numbers], dtype=np.float64
        )
        # 15 % speak of one thing, 60 % of two, 25 % of three.
        count = 1 + int(np.searchsorted((0.15, 0.75), rng.random()))
        # The order of exponential waiting times is a weighted draw without replacement.
        drawn = np.argsort(rng.standard_exponential(len(numbers)) / weights)[:count]
        chosen = [numbers[i] for i in drawn]
        lively = (*PEOPLE, "animal")
        return sorted(chosen, key=lambda n: self._concept(n).family not in lively)

    def _opening(self, plural: bool) -> tuple[tuple[Word, ...], str]:
        """What comes before the subject, and the verb after it ("" for none)."""
        be = "are" if plural else "is"
        form = self._rng.random()
        if form < 0.15:
            return _plain(f"there {be}"), ""
        if form < 0.25:
            return _plain(self._pick(("a photo of", "a picture of", "a view of"))), ""
        return (), be if form < 0.6 else ""

    def _link(self, subject: int, other: int) -> tuple[tuple[Word, ...], Relation | None]:
        true = relations(self._scene, subject, other)
        if not true or self._rng.random() < 0.2:
            return _plain(self._pick(("and", "with"))), None
        # The first is the most telling; people say less telling things too.
        name = true[0] if self._rng.random() < 0.6 else self._pick(true)
        worn = name == "with" and self._concept(other).place == "head"
        phrase = self._pick(_PHRASES["wearing" if worn else name])
        return _plain(phrase), Relation(name, subject, other)

    def _phrase(self, mention: int, *, verb: str = "") -> tuple[Word, ...]:
        """A noun phrase, e.g. "two small dogs running"; `verb` goes before the participle."""
        places = tuple(self._mentions[mention])
        concept, thing = self._concept(mention), self._thing(mention)
        said = {
            kind: value for kind, value in thing.attributes.items() if self._rng.random() < 0.55
        }
        before = [said[kind] for kind in ("age", "size") if kind in said]
        clothes = concept.family in PEOPLE and "colour" in said
        if not clothes:
            before += [said[kind] for kind in ("colour", "pattern", "material") if kind in said]
        words = [Word(self._value(value), qualifies=places) for value in before]
        words += [Word(text, names=places) for text in self._noun(concept, len(places) > 1).split()]
        if concept.family == "stuff":
            words.insert(0, Word("the"))
        elif len(places) > 1:
            number = self._pick(_NUMBERS[len(places)]).split()
            words = [
                Word(text) if text in ("a", "of") else Word(text, qualifies=places)
                for text in number
            ] + words
        elif self._rng.random() < 0.12:
            words.insert(0, Word("the"))
        else:
            words.insert(0, Word("an" if words[0].text[0] in "aeiou" else "a"))
        if clothes:
            words += _plain(self._pick(("in", "wearing", "dressed in")))
            words.append(Word(self._value(said["colour"]), qualifies=places))
        if verb:
            words.append(Word(verb))
        if "pose" in said:
            words.append(Word(self._value(said["pose"]), qualifies=places))
        return tuple(words)

    def _noun(self, concept: Concept, plural: bool) -> str:
        draw = self._rng.random()
        if draw < 0.08 and concept.family in _HYPERNYMS:
            return _HYPERNYMS[concept.family][plural]
        words = concept.plurals if plural else concept.words
        if draw < 0.65 or len(words) == 1:
            return words[0]
        return self._pick(words[1:])

    def _value(self, value: str) -> str:
        return self._pick(_VALUE_WORDS.get(value, (value,)))

    def _thing(self, mention: int) -> SceneObject:
        return self._scene.objects[self._mentions[mention][0]]

    def _concept(self, mention: int) -> Concept:
        return CONCEPTS[self._thing(mention).concept]

    def _pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._rng.integers(len(choices)))]


def _plain(text: str) -> tuple[Word, ...]:
    return tuple(Word(word) for word in text.split())
