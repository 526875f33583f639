"""Are a model's prominent words the words that name things?

    python benchmarks/prominent_words.py MODEL [MODEL ...] --data DIR

In each matching pair of the test split, every region whose gate is above 0.5 has one word that is
prominent for it. Told are the share of these words that are content words, that is none of
`FUNCTION_WORDS`, and the same share of all words of the captions; and the words most often chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cpfean.analysis.pair_views import check_gates
from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError, CpfeanError
from cpfean.folders import cache_folder
from cpfean.model.scorers.pairs import listed_pairs
from cpfean.model.scorers.prominent import ProminentAlignment
from cpfean.training.setup import TrainedModel, open_checkpoint
from cpfean.training.trained import model_folder, trained_configuration

# Articles, pronouns, prepositions, conjunctions, auxiliaries, number words and the like of English
# captions, and what is left of "'s", "n't" and their kin.
_LISTED = """
    a an the this that these those some any each every all both either neither no not another other
    one two three four five six seven eight nine ten several many much more most few
    i me my mine you your yours he him his she her hers it its we us our ours they them their theirs
    himself herself itself themselves who whom whose which what there here
    in on at by to from with without of off for into onto over under up down out about above below
    across after against along among around as before behind beneath beside besides between beyond
    during inside near next outside past through throughout toward towards underneath until upon
    via within
    and or but nor so yet if because while when where than then also too very just only
    is are was were be been being am do does did doing done has have had having can could will would
    shall should may might must
    s t d ll m re ve don
"""
FUNCTION_WORDS = frozenset(_LISTED.split())
_OPEN = 0.5


class Chosen(NamedTuple):
    """What was counted.

    Attributes:
        prominent: how often each word was prominent for an open region.
        words: how often each word stands in the captions.
        open_regions, regions: of all matching pairs.
    """

    prominent: Counter[str]
    words: Counter[str]
    open_regions: int
    regions: int


def content_share(words: Counter[str]) -> float:
    """The share of the words that are none of `FUNCTION_WORDS`, and no punctuation either."""
    content = sum(
        n
        for word, n in words.items()
        if word.casefold() not in FUNCTION_WORDS and any(c.isalnum() for c in word)
    )
    return content / max(1, words.total())


@torch.inference_mode()
def chosen_words(trained: TrainedModel, *, batch: int = 256) -> Chosen:
    """Counts the prominent words of all matching pairs of a split.

    Raises:
        ConfigError: the model has no gates, or its words are pieces of words.
    """
    model, dataset = trained.model, trained.dataset
    check_gates(model, name="the model")
    if model.config.text.units == "pieces":
        raise ConfigError('with model.text.units = "pieces" there are no words to be counted.')
    assert isinstance(model.scorer, ProminentAlignment)
    counted = Chosen(Counter(), Counter(), 0, 0)
    open_regions = regions = 0
    for start in range(0, len(dataset), batch):
        pairs = np.arange(start, min(start + batch, len(dataset)))
        images = np.asarray(dataset.split.image_of(pairs), dtype=np.int64)
        seen = model.encode_images(**dataset.image_batch(images)._asdict())
        told = model.encode_captions(**dataset.caption_batch(pairs)._asdict())
        alignment = model.scorer.align(listed_pairs(seen, told))
        named = alignment.prominence[:, 0].argmax(dim=1)
        is_open = (alignment.gates[:, 0] > _OPEN) & seen.mask
        for pair, places, gates in zip(pairs, named, is_open, strict=True):
            words = trained.tokenizer.words(dataset.split.captions[pair])
            counted.words.update(word.casefold() for word in words)
            counted.prominent.update(words[k].casefold() for k in places[gates].tolist())
        open_regions += int(is_open.sum())
        regions += int(seen.mask.sum())
    return counted._replace(open_regions=open_regions, regions=regions)


def table(rows: Iterable[tuple[str, Chosen]]) -> str:
    """A row for each model."""
    lines = [
        "| model | content words among prominent ones | among all | open regions | most often |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in rows:
        often = ", ".join(
            f"{word} {n / max(1, found.prominent.total()):.0%}"
            for word, n in found.prominent.most_common(6)
        )
        cells = [content_share(found.prominent), content_share(found.words)]
        cells.append(found.open_regions / max(1, found.regions))
        lines.append(f"| {name} | {' | '.join(f'{cell:.0%}' for cell in cells)} | {often} |")
    return "\n".join(lines)


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", type=Path, help="trained models")
    parser.add_argument("--data", type=Path, required=True, help="folder with a test split")
    arguments = parser.parse_args()
    try:
        rows = [
            (str(model), chosen_words(opened(model, arguments.data))) for model in arguments.models
        ]
    except CpfeanError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(table(rows))


def opened(model: Path, data: Path) -> TrainedModel:
    """A model with the test split."""
    folder = model_folder(model)
    config: ExperimentConfig = trained_configuration(folder)
    return open_checkpoint(
        folder,
        data_folder=data,
        split="test",
        cache_dir=cache_folder(),
        device=torch.device("cpu"),
        num_regions=config.data.num_regions,
    )


if __name__ == "__main__":
    main()
