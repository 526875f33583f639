"""Finished runs by what they were."""

import json
import re
from pathlib import Path

import pytest

from cpfean.json_files import RecordError
from cpfean.records.results import Results
from cpfean.records.trial_record import TrialRecord
from tests.orchestration.samples import TINY, record


def store(folder: Path, data: str = "data", code: str | None = None) -> Results:
    return Results(folder, data_fingerprint=data, commit="abc", code=code)


def done(**fields) -> TrialRecord:
    given = {"state": "finished", "test": {"rsum": 123.4}, "seconds": 9.0, "checkpoint": "/c"}
    return record(7, 100.0, 120.0, name="full/seed-1", **given | fields)


def test_a_kept_run_comes_back_with_all_that_a_table_needs(tmp_path: Path) -> None:
    kept = done()
    store(tmp_path / "results").keep(kept)
    waiting = record(0, name="another/name")
    assert store(tmp_path / "results").fill(waiting, tested=True)
    assert (waiting.state, waiting.complete, waiting.test) == ("finished", True, {"rsum": 123.4})
    assert (waiting.history, waiting.seconds) == (kept.history, 9.0)
    assert waiting.reused == store(tmp_path).file_of(TINY).name
    assert waiting.name == "another/name"


def test_another_configuration_data_or_code_is_another_run(tmp_path: Path) -> None:
    store(tmp_path).keep(done())
    other = TINY.with_overrides({"seed": 1})
    assert not store(tmp_path).fill(record(0, config=other.to_dict()), tested=True)
    assert not store(tmp_path, data="other").fill(record(0), tested=True)
    assert not store(tmp_path, code="0" * 12).fill(record(0), tested=True)


def test_where_data_and_encoder_lie_says_nothing_but_what_they_hold_does(tmp_path: Path) -> None:
    for name, content in (("here", "weights"), ("there", "weights"), ("other", "others")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_text(content)

    def file_of(name: str) -> Path:
        places = {"data.path": f"/{name}", "model.text.encoder": str(tmp_path / name)}
        return store(tmp_path).file_of(TINY.with_overrides(places))

    assert file_of("here") == file_of("there")
    assert file_of("here") != file_of("other")


def test_a_run_that_was_not_tested_does_not_stand_in_for_one_that_was(tmp_path: Path) -> None:
    store(tmp_path).keep(done(test={}))
    assert store(tmp_path).fill(record(0), tested=False)
    assert not store(tmp_path).fill(record(0), tested=True)
    store(tmp_path).keep(done())
    store(tmp_path).keep(done(test={}))  # says less: what is known stays
    assert store(tmp_path).fill(record(0), tested=True)


def test_a_result_that_cannot_be_read_is_told_and_never_written_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = store(tmp_path).file_of(TINY)
    file.write_text("{")
    with pytest.raises(RecordError, match=re.escape(str(file))):
        store(tmp_path).fill(record(0), tested=False)
    store(tmp_path).keep(done())  # at the end of a long study: it must not end by this
    assert file.read_text() == "{"
    assert str(file) in caplog.text
    file.unlink()
    store(tmp_path).keep(done())
    told = json.loads(file.read_text()) | {"format": 2}
    file.write_text(json.dumps(told))
    with pytest.raises(RecordError, match="format must be 1; got 2"):
        store(tmp_path).fill(record(0), tested=False)


def test_checkpoints_of_results_are_found_where_all_of_the_runs_have_moved(tmp_path: Path) -> None:
    for tail in ("a/train/a-000/epoch-0001", "b/checkpoints/epoch-0001"):
        new = tmp_path / "new" / tail
        new.mkdir(parents=True)
        store(tmp_path / "new" / "results").keep(done(checkpoint=f"/old/runs/{tail}"))
        waiting = record(0)
        assert store(tmp_path / "new" / "results").fill(waiting, tested=True)
        assert waiting.checkpoint == str(new)
