"""A best model in MLflow: there once, whole, without a pickle, under the name that was asked."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException

from cpfean.fingerprints import listing
from cpfean.records.trial_record import TrialRecord
from orchestration.study.follower import Pauses
from tests.orchestration.samples import record
from tests.orchestration.tracking.tracked import (
    SWEEP,
    Tracked,
    files_of,
    points,
    runs,
)

NAMED = replace(SWEEP, register="my-model")
RARE = Pauses(retry=60.0, refused=60.0)
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".cloudpickle")


def write_model(folder: Path) -> Path:
    """A folder that has the files of a model; nobody loads it."""
    (folder / "tokenizer").mkdir(parents=True)
    described = {"format": 1, "inputs": {"label_names": ["cat", "tree", "sky"]}}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "config.toml").write_text("seed = 0\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "best_model")


@pytest.fixture
def best() -> TrialRecord:
    return record(0, 10.0, 20.0, state="finished")


def send(
    uri: str,
    best: TrialRecord,
    model: Path,
    *,
    run: Any = NAMED,
    client: type[MlflowClient] | None = None,
) -> tuple[bool, list[str]]:
    """Whether a driver that ends has sent all, and what it said."""
    study = Tracked(uri, run, pauses=RARE, client=client)
    study.update(best)
    study.follower.keep_files([model], best)
    return study.end(), study.said


def logged(uri: str) -> list[LoggedModel]:
    (run,) = runs(uri, role="trial")
    return list(MlflowClient(uri).search_logged_models([run.info.experiment_id]))


def versions(uri: str, name: str) -> list[tuple[str, str]]:
    """Version and place of each, the oldest first."""
    found = MlflowClient(uri).search_model_versions(f"name = '{name}'")
    return sorted((str(one.version), one.source) for one in found)


def folder_of(one: LoggedModel) -> Path:
    return Path(unquote(urlsplit(one.artifact_location).path))


def files_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_model_is_logged_with_its_trial_and_registered_once_by_however_many_drivers(
    uri: str, best: TrialRecord, model: Path
) -> None:
    done, said = send(uri, best, model)
    assert done
    (run,) = runs(uri, role="trial")
    (one,) = logged(uri)
    assert one.status == LoggedModelStatus.READY
    assert one.source_run_id == run.info.run_id
    assert [output.model_id for output in run.outputs.model_outputs] == [one.model_id]
    assert said == [
        f"best_model is logged in MLflow: models:/{one.model_id}",
        "best_model is registered in MLflow: models:/my-model/1",
    ]
    assert versions(uri, "my-model") == [("1", one.artifact_location)]
    assert files_of(uri, run) == {"config.toml"}
    for _ in range(2):
        assert send(uri, best, model) == (True, [])
    assert [again.model_id for again in logged(uri)] == [one.model_id]
    assert len(versions(uri, "my-model")) == 1


def test_what_is_logged_is_the_folder_as_it_is_and_no_pickle(
    uri: str, best: TrialRecord, model: Path
) -> None:
    send(uri, best, model)
    (one,) = logged(uri)
    files = files_in(folder_of(one))
    for name, content in files_in(model).items():
        assert files[f"data/best_model/{name}"] == content
    for name, content in files.items():
        assert not name.endswith(PICKLES), name
        assert content[:2] not in {bytes([0x80, version]) for version in range(6)}, name
        assert content[:4] != b"PK\x03\x04", name  # what torch.save writes
    description = yaml.safe_load(files["MLmodel"])
    assert set(description["flavors"]) == {"python_function"}
    flavour = description["flavors"]["python_function"]
    assert flavour["loader_module"] == "cpfean.pyfunc"
    assert not [key for key in flavour if "pickle" in key or key == "python_model"]
    assert "code/cpfean/pyfunc.py" in files
    assert not [name for name in files if "__pycache__" in name]
    assert {json.loads(description["signature"]["inputs"])[0]["name"]} == {"caption"}
    assert json.loads(files["input_example.json"])["data"] == [["a cat and a tree"]]
    requirements = files["requirements.txt"].decode().split()
    assert all("==" in line and "+" not in line for line in requirements)
    assert description["model_id"] == one.model_id


def test_a_resume_registers_what_was_only_logged_and_another_name_is_another_model(
    uri: str, best: TrialRecord, model: Path
) -> None:
    done, said = send(uri, best, model, run=SWEEP)
    (one,) = logged(uri)
    assert (done, said) == (True, [f"best_model is logged in MLflow: models:/{one.model_id}"])
    assert MlflowClient(uri).search_registered_models() == []
    for name in ("my-model", "their-model"):
        done, said = send(uri, best, model, run=replace(SWEEP, register=name))
        assert (done, said) == (True, [f"best_model is registered in MLflow: models:/{name}/1"])
        assert versions(uri, name) == [("1", one.artifact_location)]
    assert len(logged(uri)) == 1


def test_another_best_model_is_a_further_version(uri: str, best: TrialRecord, model: Path) -> None:
    send(uri, best, model)
    before = listing(model)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert listing(model) != before
    done, said = send(uri, best, model)
    assert done
    assert said[-1] == "best_model is registered in MLflow: models:/my-model/2"
    assert len(logged(uri)) == 2
    assert len(versions(uri, "my-model")) == 2


def client_that(**calls: Callable[[], None]) -> type[MlflowClient]:
    """A client that calls a function before it does what has that name."""
    members = {}
    for name, before in calls.items():

        def method(
            self: MlflowClient,
            *words: Any,
            name: str = name,
            before: Callable[[], None] = before,
            **more: Any,
        ) -> Any:
            before()
            return getattr(MlflowClient, name)(self, *words, **more)

        members[name] = method
    return type("Client", (MlflowClient,), members)


def broken() -> None:
    raise OSError("the connection broke off")


@pytest.mark.parametrize(
    "at", ["log_model_artifacts", "log_outputs", "finalize_logged_model", "create_model_version"]
)
def test_what_was_cut_off_is_told_and_finished_by_the_next_driver(
    uri: str, best: TrialRecord, model: Path, at: str
) -> None:
    done, said = send(uri, best, model, client=client_that(**{at: broken}))
    assert not done
    assert [line for line in said if "does not take best_model" in line and "broke off" in line]
    assert said[-1].startswith("tracking: 1 file(s) (best_model")
    (begun,) = logged(uri)
    (run,) = runs(uri, role="trial")
    assert points(uri, run) == [(1, 10.0), (2, 20.0)]  # numbers do not wait for it
    assert run.info.status == "FINISHED"
    done, said = send(uri, best, model)
    assert done
    (one,) = logged(uri)
    assert (one.model_id, one.status) == (begun.model_id, LoggedModelStatus.READY)
    assert len(versions(uri, "my-model")) == 1


def test_an_answer_that_was_lost_makes_no_second_one(
    uri: str, best: TrialRecord, model: Path
) -> None:
    send(uri, best, model)
    (run,) = runs(uri, role="trial")
    # As if the driver had been killed before it noted what had arrived.
    for name in ("best_model", "best_model as my-model"):
        MlflowClient(uri).delete_tag(run.info.run_id, f"cpfean.file.{name}")
    done, _ = send(uri, best, model)
    assert done
    assert len(logged(uri)) == 1
    assert len(versions(uri, "my-model")) == 1


def test_a_registry_that_refuses_holds_up_neither_numbers_nor_the_model(
    uri: str, best: TrialRecord, model: Path
) -> None:
    def refuses() -> None:
        raise MlflowException("You may not register models.", error_code=7)

    done, said = send(uri, best, model, client=client_that(create_registered_model=refuses))
    assert not done
    assert [line for line in said if "does not take best_model as my-model" in line]
    (one,) = logged(uri)
    assert one.status == LoggedModelStatus.READY
    (parent,) = runs(uri, role="parent")
    assert parent.info.status == "FINISHED"


def test_a_model_that_is_not_on_this_machine_is_left_out(
    uri: str, best: TrialRecord, tmp_path: Path
) -> None:
    assert send(uri, best, tmp_path / "best_model") == (True, [])
    assert logged(uri) == []
