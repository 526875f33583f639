"""The post without Ray; then a crew on a real Ray: one trial after another, and what goes wrong."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpfean.config import ExperimentConfig
from cpfean.data.sources import resolve_data
from orchestration.runners.worker_pool import Post
from orchestration.settings import ENVIRONMENT, Settings
from orchestration.study.records import RunFolder, TrialRecord
from tests.faults import actors
from tests.orchestration.samples import TINY

ROOT = Path(__file__).resolve().parents[3]


async def soon(waiting: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Started, and so far that it waits."""
    task = asyncio.create_task(waiting)
    await asyncio.sleep(0.01)
    assert not task.done()
    return task


def test_an_order_is_waited_for_and_every_worker_gets_it_once() -> None:
    async def script() -> None:
        post = Post()
        workers = [await soon(post.order(after=0)) for _ in range(2)]
        await post.give({"name": "a"})
        assert [await worker for worker in workers] == [(1, {"name": "a"})] * 2
        idle = await soon(post.order(after=1))
        await post.arrived(1, "10.0.0.2")
        assert await post.hosts() == {1: "10.0.0.2"}
        await post.close()
        assert await idle is None

    asyncio.run(script())


def test_after_an_epoch_the_workers_wait_to_hear_whether_to_go_on() -> None:
    async def script() -> None:
        post = Post()
        await post.give({})
        await post.tell(1, {"epoch": 1})
        assert await post.news() == {"epoch": 1}
        verdict = await soon(post.verdict(1, 1))
        await post.go_on(0)  # an answer to something earlier
        assert not verdict.done()
        await post.go_on(1)
        assert await verdict

    asyncio.run(script())


@pytest.mark.parametrize("how", ["the next trial", "the end"])
def test_a_trial_that_is_not_wanted_any_more_is_given_up(how: str) -> None:
    async def script() -> None:
        post = Post()
        await post.give({})
        verdict = await soon(post.verdict(1, 3))
        await (post.give({}) if how == "the next trial" else post.close())
        assert not await verdict

    asyncio.run(script())


def test_who_stops_a_crew_waits_until_workers_that_are_there_have_gone() -> None:
    async def script() -> None:
        idle = Post()
        await idle.stop()  # nobody has come yet
        post = Post()
        await post.arrived(0, "10.0.0.1")
        await post.give({})
        told = await soon(post.told_to_stop())
        stopping = await soon(post.stop())
        await told
        assert await post.order(after=0) is None
        assert not stopping.done()
        await post.gone()
        await stopping

    asyncio.run(script())


def test_what_a_trial_left_behind_is_not_taken_for_news_of_the_next() -> None:
    async def script() -> None:
        post = Post()
        await post.give({})
        await post.tell(1, {"epoch": 1})
        await post.give({})
        await post.tell(1, {"epoch": 2})
        await post.tell(2, {"epoch": 7})
        assert await post.news() == {"epoch": 7}

    asyncio.run(script())


class Script:
    """Hooks with a list of trials; kills a worker once, when its trial has come to an epoch."""

    def __init__(self, records: list[TrialRecord], *, kill: tuple[int, int]) -> None:
        self.records = records
        self.waiting = list(records)
        self.kill = kill
        self.outcomes: list[tuple[int, str]] = []
        self.notes: list[tuple[int, str]] = []
        self.workers: dict[int, list[int]] = {}
        self.messages: dict[int, str] = {}

    def next_trial(self) -> TrialRecord | None:
        return self.waiting.pop(0) if self.waiting else None

    def started(self, number: int) -> None: ...

    def begun(self, number: int, crew: str) -> None:
        # Each crew has one worker.
        (worker,) = actors("RayTrainWorker", of=os.getpid())
        self.workers.setdefault(number, []).append(worker)

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        self.records[number].history = metrics["history"]
        if (number, metrics["epoch"]) == self.kill:
            self.kill = (-1, -1)
            os.kill(self.workers[number][-1], signal.SIGKILL)

    def ended(self, number: int, *, pruned: bool) -> None:
        self.outcomes.append((number, "pruned" if pruned else "finished"))

    def failed(self, number: int, failure: str, message: str) -> None:
        self.outcomes.append((number, failure))
        self.messages[number] = message

    def lost(self, number: int, message: str) -> None:
        raise AssertionError(message)

    def noted(self, number: int, line: str) -> None:
        self.notes.append((number, line))

    def tick(self) -> None: ...


def spoilt_data(config: ExperimentConfig, folder: Path) -> Path:
    """Data with infinite features, which only the check before a study would refuse."""
    made = resolve_data(config.data, cache_dir=folder / "cache")
    copy = folder / "spoilt"
    shutil.copytree(made, copy)
    file = copy / "train_ims.npy"
    np.save(file, np.full_like(np.load(file), np.inf))
    return copy


def rsums(record: TrialRecord) -> list[tuple[float, float]]:
    return [(row["train/loss"], row["val/rsum"]) for row in record.history]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_stay_train_as_fresh_ones_do_and_are_replaced_when_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from orchestration.cluster import connection
    from orchestration.cluster.capacity import Resources
    from orchestration.runners import tuner

    base = TINY.with_overrides({"optim.epochs": 3, "loss.warmup_epochs": 0})
    configs = [
        base.with_overrides({"loss.margin": 0.1, "seed": 3}),
        base.with_overrides({"model.dim": 32}),
        base.with_overrides({"seed": 4}),  # its worker is killed
        base.with_overrides({"data.path": str(spoilt_data(base, tmp_path))}),  # it diverges
        base.with_overrides({"seed": 5}),
    ]
    records = [
        TrialRecord(number=number, name=f"t{number}", config=config.to_dict())
        for number, config in enumerate(configs)
    ]
    script = Script(records, kill=(2, 1))
    where = Settings(output=tmp_path, cache_dir=tmp_path / "cache", tracking_uri="")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    connection.connect(where)
    try:
        before = ray.available_resources()["CPU"]
        tuner.run_trials(
            script,
            num_trials=len(records),
            resources=Resources(workers=1, cpus=1, use_gpu=False, concurrent=1),
            settings=where,
            run_name="s",
            train_storage=str(tmp_path / "train"),
            tune_storage=str(tmp_path / "tune"),
            test=False,
            early_stopping=None,
            past=[],
        )
        groups = ray.util.placement_group_table().values()
        assert {group["state"] for group in groups} == {"REMOVED"}
        assert before == ray.cluster_resources()["CPU"]
    finally:
        connection.disconnect()
    expected = ["finished", "finished", "finished", "diverged", "finished"]
    assert script.outcomes == list(enumerate(expected))
    assert "the loss is nan at step 1 of epoch 1" in script.messages[3]
    assert records[3].history == []
    ((number, note),) = script.notes
    assert number == 2
    assert re.fullmatch(r"worker lost \(rank 0 on [\d.]+\), fenced; retry 1/3 from epoch 1\.", note)
    assert {row["train/workers"] for record in records for row in record.history} == {1}
    first, second, (third, again), failed, last = script.workers.values()
    assert first == second == [third]
    assert len({third, again, last[0]}) == 3
    assert failed == [again]  # and no second try

    # The second trial was trained where the first had been; here it is alone in a fresh process.
    (tmp_path / "second.toml").write_text(configs[1].to_toml())
    words = ["--config", "second.toml", "--name", "alone", "--output", "runs"]
    subprocess.run(
        [sys.executable, str(ROOT / "experiments/train.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"CPFEAN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    (alone,) = RunFolder(tmp_path / "runs" / "alone").records()
    assert rsums(alone) == rsums(records[1])
