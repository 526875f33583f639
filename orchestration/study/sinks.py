"""What follows the records of a study: the copy on the storage, and MLflow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from cpfean.records.run_folder import RunFolder
from orchestration.settings import Settings
from orchestration.study.follower import Follower, Sink
from orchestration.study.plan import StudyPlan
from orchestration.study.records_copy import RecordsCopy
from orchestration.tracking.mlflow_sink import MlflowSink
from orchestration.tracking.runs import TrackedRun


def follower_of(
    plan: StudyPlan,
    settings: Settings,
    folder: RunFolder,
    *,
    say: Callable[[str], None],
    copy: RecordsCopy | None = None,
    needs_mlflow: bool = True,
) -> Follower:
    """The follower of a study, which is to be started.

    Args:
        say: shows the user a line.
        copy: of the records, if there is one, which has been checked.
        needs_mlflow: False to do without where it is not installed: the records alone tell, which
            is enough for a report.
    """
    # The copy first: MLflow can be filled from the records.
    sinks: list[Sink] = [] if copy is None else [copy]
    if needs_mlflow or importlib.util.find_spec("mlflow") is not None:
        sinks.append(MlflowSink(settings.tracking_uri, tracked_run(plan, folder), say=say))
    else:
        say("MLflow is not installed: nothing is tracked, records and results are kept.")
    return Follower(sinks, say=say)


def tracked_run(plan: StudyPlan, folder: RunFolder) -> TrackedRun:
    """How MLflow knows a study."""
    parameters = {
        "study.trials": plan.trials,
        "study.workers": plan.workers,
        "study.space": plan.space.name if plan.space else "",
    }
    return TrackedRun(
        id=folder.id,
        name=plan.name,
        kind=plan.kind,
        tags={
            "cpfean.data": plan.data_fingerprint,
            "cpfean.data_path": plan.base.data.path,
            **plan.tags,
        },
        parameters=parameters | plan.base.flat(),
        has_parent=plan.of_kind.has_parent,
    )
