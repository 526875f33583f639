"""The copy of a study's records: kept up to date, fetched, refused; the storage is a folder."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cpfean.data.sources import resolve_data
from cpfean.errors import ConfigError, ServiceError
from cpfean.json_files import RecordError
from cpfean.records.budget import SPENT, Budget
from cpfean.records.run_folder import RunFolder
from cpfean.writing import write_json
from orchestration.runners.on_ray import OnRay
from orchestration.settings import Settings
from orchestration.study.follower import Follower, Pauses
from orchestration.study.plan import StudyPlan, TrialPlan
from orchestration.study.records_copy import CopyFolder, RecordsCopy, fetch_records
from orchestration.study.study import run_study
from orchestration.tracking.stores import open_store
from tests.lab.hosts import wait_until
from tests.orchestration.samples import TINY, record

IDENTITY = {"kind": "sweep"}


@pytest.fixture
def where(where: Settings, tmp_path: Path) -> Settings:
    return replace(where, storage=str(tmp_path / "storage"))


def study(where: Settings, *, epochs: int = 2) -> RunFolder:
    """A study of two trials, the second of which has not ended."""
    folder = RunFolder(where.output / "s")
    folder.create(IDENTITY)
    folder.write(record(0, 10.0, 20.0, state="finished"))
    folder.write(record(1, *range(epochs), state="running"))
    write_json(folder.path / SPENT, {"seconds": 5.0})
    return folder


class Place(CopyFolder):
    """Where a copy goes; notes what it is asked for and what it gets, and may hang."""

    def __init__(self, where: Settings) -> None:
        assert where.storage is not None
        super().__init__(where.storage, "s", patience=0.0)
        self.asked: list[str] = []
        self.got: list[str] = []
        self.answers = threading.Event()
        self.answers.set()

    def get(self, name: str, file: Path) -> bool:
        self.asked.append(name)
        self.answers.wait(60)
        return super().get(name, file)

    def put(self, file: Path, name: str) -> None:
        self.got.append(name)
        super().put(file, name)


def copy_to(place: Place, folder: RunFolder, *, resume: str = "") -> RecordsCopy:
    return RecordsCopy(folder, place, resume=resume, answer_seconds=1.0, look_seconds=0.02)


def follower_of(copy: RecordsCopy, say: Callable[[str], None] = print) -> Follower:
    """It has been started."""
    follower = Follower([copy], say=say, pauses=Pauses(retry=0.02))
    follower.start()
    return follower


def copy_of(where: Settings) -> RunFolder:
    return RunFolder(Path(where.storage or "") / "studies" / "s")


def copied(folder: RunFolder, where: Settings) -> None:
    """Copies a folder, as a driver does that ends at once."""
    said: list[str] = []
    copy = copy_to(Place(where), folder)
    copy.check()
    assert follower_of(copy, said.append).close()
    assert said == []


def test_a_study_whose_folder_is_lost_is_fetched_as_it_was(where: Settings) -> None:
    folder = study(where)
    records, number = folder.records(), folder.id
    copied(folder, where)
    shutil.rmtree(where.output)

    said: list[str] = []
    fetch_records("s", where, say=said.append)
    assert (folder.records(), folder.id) == (records, number)
    assert (folder.path / SPENT).read_text() == '{\n "seconds": 5.0\n}\n'
    assert len(said) == 1
    assert f"fetched from {copy_of(where).path}, with 2 trial(s) and 4 epoch(s)" in said[0]
    folder.check_same(IDENTITY)
    copied(folder, where)


def test_a_folder_that_is_here_is_left_as_it_is(where: Settings) -> None:
    folder = study(where)
    copied(folder, where)
    folder.write(record(1, 7.0, state="running"))
    fetch_records("s", where, say=pytest.fail)
    assert folder.records()[1].epochs == 1


def test_where_there_is_no_copy_nothing_is_made(where: Settings) -> None:
    fetch_records("s", where, say=pytest.fail)
    fetch_records("s", replace(where, storage=None), say=pytest.fail)
    assert not (where.output / "s").exists()


def test_a_fetch_that_was_cut_off_is_done_again(where: Settings) -> None:
    folder = study(where)
    copied(folder, where)
    shutil.rmtree(where.output)
    in_the_way = folder.path / "trials" / "001"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    with pytest.raises(ServiceError, match="cannot be copied to"):
        fetch_records("s", where, say=pytest.fail)
    in_the_way.unlink()
    fetch_records("s", where, say=print)
    assert [found.epochs for found in folder.records()] == [2, 2]


def test_what_changes_is_copied_while_the_study_runs_and_nothing_else_is(where: Settings) -> None:
    folder = study(where)
    (folder.path / "best_model").mkdir()
    (folder.path / "best_model" / "model.safetensors").write_bytes(b"large")
    place = Place(where)
    follower = follower_of(copy_to(place, folder))
    wait_until(lambda: len(copy_of(where).records()) == 2, seconds=30, what="the first copies")
    # Whether it is told of, or found.
    changed = record(1, 1.0, 2.0, 3.0, state="finished")
    folder.write(changed)
    follower.update(changed)
    wait_until(lambda: copy_of(where).records()[1].settled, seconds=30, what="the change")
    write_json(folder.path / SPENT, {"seconds": 6.0})
    wait_until(lambda: place.got.count(SPENT) == 2, seconds=30, what="the hours that were spent")
    assert follower.close()
    assert place.got == [
        "sweep.json",
        SPENT,
        "trials/000/record.json",
        "trials/001/record.json",
        "trials/001/record.json",
        SPENT,
    ]


def test_a_name_that_another_study_has_taken_is_refused_and_its_copy_stays(where: Settings) -> None:
    copied(study(where), where)
    first = copy_of(where).id
    elsewhere = replace(where, output=where.output.with_name("elsewhere"))
    mine = RunFolder(elsewhere.output / "s")
    with pytest.raises(ConfigError, match=r"studies/s holds a run already.*\n  goes on with s\n"):
        copy_to(Place(elsewhere), mine, resume="goes on with s").check()
    other = study(elsewhere)
    with pytest.raises(ConfigError, match=f"another run than .*{first}, and {other.id} here"):
        copy_to(Place(elsewhere), other).check()
    # One that learns it late, as the storage was away at its start, writes nothing either.
    said: list[str] = []
    late = follower_of(copy_to(Place(elsewhere), other), said.append)
    late.meet(seconds=30)
    late.close()
    assert len(said) == 1
    assert "the records are not copied: " in said[0]
    assert copy_of(where).id == first


def test_a_copy_that_is_further_than_the_folder_is_told_and_neither_is_chosen(
    where: Settings,
) -> None:
    folder = study(where, epochs=5)
    copied(folder, where)
    folder.write(record(1, 1.0, state="running"))
    with pytest.raises(ConfigError, match=r"further than .*: 7 epoch\(s\), and 3 here"):
        copy_to(Place(where), folder).check()
    assert copy_of(where).records()[1].epochs == 5


def test_a_storage_that_is_away_is_told_once_and_copied_to_when_it_is_back(where: Settings) -> None:
    folder = study(where)
    in_the_way = Path(where.storage or "")
    in_the_way.write_text("no folder")
    said: list[str] = []
    place = Place(where)
    copy = copy_to(place, folder, resume="goes on with s")
    copy.check()
    follower = follower_of(copy, said.append)
    wait_until(lambda: len(said) > 0, seconds=30, what="the warning")
    folder.write(record(1, 1.0, 2.0, 3.0, state="running"))
    wait_until(lambda: len(place.asked) > 4, seconds=30, what="some tries")
    in_the_way.unlink()
    wait_until(lambda: len(copy_of(where).records()) == 2, seconds=30, what="the copies")
    in_the_way.rename(in_the_way.with_name("taken away"))
    in_the_way.write_text("no folder")
    folder.write(last := record(1, 1.0, 2.0, 3.0, 4.0, state="running"))
    follower.update(last)
    assert follower.close()  # it says itself how the rest is copied
    assert len(said) == 2
    assert "training goes on" in said[0]
    assert "has not got all records" in said[1]
    assert said[1].endswith("\n  goes on with s")


def test_a_storage_that_hangs_holds_neither_the_start_nor_the_end_up(where: Settings) -> None:
    said: list[str] = []
    place = Place(where)
    place.answers.clear()
    copy = RecordsCopy(study(where), place, answer_seconds=0.1)
    began = time.monotonic()
    copy.check()
    follower_of(copy, said.append).close(seconds=0.1)
    assert time.monotonic() - began < 5
    place.answers.set()
    assert len(said) == 1
    assert "has not got all records" in said[0]


def used_up_plan(where: Settings) -> StudyPlan:
    """A study that starts no Ray: its budget is used up when it is resumed."""
    fixed = tuple(TrialPlan(name=f"t{n}", overrides={}, config=TINY) for n in range(4))
    return StudyPlan(
        kind="tuning",
        name="s",
        base=TINY,
        workers=1,
        data_folder=resolve_data(TINY.data, cache_dir=where.cache_dir),
        data_fingerprint="0",
        trials=4,
        fixed=fixed,
        budget=Budget(max_hours=1.0),
    )


def tracked(where: Settings) -> dict[str, tuple[str, list[tuple[int, float]]]]:
    """Status and points of each trial's run."""
    _, experiment = open_store(where.tracking_uri)
    client = MlflowClient(where.tracking_uri)
    found = {}
    for run in client.search_runs([experiment]):
        if run.data.tags["cpfean.role"] == "trial":
            points = client.get_metric_history(run.info.run_id, "val/rsum")
            status = run.info.status
            assert run.data.tags["cpfean.trial"] not in found
            found[run.data.tags["cpfean.trial"]] = status, [(p.step, p.value) for p in points]
    return found


def test_a_study_that_lost_folder_and_mlflow_has_both_again_and_each_point_once(
    where: Settings, uri: str, empty_store: bytes
) -> None:
    assert where.tracking_uri == uri
    plan = used_up_plan(where)
    folder = RunFolder(where.output / "s")
    folder.create(plan.identity())
    folder.write(record(0, 10.0, 20.0, state="finished"))
    folder.write(record(1, 5.0, state="interrupted"))
    folder.write(record(2, 6.0, 7.0, state="running"))
    write_json(folder.path / SPENT, {"seconds": 3600.0, "dollars": None})
    run_study(plan, where, runner=OnRay(where), resume=True, say=print)
    before, points = folder.records(), tracked(where)
    assert points == {
        "0": ("FINISHED", [(1, 10.0), (2, 20.0)]),
        "1": ("KILLED", [(1, 5.0)]),
        "2": ("KILLED", [(1, 6.0), (2, 7.0)]),
    }

    shutil.rmtree(where.output)
    database = Path(uri.removeprefix("sqlite:///"))
    database.unlink()
    database.write_bytes(empty_store)
    fetch_records("s", where, say=print)
    for _ in range(2):
        result = run_study(plan, where, runner=OnRay(where), resume=True, say=print)
        assert (list(result.records), tracked(where)) == (before, points)


def test_a_new_study_of_a_name_that_is_taken_on_the_storage_makes_no_folder(
    where: Settings,
) -> None:
    copied(study(where), where)
    shutil.rmtree(where.output)
    with pytest.raises(ConfigError, match="holds a run already"):
        run_study(used_up_plan(where), where, runner=OnRay(where), resume=False, say=print)
    assert not (where.output / "s").exists()


@pytest.mark.parametrize("name", ["sweep.json", "trials/000/record.json"])
@pytest.mark.parametrize("content", ["null", "[" * 1000, '{"id": 3, "unknown": 1}'])
def test_a_copy_that_cannot_be_read_is_told_and_left(
    where: Settings, name: str, content: str
) -> None:
    folder = study(where)
    copied(folder, where)
    file = copy_of(where).path / name
    file.write_text(content)
    with pytest.raises(ConfigError, match="is made anew from") as told:
        copy_to(Place(where), folder).check()
    assert str(told.value).startswith(f"{file}: ")
    assert f"Move {copy_of(where).path} away" in str(told.value)
    assert file.read_text() == content


def test_a_damaged_record_that_is_put_aside_is_fetched_with_its_run(where: Settings) -> None:
    folder = study(where)
    copied(folder, where)
    folder.write(record(1, 1.0, 2.0, 3.0, state="running"))  # further than the copy
    for file in (folder.identity_file, folder.path / "trials" / "000" / "record.json"):
        file.write_text("{")
    with pytest.raises(RecordError, match="fetches it once this one is put aside"):
        folder.check_same(IDENTITY)
    folder.identity_file.unlink()
    (folder.path / "trials" / "000" / "record.json").unlink()
    fetch_records("s", where, say=print)
    folder.check_same(IDENTITY)
    assert [found.epochs for found in folder.records()] == [2, 3]
