"""A Chromium without a window, through the WebDriver protocol; and servers for it to look at.

Needs Chromium and its driver (Debian: chromium-driver), and no library.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENTER, TAB = "\ue007", "\ue004"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """One window of a Chromium, through the WebDriver protocol."""

    def __init__(self, driver: str, profile: str) -> None:
        self._driver = driver
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        if binary:
            options["binary"] = binary
        logs = {"browser": "ALL", "performance": "ALL"}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        wanted = {"capabilities": {"alwaysMatch": always}}
        self._session = f"/session/{self._call('POST', '/session', wanted)['sessionId']}"

    def open(self, url: str) -> None:
        # From one place of a page to another one is no load.
        self._call("POST", f"{self._session}/url", {"url": "about:blank"})
        self._call("POST", f"{self._session}/url", {"url": url})

    def remember(self, values: Mapping[str, Any]) -> None:
        """Puts values where the page that is open keeps its own."""
        for name, value in values.items():
            self.run("localStorage.setItem(...arguments)", name, json.dumps(value))

    def run(self, script: str, *arguments: object) -> Any:
        body = {"script": script, "args": arguments}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def click(self, selector: str, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        script = (
            "const found = document.querySelector(arguments[0]); found?.click(); return !!found"
        )
        while not self.run(script, selector):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the page has no {selector}")
            time.sleep(0.2)

    def press(self, *keys: str) -> None:
        """Presses keys one after the other, on whatever has the focus."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": strokes}
        self._call("POST", f"{self._session}/actions", {"actions": [keyboard]})

    def hand_over(self, selector: str, file: Path) -> None:
        """Gives a file to an input for files, as a dialogue or a drop does."""
        found = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", found)
        (name,) = element.values()
        self._call("POST", f"{self._session}/element/{name}/value", {"text": str(file)})

    def console(self) -> list[str]:
        """What the pages have said since the last time, but for mere information."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """The addresses that the pages have asked for since the last time."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "performance"})
        told = [json.loads(entry["message"])["message"] for entry in entries]
        return [
            one["params"]["request"]["url"]
            for one in told
            if one["method"] == "Network.requestWillBeSent"
        ]

    def size(self, width: int, height: int) -> None:
        # That of the page: the window's own borders are not seen.
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": screen}
        self._call("POST", f"{self._session}/goog/cdp/execute", command)

    def picture(self, file: Path) -> None:
        # The pointer's traces, and what fades in.
        time.sleep(1)
        file.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            self._driver + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser with an empty profile."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        running(["chromedriver", f"--port={port}"], f"http://127.0.0.1:{port}/status") as driver,
    ):
        browser = Browser(driver.removesuffix("/status"), profile)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def running(command: Sequence[str], url: str, **environment: str) -> Iterator[str]:
    """A server that answers at an address, and ends with all that it started."""
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while not answers(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} does not answer:\n{log.read().decode()}")
                time.sleep(0.1)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
