"""What came out of a study whose trials are settled: the best one, its test, files and lines."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpfean.errors import ServiceError, message_of
from cpfean.records.budget import Meter
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from cpfean.storage.checkpoints import CheckpointFolder
from cpfean.writing import write_json, write_text
from orchestration.runners.protocol import Driver
from orchestration.study.follower import Follower
from orchestration.study.plan import resume_line, with_more


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """What came out.

    Attributes:
        best: the finished trial with the highest rSum on dev; a stopped one only if none finished.
        test: its metrics on the test split.
        used_up: the limit that kept trials from being begun, and how to go on; empty if none did.
        failed: how many trials failed with what, and how to run them again; empty if none did.
        spent: hours, and dollars where prices are known, of all attempts; for people.
        has_report: whether the plan's report was written.
    """

    folder: Path
    records: tuple[TrialRecord, ...]
    best: TrialRecord | None = None
    test: Mapping[str, float] = field(default_factory=dict)
    used_up: str = ""
    failed: str = ""
    spent: str = ""
    has_report: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 4 if trials failed."""
        return 4 if any(record.state == "failed" for record in self.records) else 0


def best_of(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The finished trial with the highest rSum on dev; a stopped one only if none finished."""
    ranked = [record for record in records if math.isfinite(record.best_rsum)]
    finished = [record for record in ranked if record.state == "finished"]
    pruned = [record for record in ranked if record.state == "pruned"]
    return max(finished or pruned, key=lambda record: record.best_rsum, default=None)


def conclude(study: Driver, follower: Follower, meter: Meter) -> StudyResult:
    """The result of a study whose trials are settled: best trial, its test, reports and summary.

    Args:
        follower: gets what the best trial comes to on the test split, and files.
    """
    plan, folder, records = study.plan, study.folder, tuple(study.records)
    best = best_of(records)
    if best is not None:
        write_text(folder.path / "best_config.toml", best.experiment.to_toml())
        if plan.of_kind.tested == "best":
            _test(best, study)
            follower.update(best)
            pictures = _pictures(best, study) if plan.of_kind.has_pictures else []
            follower.keep_files([*pictures, folder.path / "best_model"], best)
        elif plan.tests_all:
            # The checkpoint of a run that was known already may be on another machine.
            with suppress(ServiceError):
                model = keep_model(best, folder.path / "best_model")
                if plan.register:
                    follower.keep_files([model], best)
    if plan.register and not (folder.path / "best_model").is_dir():
        study.say(f"{plan.register} is not registered: there is no best_model on this machine.")
    has_report = plan.report is not None
    if plan.report is not None:
        try:
            follower.keep_files(plan.report(records))
        # As with the pictures: a later resume writes it.
        except Exception as error:
            has_report = False
            study.say(f"no report: {message_of(error)}")
    failures = Counter(record.failure for record in records if record.state == "failed")
    failed = ", ".join(f"{count} {failure}" for failure, count in failures.items())
    used_up, more = meter.used_up, with_more(plan, meter)
    result = StudyResult(
        folder=folder.path,
        records=records,
        best=best,
        test={} if best is None else best.test,
        used_up=used_up and f"{used_up}; to go on with twice as much:\n{more}",
        failed=failed
        and f"{failed}; to run them once more:\n{resume_line(plan, retry_failed=True)}",
        spent=meter.spent,
        has_report=has_report,
    )
    write_json(folder.path / "summary.json", summary(result))
    return result


def _test(best: TrialRecord, study: Driver) -> None:
    """Shows the best trial the test split, unless that has been done, and keeps its model."""
    from cpfean.training.setup import default_device, test_split_metrics

    if best.test:
        return
    study.say(f"testing {best.name} ...")
    best.test = test_split_metrics(
        keep_model(best, study.folder.path / "best_model"),
        best.experiment,
        data_folder=study.plan.data_folder,
        cache_dir=study.settings.cache_dir,
        device=default_device(),
    )
    study.folder.write(best)


def _pictures(best: TrialRecord, study: Driver) -> list[Path]:
    """Pictures of what the best model sees, of which a study can do without."""
    from cpfean.analysis.pictures.queries import draw_study_pictures

    try:
        return draw_study_pictures(
            study.folder.path / "best_model",
            best.experiment,
            data_folder=study.plan.data_folder,
            cache_dir=study.settings.cache_dir,
            output=study.folder.path / "pictures" / best.name,
        )
    # Whatever is wrong with drawing, the result is there and has been tested.
    except Exception as error:
        study.say(f"no pictures of {best.name}: {message_of(error)}")
        return []


def outcome_metrics(records: Sequence[TrialRecord]) -> dict[str, float]:
    """What settled trials have come to, for the tracker: the tested one, else the best one."""
    best = next((record for record in records if record.test), None) or best_of(records)
    if best is None:
        return {}
    tested = {f"test/{name}": value for name, value in best.test.items()}
    return {"best/val_rsum": best.best_rsum} | tested


def keep_model(record: TrialRecord, folder: Path) -> Path:
    """Copies the best weights out of a trial's checkpoint, wherever it is stored.

    The folder is one for `Cpfean.from_pretrained`; `config.toml` beside the weights is the whole
    experiment.

    Raises:
        ServiceError: the checkpoint cannot be read.
    """
    uri, _, name = record.checkpoint.rpartition("/")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with CheckpointFolder(uri).opened(name) as source:
            shutil.copytree(source / "best", temporary)
    except OSError as error:
        raise ServiceError(f"{record.checkpoint}: cannot be read: {error}") from None
    write_text(temporary / "config.toml", record.experiment.to_toml())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def summary(result: StudyResult) -> dict[str, Any]:
    """The outcome as plain data, for programs."""
    rows = []
    for record in result.records:
        row = asdict(record)
        del row["config"], row["history"]
        best = {"best_rsum": record.best_rsum} if record.history else {}
        rows.append(row | {"epochs": record.epochs} | best)
    return {
        "best": result.best.number if result.best else None,
        "test": dict(result.test),
        "commit": RunFolder(result.folder).commit,
        "used_up": result.used_up,
        "trials": rows,
    }
