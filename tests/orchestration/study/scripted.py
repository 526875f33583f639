"""A study that a test drives by hand, with a runner that does what the test says."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpfean.config import ExperimentConfig
from cpfean.errors import ServiceError
from cpfean.records.budget import OTHER, Budget
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from orchestration.proposals.search_space import Range, SearchSpace
from orchestration.runners.messages import Ended, Epoch, Failed
from orchestration.settings import Settings
from orchestration.study.plan import StudyPlan, TrialPlan
from orchestration.study.stopping import Deadlines, Stop
from orchestration.study.study import Study
from tests.orchestration.samples import TINY, history

SPACE = SearchSpace(name="s", question="?", parameters={"loss.margin": Range(0.1, 0.4)})


class Tracker:
    """Takes everything, like a tracker that is away; keeps what it is told of the whole."""

    first = ""

    def __init__(self) -> None:
        self.parent: list[tuple[str, dict[str, float], dict[str, str]]] = []
        self.files: list[tuple[list[Path], TrialRecord | None]] = []

    def start(self) -> None: ...

    def meet(self, *, seconds: float) -> None: ...

    def update(self, record: TrialRecord) -> None: ...

    def update_study(
        self, state: str, metrics: dict[str, float], tags: dict[str, str] | None = None
    ) -> None:
        self.parent.append((state, metrics, tags or {}))

    def keep_files(self, files: list[Path], record: TrialRecord | None = None) -> None:
        self.files.append((files, record))

    def close(self, *, seconds: float = 60.0) -> bool:
        return True


class Runner:
    """Does with the trials what a test says."""

    meet_seconds = 0.0
    needs_mlflow = True

    def __init__(self, script: Callable[[Any], None] = lambda study: None) -> None:
        self.script = script
        self.types: Sequence[str] = (OTHER,)
        self.there: Any = None
        self.lost: ServiceError | None = None

    def check(self, plan: StudyPlan) -> None: ...

    def wait_for_start(self) -> None: ...

    def run(self, study: Any) -> None:
        study.expect(is_local=True)
        self.script(study)
        study.stop.check()

    def node_types(self) -> Sequence[str]:
        return self.types

    def demand(self) -> Any:
        return self.there

    def gone(self, plan: StudyPlan) -> ServiceError | None:
        return self.lost


class Clock:
    """Seconds that go by as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Driven(Study):
    """A study in the folder `s`, and what it says."""

    def __init__(
        self,
        tmp_path: Path,
        script: Callable[[Any], None] = lambda study: None,
        *,
        kind: str = "ablations",
        trials: int = 4,
        fixed: bool = False,
        deadlines: Deadlines = Deadlines(),  # noqa: B008
        address: str | None = None,
        prepare: bool = True,
        **plan: Any,
    ) -> None:
        self.said: list[str] = []
        self.codes: list[int] = []
        self.tracker = Tracker()
        self.runner = Runner(script)
        self.clock = Clock()
        self.data = tmp_path
        asked = StudyPlan(
            kind=kind,
            name="s",
            base=TINY,
            data_folder=tmp_path,
            data_fingerprint="0",
            trials=trials,
            fixed=tuple(trial(f"t{number}", number) for number in range(trials)) if fixed else (),
            **{"workers": 1, "budget": Budget(), "space": None if fixed else SPACE} | plan,
        )
        folder = RunFolder(tmp_path / "s")
        if not folder.identity_file.exists():
            folder.create(asked.identity(), commit="at the start")
        tracker: Any = self.tracker
        super().__init__(
            asked,
            Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="", address=address),
            folder,
            self.runner,
            tracker,
            stop=Stop(self.said.append, deadlines=deadlines, end_process=self.codes.append),
            say=self.said.append,
            clock=self.clock,
        )
        if prepare:
            self.prepare()

    def begin(self) -> int:
        """Begins the next trial; returns its number."""
        record = self.next_trial()
        assert record is not None
        self.started(record.number)
        return record.number

    def report(self, number: int, *rsums: float, ended: bool = False) -> None:
        """Tells of epochs with these rSums."""
        told = tuple(history(*rsums))
        self.tell(number, Epoch(history=told, checkpoint="", ended=ended))

    def end(self, number: int, *, pruned: bool = False) -> None:
        self.tell(number, Ended(pruned=pruned))

    def finish(self, number: int, *rsums: float) -> None:
        """Brings a trial to its end."""
        self.report(number, *(rsums or (10.0, 20.0)), ended=True)
        self.end(number)

    def fail(self, number: int, failure: str, message: str) -> None:
        self.tell(number, Failed(failure=failure, message=message))


def trial(name: str, seed: int) -> TrialPlan:
    config: ExperimentConfig = TINY.with_overrides({"seed": seed})
    return TrialPlan(name=name, overrides={"seed": seed}, config=config)


def on_disk(tmp_path: Path) -> list[TrialRecord]:
    """The records of the study."""
    return RunFolder(tmp_path / "s").records()
