"""A sweep's best model: logged and registered at its end, and loaded by whoever has MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from mlflow import MlflowClient

from cpfean.data.sources import resolve_data
from cpfean.data.split import data_fingerprint
from cpfean.model.cpfean import Cpfean
from cpfean.training.setup import open_checkpoint
from orchestration.settings import Settings
from orchestration.study.plan import StudyPlan
from orchestration.tracking.stores import open_store
from tests.orchestration.runners.test_in_process import plan_of
from tests.orchestration.samples import TINY, run_here
from tests.orchestration.study.scripted import SPACE

# Of a process that has the packages and no checkout: the code is the model's own.
PROGRAM = """
import json, sys
import pandas
sys.path[:] = [place for place in sys.path if place not in ("", sys.argv[3])]
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/tiny/1", model_config=json.loads(sys.argv[4]))
rows = pandas.read_json(sys.argv[2], orient="records")
answers = model.predict(rows)
best = model.predict(rows[["caption"]].drop_duplicates(), params={"k": 3})
assert len(model.predict(model.input_example, params={"k": 1})) == 1
import cpfean
print(json.dumps([answers["score"].tolist(), best.to_dict("list"), cpfean.__file__]))
"""


def sweep(where: Settings, **more: str) -> StudyPlan:
    folder = resolve_data(TINY.data, cache_dir=where.cache_dir)
    return StudyPlan(
        kind="sweep",
        name="swept",
        base=TINY.with_overrides({"optim.epochs": 1}),
        trials=2,
        workers=1,
        space=SPACE,
        data_folder=folder,
        data_fingerprint=data_fingerprint(folder),
        **more,
    )


def plain_scores(model: Path, where: Settings, data: Path) -> pandas.DataFrame:
    """Of `Cpfean.score`: images of the test split by captions."""
    opened = open_checkpoint(
        model,
        data_folder=data,
        split="test",
        cache_dir=where.cache_dir,
        device=torch.device("cpu"),
        num_regions=TINY.data.num_regions,
    )
    dataset, read = opened.dataset, Cpfean.from_pretrained(model)
    with torch.inference_mode():
        images = read.encode_images(**dataset.image_batch(range(10))._asdict())
        captions = read.encode_captions(**dataset.caption_batch(range(50))._asdict())
        scores = read.score(images, captions).numpy()
    split = dataset.split
    return pandas.DataFrame(scores, index=split.image_ids, columns=split.captions)


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_s_best_model_is_registered_and_gives_the_scores_of_the_plain_model(
    where: Settings, tmp_path: Path
) -> None:
    plan = sweep(where, register="tiny")
    said: list[str] = []
    result = run_here(plan, where, resume=False, say=said.append)
    assert "best_model is registered in MLflow: models:/tiny/1" in said
    assert result.best is not None
    client, experiment = open_store(where.tracking_uri)
    (logged,) = client.search_logged_models([experiment])
    run = client.get_run(logged.source_run_id)
    assert run.data.tags["cpfean.trial"] == str(result.best.number)
    assert run.data.metrics["test/rsum"] == result.test["rsum"]

    again: list[str] = []
    run_here(plan, where, resume=True, say=again.append)
    assert not [line for line in again if "MLflow" in line or line.startswith("tracking")]
    assert len(client.search_logged_models([experiment])) == 1
    assert len(client.search_model_versions("name = 'tiny'")) == 1

    plain = plain_scores(result.folder / "best_model", where, plan.data_folder)
    plain = plain.loc[:, ~plain.columns.duplicated()]
    pairs = plain.stack().reset_index()
    pairs.columns = ["image_id", "caption", "score"]
    asked = pairs[["caption", "image_id"]]
    asked.to_json(tmp_path / "rows.json", orient="records")
    root = str(Path(__file__).resolve().parents[3])
    settings = json.dumps({"data": str(plan.data_folder)})
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM),
            *(where.tracking_uri, str(tmp_path / "rows.json"), root, settings),
        ],
        cwd=tmp_path,
        env=environment | {"CPFEAN_CACHE": str(tmp_path / "other-cache")},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    scores, best, code = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor(pairs["score"].tolist()), atol=2e-6, rtol=0
    )
    for i, caption in enumerate(dict.fromkeys(asked["caption"])):
        assert best["caption"][3 * i : 3 * i + 3] == [caption] * 3
        expected = plain[caption].nlargest(3).tolist()
        torch.testing.assert_close(
            torch.tensor(best["score"][3 * i : 3 * i + 3]),
            torch.tensor(expected),
            atol=2e-6,
            rtol=0,
        )
    assert Path(code).parts[-3:-1] == ("code", "cpfean")


def test_a_training_s_model_is_logged_and_registered_by_a_later_resume(where: Settings) -> None:
    plan = plan_of(TINY.with_overrides({"optim.epochs": 1}), where, "alone")
    said: list[str] = []
    run_here(plan, where, resume=False, say=said.append)
    client, experiment = open_store(where.tracking_uri)
    (logged,) = client.search_logged_models([experiment])
    assert f"best_model is logged in MLflow: models:/{logged.model_id}" in said
    assert client.search_registered_models() == []
    run_here(replace(plan, register="alone"), where, resume=True, say=said.append)
    assert said[-1] == "best_model is registered in MLflow: models:/alone/1"
    (version,) = MlflowClient(where.tracking_uri).search_model_versions("name = 'alone'")
    assert version.source == logged.artifact_location
