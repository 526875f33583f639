"""Small records and configurations."""

from collections.abc import Callable

from cpfean.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    RegionConfig,
    SyntheticConfig,
    TextConfig,
)
from cpfean.records.trial_record import TrialRecord
from orchestration.runners.in_process import InProcess
from orchestration.settings import Settings
from orchestration.study.conclusion import StudyResult
from orchestration.study.plan import StudyPlan
from orchestration.study.study import run_study

TINY = ExperimentConfig(
    data=DataConfig(
        num_regions=8,
        synthetic=SyntheticConfig(
            train_images=16, dev_images=10, test_images=10, num_regions=8, feature_dim=8
        ),
    ),
    model=ModelConfig(
        dim=16,
        text=TextConfig(scratch_dim=16, scratch_vocabulary=300),
        regions=RegionConfig(heads=2),
    ),
    optim=OptimConfig(epochs=2, batch_size=40),
)


def history(*rsums: float) -> list[dict[str, float]]:
    """What epochs with these rSums report."""
    return [
        {"epoch": epoch, "train/loss": 1.0 / epoch, "train/seconds": 1.0, "val/rsum": rsum}
        for epoch, rsum in enumerate(rsums, start=1)
    ]


def record(number: int, *rsums: float, **fields) -> TrialRecord:
    given = {"name": f"trial-{number:03d}", "config": TINY.to_dict()} | fields
    return TrialRecord(number=number, history=history(*rsums), **given)


def run_here(
    plan: StudyPlan, where: Settings, *, resume: bool, say: Callable[[str], None]
) -> StudyResult:
    """Runs a study in this process."""
    return run_study(plan, where, runner=InProcess(), resume=resume, say=say)
