"""`search.py`: what it refuses, the page it makes, and that page in a real browser."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.experiments.conftest import Run
from tests.search.conftest import home
from tests.search.test_photographs import photographs, place

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["home", "place"]

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs Gradio: pip install -e '.[demo]'"
)
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Chromium and its driver",
)


@needs_gradio
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("prominent --count 0", 2, "--count must be at least 1"),
        ("prominent --count 12 --shortlist 11", 2, "--shortlist must be at least 12"),
        ("prominent --photos nowhere", 2, "expected a folder"),
        ("prominent --photos data", 2, "none of the images"),
        ("prominent --host 0.0.0.0", 2, "add --password-file"),
        ("prominent --host 0.0.0.0 --password short", 2, "5 characters"),
        ("prominent --password-file nowhere", 2, "--password-file nowhere: cannot be read"),
        ("prominent --password a --password-file b", 2, "not allowed with"),
        ("prominent --port 70000", 2, "--port must be from 1 to 65535"),
        ("prominent --split tset", 2, "invalid choice"),
        ("prominent --split gallery", 3, "gallery_ims.npy"),
        ("prominent --data nowhere", 3, "nowhere"),
        ("data", 5, "no folder of a finished run"),
        ("prominent --against data", 5, "no folder of a finished run"),
        ("prominent --shortlsit 5", 2, "did you mean"),
    ],
)
def test_a_mistake_is_refused_in_a_line(
    home: Path, run: Run, words: str, code: int, said: str
) -> None:
    given = words.split(" ")
    if "--port" not in given:
        given += ["--port", str(free_port())]
    answer = run("search.py", *given, cwd=home)
    assert answer.returncode == code
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("gradio") is not None, reason="Gradio is installed here"
)
def test_without_gradio_it_says_how_to_get_it(home: Path, run: Run) -> None:
    answer = run("search.py", "prominent", cwd=home)
    assert answer.returncode == 2
    assert "pip install -c constraints.txt -e '.[demo]'" in answer.message


@needs_gradio
def test_a_port_in_use_is_refused_before_anything_is_opened(home: Path, run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = run("search.py", "prominent", "--port", str(port), cwd=home)
    assert answer.returncode == 5
    assert f"--port {port}: something listens there already" in answer.message


def test_help_answers_without_the_heavy_libraries() -> None:
    program = (
        "import sys; sys.argv = ['search.py', '--help']\n"
        "from experiments import search\n"
        "try: search.main()\n"
        "except SystemExit: pass\n"
        "print(*sorted({'torch', 'gradio', 'transformers', 'matplotlib'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Exit codes: 0 done" in done.stdout
    assert done.stdout.splitlines()[-1] == ""


@needs_gradio
def test_no_function_of_the_page_can_be_called_by_name(home: Path) -> None:
    from cpfean.search.page.answers import Answers
    from cpfean.search.page.blocks import build_page
    from cpfean.search.page.photos import Photos
    from cpfean.search.searcher import Searcher

    searcher = Searcher.from_pretrained(home / "prominent", cache_dir=home / "cache", device="cpu")
    answers = Answers([searcher], names=["one"], photos=Photos(None), count=5, shortlist=None)
    page = build_page(answers, title="a page", about="about", why_no_upload=None)
    assert len(page.fns) > 5
    assert {function.api_visibility for function in page.fns.values()} == {"private"}
    assert not page.analytics_enabled


@needs_gradio
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to_and_leaves_nothing(
    home: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    with served(home, "prominent", temporary=tmp_path) as (server, _):
        assert list(tmp_path.glob("cpfean-search-*"))
        server.send_signal(stop)
        assert server.wait(timeout=30) == 128 + stop
    assert not list(tmp_path.glob("cpfean-search-*"))


@needs_gradio
@needs_browser
@pytest.mark.slow
@pytest.mark.long
def test_a_browser_searches_by_keyboard_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from browser import ENTER, TAB, browsing

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(30):
        pixels = np.full((60, 80, 3), 8 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"test-{number:06d}.jpg")
    words = ("prominent", "--against", "crossed", "--photos", str(photos), "--count", "4")
    with served(home, *words, temporary=tmp_path) as (_, url), browsing() as browser:
        browser.size(1200, 900)
        browser.open(url)
        until(lambda: browser.run("return document.activeElement?.tagName === 'TEXTAREA'"))
        browser.press(*"a dog <b>{{7*7}}</b>", ENTER)
        until(lambda: browser.run("return document.querySelectorAll('.cards button').length"))
        shown = browser.run("return document.body.innerText")
        assert shown.count("All 30 images scored") == 2
        assert browser.run("return document.querySelectorAll('.cards img').length") == 8
        focused = "return document.activeElement?.dataset?.hit ?? ''"
        for _ in range(10):
            if browser.run(focused) == "2":
                break
            browser.press(TAB)
        assert browser.run(focused) == "2"
        browser.press(ENTER)
        until(lambda: browser.run("return document.querySelectorAll('.pair').length == 2"))
        asked = browser.run("return document.querySelector('.asked').innerText")
        assert asked == "a dog <b>{{7*7}}</b>"
        assert browser.run("return document.querySelectorAll('.regions tbody tr').length") > 0
        # A narrow window has room for everything.
        browser.size(400, 900)
        wide = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.run(wide) <= 0
        assert browser.run(
            "return [...document.querySelectorAll('.frame')].every(f => f.offsetWidth <= 400)"
        )
        assert browser.console() == []
        asked_for = [one for one in browser.requests() if one.startswith("http")]
        assert asked_for
        assert [one for one in asked_for if not one.startswith(f"{url}/")] == []


@needs_gradio
@needs_browser
@pytest.mark.slow
@pytest.mark.long
def test_a_browser_drops_a_photograph_in(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from browser import browsing

    Image.fromarray(photographs(3)[2]).save(tmp_path / "my ünique <photo>.png")
    (tmp_path / "no picture.jpg").write_text("a text")
    with served(place, "model", temporary=tmp_path) as (_, url), browsing() as browser:
        browser.size(1200, 900)
        browser.open(url)
        until(lambda: browser.run("return document.querySelectorAll('[role=tab]').length > 1"))
        browser.run("document.querySelectorAll('[role=tab]')[1].click()")
        until(lambda: browser.run("return !!document.querySelector('input[type=file]')"))
        browser.hand_over("input[type=file]", tmp_path / "no picture.jpg")
        until(lambda: browser.run("return !!document.querySelector('.problem')"))
        assert "found a text" in browser.run("return document.body.innerText")
        browser.hand_over("input[type=file]", tmp_path / "my ünique <photo>.png")
        until(lambda: browser.run("return document.querySelectorAll('.captions button').length"))
        shown = browser.run("return document.body.innerText")
        assert "my ünique <photo>.png" in shown
        assert "All 30 captions scored" in shown
        browser.click(".captions button")
        until(lambda: browser.run("return !!document.querySelector('.pair img')"))
        assert browser.console() == []
        left = [path for path in tmp_path.glob("cpfean-search-*/**/*") if path.is_file()]
        assert left == [], "nothing of a visitor's is kept in a file"


@contextmanager
def served(
    folder: Path, *words: str, temporary: Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `search.py`, and its address."""
    port = free_port()
    command = [sys.executable, str(ROOT / "experiments" / "search.py"), *words]
    settings = {
        "PYTHONPATH": str(ROOT),
        "CPFEAN_CACHE": str(folder / "cache"),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=folder,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        restore_signals=True,
    )
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if "Ctrl-C ends it" in line), "")
        assert line.startswith(f"http://127.0.0.1:{port}"), "it ended before it answered"
        yield server, line.split()[0]
    finally:
        server.kill()
        server.wait(timeout=30)
        if server.stdout is not None:
            server.stdout.close()


def until(done: object, *, seconds: float = 60) -> None:
    """Waits until something is so."""
    assert callable(done)
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
