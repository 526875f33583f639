"""A study's best model in MLflow: a logged model that `mlflow.pyfunc.load_model` scores with.

It is the folder of the model as it stands, the code of `cpfean` beside it, and a description: no
Python object is pickled. It is sent once, by whichever driver: the content's digest goes in with
its creation, so that one which was cut off is found again and finished.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import cpfean
from cpfean.fingerprints import listing

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGEST_TAG = "cpfean.sha256"


def log_model(client: MlflowClient, run_id: str, folder: Path) -> str:
    """Logs a model with its run, unless it has been; returns its address, models:/m-..."""
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model, ModelSignature

    from cpfean import pyfunc  # which imports torch

    digest = hashlib.sha256(listing(folder)).hexdigest()
    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    query = f"source_run_id = '{run_id}' AND tags.`{_DIGEST_TAG}` = '{digest}'"
    found = list(client.search_logged_models([experiment], query))
    if not found:
        tags = {_DIGEST_TAG: digest}
        made = client.create_logged_model(
            experiment, folder.name, run_id, tags, model_type="cpfean"
        )
        # MLflow sends a request again whose answer was lost, and then there are two.
        found = list(client.search_logged_models([experiment], query)) or [made]
    # The finished one first, if there is one.
    logged, *twins = sorted(found, key=lambda one: one.status != LoggedModelStatus.READY)
    for twin in twins:
        if twin.status != LoggedModelStatus.READY:
            client.delete_logged_model(twin.model_id)
    if logged.status != LoggedModelStatus.READY:
        id = logged.model_id
        description = Model(logged.artifact_location, run_id, model_uuid=id, model_id=id)
        with tempfile.TemporaryDirectory(prefix="cpfean-model-") as temporary:
            mlflow.pyfunc.save_model(
                temporary,
                loader_module=pyfunc.__name__,
                data_path=str(folder),
                code_paths=[str(Path(cpfean.__path__[0]))],
                mlflow_model=description,
                pip_requirements=pyfunc.requirements(folder),
                model_config=pyfunc.SETTINGS,
                signature=ModelSignature.from_dict(pyfunc.SIGNATURE),
                input_example=pyfunc.example(folder),
            )
            client.log_model_artifacts(id, temporary)
        outputs = run.outputs.model_outputs if run.outputs else []
        if id not in {output.model_id for output in outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(id, step=0)])
        client.finalize_logged_model(id, LoggedModelStatus.READY)
    return f"models:/{logged.model_id}"


def register(client: MlflowClient, run_id: str, model: str, name: str) -> str:
    """Makes a logged model a version of a registered one, unless it is one; returns its address."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    id = model.removeprefix("models:/")
    # By its place: an address would be looked up in whatever store is the process's default.
    place = client.get_logged_model(id).artifact_location

    def ours() -> list[int]:
        versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        return sorted(int(one.version) for one in versions if one.source == place)

    if not (found := ours()):
        client.create_model_version(name, place, run_id, await_creation_for=0, model_id=id)
        found = ours()
        for twin in found[1:]:  # as above
            client.delete_model_version(name, str(twin))
    return f"models:/{name}/{found[0]}"
