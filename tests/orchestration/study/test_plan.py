"""What a plan needs before it is begun; the disk is the test's."""

from pathlib import Path
from typing import Any

import pytest

from cpfean.errors import ServiceError
from cpfean.records.budget import SPENT, Disk
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TUNING
from orchestration.settings import Settings
from orchestration.study.plan import StudyPlan, check_room_for_checkpoints, meter_of
from tests.orchestration.samples import TINY


def plan(tmp_path: Path, **fields: Any) -> StudyPlan:
    given: dict[str, Any] = {"kind": "sweep", "name": "s", "trials": 6} | fields
    return StudyPlan(base=TINY, workers=1, data_folder=tmp_path, data_fingerprint="0", **given)


def test_the_tuning_of_a_comparison_counts_as_part_of_it(tmp_path: Path) -> None:
    for name, seconds in (("c" + TUNING, 7200), ("c", 3600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / SPENT).write_text(f'{{"seconds": {seconds}, "dollars": 1.0}}')
    meter = meter_of(plan(tmp_path, kind="comparison", name="c"), RunFolder(tmp_path / "c"))
    assert (meter.hours, meter.dollars) == (pytest.approx(3.0), pytest.approx(2.0))
    alone = meter_of(plan(tmp_path, kind="sweep", name="c"), RunFolder(tmp_path / "c"))
    assert alone.hours == pytest.approx(1.0)


def test_checkpoints_that_do_not_fit_are_refused_with_the_numbers_and_the_flag(
    tmp_path: Path,
) -> None:
    disk = Disk(each=1_000_000, trials=6, kept=2, at_a_time=2)
    assert disk.needed == 14_000_000
    settings = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="", storage="/s")

    def check(free: int) -> None:
        check_room_for_checkpoints(
            plan(tmp_path), settings, needs=lambda *_, **__: disk, free=lambda _: free
        )

    check(14_000_000)
    with pytest.raises(ServiceError) as refused:
        check(13_999_999)
    assert refused.value.exit_code == 5
    for said in (
        "/s has 14 MB free",
        "14 MB",
        "6 trial(s) x 2 kept",
        "at most 1 MB each",
        "--trials",
    ):
        assert said in str(refused.value)


@pytest.mark.parametrize("kind", ["sweep", "ablations", "train", "tuning", "comparison"])
def test_a_study_is_refused_before_its_folder_is_made(kind: str, tmp_path: Path) -> None:
    asked: list[Path] = []

    def free(folder: Path) -> int:
        asked.append(folder)
        return 12_999

    enough = Disk(each=1000, trials=6, kept=2, at_a_time=1)
    settings = Settings(output=tmp_path / "runs", cache_dir=tmp_path, tracking_uri="")
    with pytest.raises(ServiceError, match=r"12\.999|13 kB"):
        check_room_for_checkpoints(
            plan(tmp_path, kind=kind), settings, needs=lambda *_, **__: enough, free=free
        )
    assert asked == [tmp_path / "runs" / "s"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("storage", "looked_at"),
    [("/mnt/shared", "/mnt/shared"), ("file:///mnt/x", "/mnt/x"), ("s3://bucket/runs", None)],
)
def test_only_a_folder_has_an_end(storage: str, looked_at: str | None, tmp_path: Path) -> None:
    asked: list[str] = []

    def free(folder: Path) -> int:
        asked.append(str(folder))
        return 10**12

    small = Disk(each=1000, trials=6, kept=2, at_a_time=1)
    settings = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="", storage=storage)
    check_room_for_checkpoints(plan(tmp_path), settings, needs=lambda *_, **__: small, free=free)
    assert asked == ([] if looked_at is None else [looked_at])
