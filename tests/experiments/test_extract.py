"""The command that makes data of photographs, with tiny models in their real architectures."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpfean.data.provenance import read_provenance
from cpfean.data.split import open_split
from tests.environment import FAIR, of_a_user
from tests.experiments.conftest import Run
from tests.experiments.test_command_line import ROOT
from tests.extraction.tiny import files_of, write_photographs
from tests.photographs.models import tiny_dinov2, tiny_rt_detr_v2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_dinov2(folder / "dino")
    tiny_rt_detr_v2(folder / "detr")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each split, with a table of two captions for each photograph."""
    return image_folder(tmp_path_factory.mktemp("data") / "photos")


def image_folder(root: Path, **numbers: int) -> Path:
    flat = write_photographs(root.with_name("flat"), **numbers)
    for split, photographs in flat.items():
        (root / split).mkdir(parents=True)
        with (root / split / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "text"])
            for one in photographs:
                os.link(one.path, root / split / one.name)
                table.writerows([one.name, text] for text in one.captions)
    return root


@pytest.fixture
def words(models: Path) -> list[str]:
    """Fixed boxes, and a backbone that takes no time."""
    return ["--detector", "grid", "--backbone", str(models / "dino"), "--regions", "5"]


def test_photographs_become_data_that_is_valid_and_the_next_command_is_named(
    tmp_path: Path, run: Run, photos: Path, models: Path
) -> None:
    detector = ["--detector", str(models / "detr"), "--backbone", str(models / "dino")]
    more = ["--features", "both", "--regions", "6", "--no-fill", "--workers", "2"]
    done = run("extract.py", str(photos), "out", "--in-process", *detector, *more)
    assert done.returncode == 0, done.stderr
    for said in (
        "out: done, and nothing wrong.",
        "13 photographs in ",
        " a second",
        "experiments/train.py --data out",
    ):
        assert said in done.stdout
    rows = {line.split()[0]: line.split()[1:6] for line in done.stdout.splitlines()[2:5]}
    # 32 of the detector's queries beside 16 of the backbone; as many regions as were found.
    assert [rows["train"][i] for i in (0, 1, 2, 4)] == ["7", "14", "2", "48"]
    assert [rows["dev"][i] for i in (0, 1, 2, 4)] == ["3", "6", "2", "48"]
    checked = run("validate.py", "out")
    assert (checked.returncode, "out: nothing wrong." in checked.stdout) == (0, True)
    told = read_provenance(tmp_path / "out")
    assert told is not None
    assert told["settings"]["features"] == "both"
    assert told["settings"]["fill"] is False
    assert told["detector"]["class"] == "RTDetrV2ForObjectDetection"
    assert (tmp_path / "out" / "objects_vocab.txt").exists()


def test_a_finished_folder_is_not_made_again_nor_by_other_settings(
    tmp_path: Path, run: Run, photos: Path, words: list[str]
) -> None:
    line = ["extract.py", str(photos), "out", "--in-process", *words]
    assert run(*line).returncode == 0
    before = files_of(tmp_path / "out")
    again = run(*line, "--workers", "1")
    assert again.returncode == 0
    assert "out: finished before, of the same photographs; nothing was made." in again.stdout
    assert " a second" not in again.stdout
    other = run(*line, "--batch-size", "5")
    assert other.returncode == 3
    assert "batch_size: 8 then, 5 now" in other.stderr
    assert files_of(tmp_path / "out") == before


def test_captions_of_a_file_are_split_by_a_seed(tmp_path: Path, run: Run, words: list[str]) -> None:
    flat = write_photographs(tmp_path / "flat")
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        table.writerows([o.name, t] for split in flat.values() for o in split for t in o.captions)
    line = ["extract.py", "flat", "--in-process", *words, "--captions", "captions.csv"]
    for target, more in (("a", []), ("b", ["--seed", "1"]), ("c", ["--split", "0.4,0.3,0.3"])):
        done = run(*line[:2], target, *line[2:], *more)
        assert done.returncode == 0, done.stderr
    ids = {t: (tmp_path / t / "train_ids.txt").read_text(encoding="utf-8") for t in "abc"}
    assert len(set(ids.values())) == 3
    assert len(ids["a"].splitlines()) == len(ids["b"].splitlines()) > len(ids["c"].splitlines())


def test_a_folder_without_captions_becomes_a_gallery_to_be_searched(
    tmp_path: Path, run: Run, words: list[str]
) -> None:
    write_photographs(tmp_path / "my photos", dev=0, test=0)
    done = run("extract.py", "my photos", "out", "--in-process", *words)
    assert done.returncode == 0, done.stderr
    assert (
        "experiments/search.py runs/NAME/best_model --data out --photos 'my photos'" in done.stdout
    )
    assert open_split(tmp_path / "out", "gallery", num_regions=None).num_images == 7


def test_what_cannot_be_read_is_named_and_left_out_only_if_asked_for(
    tmp_path: Path, run: Run, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    photos = image_folder(tmp_path / "photos")
    broken = photos / "train" / "train 001.png"
    broken.unlink()
    broken.write_text("no picture", encoding="utf-8")
    line = ["extract.py", "photos", "out", "--in-process", *words]
    refused = run(*line)
    assert refused.returncode == 3
    assert "1 of 13 photographs" in refused.stderr
    assert "photos/train/train 001.png: expected JPEG" in refused.stderr
    assert not (tmp_path / "out.unfinished").exists()
    done = run(*line, "--skip-broken")
    assert done.returncode == 0, done.stderr
    assert "left out: photos/train/train 001.png" in caplog.text
    assert "1 photograph could not be read" in done.stdout
    assert "train/train 001.png" not in (tmp_path / "out" / "train_ids.txt").read_text("utf-8")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--split", "0.5,0.5"], 2, "three shares such as"),
        (["--workers", "0"], 2, "--workers must be at least 1"),
        (["--batch-size", "0"], 2, "--batch-size must be at least 1"),
        (["--seed", "-1"], 2, "--seed must be at least 0"),
        (["--regions", "0"], 2, "num_regions must be from 1"),
        (["--min-score", "2"], 2, "min_score must be in"),
        (["--features", "both", "--detector", "grid"], 2, 'with the detector "grid"'),
        (["--in-process", "--address", "local"], 2, "exclude each other"),
        (["--vocabulary", "no.txt"], 3, "no.txt: cannot be read"),
        (["--in-process", "--detector", "no/such"], 5, "no/such"),
        (["--in-process", "--detector", "grid", "--backbone", "."], 5, "config.json"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_made(
    tmp_path: Path, run: Run, photos: Path, more: list[str], code: int, said: str
) -> None:
    refused = run("extract.py", str(photos), "out", *more, environment={"HF_HUB_OFFLINE": "1"})
    assert refused.returncode == code, refused.stderr
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_places_that_cannot_be_are_refused(tmp_path: Path, run: Run, photos: Path) -> None:
    for photographs, target, code, said in (
        (str(photos), "s3://bucket/out", 2, "expected a folder of this machine"),
        (str(photos), "/", 2, "expected a new folder"),
        ("nowhere", "out", 3, "nowhere"),
    ):
        refused = run("extract.py", photographs, target, "--in-process", "--detector", "grid")
        assert refused.returncode == code, refused.stderr
        assert said in refused.stderr
        assert list(tmp_path.iterdir()) == []


@contextmanager
def running(folder: Path, line: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own."""
    environment = of_a_user() | FAIR
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "extract.py"), *line],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_batches(work: Path, enough: int, process: subprocess.Popen[str]) -> int:
    while process.poll() is None and (there := batches(work)) < enough:
        time.sleep(0.001)
    assert process.returncode is None, process.communicate()
    return there


def batches(work: Path) -> int:
    return len(list(work.glob("batches/*.npz")))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ray", [False, True])
def test_after_a_kill_the_same_command_makes_what_is_missing_and_nothing_twice(
    tmp_path: Path, run: Run, words: list[str], ray: bool, caplog: pytest.LogCaptureFixture
) -> None:
    image_folder(tmp_path / "photos", train=60)
    where = ["--address", "local"] if ray else ["--in-process"]
    line = ["photos", "out", *words, "--batch-size", "1", "--workers", "2", *where]
    with running(tmp_path, line) as process:
        enough = random.Random(os.getpid()).randrange(1, 50)
        wait_for_batches(tmp_path / "out.unfinished", enough, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = batches(tmp_path / "out.unfinished")
    assert enough <= there < 66
    rest = run("extract.py", "photos", "out", *words, "--batch-size", "1", "--in-process")
    assert rest.returncode == 0, rest.stderr
    assert f"{there} of 66 batches are there already" in caplog.text
    assert re.search(rf"^{66 - there} photographs in ", rest.stdout, flags=re.MULTILINE)
    undisturbed = run("extract.py", "photos", "all", *words, "--batch-size", "1", "--in-process")
    assert undisturbed.returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "all")
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_stop_by_ctrl_c_says_what_goes_on(tmp_path: Path, run: Run, words: list[str]) -> None:
    image_folder(tmp_path / "photos", train=60)
    line = ["photos", "out", *words, "--batch-size", "1", "--workers", "1", "--in-process"]
    with running(tmp_path, line) as process:
        wait_for_batches(tmp_path / "out.unfinished", 3, process)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; what is done is kept, and this goes on:" in told
    assert "Traceback" not in told
    typed = told.strip().splitlines()[-1].split("extract.py ")[1].split()
    assert typed == line
    assert run("extract.py", *typed).returncode == 0
