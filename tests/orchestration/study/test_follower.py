"""What a follower promises whatever its sinks do; sinks of tests are lists that can fail."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from cpfean.records.trial_record import TrialRecord
from orchestration.study.follower import (
    Follower,
    GivenUpError,
    Pauses,
    RefusedError,
    ShutError,
    StudyNews,
)
from tests.lab.hosts import wait_until
from tests.orchestration.samples import record

SOON = Pauses(retry=0.02, refused=0.02, away=0.2)
RARE = Pauses(retry=60.0, refused=60.0, away=0.2)


class Noted:
    """A sink that keeps what it is sent.

    Attributes:
        got: "running" of the whole, "0:2" of a trial with two epochs, "files 0".
        fails: called with each of them before it is taken.
        answers: as long as it is not set, everything hangs.
        beats: of them, true ones find the whole to be dirty.
    """

    name = "noted"
    names_resume = False

    def __init__(self, fails: Callable[[str], None] = lambda what: None) -> None:
        self.got: list[str] = []
        self.tried: list[str] = []
        self.fails = fails
        self.answers = threading.Event()
        self.answers.set()
        self.beat_due = float("inf")
        self.on_beat: Callable[[], bool] = lambda: False
        self.is_loaded = False

    def load(self) -> None:
        self.is_loaded = True

    def open(self) -> None:
        self.answers.wait(60)

    def send_study(self, news: StudyNews) -> None:
        self._take(news.state)

    def send_trial(self, record: TrialRecord) -> None:
        self._take(f"{record.number}:{record.epochs}")

    def send_files(self, paths: Sequence[Path], record: TrialRecord | None) -> None:
        whose = "whole" if record is None else record.number
        self._take(" ".join([f"files {whose}", *(path.name for path in paths)]))

    def beat(self) -> bool:
        self.beat_due = float("inf")
        return self.on_beat()

    def away(self, error: Exception) -> str:
        return f"away: {error}"

    def lacks(
        self, records: Sequence[TrialRecord], files: Mapping[int | None, Sequence[Path]]
    ) -> str:
        numbers = [one.number for one in records]
        return f"lacks {numbers}, files of {list(files)}" if numbers or files else ""

    def _take(self, what: str) -> None:
        self.tried.append(what)
        self.fails(what)
        self.got.append(what)

    def wait_for(self, what: str) -> None:
        wait_until(lambda: what in self.got, seconds=30, what=what)


def started(*sinks: Noted, pauses: Pauses = SOON) -> tuple[Follower, list[str]]:
    """A follower, and what it says."""
    said: list[str] = []
    follower = Follower(sinks, say=said.append, pauses=pauses)
    follower.start()
    return follower, said


def failing(*errors: Exception, of: str = "") -> Callable[[str], None]:
    """Raises one after another, for what begins so; the last one for good."""
    left = list(errors)

    def fails(what: str) -> None:
        if what.startswith(of) and left:
            raise left.pop(0) if len(left) > 1 else left[0]

    return fails


def passing(*errors: Exception, of: str = "") -> Callable[[str], None]:
    """Raises one after another, for what begins so; then no more."""
    left = list(errors)

    def fails(what: str) -> None:
        if what.startswith(of) and left:
            raise left.pop(0)

    return fails


def test_without_sinks_nothing_is_noted_and_all_is_done() -> None:
    follower, said = started()
    follower.update(record(0, 1.0))
    follower.meet(seconds=60)
    assert follower.close()
    assert (follower.first, said) == ("", [])


def test_each_sink_gets_the_whole_at_once_and_then_what_changes() -> None:
    one, other = Noted(), Noted()
    follower, said = started(one, other)
    for sink in (one, other):
        assert sink.is_loaded
        sink.wait_for("running")
    follower.update(record(0, 1.0, 2.0))
    follower.update_study("finished", {})
    assert follower.close()
    for sink in (one, other):
        assert sink.got == ["running", "0:2", "finished", "files 0"]
    assert said == []


def test_what_is_sent_is_what_is_known_by_then() -> None:
    sink = Noted()
    sink.answers.clear()
    follower, _ = started(sink)
    growing = record(0, 1.0)
    for epochs in range(2, 30):
        growing.history = record(0, *range(epochs)).history
        follower.update(growing)
    growing.history = []  # which the follower does not see
    follower.update_study("finished", {})
    sink.answers.set()
    assert follower.close()
    assert sink.got == ["0:29", "finished", "files 0"]


def test_numbers_go_before_files_and_the_end_of_the_whole_after_the_trials() -> None:
    sink = Noted()
    sink.answers.clear()
    follower, _ = started(sink)
    follower.keep_files([Path("a.png")], record(0, 1.0))
    follower.keep_files([Path("report.md")])
    follower.update_study("finished", {})
    follower.update(record(1, 1.0))
    follower.update(record(0, 1.0))
    follower.keep_files([Path("b.png"), Path("a.png")], record(0, 1.0))
    sink.answers.set()
    assert follower.close()
    files = ["files 0 a.png b.png", "files whole report.md", "files 1"]
    assert sink.got == ["1:1", "0:1", "finished", *files]


def test_a_sink_that_hangs_holds_up_neither_the_study_nor_the_other_sink() -> None:
    hangs, other = Noted(), Noted()
    hangs.answers.clear()
    follower, said = started(hangs, other)
    began = time.monotonic()
    for epochs in range(50):
        follower.update(record(0, *range(epochs)))
    assert time.monotonic() - began < 0.5
    other.wait_for("0:49")
    began = time.monotonic()
    assert not follower.close(seconds=0.4)
    assert time.monotonic() - began < 2
    assert said == ["lacks [0], files of [0]"]
    hangs.answers.set()


def test_one_sink_takes_no_more_of_the_end_than_its_share() -> None:
    hangs, slow = Noted(), Noted()
    hangs.answers.clear()
    follower, _ = started(hangs, slow)
    slow.wait_for("running")
    slow.fails = lambda what: time.sleep(0.8)
    follower.update_study("finished", {})
    began = time.monotonic()
    follower.close(seconds=1.2)
    assert time.monotonic() - began < 1.15  # a share of 0.6, and what the other takes
    assert slow.got == ["running", "finished"]
    hangs.answers.set()


def test_what_fails_stays_dirty_and_is_told_once() -> None:
    sink = Noted(passing(*[OSError("gone")] * 5))
    follower, said = started(sink)
    follower.update(record(0, 1.0))
    sink.wait_for("0:1")
    assert follower.close()
    assert said == ["away: gone"]
    assert sink.got == ["running", "0:1", "files 0"]


def test_a_sink_that_is_away_is_tried_once_more_at_the_end_and_not_waited_for() -> None:
    sink = Noted(failing(OSError("gone")))
    follower, said = started(sink, pauses=RARE)
    wait_until(lambda: said != [], seconds=30, what="the warning")
    follower.update(record(0, 1.0))
    assert sink.tried == ["running"]
    began = time.monotonic()
    assert not follower.close()
    assert time.monotonic() - began < 2
    assert len(sink.tried) == 2
    assert said == ["away: gone", "lacks [0], files of [0]"]
    assert follower.first == ""


def test_a_sink_that_is_away_and_hangs_is_waited_for_no_longer_than_it_is_worth() -> None:
    sink = Noted(failing(OSError("gone")))
    follower, said = started(sink)
    wait_until(lambda: said != [], seconds=30, what="the warning")
    sink.answers.clear()
    began = time.monotonic()
    follower.close()
    assert time.monotonic() - began < 2
    sink.answers.set()


def test_what_is_refused_is_told_once_holds_up_nothing_else_and_is_asked_once_more() -> None:
    sink = Noted(failing(RefusedError("it was deleted"), of="0:"))
    follower, said = started(sink, pauses=RARE)
    for epochs in range(1, 20):
        follower.update(record(0, *range(epochs)))
        follower.update(record(1, *range(epochs)))
        sink.wait_for(f"1:{epochs}")
    assert said == ["it was deleted"]
    assert len([what for what in sink.tried if what.startswith("0:")]) == 1
    follower.update_study("finished", {})
    assert not follower.close()
    assert len([what for what in sink.tried if what.startswith("0:")]) == 2
    assert sink.tried[-1] == "0:19"
    assert said == ["it was deleted", "lacks [0], files of []"]
    assert "finished" in sink.got
    assert follower.first == "once that is mended, "


def test_what_is_refused_is_sent_when_it_is_mended() -> None:
    sink = Noted(passing(*[RefusedError("it was deleted")] * 3, of="0:"))
    follower, said = started(sink)
    follower.update(record(0, 1.0))
    sink.wait_for("0:1")
    assert follower.first == ""
    assert follower.close()
    assert said == ["it was deleted"]


def test_a_sink_that_is_shut_says_what_mends_it_once_and_gets_all_then() -> None:
    sink = Noted(failing(ShutError("restore it")))
    follower, said = started(sink)
    follower.meet(seconds=30)
    wait_until(lambda: len(sink.tried) > 3, seconds=30, what="some tries")
    assert follower.first == "once that is mended, "
    sink.fails = lambda what: None
    assert follower.close()
    assert (follower.first, said) == ("", ["restore it"])


def test_a_sink_that_gives_up_says_why_and_gets_nothing_more() -> None:
    sink = Noted(failing(GivenUpError("another's")))
    follower, said = started(sink)
    follower.meet(seconds=30)
    wait_until(lambda: said != [], seconds=30, what="the reason")
    follower.update(record(0, 1.0))
    follower.close()
    assert (sink.tried, said) == (["running"], ["another's"])


@pytest.mark.parametrize("names_resume", [True, False])
def test_a_sink_may_say_itself_how_the_rest_is_sent(names_resume: bool) -> None:
    sink = Noted(failing(OSError("gone")))
    sink.names_resume = names_resume
    follower, _ = started(sink)
    assert follower.close() == names_resume


def test_the_first_answer_is_waited_for_and_no_longer_than_that() -> None:
    sink = Noted()
    sink.answers.clear()
    follower, _ = started(sink)
    began = time.monotonic()
    follower.meet(seconds=0.2)
    assert 0.2 <= time.monotonic() - began < 1
    threading.Timer(0.2, sink.answers.set).start()
    follower.meet(seconds=30)
    assert time.monotonic() - began < 5


def test_a_beat_finds_what_nobody_tells_of() -> None:
    sink = Noted()
    sink.on_beat = lambda: True
    follower, _ = started(sink)
    sink.wait_for("running")
    sink.beat_due = 0.0
    follower.update(record(0, 1.0))
    wait_until(lambda: sink.got.count("running") == 2, seconds=30, what="the whole once more")
    assert follower.close()


def test_a_beat_that_fails_or_hangs_is_not_told_and_not_waited_for() -> None:
    sink = Noted()
    came, over = threading.Event(), threading.Event()

    def beat() -> bool:
        came.set()
        over.wait(60)
        raise OSError("gone")

    sink.on_beat, sink.beat_due = beat, time.monotonic() + 0.1
    follower, said = started(sink)
    assert came.wait(30)
    began = time.monotonic()
    assert follower.close()
    assert time.monotonic() - began < 2
    over.set()
    assert (sink.got, said) == (["running"], [])
