"""One trial, wherever it runs: from its newest checkpoint to its end, and to its test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cpfean.config import ExperimentConfig
from cpfean.storage.checkpoint_names import epoch_of
from cpfean.storage.checkpoints import CheckpointFolder
from orchestration.runners.messages import Epoch, Message, Order, Resumed

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint, TrainingState
    from cpfean.training.loop import EpochReport

_Value = TypeVar("_Value")


class Abandoned(Exception):  # noqa: N818  (nothing has gone wrong)
    """The trial is not wanted any more; raised in all its processes after the same epoch."""


class Team(Protocol):
    """The processes that train a trial together, as one of them sees them.

    Attributes:
        is_first: whether this is the one that looks, saves and tells for all.
    """

    is_first: bool

    def tell(self, message: Message) -> None:
        """Tells the driver; on the first process only."""

    def agree(self, value: _Value | None) -> _Value:
        """The first process's value, on all of them."""

    def is_wanted(self, epoch: int) -> bool:
        """Whether the trial goes on after that epoch; asked on the first process only; waits."""


def train(
    order: Order,
    team: Team,
    *,
    cache_dir: Path,
    device: Any,
    is_to_stop: Callable[[], bool],
    data_folder: Path | None = None,
) -> None:
    """Trains one trial to its end, and tests it if that is asked for.

    Args:
        cache_dir: on this node.
        is_to_stop: whether the processes will have to stop soon; they save before their next step.
        data_folder: the data, checked; None: what the configuration says, fetched if need be.

    Raises:
        Abandoned: nobody wants the trial any more.
        StoppedError: it was to stop, and has saved where it is.
        CpfeanError: what `fit` raises.
    """
    from cpfean.data.sources import resolve_data
    from cpfean.data.split import data_fingerprint
    from cpfean.training.checkpoint import check_same_run
    from cpfean.training.loop import fit
    from cpfean.training.setup import test_split_metrics

    config = ExperimentConfig.from_dict(order.config)
    data = data_folder or resolve_data(config.data, cache_dir=cache_dir)
    folder = CheckpointFolder(order.folder, attempt=order.attempt)
    folder.check_shared()

    def fits(state: TrainingState) -> None:
        check_same_run(state, config, data_fingerprint(data))

    # One looks for all: they must not go on from different epochs.
    newest = team.agree(folder.newest_valid(fits=fits) if team.is_first else None)
    if newest is not None:
        team.tell(Resumed(epoch=epoch_of(newest), checkpoint=folder.at(newest)))
    link = _Link(order, folder, team, is_to_stop)
    with nullcontext() if newest is None else folder.opened(newest) as checkpoint:
        result = fit(
            config,
            data_folder=data,
            cache_dir=cache_dir,
            reporter=link,
            resume_from=checkpoint,
            device=device,
            notice=link,
        )
    test = {}
    if order.test:
        newest = team.agree(folder.newest_valid() if team.is_first else None)
        with folder.opened(newest) as checkpoint:
            test = test_split_metrics(
                checkpoint, config, data_folder=data, cache_dir=cache_dir, device=device
            )
    elif newest is None or link.has_reported:
        return
    # Without a test it was at its end before, when its driver was lost.
    saved = folder.at(newest)
    team.tell(Epoch(history=result.history, checkpoint=saved, ended=True, test=test))


class _Link:
    """What ties a training to its team: epochs are saved and told of; word comes to go on or stop.

    Args:
        is_to_stop: whether the processes will have to stop soon.
    """

    def __init__(
        self, order: Order, folder: CheckpointFolder, team: Team, is_to_stop: Callable[[], bool]
    ) -> None:
        self.given = is_to_stop
        self.has_reported = False
        self._is_tested = order.test
        self._folder = folder
        self._team = team

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        self.has_reported = True
        is_last = report.stopped_early or report.epoch >= report.epochs
        is_wanted = None
        if checkpoint is not None:
            saved = self._folder.save(checkpoint)
            # A trial that is to be tested is at its end after that.
            ended = is_last and not self._is_tested
            self._team.tell(Epoch(history=report.history, checkpoint=saved, ended=ended))
            if not is_last:
                is_wanted = self._team.is_wanted(report.epoch)
        if not is_last and not self._team.agree(is_wanted):
            raise Abandoned

    def save(self, checkpoint: Checkpoint | None) -> None:
        # However late it is: what is not whole by then is passed over.
        if checkpoint is not None:
            self._folder.save(checkpoint)
