"""Draw a sweep as MLflow shows it in a browser: the table of its trials, and rSum by epoch.

    python benchmarks/draw_tracking.py runs/NAME docs/images

Starts an MLflow server on loopback and a Chromium without a window, opens both pages, and writes a
picture only of a page whose text names every trial with the rSum that the records on disk have.
Needs Chromium and its driver (Debian: chromium-driver).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from orchestration.settings import prepare_environment
from orchestration.tracking.stores import open_store

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
# What MLflow's pages keep in a browser: models instead of chats, and no assistant beside them.
PREFERENCES = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.panelOpen_v1": False,
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
}


def main() -> None:
    """Opens the pages, looks whether they are complete, and takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of the sweep")
    parser.add_argument("pictures", type=Path, help="folder to write mlflow-*.png to")
    parser.add_argument(
        "--tracking-uri", help="of MLflow (default: the sqlite file beside the folder of the sweep)"
    )
    arguments = parser.parse_args()
    prepare_environment()
    folder = RunFolder(arguments.run.absolute())
    uri = arguments.tracking_uri or f"sqlite:///{folder.path.parent / 'mlflow.db'}"
    seen = draw(folder, uri, arguments.pictures)
    for picture, rows in seen.items():
        print(picture)
        for name, rsum in rows.items():
            print(f"  {name}  val/rsum {rsum}")


def draw(folder: RunFolder, uri: str, pictures: Path) -> Mapping[str, Mapping[str, str]]:
    """Writes mlflow-trials.png and mlflow-curves.png.

    Returns:
        for each picture, the rSum that its page shows beside the name of each trial.

    Raises:
        RuntimeError: a page that does not show every trial with its last rSum.
    """
    records = folder.records()
    client, experiment = open_store(uri)
    query = f"tags.`cpfean.id` = '{folder.id}'"
    runs = {
        run.data.tags.get("cpfean.trial"): run for run in client.search_runs([experiment], query)
    }
    ids = [runs[str(record.number)].info.run_id for record in records]
    parent = runs[None].info.run_id
    pictures.mkdir(parents=True, exist_ok=True)
    seen = {}
    with serving(uri) as server, browsing() as browser:
        browser.open(server)
        browser.remember(PREFERENCES)
        browser.remember(table_view(experiment, parent, records))

        browser.size(1540, 352 + 32 * len(records))
        browser.open(f"{server}/#/experiments/{experiment}/runs")
        browser.click("[aria-label='Toggle sidebar']")
        seen["mlflow-trials.png"] = complete(records, lambda: rows_of_table(browser))
        browser.picture(pictures / "mlflow-trials.png")

        browser.size(1280, 800)
        browser.open(f"{server}/#/metric?{curves_query(ids, experiment)}")
        seen["mlflow-curves.png"] = complete(records, lambda: rows_of_curves(browser))
        browser.picture(pictures / "mlflow-curves.png")
    return seen


def table_view(
    experiment: str, parent: str, records: Sequence[TrialRecord]
) -> Mapping[str, Mapping[str, Any]]:
    """The table as somebody leaves it who has unfolded the sweep and chosen what varies."""
    varied = sorted({path for record in records for path in record.overrides}, key=len)
    columns = ["metrics.`val/rsum`", *(f"params.`{path}`" for path in varied)]
    state = {
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": ["duration", *columns],
        "columnWidths": {f"params.`{path}`": 25 + 7 * len(path) for path in varied},
        "runsExpanded": {parent: True},
    }
    return {f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState': state}


def curves_query(ids: Sequence[str], experiment: str) -> str:
    """The page of one metric of several runs, by epoch."""
    given = {
        "runs": ids,
        "experiments": [experiment],
        "metric": "val/rsum",
        "plot_metric_keys": ["val/rsum"],
    }
    listed = "&".join(f"{name}={quote(json.dumps(value))}" for name, value in given.items())
    return f"{listed}&x_axis=step&show_point=true"


def complete(
    records: Sequence[TrialRecord], rows: Callable[[], Mapping[str, str]], *, seconds: float = 60
) -> Mapping[str, str]:
    """Waits until a page shows every trial with its last rSum, to the first decimal.

    Raises:
        RuntimeError: it never does.
    """
    expected = {record.name: record.history[-1]["val/rsum"] for record in records if record.history}

    def is_right(name: str, shown: Mapping[str, str]) -> bool:
        try:
            return abs(float(shown[name]) - expected[name]) < 0.05
        except (KeyError, ValueError):
            return False

    deadline = time.monotonic() + seconds
    shown = rows()
    while not all(is_right(name, shown) for name in expected):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the page shows {dict(shown)}, the records have {expected}")
        time.sleep(0.2)
        shown = rows()
    return {name: shown[name] for name in expected}


def rows_of_table(browser: Browser) -> Mapping[str, str]:
    """Name and rSum of every row of the table of runs: its columns are in several containers."""
    return browser.run("""
        const rows = {};
        for (const cell of document.querySelectorAll('[role=row][row-id] [col-id]')) {
            const row = rows[cell.closest('[row-id]').getAttribute('row-id')] ??= {};
            row[cell.getAttribute('col-id')] = cell.innerText.trim();
        }
        const shown = {};
        for (const row of Object.values(rows)) {
            const name = Object.entries(row).find(([column]) => /name/i.test(column));
            const rsum = Object.entries(row).find(([column]) => column.includes('val/rsum'));
            if (name && rsum) shown[name[1].split('\\n').pop()] = rsum[1];
        }
        return shown;
    """)


def rows_of_curves(browser: Browser) -> Mapping[str, str]:
    """Name and last rSum of every row of the table below the curves, once these are drawn."""
    return browser.run("""
        const shown = {};
        if (!document.querySelector('.js-plotly-plot .scatterlayer .trace')) return shown;
        for (const row of document.querySelectorAll('tr[data-row-key]')) {
            const [name, latest] = [...row.cells].map(cell => cell.innerText.trim());
            shown[name] = latest.replace(/ \\(step=\\d+\\)$/, '');
        }
        return shown;
    """)


class Browser:
    """One window of a Chromium, through the WebDriver protocol."""

    def __init__(self, driver: str, profile: str) -> None:
        self._driver = driver
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        if binary:
            options["binary"] = binary
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
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
def serving(uri: str) -> Iterator[str]:
    """The address of a server of what is tracked."""
    if uri.startswith(("http://", "https://")):
        yield uri.rstrip("/")
        return
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", uri, "--port", url.rsplit(":", 1)[1]]
    with running(command, f"{url}/health", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        yield url


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


if __name__ == "__main__":
    main()
