"""Extractions from photographs to the folder: resumed, refused, and the same whoever works."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpfean.data.convert.photographs import Photograph
from cpfean.data.provenance import read_provenance
from cpfean.data.split import check_folder, open_split
from cpfean.errors import DataError
from cpfean.extraction.batches import Batch
from cpfean.extraction.in_process import Made, Threads
from cpfean.extraction.run import Extraction, extract
from cpfean.extraction.work_folder import claimed
from cpfean.photographs.decoding import read_photograph
from tests.extraction.tiny import REGIONS, Quadrants, files_of, quadrants, write_photographs
from tests.faults import small_disk

Photographs = dict[str, list[Photograph]]


@pytest.fixture
def photographs(tmp_path: Path) -> Photographs:
    return write_photographs(tmp_path / "photos")


def extracted(
    photographs: Photographs,
    target: Path,
    *,
    run: Any = None,
    extractor: Quadrants | None = None,
    batch_size: int = 2,
    **more: Any,
) -> Extraction:
    return extract(
        photographs,
        target,
        extractor=extractor or Quadrants(),
        run=run or Threads(quadrants, workers=1),
        batch_size=batch_size,
        device="cpu",
        **more,
    )


class Stops:
    """Works through so many batches and then is interrupted; counts the photographs."""

    def __init__(self, after: int | None = None, *, error: type[BaseException] = RuntimeError):
        self.extractor = Quadrants()
        self._after = after
        self._error = error
        self._threads = Threads(lambda device: self.extractor, workers=1)

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Made]:
        for number, made in enumerate(self._threads(batches)):
            if number == self._after:
                raise self._error
            yield made


def shuffled(batches: Sequence[Batch]) -> Iterator[Made]:
    """As many workers do: what was begun last may be done first."""
    order = list(batches)
    random.Random(0).shuffle(order)
    return Threads(quadrants, workers=1)(order)


def test_the_folder_has_what_the_extractor_found_in_the_order_of_the_ids(
    tmp_path: Path, photographs: Photographs
) -> None:
    done = extracted(photographs, tmp_path / "out")
    check_folder(tmp_path / "out")
    assert (done.made, done.was_finished, done.feature_dim) == (13, False, 16)
    assert not (tmp_path / "out.unfinished").exists()
    # One after the other, in batches of the same two.
    every = [one for split in ("train", "dev", "test") for one in photographs[split]]
    expected = []
    for start in range(0, len(every), 2):
        expected += Quadrants()([read_photograph(one.path) for one in every[start : start + 2]])
    rows = iter(expected)
    for name in ("train", "dev", "test"):
        split = open_split(tmp_path / "out", name, num_regions=None)
        assert split.image_ids == [one.name for one in photographs[name]]
        assert split.captions == [text for one in photographs[name] for text in one.captions]
        assert split.label_names == ["thing", "stuff"]
        stored = np.load(tmp_path / "out" / f"{name}_ims.npy")
        assert stored.dtype == np.float16
        assert stored.shape[1:] == (REGIONS, 16)
        scores = np.load(tmp_path / "out" / f"{name}_scores.npy")
        sizes = np.load(tmp_path / "out" / f"{name}_sizes.npy")
        for row, regions in zip(range(split.num_images), rows, strict=False):
            np.testing.assert_array_equal(stored[row], regions.features)
            np.testing.assert_array_equal(scores[row], regions.scores)
            assert tuple(sizes[row]) == regions.size


def test_counts_are_stored_where_photographs_have_different_numbers_of_regions(
    tmp_path: Path, photographs: Photographs
) -> None:
    run = Threads(lambda device: Quadrants(fewest=1), workers=1)
    extracted(photographs, tmp_path / "out", run=run, extractor=Quadrants(fewest=1))
    check_folder(tmp_path / "out")
    counts = np.load(tmp_path / "out" / "train_counts.npy")
    features = np.load(tmp_path / "out" / "train_ims.npy")
    assert len(set(counts)) > 1
    for row, count in enumerate(counts):
        assert features[row, :count].any(axis=1).all()
        assert not features[row, count:].any()


def test_photographs_without_captions_become_a_gallery(tmp_path: Path) -> None:
    bare = write_photographs(tmp_path / "photos", captions=0)
    extracted({"gallery": bare["train"]}, tmp_path / "out")
    split = open_split(tmp_path / "out", "gallery", num_regions=None)
    assert (split.num_images, split.num_captions) == (7, 0)
    assert {name.split("_")[0] for name in files_of(tmp_path / "out")} == {
        "gallery",
        "objects",
        "provenance.json",
    }


@pytest.mark.parametrize("run", [Threads(quadrants, workers=3), shuffled])
def test_whoever_works_and_whatever_is_done_first_the_bytes_are_the_same(
    tmp_path: Path, photographs: Photographs, run: Any
) -> None:
    extracted(photographs, tmp_path / "one")
    extracted(photographs, tmp_path / "other", run=run)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_threads_compute_as_a_process_with_one_torch_thread_does(
    tmp_path: Path, photographs: Photographs
) -> None:
    extracted(photographs, tmp_path / "one", batch_size=4)
    torch.set_num_threads(2)
    try:
        extracted(photographs, tmp_path / "two", run=Threads(quadrants, workers=2), batch_size=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_what_was_stopped_goes_on_with_what_is_missing_and_comes_to_the_same_bytes(
    tmp_path: Path,
    photographs: Photographs,
    after: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    extracted(photographs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        extracted(photographs, tmp_path / "out", run=Stops(after, error=KeyboardInterrupt))
    assert not (tmp_path / "out").exists()
    rest = Stops()
    caplog.set_level("INFO")
    done = extracted(photographs, tmp_path / "out", run=rest)
    assert rest.extractor.seen == done.made == 13 - 2 * after
    assert (f"{after} of 7 batches are there already" in caplog.text) == (after > 0)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()


def killed_extraction(photographs: Photographs, target: Path, pause: float) -> None:
    class Slow(Quadrants):
        def __call__(self, pictures: Any) -> Any:
            time.sleep(pause)
            return super().__call__(pictures)

    extracted(photographs, target, run=Threads(lambda device: Slow(), workers=2))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(
    tmp_path: Path, photographs: Photographs, seed: int
) -> None:
    extracted(photographs, tmp_path / "whole")
    target, work = tmp_path / "out", tmp_path / "out.unfinished"
    # Forked, so that it has begun at once; a seed says after how many batches, and when.
    draw = random.Random(seed)
    enough = draw.randrange(1, 7)
    process = multiprocessing.get_context("fork").Process(
        target=killed_extraction, args=(photographs, target, 0.05)
    )
    process.start()
    try:
        while process.is_alive() and len(list(work.glob("batches/*.npz"))) < enough:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    there = len(list(work.glob("batches/*.npz")))
    assert there >= enough or target.exists()
    rest = Stops()
    done = extracted(photographs, target, run=rest)
    assert done.was_finished or rest.extractor.seen == done.made
    assert rest.extractor.seen <= 13 - 2 * (there - 1)  # the last batch has one photograph
    assert files_of(target) == files_of(tmp_path / "whole")
    assert not work.exists()


def test_what_is_left_of_putting_the_folder_together_is_made_anew(
    tmp_path: Path, photographs: Photographs
) -> None:
    extracted(photographs, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        extracted(photographs, tmp_path / "out", run=Stops(6))
    work = tmp_path / "out.unfinished"
    for name in ("folder", "folder.unfinished"):
        (work / name).mkdir()
        (work / name / "train_ims.npy").write_bytes(b"half")
    (work / "batches" / "000009-abc.npz.new").write_bytes(b"half")
    assert extracted(photographs, tmp_path / "out").made == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_finished_folder_is_not_made_again_and_what_a_kill_left_beside_it_goes(
    tmp_path: Path, photographs: Photographs
) -> None:
    extracted(photographs, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out.unfinished" / "batches").mkdir(parents=True)
    (tmp_path / "out.unfinished" / "settings.json").write_text("{}", encoding="utf-8")
    for _ in range(2):
        run = Stops()
        done = extracted(photographs, tmp_path / "out", run=run)
        assert (done.was_finished, done.made, run.extractor.seen) == (True, 0, 0)
        assert not (tmp_path / "out.unfinished").exists()
    assert files_of(tmp_path / "out") == before
    assert done.provenance == read_provenance(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 3}, "batch_size: 2 then, 3 now"),
        ({"extractor": Quadrants(weights=1)}, 'detector.sha256: "0" then, "1" now'),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_are_refused_and_named(
    tmp_path: Path, photographs: Photographs, change: Any, said: str, is_finished: bool
) -> None:
    if is_finished:
        extracted(photographs, tmp_path / "out")
    else:
        with pytest.raises(RuntimeError):
            extracted(photographs, tmp_path / "out", run=Stops(2))
    before = files_of(tmp_path)
    run = Stops()
    with pytest.raises(DataError) as refused:
        extracted(photographs, tmp_path / "out", run=run, **change)
    assert said in str(refused.value)
    assert run.extractor.seen == 0
    assert files_of(tmp_path) == before


def test_another_photograph_or_caption_is_refused_in_a_folder_that_was_begun(
    tmp_path: Path, photographs: Photographs
) -> None:
    extracted(photographs, tmp_path / "out")
    fewer = photographs | {"dev": photographs["dev"][:2]}
    with pytest.raises(DataError, match=r"found\.dev\.photographs: 3 then, 2 now"):
        extracted(fewer, tmp_path / "out")
    path = Path(photographs["dev"][0].path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"other photographs or settings:\n  files: "):
        extracted(photographs, tmp_path / "out")


def test_somebody_elses_folder_is_left_alone(tmp_path: Path, photographs: Photographs) -> None:
    for name in ("out", "out.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("all of it", encoding="utf-8")
        before = files_of(tmp_path)
        with pytest.raises(DataError, match=f"{name}: e.*name another OUT"):
            extracted(photographs, tmp_path / "out")
        assert files_of(tmp_path) == before
        (tmp_path / name / "thesis.txt").unlink()
        (tmp_path / name).rmdir()


def test_the_second_of_two_at_once_is_refused(tmp_path: Path, photographs: Photographs) -> None:
    with (
        claimed(tmp_path / "out"),
        pytest.raises(DataError, match="another extraction is making it"),
    ):
        extracted(photographs, tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()
    extracted(photographs, tmp_path / "out")


def test_photographs_that_cannot_be_read_are_all_named_before_anything_is_computed(
    tmp_path: Path, photographs: Photographs
) -> None:
    for split, row in (("train", 2), ("test", 0)):
        Path(photographs[split][row].path).write_text("no picture", encoding="utf-8")
    Path(photographs["dev"][1].path).write_bytes(b"")
    run = Stops()
    with pytest.raises(DataError, match="3 of 13 photographs") as refused:
        extracted(photographs, tmp_path / "out", run=run)
    for said in ("train 002.png", "test 000.png", "dev 001.png: an empty file", "--skip-broken"):
        assert said in str(refused.value)
    assert run.extractor.seen == 0
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def cut_short(photograph: Photograph) -> bytes:
    """Leaves the header, and half of the pixels; gives back what there was."""
    path = Path(photograph.path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def test_damage_behind_the_header_is_named_when_the_others_are_done_and_can_be_mended(
    tmp_path: Path, photographs: Photographs
) -> None:
    extracted(photographs, tmp_path / "whole")
    first, second = photographs["train"][1], photographs["dev"][2]
    contents = {one.path: cut_short(one) for one in (first, second)}
    with pytest.raises(DataError, match="2 of 13 photographs") as refused:
        extracted(photographs, tmp_path / "out")
    assert "cut short" in str(refused.value)
    assert "the same command again goes on" in str(refused.value)
    for path, content in contents.items():
        Path(path).write_bytes(content)
    run = Stops()
    done = extracted(photographs, tmp_path / "out", run=run)
    assert run.extractor.seen == done.made == 4  # of two batches
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_photograph_that_was_mended_to_the_same_size_is_looked_at_again(
    tmp_path: Path, photographs: Photographs
) -> None:
    path = Path(photographs["train"][2].path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))
    with pytest.raises(DataError, match="Mend them, or leave them out"):
        extracted(photographs, tmp_path / "out")
    path.write_bytes(whole)
    assert extracted(photographs, tmp_path / "out").made == 2
    extracted(photographs, tmp_path / "undisturbed")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_a_link_that_leads_nowhere_is_left_out_as_what_is_broken(
    tmp_path: Path, photographs: Photographs
) -> None:
    path = Path(photographs["dev"][0].path)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere.png")
    done = extracted(photographs, tmp_path / "out", skip_broken=True)
    (skipped,) = done.provenance["skipped"]
    assert skipped["name"] == path.name
    assert "link" in skipped["reason"]


def test_a_process_may_end_while_it_clears_up(tmp_path: Path, photographs: Photographs) -> None:
    extracted(photographs, tmp_path / "undisturbed")
    with pytest.raises(RuntimeError):
        extracted(photographs, tmp_path / "out", run=Stops(after=3))
    shutil.rmtree(tmp_path / "out.unfinished" / "batches")  # which goes first
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "out")
    assert extracted(photographs, tmp_path / "out").was_finished
    assert not (tmp_path / "out.unfinished").exists()


def test_broken_photographs_are_left_out_with_their_captions_if_that_is_asked_for(
    tmp_path: Path, photographs: Photographs, caplog: pytest.LogCaptureFixture
) -> None:
    cut_short(photographs["train"][1])
    Path(photographs["dev"][2].path).write_text("no picture", encoding="utf-8")
    with pytest.raises(DataError):
        extracted(photographs, tmp_path / "out")
    with pytest.raises(RuntimeError):
        extracted(photographs, tmp_path / "out", run=Stops(3), skip_broken=True)
    done = extracted(photographs, tmp_path / "out", skip_broken=True)
    extracted(photographs, tmp_path / "whole", skip_broken=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    check_folder(tmp_path / "out")
    split = open_split(tmp_path / "out", "train", num_regions=None)
    kept = [one for row, one in enumerate(photographs["train"]) if row != 1]
    assert split.image_ids == [one.name for one in kept]
    assert split.captions == [text for one in kept for text in one.captions]
    assert done.provenance["photographs"] == {"train": 6, "dev": 2, "test": 3}
    assert done.provenance["captions"] == {"train": 12, "dev": 4, "test": 6}
    skipped = done.provenance["skipped"]
    assert [(one["split"], one["name"]) for one in skipped] == [
        ("train", "train 001.png"),
        ("dev", "dev 002.png"),
    ]
    assert "cut short" in skipped[0]["reason"]
    assert f"left out: {photographs['train'][1].path}: cut short" in caplog.text
    assert extracted(photographs, tmp_path / "out").was_finished


def test_a_split_of_broken_photographs_alone_is_refused(
    tmp_path: Path, photographs: Photographs
) -> None:
    for one in photographs["dev"]:
        Path(one.path).write_bytes(b"")
    with pytest.raises(DataError, match="dev: none of its photographs"):
        extracted(photographs, tmp_path / "out", skip_broken=True)


def test_a_damaged_batch_is_named_and_made_anew_by_the_next_attempt(
    tmp_path: Path, photographs: Photographs
) -> None:
    extracted(photographs, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        extracted(photographs, tmp_path / "out", run=Stops(5))
    damaged = sorted((tmp_path / "out.unfinished" / "batches").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{damaged.name}: damaged.*same command"):
        extracted(photographs, tmp_path / "out")
    assert extracted(photographs, tmp_path / "out").made == 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_provenance_says_what_was_made_of_what_and_not_where_or_when(
    tmp_path: Path, photographs: Photographs
) -> None:
    extracted(photographs, tmp_path / "a")
    moved = write_photographs(tmp_path / "elsewhere")
    extracted(moved, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    text = (tmp_path / "a" / "provenance.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    told = json.loads(text)
    assert told["settings"]["num_regions"] == REGIONS
    assert told["photographs"] == {"train": 7, "dev": 3, "test": 3}
    assert (told["device"], told["batch_size"], told["skipped"]) == ("cpu", 2, [])


def test_a_full_disk_is_told_and_what_was_done_is_gone_on_with(
    tmp_path: Path, photographs: Photographs
) -> None:
    def fill(batches: Sequence[Batch]) -> Iterator[Made]:
        for number, made in enumerate(Threads(quadrants, workers=1)(batches)):
            if number == 3:
                with (disk / "filler").open("wb", buffering=0) as filler:
                    filler.write(bytes(shutil.disk_usage(disk).free))
            yield made

    extracted(photographs, tmp_path / "whole")
    with small_disk(tmp_path / "disk", kilobytes=512) as disk:
        with pytest.raises(DataError, match=r"No space left on device.*same command") as refused:
            extracted(photographs, disk / "out", run=fill)
        assert str(disk / "out.unfinished") in str(refused.value)
        (disk / "filler").unlink()
        assert extracted(photographs, disk / "out").made == 13 - 6
        assert files_of(disk / "out") == files_of(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photos", train=400, captions=1)
    with small_disk(tmp_path / "disk", kilobytes=100) as disk:
        run = Stops()
        with pytest.raises(DataError, match=r"needs up to 0\.0 GB, and its disk has"):
            extracted(photographs, disk / "out", run=run)
        assert run.extractor.seen == 0
