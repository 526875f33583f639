"""One study: trials that are run, recorded, tracked and resumed. A sweep is one, ablations another.

The records on disk are the truth (`orchestration.study.trials`); what is here ties them to a runner
that trains the trials, to the followers that track and copy the records, and to an end.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpfean import commands
from cpfean.data.provenance import described, read_provenance
from cpfean.errors import ServiceError
from cpfean.fingerprints import encoder_fingerprint
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import State, TrialRecord
from orchestration.cluster.versions import since_start
from orchestration.runners import messages
from orchestration.runners.protocol import Runner
from orchestration.settings import Settings
from orchestration.study.conclusion import StudyResult, conclude, outcome_metrics
from orchestration.study.follower import Follower, Sink
from orchestration.study.plan import (
    StudyPlan,
    check_room_for_checkpoints,
    checkpoint_root,
    folder_of,
    meter_of,
    resume_line,
)
from orchestration.study.progress import Progress
from orchestration.study.records_copy import checked_copy
from orchestration.study.stopping import Interrupted, Stop
from orchestration.study.trials import MAX_LOSSES, StudyError, Trials
from orchestration.tracking.mlflow_sink import MlflowSink
from orchestration.tracking.runs import TrackedRun
from orchestration.versions import git_commit, versions


def run_study(
    plan: StudyPlan,
    settings: Settings,
    *,
    runner: Runner,
    resume: bool,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> StudyResult:
    """Runs a study to its end, or on to its end.

    Args:
        runner: that trains its trials.
        resume: the folder of that name exists, and was made for the same plan.
        say: shows the user a line.

    Raises:
        ConfigError: the folder exists, or does not, or was made for another plan, or by other
            versions, or its copy on the storage is another one's; or a limit in dollars, and a node
            without a price.
        ServiceError: no cluster, one of other versions, no room for the checkpoints, or nothing
            moves any more.
        CpfeanError: what the training raises, if there is only one and it runs in this process.
        Interrupted: after SIGINT or SIGTERM, once everything is written.
    """
    runner.check(plan)
    check_room_for_checkpoints(plan, settings)
    copy = checked_copy(plan, settings)
    folder = folder_of(plan, settings)
    if resume:
        folder.check_same(plan.identity())
        folder.check()
        meter_of(plan, folder)  # which reads what was spent
    else:
        folder.create(
            plan.identity(), commit=git_commit(), versions=versions(), resume=resume_line(plan)
        )
    stop = Stop(say)
    with folder.lock(), stop.listening():
        _follow_places(plan, folder, say)
        drift = since_start(folder, allowed=plan.allow_drift)
        if plan.retry_failed and (number := folder.reopen_failed()):
            say(f"{number} trial(s) that failed are run once more.")
        # The copy first: MLflow can be filled from the records.
        sinks: list[Sink] = [] if copy is None else [copy]
        if runner.needs_mlflow or importlib.util.find_spec("mlflow") is not None:
            sinks.append(MlflowSink(settings.tracking_uri, _tracked_run(plan, folder), say=say))
        elif plan.register:
            line = commands.pip_install("mlflow[auth]")
            raise ServiceError(f"--register needs MLflow, which is not installed: `{line}`")
        else:
            say("MLflow is not installed: nothing is tracked, records and results are kept.")
        follower = Follower(sinks, say=say)
        return Study(
            plan, settings, folder, runner, follower, stop=stop, say=say, drift=drift, clock=clock
        ).run()


def _tracked_run(plan: StudyPlan, folder: RunFolder) -> TrackedRun:
    """How MLflow knows a study."""
    own = {"cpfean.data": plan.data_fingerprint, "cpfean.data_path": plan.base.data.path}
    made_by = read_provenance(plan.data_folder)
    if made_by is not None:
        own["cpfean.features"] = described(made_by)
    parameters = {
        "study.trials": plan.trials,
        "study.workers": plan.workers,
        "study.space": plan.space.name if plan.space else "",
    }
    return TrackedRun(
        id=folder.id,
        name=plan.name,
        kind=plan.kind,
        tags=own | dict(plan.tags),
        parameters=parameters | plan.base.flat(),
        has_parent=plan.of_kind.has_parent,
        register=plan.register,
    )


def _follow_places(plan: StudyPlan, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Lets the trials of a study read data and text encoder where they are now.

    Of what a study is resumed with is known that it holds the same as before.
    """
    now = plan.base.flat()
    places = {"data.path": "data"}
    if encoder_fingerprint(plan.base):  # else it goes by its name
        places["model.text.encoder"] = "text encoder"
    for path, what in places.items():
        moved: set[str] = set()
        for record in folder.records():
            before = record.experiment.flat()[path]
            # A trial may have been asked for with another encoder than the base has.
            if before != now[path] and path not in record.overrides:
                record.config = record.experiment.with_overrides({path: now[path]}).to_dict()
                folder.write(record)
                moved.add(str(before))
        if moved:
            say(f"the {what} is now read from {now[path]}; it was in {', '.join(sorted(moved))}.")


@dataclass(eq=False)
class Study:
    """A study while it runs; to its runner, a `Driver`.

    Attributes:
        folder: of its records; locked.
        follower: of the records.
        stop: asked and told by everybody.
        drift: how the versions here differ from those at the start, which is allowed.
    """

    plan: StudyPlan
    settings: Settings
    folder: RunFolder
    runner: Runner
    follower: Follower
    stop: Stop
    say: Callable[[str], None]
    drift: str = ""
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        plan, folder, say, clock = self.plan, self.folder, self.say, self.clock
        self._trials = Trials(plan, folder, self.follower.update, say, clock)
        self._meter = meter_of(plan, folder, nodes=self.runner.node_types, say=say, clock=clock)
        self._progress = Progress(clock)
        self._team_sizes: dict[int, int] = {}
        self._closing = threading.Lock()
        self._resume = resume_line(plan)
        self.stop.left = self._leave

    def run(self) -> StudyResult:
        """Runs it to its end; raises as `run_study`."""
        if self.num_open > 0:
            self.runner.wait_for_start()
        self.follower.start()
        self.follower.update_study("running", {})
        if self.runner.meet_seconds:
            self.follower.meet(seconds=self.runner.meet_seconds)
        for record in self.records:
            # An interrupted trial may not be begun again, and MLflow may be another, empty one.
            if record.settled or record.state == "interrupted":
                self.follower.update(record)
        outcome: State = "failed"
        try:
            self.prepare()
            if self.num_open > 0 and self._may_begin():
                self.runner.run(self)
            left_out = {r.number for r in self._trials.waiting} if self._meter.used_up else set()
            if any(not r.settled and r.number not in left_out for r in self.records):
                raise ServiceError(f"the cluster was lost; continue with:\n{self._resume}")
            self._trials.export_search()
            result = conclude(self, self.follower, self._meter)
            outcome = "finished"
            return result
        except (Interrupted, KeyboardInterrupt):
            outcome = "interrupted"
            self.say(f"Stopped; continue with:\n{self._resume}")
            raise
        finally:
            self._close(outcome)

    def prepare(self) -> None:
        """Takes over what is known of its trials, and says what was found."""
        self._trials.prepare()

    @property
    def records(self) -> Sequence[TrialRecord]:
        return self._trials.records

    @property
    def num_open(self) -> int:
        return self._trials.num_open

    def checkpoints_of(self, number: int) -> str:
        root = checkpoint_root(self.folder, self.settings)
        return f"{root}/{self.folder.first_name}-{number:03d}"

    def expect(self, *, is_local: bool) -> None:
        self.plan.budget.check_prices(self.runner.node_types())
        self._meter.count()
        self._progress = Progress(self.clock, is_local=is_local)

    def differs(self, versions: str) -> None:
        self.drift = "; ".join(text for text in (self.drift, versions) if text)

    def next_trial(self) -> TrialRecord | None:
        if self.stop.is_asked or not self._trials.has_next() or not self._may_begin():
            return None
        return self._trials.next()

    def started(self, number: int) -> None:
        self._trials.started(number, drift=self.drift)
        self._progress.news()

    def tell(self, number: int, message: messages.Message) -> None:
        record = self._trials[number]
        match message:
            case messages.Begun(workers=workers):
                self._progress.begun()
                self._tell_team_size(record, workers)
            case messages.Resumed(checkpoint=checkpoint):
                self.say(f"{record.name}: resuming from {checkpoint}")
            case messages.Epoch():
                new = self._trials.trained(number, message)
                # One that was only tested, as its driver was lost before, tells no epoch's length.
                if new and not message.test:
                    self._progress.news(epochs=new)
                    self._show(record)
            case messages.Note(line=line):
                self.say(f"{record.name}: {line}")
            case messages.Failed(failure=failure, message=text):
                self._failed(record, failure, text)
            case messages.Lost(message=text):
                self._lost(record, text)
            case messages.Ended(pruned=pruned):
                self._ended(record, pruned=pruned)
        self._progress.news()

    def tick(self) -> None:
        if self._meter.is_due:
            self._meter.count()
        silent = self._progress.silent
        if self._progress.is_worth_a_line():
            running = ", ".join(record.name for record in self._trials.running)
            demand = self.runner.demand()
            asked = f"{self.plan.workers} worker(s) each" if demand is None else str(demand)
            awaited = running or "the first trial"
            self.say(f"no news for {silent:.0f} s; waiting for {awaited}, {asked}.")
            # Workers that were there may come back: a host that is booted, a spot instance.
            if demand is not None and demand.never_fits and not self._progress.has_begun:
                raise ServiceError(
                    f"the cluster cannot give what a trial asks for: {demand}. Lower --workers, or "
                    f"add nodes; then:\n{self._resume}"
                )
        if self._progress.has_stalled:
            raise ServiceError(
                f"nothing has moved for {silent:.0f} s: the cluster does not give "
                f"{self.plan.workers} worker(s) to a trial, or the workers hang. Everything so "
                f"far is recorded; see {commands.cluster_status()}, then:\n{self._resume}"
            )

    def _failed(self, record: TrialRecord, failure: str, message: str) -> None:
        if self.stop.signal:
            return  # its workers have gone because we are to stop
        if failure in ("infra", "preempted") and (gone := self.runner.gone(self.plan)) is not None:
            self.stop.fail(gone)
            return  # it was not the trial that failed
        try:
            self._trials.fail(record.number, failure, message)
        except StudyError as error:
            self.stop.fail(error)

    def _lost(self, record: TrialRecord, message: str) -> None:
        is_over = self.stop.signal or self.runner.gone(self.plan) is not None
        times = 0 if is_over else self._trials.lost(record.number)
        if times:
            self.say(f"{record.name}: its process was lost; retry {times}/{MAX_LOSSES}.")
        else:
            self._failed(record, "infra", message)

    def _ended(self, record: TrialRecord, *, pruned: bool) -> None:
        if self.stop.is_asked and not pruned and not record.complete:
            return  # it was stopped because the study is
        if pruned:
            self._trials.settle(record.number, "pruned")
            self.say(f"{record.name}: stopped after epoch {record.epochs}, behind the others.")
        elif record.complete:
            self._trials.settle(record.number, "finished")
        else:
            unclear = "the training ended before its last epoch without an error"
            self._failed(record, "infra", unclear)

    def _may_begin(self) -> bool:
        running = len(self._trials.running)
        left = self.num_open - running
        return self._meter.allows_another(left=left, running=running)

    def _tell_team_size(self, record: TrialRecord, workers: int) -> None:
        most = max(1, self.plan.workers)
        if workers != self._team_sizes.get(record.number, most):
            line = f"trained by {workers} of {most} workers; the batch is the same."
            self.say(f"{record.name}: {line}")
        self._team_sizes[record.number] = workers

    def _show(self, record: TrialRecord) -> None:
        done, running = len(self._trials.settled), len(self._trials.running)
        eta = self._progress.eta(self._trials.epochs_left)
        of_all = f"{done}/{self.plan.trials} done, {running} running, {eta}"
        self.say(f"[{of_all}; {self._meter.spent}] {record.name}  {record.newest}")

    def _close(self, outcome: State) -> None:
        self._closing.acquire()  # for good: nothing may be written after it
        self._trials.cut_off_all()
        metrics = outcome_metrics(self._trials.settled)
        self._meter.look()
        self._meter.save()
        tags = {"cpfean.used_up": self._meter.used_up or "no"}
        if self.drift:
            tags["cpfean.drift"] = self.drift
        self.follower.update_study(outcome, metrics | self._meter.metrics(), tags)
        if not self.follower.close(seconds=self.stop.seconds_to_close):
            self.say(
                f"tracking: not everything is sent; {self.follower.first}the rest is sent by:"
                f"\n{self._resume}"
            )

    def _leave(self) -> None:
        """Ends the process from another thread, as the main thread hangs in somebody's code."""
        if self._closing.locked():
            return
        error = self.stop.error
        try:
            self.say(str(error or f"Stopped; continue with:\n{self._resume}"))
            self._close("failed" if error else "interrupted")
        finally:
            self.stop.end_process(self.stop.exit_code)
