"""Trials in this very process, one after another: no Ray, but the same records and tracking."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cpfean.errors import CpfeanError, StoppedError
from cpfean.records.budget import OTHER
from cpfean.records.trial_record import TrialRecord
from cpfean.storage.checkpoints import CheckpointFolder
from orchestration.runners.messages import Begun, Ended, Failed, Message, Order
from orchestration.runners.protocol import Driver, Runner
from orchestration.runners.training import Abandoned, train
from orchestration.study.failures import known_failure
from orchestration.study.plan import StudyPlan
from orchestration.study.stopping import Interrupted, Stop


class InProcess(Runner):
    """A runner without Ray.

    Of several trials, one that fails is recorded and the next one follows; of a single one the
    error is the study's.
    """

    meet_seconds = 5.0
    needs_mlflow = False

    def check(self, plan: StudyPlan) -> None:
        plan.budget.check_prices(self.node_types())

    def run(self, study: Driver) -> None:
        study.expect(is_local=True)
        while (record := study.next_trial()) is not None:
            study.started(record.number)
            study.tell(record.number, Begun())
            try:
                _train(study, record)
            except (Interrupted, KeyboardInterrupt):
                raise
            # The record has to tell of any failure, whoever raises what.
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                failure, message = known_failure([error]) or ("bug", what)
                study.tell(record.number, Failed(failure=failure, message=message))
                if study.plan.trials == 1 or not isinstance(error, CpfeanError):
                    raise
        study.stop.check()

    def node_types(self) -> Sequence[str]:
        return [OTHER]


def _train(study: Driver, record: TrialRecord) -> None:
    from cpfean.training.setup import default_device

    order = Order(
        config=record.config,
        folder=study.checkpoints_of(record.number),
        attempt=0,
        test=study.plan.tests_all,
    )
    CheckpointFolder(order.folder).create()
    try:
        with _interruptible(study.stop):
            train(
                order,
                _Alone(study, record.number),
                data_folder=study.plan.data_folder,
                cache_dir=study.settings.cache_dir,
                device=default_device(),
                is_to_stop=lambda: study.stop.signal != 0,
            )
        study.stop.check()  # a signal may have come after the last step of all
        study.tell(record.number, Ended(pruned=False))
    except Abandoned:
        study.tell(record.number, Ended(pruned=True))
    except StoppedError:
        study.stop.check()
        raise


@contextmanager
def _interruptible(stop: Stop) -> Iterator[None]:
    """Lets a signal wait, for some seconds, until the training has saved before its next step."""
    has_ended = threading.Event()

    def end(_number: int, _frame: object) -> None:
        raise Interrupted(stop.signal)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, end)
    try:
        with stop.at_work(has_ended.wait):
            yield
    finally:
        has_ended.set()


class _Alone:
    """A team of this process."""

    is_first = True

    def __init__(self, study: Driver, number: int) -> None:
        self._study = study
        self._number = number

    def tell(self, message: Message) -> None:
        self._study.tell(self._number, message)

    def agree(self, value: Any) -> Any:
        return value

    def is_wanted(self, epoch: int) -> bool:
        return True
