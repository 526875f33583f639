"""What a drill holds against a sweep, without a lab."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.drill import Kept, judge
from tests.orchestration.samples import record


def kept() -> Kept:
    """Two trials of which records, Tune's folders and MLflow tell the same."""
    records = [
        record(number, 100.0, 200.0, state=state, checkpoint="/mnt/checkpoints/x")
        for number, state in enumerate(("finished", "pruned"))
    ]
    parent = {"role": "parent", "trial": "", "parent": "", "run": "p", "state": "finished"}
    trials = [
        {"role": "trial", "trial": str(of.number), "parent": "p", "run": "t", "state": of.state}
        | {"points": [[1, 100.0], [2, 200.0]]}
        for of in records
    ]
    runs: list[dict[str, Any]] = [parent | {"points": []}, *trials]
    return Kept(
        records=records, folders={0, 1}, runs=[run | {"status": "FINISHED"} for run in runs]
    )


def test_records_that_agree_are_passed() -> None:
    judge(kept(), trials=2, storage="/mnt/checkpoints/")


SPOILT: dict[str, Callable[[Kept], Any]] = {
    "a trial that is missing": lambda k: k.records.pop(),
    "a trial that still runs": lambda k: setattr(k.records[0], "state", "running"),
    "an epoch twice": lambda k: k.records[0].history.append(k.records[0].history[-1]),
    "checkpoints elsewhere": lambda k: setattr(k.records[0], "checkpoint", "/tmp/x"),
    "no folder of Tune's": lambda k: k.folders.remove(1),
    "a second run of a trial": lambda k: k.runs.append(k.runs[1]),
    "a run that still runs": lambda k: k.runs[1].update(status="RUNNING"),
    "a run that is another's child": lambda k: k.runs[1].update(parent="q"),
    "a step twice": lambda k: k.runs[1]["points"].append([2, 200.0]),
    "a step that is missing": lambda k: k.runs[2]["points"].pop(),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_drill_fails_over(name: str) -> None:
    spoilt = kept()
    SPOILT[name](spoilt)
    with pytest.raises(AssertionError):
        judge(spoilt, trials=2, storage="/mnt/checkpoints/")
