"""Signals and errors that stop a study."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cpfean.errors import ConfigError, ServiceError
from orchestration.study.stopping import Deadlines, Interrupted, Stop


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = """
import os, signal, time
from orchestration.study.stopping import Stop

stop = Stop(print)
signal.signal(signal.SIGUSR1, lambda *_: None)
with stop.listening(), stop.at_work(lambda seconds: True):
    os.kill(os.getpid(), signal.SIGINT)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        print("tidied up")
"""
    ended = subprocess.run([sys.executable, "-uc", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "")
    assert ended.stdout == "stopping ... (once more to stop at once)\n"


def test_the_first_error_counts_and_a_signal_that_comes_first_is_no_error() -> None:
    stop = Stop(print)
    stop.check()
    assert not stop.is_asked
    stop.fail(ServiceError("first"))
    stop.fail(ServiceError("second"))
    assert stop.is_asked
    assert stop.exit_code == 5
    with pytest.raises(ServiceError, match="first"):
        stop.check()


def test_errors_of_ours_and_of_disks_are_kept_and_defects_are_not(tmp_path) -> None:
    for error, told in (
        (ConfigError("margin"), "margin"),
        (OSError(28, "No space left on device"), "disk full"),
    ):
        stop = Stop(print)
        with stop.errors_of(tmp_path):
            raise error
        assert told in str(stop.error)
    stop = Stop(print)
    with pytest.raises(ZeroDivisionError), stop.errors_of(tmp_path):
        raise ZeroDivisionError
    assert stop.error is None


def test_work_that_saves_in_time_is_not_interrupted() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    saved = threading.Event()
    stop = Stop(lambda line: None, deadlines=Deadlines(saved=30.0, ended=60.0))
    try:
        with stop.listening():
            with stop.at_work(saved.wait):
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.signal == signal.SIGTERM
                saved.set()
                time.sleep(0.1)
            with pytest.raises(Interrupted):
                stop.check()
        assert heard == []
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stopped_study_has_some_seconds_to_close_and_another_one_a_minute() -> None:
    stop = Stop(lambda line: None, deadlines=Deadlines(closed=5.0))
    assert stop.seconds_to_close == 60.0
    with pytest.raises(Interrupted), stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert 0 < stop.seconds_to_close <= 5.0
