"""A batch of photographs, its bytes, and the plan that it is of."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cpfean.errors import DataError, NoMemoryError
from cpfean.extraction.batches import (
    Batch,
    Description,
    Found,
    Unreadable,
    extract_batch,
    one_thread,
    packed,
    unpacked,
    unpacked_reasons,
)
from cpfean.extraction.plan import ExtractionPlan, differences
from cpfean.photographs.extractor import PhotographRegions
from tests.extraction.tiny import Quadrants, write_photographs


def regions(count: int, *, labels: bool, seed: int = 0) -> PhotographRegions:
    rng = np.random.default_rng(seed)
    return PhotographRegions(
        features=rng.standard_normal((count, 5)).astype(np.float16),
        boxes=rng.random((count, 4), dtype=np.float32),
        size=(int(rng.integers(9, 99)), 7),
        labels=rng.integers(0, 3, count).astype(np.int32) if labels else None,
        scores=rng.random(count, dtype=np.float32) if labels else None,
    )


def plan_of(folder: Path, *, batch_size: int = 4, device: str = "cpu") -> ExtractionPlan:
    photographs = write_photographs(folder)
    sizes = {one.path: 10 for each in photographs.values() for one in each}
    return ExtractionPlan(
        photographs=photographs,
        sizes=sizes,
        batch_size=batch_size,
        extractor=Quadrants().provenance(),
        device=device,
    )


@pytest.mark.parametrize("labels", [True, False])
def test_a_batch_comes_out_of_its_bytes_as_it_went_in(labels: bool) -> None:
    found: list[Found] = [
        Unreadable(reason="a text: ä\n"),
        regions(3, labels=labels),
        regions(1, labels=labels, seed=1),
        Unreadable(reason="empty"),
    ]
    content = packed(found)
    again = unpacked(io.BytesIO(content))
    assert unpacked_reasons(io.BytesIO(content)) == ["a text: ä\n", "", "", "empty"]
    assert (again[0], again[3]) == (found[0], found[3])
    for new, old in zip(again[1:3], found[1:3], strict=True):
        assert isinstance(new, PhotographRegions)
        assert isinstance(old, PhotographRegions)
        assert new.size == old.size
        for name in ("features", "boxes", "labels", "scores"):
            np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
            assert (
                getattr(new, name) is None or getattr(new, name).dtype == getattr(old, name).dtype
            )


def test_a_batch_of_nothing_that_can_be_read_has_its_reasons() -> None:
    found: list[Found] = [Unreadable(reason="a"), Unreadable(reason="b")]
    assert unpacked(io.BytesIO(packed(found))) == found


def test_damage_anywhere_in_the_bytes_is_seen() -> None:
    content = packed([regions(3, labels=True)])
    for at in range(0, len(content), 7):
        spoilt = bytearray(content)
        spoilt[at] ^= 0xFF
        try:
            again = unpacked(io.BytesIO(bytes(spoilt)))
        except DataError as error:
            assert "damaged" in str(error)
        else:  # a byte that says nothing, such as a time in the archive
            assert packed(again) == content
    with pytest.raises(DataError, match="damaged"):
        unpacked(io.BytesIO(content[: len(content) // 2]))


def test_a_photograph_that_cannot_be_read_is_left_out_of_its_batch(tmp_path: Path) -> None:
    paths = tuple(one.path for one in write_photographs(tmp_path)["train"])
    Path(paths[1]).write_text("no picture", encoding="utf-8")
    extractor = Quadrants()
    for readers in (1, 3):
        found = extract_batch(extractor, Batch(number=0, paths=paths, key="k"), readers=readers)
        assert [isinstance(one, Unreadable) for one in found] == [False, True, *[False] * 5]
    assert extractor.seen == 12
    reason = found[1]
    assert isinstance(reason, Unreadable)
    assert "text" in reason.reason
    assert str(tmp_path) not in reason.reason


def test_large_photographs_of_a_batch_are_looked_at_one_after_the_other(tmp_path: Path) -> None:
    class Notes(Quadrants):
        def __call__(self, photographs: Any) -> list[PhotographRegions]:
            calls.append(len(photographs))
            return super().__call__(photographs)

    large = tmp_path / "large.png"
    Image.new("RGB", (6000, 4000)).save(large)  # two of them are beyond what is held at a time
    small = write_photographs(tmp_path)["train"][0].path
    batch = Batch(number=0, paths=(small, str(large), small, str(large), small), key="k")
    for readers in (1, 2, 8):
        calls: list[int] = []
        assert len(extract_batch(Notes(), batch, readers=readers)) == 5
        assert calls == [3, 2]


def test_a_photograph_that_has_gone_is_no_photograph_to_leave_out(tmp_path: Path) -> None:
    batch = Batch(number=0, paths=(str(tmp_path / "gone.jpg"),), key="k")
    with pytest.raises(DataError, match=r"gone\.jpg.*cannot be seen from"):
        extract_batch(Quadrants(), batch)


def test_features_that_are_no_numbers_are_refused_by_the_photograph(tmp_path: Path) -> None:
    class Broken(Quadrants):
        def __call__(self, photographs: Any) -> list[PhotographRegions]:
            (found,) = super().__call__(photographs)
            return [replace(found, features=found.features * np.float16(np.nan))]

    path = write_photographs(tmp_path)["dev"][0].path
    with pytest.raises(DataError, match=r"dev 000\.png.*finite"):
        extract_batch(Broken(), Batch(number=0, paths=(path,), key="k"))


def test_a_batch_that_is_too_large_says_which_flag_makes_it_smaller(tmp_path: Path) -> None:
    class Hungry(Quadrants):
        def __call__(self, photographs: Any) -> list[PhotographRegions]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    path = write_photographs(tmp_path)["dev"][0].path
    with pytest.raises(NoMemoryError, match="--batch-size"):
        extract_batch(Hungry(), Batch(number=0, paths=(path,), key="k"))


def test_torch_has_one_thread_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_hold_every_photograph_once_in_the_order_of_splits_and_ids(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    batches = plan.batches()
    assert [len(batch.paths) for batch in batches] == [4, 4, 4, 1]
    assert [batch.number for batch in batches] == [0, 1, 2, 3]
    ordered = [one.path for split in ("train", "dev", "test") for one in plan.photographs[split]]
    assert [path for batch in batches for path in batch.paths] == ordered
    # Whatever the order in which the splits were found.
    turned = replace(plan, photographs=dict(reversed(plan.photographs.items())))
    assert turned.batches() == batches


def test_a_photograph_of_another_size_changes_its_own_batch_alone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    path = plan.photographs["dev"][0].path  # the eighth of all
    mended = replace(plan, sizes={**plan.sizes, path: 11})
    same = [old == new for old, new in zip(plan.batches(), mended.batches(), strict=True)]
    assert same == [True, False, True, True]
    assert mended.settings() == plan.settings()
    assert mended.files() != plan.files()


def test_what_differs_between_two_plans_is_told_by_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    other = replace(plan, batch_size=5, extractor=Quadrants(weights=1).provenance())
    assert differences(plan.settings(), other.settings()) == [
        "batch_size: 4 then, 5 now",
        'detector.sha256: "0" then, "1" now',
    ]
    photographs = dict(plan.photographs)
    photographs["test"] = [replace(photographs["test"][0], captions=("another",))]
    fewer = differences(plan.settings(), replace(plan, photographs=photographs).settings())
    assert [line.split(":")[0] for line in fewer] == [
        "found.test.captions",
        "found.test.names",
        "found.test.photographs",
    ]
    assert differences(plan.settings(), plan.settings()) == []


def test_a_description_tells_what_the_extractor_tells() -> None:
    extractor = Quadrants()
    about = Description.of(extractor)
    assert about.provenance() == extractor.provenance()
    assert (about.label_names, about.feature_dim) == (extractor.label_names, 16)
