"""Draw a sweep as MLflow shows it in a browser: the table of its trials, and rSum by epoch.

    python benchmarks/draw_tracking.py runs/NAME docs/images

Starts an MLflow server on loopback and a Chromium without a window, opens both pages, and writes a
picture only of a page whose text names every trial with the rSum that the records on disk have.
Needs Chromium and its driver (Debian: chromium-driver).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from browser import Browser, browsing, free_port, running

from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from orchestration.settings import prepare_environment
from orchestration.tracking.stores import open_store

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


if __name__ == "__main__":
    main()
