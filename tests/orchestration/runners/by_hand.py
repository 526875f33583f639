"""A study for tests of Ray's side: its trials are given, and what is told of them is kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cpfean.config import ExperimentConfig
from cpfean.records.trial_record import TrialRecord
from orchestration.cluster.capacity import Resources
from orchestration.runners.messages import Begun, Ended, Epoch, Failed, Lost, Message, Note
from orchestration.runners.tune import run_trials
from orchestration.runners.worker_pool import PoolOptions
from orchestration.study.stopping import Stop


class ByHand:
    """Runs one trial of each configuration."""

    def __init__(self, folder: Path, configs: list[ExperimentConfig], *, name: str = "s") -> None:
        self.records = [
            TrialRecord(number=number, name=f"t{number}", config=config.to_dict())
            for number, config in enumerate(configs)
        ]
        self.outcomes: list[tuple[int, str]] = []
        self.notes: dict[int, list[str]] = {record.number: [] for record in self.records}
        self.messages: dict[int, str] = {}
        self.folder = SimpleNamespace(path=folder)
        self.plan = SimpleNamespace(grace=0, tests_all=False)
        self.stop = Stop(print)
        self._waiting = list(self.records)
        self._name = name

    @property
    def num_open(self) -> int:
        return len(self.records)

    def checkpoints_of(self, number: int) -> str:
        return f"{self.folder.path}/train/{self._name}-{number:03d}"

    def next_trial(self) -> TrialRecord | None:
        return self._waiting.pop(0) if self._waiting else None

    def started(self, number: int) -> None: ...

    def tick(self) -> None: ...

    def tell(self, number: int, message: Message) -> None:
        match message:
            case Begun(workers=workers):
                self.begun(number, workers)
            case Epoch(history=history):
                self.records[number].history = list(history)
                self.after_epoch(number, int(history[-1]["epoch"]))
            case Note(line=line):
                self.notes[number].append(line)
            case Failed(failure=failure, message=text):
                self.outcomes.append((number, failure))
                self.messages[number] = text
            case Lost(message=text):
                raise AssertionError(text)
            case Ended(pruned=pruned):
                self.outcomes.append((number, "pruned" if pruned else "finished"))

    def begun(self, number: int, workers: int) -> None:
        """Called when a trial's workers are there."""

    def after_epoch(self, number: int, epoch: int) -> None:
        """Called when a trial has come to the end of an epoch."""

    def run(
        self, *, cache_dir: Path, is_local: bool = True, silence: int = 600, **resources: Any
    ) -> None:
        asked = {"workers": 1, "min_workers": 1, "cpus": 1, "use_gpu": False, "concurrent": 1}
        options = PoolOptions(
            resources=Resources(**asked | resources),
            cache_dir=str(cache_dir),
            storage=f"{self.folder.path}/train",
            is_local=is_local,
            silence=silence,
        )
        run_trials(self, options)  # type: ignore[arg-type]
