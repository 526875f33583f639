"""What each Ray Train worker runs: one share of one training after another.

Ray has initialised torch.distributed before it calls us; `fit` finds it and makes one batch of all
workers' shares. A worker lives as long as its crew (`orchestration.runners.worker_pool`):
processes, imports and the process group are there for the next trial. Nothing else is: data, model
and optimizer are made anew, and all that is drawn depends on the configuration's seed, so a trial
comes to the same numbers whichever trials its workers have trained before.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.config import ExperimentConfig
from orchestration.storage.checkpoint_names import epoch_of
from orchestration.storage.checkpoints import CheckpointFolder
from orchestration.study.records import METRIC

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint, TrainingState
    from cpfean.training.loop import EpochReport


def metrics_of(report: EpochReport) -> dict[str, Any]:
    """What a driver is told of an epoch.

    The numbers of all epochs so far, so that a driver that was away misses nothing, and whether the
    training has come to its own end.
    """
    ended = report.stopped_early or report.epoch >= report.epochs
    return _told(report.history, ended=ended)


def _told(history: tuple[dict[str, float], ...], *, ended: bool) -> dict[str, Any]:
    # On top only what a scheduler looks at: Tune keeps statistics of every number there.
    judged = {name: history[-1][name] for name in ("epoch", METRIC)}
    return judged | {"history": [dict(row) for row in history], "ended": ended}


def work(job: dict[str, Any]) -> None:
    """Trains what the crew's post hands out, until it closes; called by Ray Train in every worker.

    Args:
        job: "post" of the crew, "cache_dir" on this node, "cpus" for this worker, and whether all
            is on one machine that nobody takes away ("is_local").
    """
    import ray
    import torch
    from ray.train import get_context

    from cpfean.errors import StoppedError
    from cpfean.processes import partners_watched

    torch.set_num_threads(job["cpus"])
    host = ray.util.get_node_ip_address()
    job["post"].arrived.remote(get_context().get_world_rank(), host)
    told_to_stop = threading.Event()
    threading.Thread(target=_listen, args=(job["post"], told_to_stop), daemon=True).start()
    number = 0
    while (order := ray.get(job["post"].order.remote(after=number))) is not None:
        number, trial = order
        reporter = RayReporter(job["post"], number, trial)
        notice = _Notice(reporter.folder, told_to_stop, hosts_may_go=not job["is_local"])
        try:
            with suppress(_Abandoned), partners_watched(where=host), warnings_noted(reporter):
                _train(trial, reporter, notice=notice, cache_dir=Path(job["cache_dir"]))
        except StoppedError:
            # Another worker may have heard of it first; if nobody does, a host is taken away.
            if not told_to_stop.wait(1.0):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if get_context().get_world_rank() == 0:
        ray.get(job["post"].gone.remote())


def _listen(post: Any, told_to_stop: threading.Event) -> None:
    """Waits in a thread of its own for the end of all orders."""
    import ray

    while True:
        try:
            ray.get(post.told_to_stop.remote())
        except ray.exceptions.ActorUnavailableError:
            time.sleep(1.0)  # the way to it is broken for a moment
            continue
        except ray.exceptions.RayError:
            pass  # without a post there are no orders either
        told_to_stop.set()
        return


def _train(
    trial: dict[str, Any], reporter: RayReporter, *, notice: _Notice, cache_dir: Path
) -> None:
    """One trial: from its newest checkpoint, if it has any.

    Args:
        trial: "config" as plain data, the "folder" of its checkpoints, the number of this
            "attempt" at it, and whether to "test" its best epoch on the test split.
    """
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import get_device

    from cpfean.data.sources import resolve_data
    from cpfean.data.split import data_fingerprint
    from cpfean.training.checkpoint import check_same_run
    from cpfean.training.loop import fit

    reporter.begun()
    config = ExperimentConfig.from_dict(trial["config"])
    data_folder = resolve_data(config.data, cache_dir=cache_dir)
    folder = reporter.folder
    folder.check_shared()

    def fits(state: TrainingState) -> None:
        check_same_run(state, config, data_fingerprint(data_folder))

    # One looks for all: they must not go on from different epochs.
    newest = folder.newest_valid(fits=fits) if reporter.is_first else None
    newest = broadcast_from_rank_zero(newest)
    if newest is not None:
        reporter.resumed(newest)
    with ExitStack() as stack:
        resume_from = None if newest is None else stack.enter_context(folder.opened(newest))
        result = fit(
            config,
            data_folder=data_folder,
            cache_dir=cache_dir,
            reporter=reporter,
            resume_from=resume_from,
            device=get_device(),
            notice=notice,
        )
    if trial["test"]:
        newest = broadcast_from_rank_zero(folder.newest_valid() if reporter.is_first else None)
        with folder.opened(newest) as checkpoint:
            metrics = test_metrics(
                checkpoint,
                config,
                data_folder=data_folder,
                cache_dir=cache_dir,
                device=get_device(),
            )
        reporter.tested(result.history, newest, metrics)
    elif newest is not None:
        reporter.had_ended(result.history, newest)


def test_metrics(
    model: Path, config: ExperimentConfig, *, data_folder: Path, cache_dir: Path, device: Any
) -> dict[str, float]:
    """Six recalls and rSum on the test split.

    Args:
        model: folder of a model or checkpoint.
        config: that it was trained with.
        data_folder: checked.
        cache_dir: for what can be made again.
        device: of this process.
    """
    from cpfean.training.setup import evaluate_checkpoint

    return evaluate_checkpoint(
        model,
        data_folder=data_folder,
        split="test",
        protocol=config.evaluation.protocol,
        cache_dir=cache_dir,
        device=device,
        num_regions=config.data.num_regions,
        batch_size=config.evaluation.batch_size,
        products=config.evaluation.products,
    ).as_dict()


def this_device() -> Any:
    """The GPU that a process without Ray may use, else the processor."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def warnings_noted(reporter: RayReporter) -> Iterator[None]:
    """What is logged as a warning reaches the user, who does not look into workers' logs."""
    handler = _Notes(reporter)
    logger = logging.getLogger("cpfean")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, reporter: RayReporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.noted(record.getMessage())


class _Abandoned(Exception):  # noqa: N818  (nothing has gone wrong)
    """The trial is not wanted any more; raised in all workers after the same epoch."""


class _Notice:
    """Word that nothing more is wanted, or that a host of the crew will be taken away.

    Of the latter Ray tells, if it is so that hosts may go.
    """

    def __init__(
        self, folder: CheckpointFolder, told_to_stop: threading.Event, *, hosts_may_go: bool
    ) -> None:
        self._folder = folder
        self._told_to_stop = told_to_stop
        self._hosts_may_go = hosts_may_go

    def given(self) -> bool:
        from ray.train import get_preemption_info

        if self._told_to_stop.is_set():
            return True
        return self._hosts_may_go and get_preemption_info() is not None

    def save(self, checkpoint: Checkpoint | None) -> None:
        # However late it is: what is not whole by then is passed over.
        if checkpoint is not None:
            self._folder.save(checkpoint)


class RayReporter:
    """Tells the crew's post of each epoch and waits to hear whether there is to be a next one."""

    def __init__(self, post: Any, number: int, trial: dict[str, Any]) -> None:
        from ray.train import get_context

        self.is_first = get_context().get_world_rank() == 0
        self.folder = CheckpointFolder(trial["folder"], attempt=trial["attempt"])
        self._post = post
        self._number = number
        self._to_be_tested = bool(trial["test"])
        self._reported = False

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        import ray
        from ray.train.collective import broadcast_from_rank_zero

        self._reported = True
        metrics = metrics_of(report)
        wanted = None
        if checkpoint is not None:
            news = metrics | {"checkpoint_path": self.folder.save(checkpoint)}
            # A trial that is to be tested is at its end after that.
            self._tell(news | {"ended": news["ended"] and not self._to_be_tested})
            if not metrics["ended"]:
                wanted = ray.get(self._post.verdict.remote(self._number, report.epoch))
        if not metrics["ended"] and not broadcast_from_rank_zero(wanted):
            raise _Abandoned

    def noted(self, line: str) -> None:
        """Tells what the user is to read."""
        self._tell({"note": line})

    def begun(self) -> None:
        """Tells that the workers are there, and of their placement group.

        The driver frees it should nobody else do so.
        """
        from ray.train import get_context
        from ray.util import get_current_placement_group

        group = get_current_placement_group()
        self._tell(
            {
                "begun": True,
                "placement_group": "" if group is None else group.id.hex(),
                "workers": get_context().get_world_size(),
            }
        )

    def resumed(self, newest: str) -> None:
        """Tells after which epoch the training goes on."""
        self._tell({"resumed": epoch_of(newest)})

    def had_ended(self, history: tuple[dict[str, float], ...], newest: str) -> None:
        """Tells of a training that was at its end before, when its driver was lost."""
        if not self._reported:
            self._tell(_told(history, ended=True) | {"checkpoint_path": self.folder.at(newest)})

    def tested(
        self, history: tuple[dict[str, float], ...], newest: str, metrics: dict[str, float]
    ) -> None:
        """Tells what the best epoch came to on the test split."""
        told = _told(history, ended=True) | {"checkpoint_path": self.folder.at(newest)}
        self._tell(told | {"test": metrics})

    def _tell(self, news: dict[str, Any]) -> None:
        if self.is_first:
            self._post.tell.remote(self._number, news)
