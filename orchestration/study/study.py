"""One study: trials on a cluster, recorded, tracked, resumable. A sweep is one, ablations another.

The driver's records on disk are the truth. A driver that is started again reads them, runs what is
not settled (each trial from its newest checkpoint) and brings the tracker up to date; it makes no
difference whether the last driver ended, was stopped or was killed, nor when.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean import commands
from cpfean.errors import CpfeanError, message_of
from orchestration.cluster.capacity import Room
from orchestration.cluster.doctor import ask_nodes, missing_workers, versions
from orchestration.cluster.version_drift import among_nodes, since_start
from orchestration.proposals.search import Proposals
from orchestration.runners.guard import Guarded
from orchestration.runners.worker import test_metrics, this_device
from orchestration.settings import ServiceError, Settings
from orchestration.storage.records_copy import copy_of
from orchestration.study.budget import (
    OTHER,
    eta,
)
from orchestration.study.conclusion import (
    StudyResult,
    best_of,
    conclude,
    keep_model,
)
from orchestration.study.follower import Follower
from orchestration.study.plan import (
    StudyPlan,
    TrialPlan,
    check_room_for_checkpoints,
    meter_of,
    planned_record,
    resume_line,
)
from orchestration.study.records import RunFolder, State, TrialRecord
from orchestration.study.results import encoder_fingerprint
from orchestration.study.sinks import follower_of
from orchestration.study.stopping import (
    _STOP_SECONDS,
    SAVE_SECONDS,
    STOPPED_SECONDS,
    Interrupted,
    seconds_to_stop,
    stopped_by_signals,
)
from orchestration.tracking.versions import git_commit

if TYPE_CHECKING:
    from orchestration.cluster.capacity import Cluster

_SILENCE_SECONDS = 60.0  # without news: say what is waited for
_SAME_FAILURES = 3
_DUPLICATES = 3  # of one search for a proposal, told one by one; more are counted
_JOIN_SECONDS = 600.0  # for workers that are to be there at least
_LOOK_SECONDS = 5.0  # between two looks at whether the cluster's head still answers
_LOOKS = 3  # in vain: the head is gone


class StudyError(CpfeanError):
    """A study in which nothing but failures is to be expected."""

    exit_code = 4


def run_study(
    plan: StudyPlan, settings: Settings, *, resume: bool, say: Callable[[str], None]
) -> StudyResult:
    """Runs a study to its end, or on to its end.

    Args:
        resume: the folder of that name exists, and was made for the same plan.
        say: shows the user a line.

    Raises:
        ConfigError: the folder exists, or does not, or was made for another plan, or by other
            versions, or its copy on the storage is another one's; or a limit in dollars, and a node
            without a price.
        ServiceError: no cluster, one of other versions, no room for the checkpoints, or nothing
            moves any more.
        Interrupted: after SIGINT or SIGTERM, once everything is written.
    """
    if settings.address is None:
        plan.budget.check_prices([OTHER])
    check_room_for_checkpoints(plan, settings)
    copy = copy_of(RunFolder(settings.output / plan.name), settings, resume=resume_line(plan))
    if copy is not None:
        copy.check()
    folder = opened_folder(plan, settings, resume=resume)
    with folder.lock():
        follow_places(plan, folder, say)
        drift = since_start(folder, allowed=plan.allow_drift)
        reopen_failed(plan, folder, say)
        tracker = follower_of(plan, settings, folder, say=say, copy=copy)
        study = _Study(plan, settings, folder, tracker, say, drift=drift)
        return study.run()


def opened_folder(plan: StudyPlan, settings: Settings, *, resume: bool) -> RunFolder:
    """A new folder for a plan, or the one that was made for it.

    Raises:
        ConfigError: the folder exists, or does not, or was made for another plan; or one of its
            files cannot be read.
    """
    folder = RunFolder(settings.output / plan.name)
    if resume:
        folder.check_same(plan.identity())
        folder.check()
        meter_of(plan, folder)  # which reads what was spent
    else:
        folder.create(
            plan.identity(), commit=git_commit(), versions=versions(), resume=resume_line(plan)
        )
    return folder


def follow_places(plan: StudyPlan, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Lets the trials of a study read data and text encoder where they are now.

    Of what a study is resumed with is known that it holds the same as before.
    """
    now = plan.base.flat()
    for path, what in (("data.path", "data"), ("model.text.encoder", "text encoder")):
        if what == "text encoder" and not encoder_fingerprint(plan.base):
            continue  # it goes by its name
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


def reopen_failed(plan: StudyPlan, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Of a plan that asks for it, lets trials that failed run once more."""
    if plan.retry_failed and (number := folder.reopen_failed()):
        say(f"{number} trial(s) that failed are run once more.")


class _Study:
    """The state of a study while it runs; `orchestration.runners.tuner` calls its hooks."""

    def __init__(
        self,
        plan: StudyPlan,
        settings: Settings,
        folder: RunFolder,
        tracker: Follower,
        say: Callable[[str], None],
        *,
        drift: str = "",
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._folder = folder
        self._tracker = tracker
        self._say = say
        self._records = {record.number: record for record in folder.records()}
        self._waiting = [record for record in self._records.values() if not record.settled]
        self._proposals: Proposals | None = None
        self._results = plan.known_results(folder)
        self._tests_all = plan.tested == "all"
        self._clock = _Clock()
        self._meter = meter_of(plan, folder)
        self._nodes: Callable[[], Sequence[str]] = lambda: (OTHER,)
        self._room: Callable[[], Room | None] = lambda: None
        self._used_up = ""
        self._unpriced: set[str] = set()
        self._running: dict[int, float] = {}
        self._crews: dict[int, str] = {}
        self._losses: Counter[int] = Counter()
        self._exhausted = False
        self._failures: list[tuple[str, str]] = []
        self._drift = drift
        self._known_nodes: set[str] = set()
        self._left_cluster = threading.Event()
        self._signal = 0
        self._told_to_stop = 0.0
        self._closing = threading.Lock()
        self._leaving: threading.Timer | None = None
        self._error: CpfeanError | None = None

    def run(self) -> StudyResult:
        try:
            with stopped_by_signals(self._stop, self._say):
                return self._run()
        finally:
            if self._leaving is not None:
                self._leaving.cancel()

    def _run(self) -> StudyResult:
        if self._num_open() > 0:
            from orchestration.cluster import connection

            connection.wait_for_start()  # importing MLflow beside it can deadlock
        self._tracker.start()
        self._tracker.update_study("running", {})
        for record in self._records.values():
            # An interrupted trial may not be begun again, and MLflow may be another, empty one.
            if record.settled or record.state == "interrupted":
                self._tracker.update(record)
        outcome: State = "failed"
        try:
            self._prepare()
            if self._num_open() > 0 and not self._is_used_up():
                self._run_open()
            result = self._conclude()
            outcome = "finished"
            return result
        except (Interrupted, KeyboardInterrupt):
            outcome = "interrupted"
            self._say(f"Stopped; continue with:\n{self._resume_line()}")
            raise
        finally:
            self._close(outcome)

    # The hooks of orchestration.runners.tuner.

    def next_trial(self) -> TrialRecord | None:
        """The next trial to run: one that was cut off first, then a new one."""
        number = next((n for n in range(self._plan.trials) if n not in self._records), None)
        if self._signal or (not self._waiting and (number is None or self._exhausted)):
            return None
        if self._is_used_up():
            return None
        if self._waiting:
            return self._waiting.pop(0)
        assert number is not None
        if self._plan.space is None:
            plan = self._plan.fixed[number]
        else:
            assert self._proposals is not None
            before = len(self._proposals.duplicates)
            drawn = self._proposals.ask(number, list(self._records.values()))
            self._tell_duplicates(self._proposals.duplicates[before:])
            if drawn is None:
                self._exhausted = True
                self._say(f"the search space has no more than {number} different configurations.")
                return None
            config = self._plan.base.with_overrides(drawn)
            plan = TrialPlan(name=f"trial-{number:03d}", overrides=drawn, config=config)
        record = planned_record(number, plan)
        self._records[number] = record
        self._folder.write(record)
        return record

    def started(self, number: int) -> None:
        record = self._records[number]
        record.drift = self._drift or record.drift
        self._running[number] = time.monotonic()
        self._set_state(record, "running")
        self._clock.news()

    def begun(self, number: int, crew: str) -> None:
        self._crews[number] = crew
        self._clock.begun()
        if self._known_nodes:  # of a cluster, which may have got others for these workers
            try:
                self._look_at_nodes()
            except ServiceError as error:
                self._error = error
                self._interrupt_tune()

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        record = self._records[number]
        known = len(record.history)
        record.history = [dict(row) for row in metrics["history"]]
        if metrics.get("checkpoint_path"):
            record.checkpoint = metrics["checkpoint_path"]
        record.complete = bool(metrics["ended"])
        record.test = dict(metrics.get("test", {}))
        self._count_seconds(record)
        self._folder.write(record)
        self._tracker.update(record)
        self._clock.news(epochs=len(record.history) - known)
        if len(record.history) > known:
            self._show(record)

    def ended(self, number: int, *, pruned: bool) -> None:
        record = self._records[number]
        if (self._signal or self._error) and not pruned and not record.complete:
            return  # Tune stopped it because we are to stop
        if pruned:
            self._settle(record, "pruned")
            self._say(f"{record.name}: stopped after epoch {record.epochs}, behind the others.")
        elif record.complete:
            self._settle(record, "finished")
        else:
            self.failed(
                number, "infra", "the training ended before its last epoch without an error"
            )

    def failed(self, number: int, failure: str, message: str) -> None:
        record = self._records[number]
        if self._signal:
            return  # its workers have gone because we are to stop
        if failure in ("infra", "preempted") and not self._head_answers():
            self._give_up_cluster()
            return  # it was not the trial that failed
        record.failure, record.message = failure, message
        self._settle(record, "failed")
        last = message.strip().splitlines()[-1] if message.strip() else ""
        self._say(f"{record.name}: failed ({failure}): {last}")
        self._failures.append(_kind_of_failure(record))
        if (
            len(self._failures) == len(self._done()) == _SAME_FAILURES
            and len(set(self._failures)) == 1
        ):
            self._error = StudyError(
                f"the first {_SAME_FAILURES} trials failed alike ({failure}), so the rest is not "
                f"tried:\n{message}\nOnce that is mended, continue with:\n"
                f"{resume_line(self._plan, retry_failed=True)}"
            )
            self._interrupt_tune()

    def lost(self, number: int, message: str) -> None:
        """The process of a trial is gone; that of its workers is the trial's own business."""
        from orchestration.runners.tuner import MAX_RETRIES

        self._losses[number] += 1
        if self._signal or self._losses[number] > MAX_RETRIES or not self._head_answers():
            self.failed(number, "infra", message)
            return
        record = self._records[number]
        self._count_seconds(record)
        self._running.pop(number, None)
        self._set_state(record, "interrupted")  # as which it is left if nothing more is begun
        self._waiting.append(record)
        self.noted(number, f"its process was lost; retry {self._losses[number]}/{MAX_RETRIES}.")

    def noted(self, number: int, line: str) -> None:
        self._say(f"{self._records[number].name}: {line}")
        self._clock.news()

    def tick(self) -> None:
        """Called about every second: says what is waited for, and ends what hangs."""
        if self._meter.is_due:
            self._count()
        silent = self._clock.silent
        if silent > self._clock.next_notice:
            self._clock.next_notice *= 2
            names = (
                ", ".join(self._records[number].name for number in self._running)
                or "the first trial"
            )
            room = self._room()
            asked = f"{self._plan.workers} worker(s) each" if room is None else str(room)
            self._say(f"no news for {silent:.0f} s; waiting for {names}, {asked}.")
            # Workers that were there may come back: a host that is booted, a spot instance.
            if room is not None and room.never_fits and not self._clock.has_begun:
                self._error = ServiceError(
                    f"the cluster cannot give what a trial asks for: {room}. Lower --workers, or "
                    f"add nodes; then:\n{self._resume_line()}"
                )
                self._interrupt_tune()
        if silent > self._clock.limit and self._error is None:
            self._error = ServiceError(
                f"nothing has moved for {silent:.0f} s: the cluster does not give "
                f"{self._plan.workers} worker(s) to a trial, or the workers hang. Everything so "
                f"far is recorded; see {commands.cluster_status()}, then:\n{self._resume_line()}"
            )
            self._interrupt_tune()

    def _watch_head(self) -> None:
        """Ends the study when the head of the cluster is gone; runs in a thread of its own.

        The main thread hangs in Ray then, which ends the process after a minute without a word.
        """
        in_vain = 0
        while not self._left_cluster.wait(_LOOK_SECONDS):
            in_vain = 0 if self._head_answers() else in_vain + 1
            if in_vain == _LOOKS:
                self._give_up_cluster()
                if not self._left_cluster.wait(_STOP_SECONDS):
                    self._leave()
                return

    def _head_answers(self) -> bool:
        try:
            self._settings.check_address()
        except ServiceError:
            return False
        return True

    def _give_up_cluster(self) -> None:
        if self._error is None:
            self._error = ServiceError(
                f"the cluster is gone: its head at {self._settings.address} does not answer any "
                "more. Everything so far is recorded; start it, or another, and continue with:\n"
                f"{self._resume_line()}"
            )
            self._interrupt_tune()

    def _prepare(self) -> None:
        if self._plan.space is not None:
            self._proposals = Proposals(
                self._plan.space,
                file=self._folder.path / "study.db",
                name=self._folder.first_name,
                seed=self._plan.base.seed,
                baseline=self._plan.space.baseline(self._plan.base),
                trials=self._plan.trials,
                records=list(self._records.values()),
            )
            damaged, rebuilt = self._proposals.damaged, self._proposals.num_rebuilt
            if damaged is not None or rebuilt:
                why = f"damaged, and is kept as {damaged.name}" if damaged else "without them"
                self._say(f"study rebuilt from {rebuilt} run(s): study.db was {why}.")
            for record in self._records.values():
                if record.settled:
                    self._proposals.tell(record)
        reused = self._reuse()
        done = self._done()
        self._failures = [_kind_of_failure(record) for record in done if record.state == "failed"]
        if reused:
            self._say(f"{reused} of {self._plan.trials} run(s) are known already.")
        if len(self._records) > reused:
            cut_off = ", ".join(record.name for record in self._waiting) or "none"
            new = self._plan.trials - len(self._records)
            self._say(
                f"resuming {self._plan.name}: {len(done)} settled, cut off: {cut_off}, {new} new."
            )

    def _reuse(self) -> int:
        """Takes over trials whose runs are known; returns how many."""
        taken = 0
        for number, plan in enumerate(self._plan.fixed):
            if number not in self._records:
                record = planned_record(number, plan)
                if self._results and self._results.fill(record, tested=self._tests_all):
                    self._records[number] = record
                    self._folder.write(record)
                    self._tracker.update(record)
                    taken += 1
        return taken

    def _run_open(self) -> None:
        from orchestration.cluster import connection, nodes
        from orchestration.cluster.capacity import share_out
        from orchestration.runners import tuner

        storage = self._settings.storage
        cluster = connection.connect(self._settings, give_up=self._leave_for)
        try:
            if not cluster.is_local:
                threading.Thread(target=self._watch_head, name="head", daemon=True).start()
                cluster = self._with_its_workers(cluster)
                self._look_at_nodes()
            resources = share_out(
                cluster,
                workers=self._plan.workers,
                trials=self._num_open(),
                min_workers=self._plan.min_workers,
            )
            where = (
                "this machine" if cluster.is_local else f"the cluster at {self._settings.address}"
            )
            device = "1 GPU" if resources.use_gpu else f"{resources.cpus} CPU(s)"
            self._say(
                f"{self._num_open()} trial(s) to run on {where}, {resources.concurrent} at a time, "
                f"each with {resources.workers} worker(s) of {device}; the first "
                "processes are started, which takes a while."
            )
            self._nodes = nodes.node_types
            self._plan.budget.check_prices(self._nodes())
            self._count()
            if not cluster.is_local:
                self._room = lambda: nodes.room_for(resources)
            self._clock = _Clock(is_local=cluster.is_local)
            self._clock.epochs_left = self._epochs_left()
            early = None
            if self._plan.grace:
                epochs = self._plan.base.optim.epochs
                early = tuner.EarlyStopping(grace=self._plan.grace, epochs=epochs)
            tuner.run_trials(
                Guarded(self, folder=self._folder.path, give_up=self._give_up),
                num_trials=self._num_open(),
                resources=resources,
                settings=self._settings,
                run_name=self._folder.first_name,
                train_storage=f"{storage.rstrip('/')}/{self._folder.id}"
                if storage
                else str(self._folder.path / "train"),
                tune_storage=str(self._folder.path / "tune"),
                early_stopping=early,
                test=self._tests_all,
                past=list(self._records.values()),
            )
        # Of a cluster that is lost Ray tells in many ways.
        except Exception as error:
            if isinstance(error, CpfeanError) or self._head_answers():
                raise
            self._give_up_cluster()
        finally:
            connection.disconnect()
            self._left_cluster.set()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # Tune leaves its own
        if self._error is not None:
            raise self._error
        if self._signal:
            raise Interrupted(self._signal)
        left_out = {record.number for record in self._waiting} if self._used_up else set()
        if any(not r.settled and r.number not in left_out for r in self._records.values()):
            raise ServiceError(f"the cluster was lost; continue with:\n{self._resume_line()}")

    def _with_its_workers(self, cluster: Cluster) -> Cluster:
        """The cluster once the workers that it is to have at least are there.

        Whether trials have GPUs, and how many run at a time, is settled by what is there when they
        start, and `ray up` returns when the head is up.
        """
        from orchestration.cluster.nodes import cluster_now

        end = time.monotonic() + _JOIN_SECONDS
        told = False
        while missing := missing_workers(len(cluster.nodes) - 1):
            if time.monotonic() > end:
                self._say(f"{missing}: starting with what is there.")
                break
            if not told:
                told = True
                self._say(f"{missing}: waiting for the others, ten minutes at most.")
            time.sleep(1.0)
            cluster = cluster_now(is_local=False)
        return cluster

    def _look_at_nodes(self) -> None:
        """Compares the versions of nodes that have not been asked with those here.

        Raises:
            ServiceError: they differ, or a node cannot tell them, and may not.
        """
        answers = ask_nodes(None, known=self._known_nodes)
        self._known_nodes |= set(answers)
        drift = among_nodes(answers, allowed=self._plan.allow_drift)
        if drift:
            self._say(f"versions differ, which is allowed: {drift}")
            self._drift = "; ".join(text for text in (self._drift, drift) if text)

    def _conclude(self) -> StudyResult:
        """The best trial, its test metrics and its files."""
        records = tuple(self._records[number] for number in sorted(self._records))
        return conclude(
            self._plan,
            self._folder,
            records,
            self._tracker,
            self._meter,
            test=self._test,
            used_up=self._used_up,
        )

    def _test(self, best: TrialRecord) -> None:
        if not best.test:
            self._say(f"testing {best.name} ...")
            best.test = self._test_metrics(best)
            self._folder.write(best)
        self._tracker.update(best)
        if self._plan.kind == "sweep":
            self._tracker.keep_files(self._pictures(best), best)

    def _pictures(self, best: TrialRecord) -> list[Path]:
        """Pictures of what the best model sees, of which a sweep can do without."""
        from orchestration.pictures.queries import draw_study_pictures

        try:
            return draw_study_pictures(
                self._folder.path / "best_model",
                best.experiment,
                data_folder=self._plan.data_folder,
                cache_dir=self._settings.cache_dir,
                output=self._folder.path / "pictures" / best.name,
            )
        # Whatever is wrong with drawing, the result is there and has been tested.
        except Exception as error:
            self._say(f"no pictures of {best.name}: {message_of(error)}")
            return []

    def _test_metrics(self, record: TrialRecord) -> dict[str, float]:
        model = keep_model(record, self._folder.path / "best_model")
        return test_metrics(
            model,
            record.experiment,
            data_folder=self._plan.data_folder,
            cache_dir=self._settings.cache_dir,
            device=this_device(),
        )

    def _close(self, outcome: State, *, seconds: float = 60.0) -> None:
        self._closing.acquire()  # for good: nothing may be written after it
        for record in self._records.values():
            if record.state == "running":
                self._count_seconds(record)
                self._set_state(record, "interrupted")
        metrics: dict[str, float] = {}
        done = self._done()
        tested = next((record for record in done if record.test), None)
        best = tested or best_of(done)
        if best is not None:
            metrics["best/val_rsum"] = best.best_rsum
            metrics |= {f"test/{name}": value for name, value in best.test.items()}
        self._meter.look()
        self._meter.save()
        tags = {"cpfean.used_up": self._used_up or "no"}
        if self._drift:
            tags["cpfean.drift"] = self._drift
        self._tracker.update_study(outcome, metrics | self._meter.metrics(), tags)
        if outcome == "interrupted":
            seconds = seconds_to_stop(self._told_to_stop)
        if not self._tracker.close(seconds=seconds):
            self._say(
                f"tracking: not everything is sent; {self._tracker.first}the rest is sent by:\n"
                f"{self._resume_line()}"
            )

    def _count(self) -> None:
        """Counts hours and dollars, by the nodes that there are now."""
        prices = self._plan.budget.prices
        if prices is None:
            self._meter.look()
        else:
            types = self._nodes()
            unknown = set(prices.unknown(types))
            # A limit in dollars was refused at the start if a node had no price; one that joins
            # later is told of, and so is any that is missing in the dollars that are shown.
            matters = self._plan.budget.max_cost is not None or unknown < set(types)
            if matters and unknown - self._unpriced:
                self._say(
                    f"{prices.file} has no price of {', '.join(sorted(unknown))}: not counted."
                )
                self._unpriced |= unknown
            self._meter.look(None if unknown >= set(types) else prices.hourly(types))
        self._meter.save()

    def _tell_duplicates(self, names: Sequence[str]) -> None:
        if len(names) > _DUPLICATES:
            counted = ", ".join(f"{count} of {name}" for name, count in Counter(names).items())
            self._say(f"{len(names)} proposals were duplicates ({counted}), not trained again.")
            return
        for name in names:
            self._say(f"a proposal was a duplicate of {name}, not trained again.")

    def _is_used_up(self) -> bool:
        """Whether the budget allows no further trial; says so once."""
        self._meter.look()
        phrase = self._plan.budget.used_up(
            hours=self._meter.hours, dollars=self._meter.dollars or 0.0
        )
        if phrase and not self._used_up:
            left = self._plan.trials - len(self._done()) - len(self._running)
            self._used_up = phrase
            self._say(
                f"{phrase}: {left} trial(s) are not begun, {len(self._running)} running go on."
            )
        return bool(phrase)

    def _settle(self, record: TrialRecord, state: State) -> None:
        self._count_seconds(record)
        self._running.pop(record.number, None)
        self._set_state(record, state)
        # What two versions have trained is the result of neither.
        if state == "finished" and self._results is not None and not record.drift:
            self._results.keep(record)
        if self._proposals is not None:
            self._proposals.tell(record)
        self._clock.news()
        self._clock.epochs_left = self._epochs_left()

    def _set_state(self, record: TrialRecord, state: State) -> None:
        record.state = state
        self._folder.write(record)
        self._tracker.update(record)

    def _count_seconds(self, record: TrialRecord) -> None:
        now = time.monotonic()
        if record.number in self._running:
            record.seconds += now - self._running[record.number]
            self._running[record.number] = now

    def _done(self) -> list[TrialRecord]:
        return [record for record in self._records.values() if record.settled]

    def _num_open(self) -> int:
        return self._plan.trials - len(self._done())

    def _epochs_left(self) -> int:
        """Epochs still to come, if no further trial is stopped early."""
        each = self._plan.base.optim.epochs
        begun = sum(each - r.epochs for r in self._records.values() if not r.settled)
        return begun + each * (self._plan.trials - len(self._records))

    def _show(self, record: TrialRecord) -> None:
        row = record.history[-1]
        done, running = len(self._done()), len(self._running)
        eta = self._clock.eta(self._epochs_left())
        self._meter.look()
        self._say(
            f"[{done}/{self._plan.trials} done, {running} running, {eta}; {self._meter.spent}] "
            f"{record.name}  epoch {record.epochs}/{record.experiment.optim.epochs}  "
            f"rSum {row['val/rsum']:.1f}  best {record.best_rsum:.1f}  "
            f"loss {row['train/loss']:.4g}  {row['train/seconds']:.0f} s"
        )

    def _resume_line(self) -> str:
        return resume_line(self._plan)

    def _stop(self, number: int) -> None:
        self._signal = number
        self._told_to_stop = time.monotonic()
        if not _tune_listens():
            raise Interrupted(number)
        self._leaving = threading.Timer(_STOP_SECONDS, self._leave)
        self._leaving.daemon = True
        self._leaving.start()
        # The main thread is in Tune, which goes on to pass news while trials are saved.
        threading.Thread(target=self._save_and_stop, name="stop", daemon=True).start()

    def _save_and_stop(self) -> None:
        from orchestration.runners.worker_pool import stop_all

        try:
            stop_all(set(self._crews.values()), seconds=SAVE_SECONDS)
        finally:
            self._interrupt_tune()

    def _leave(self) -> None:
        """Ends the process from another thread, as the main thread hangs in Ray."""
        if self._closing.locked():
            return
        outcome: State = "interrupted"
        code, text = 128 + self._signal, f"Stopped; continue with:\n{self._resume_line()}"
        if self._error is not None:
            outcome, code, text = "failed", self._error.exit_code, str(self._error)
        try:
            self._say(text)
            self._close(outcome, seconds=STOPPED_SECONDS)
        finally:
            os._exit(code)

    def _leave_for(self, error: CpfeanError) -> None:
        self._error = self._error or error
        self._leave()

    def _give_up(self, error: CpfeanError) -> None:
        self._error = self._error or error
        self._interrupt_tune()

    def _interrupt_tune(self) -> None:
        if not _tune_listens():
            return
        # Tune stops in good order on SIGUSR1; an exception out of a callback would leave trials.
        os.kill(os.getpid(), signal.SIGUSR1)


class _Clock:
    """How long nothing has happened, and how long the rest will take."""

    def __init__(self, *, is_local: bool = True) -> None:
        self._start = self._last = time.monotonic()
        self._epochs = 0
        self._begun = False
        self._slowest = 0.0
        self._floor = 600.0 if is_local else 3600.0  # a cluster may have to start its machines
        self.epochs_left = 0
        self.next_notice = _SILENCE_SECONDS

    @property
    def has_begun(self) -> bool:
        return self._begun

    @property
    def silent(self) -> float:
        return time.monotonic() - self._last

    @property
    def limit(self) -> float:
        """Seconds of silence after which nothing is expected any more.

        Between a driver's first workers and its first epoch nobody knows how long one takes, hence
        the long wait.
        """
        if self._begun and not self._epochs:
            return 4 * 3600.0
        return max(self._floor, 10 * self._slowest)

    def begun(self) -> None:
        """Workers are there; the time that the first ones took to start says nothing of trials."""
        self.news()
        if not self._begun:
            self._begun = True
            self._start = self._last

    def news(self, *, epochs: int = 0) -> None:
        if epochs > 0:
            self._slowest = max(self._slowest, self.silent)
            self._epochs += epochs
        self._last = time.monotonic()
        self.next_notice = max(_SILENCE_SECONDS, 3 * self._slowest)

    def eta(self, epochs_left: int) -> str:
        if not self._epochs:
            return "ETA unknown"
        return eta((self._last - self._start) / self._epochs * epochs_left)


def _tune_listens() -> bool:
    return signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, None)


def _kind_of_failure(record: TrialRecord) -> tuple[str, str]:
    """What failures have in common; steps, rates and norms in the message need not be the same."""
    last = (record.message.strip().splitlines() or [""])[-1]
    return record.failure, re.sub(r"[-+]?\b(\d[\d.]*(e[-+]?\d+)?|nan|inf)\b", "#", last)
