"""MLflow's pages of a sweep, in a real browser: every trial with its rSum, side by side."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cpfean.records.run_folder import RunFolder
from orchestration.tracking.runs import TrackedRun
from tests.benchmarks.conftest import ROOT
from tests.orchestration.samples import record
from tests.orchestration.tracking.tracked import track

SCRIPT = ROOT / "benchmarks" / "draw_tracking.py"
TRIALS = (
    record(0, 20.5, 300.25, state="finished", overrides={"loss.margin": 0.2}),
    record(1, 40.0, 280.4, 361.0, state="finished", overrides={"loss.margin": 0.1}),
    record(2, 90.0, 61.3, state="pruned", overrides={"loss.margin": 0.3}),
)


@pytest.mark.slow
@pytest.mark.long
def test_the_pages_show_every_trial_with_its_rsum(tmp_path: Path) -> None:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and its driver")
    folder = RunFolder(tmp_path / "a-sweep")
    folder.create({"kind": "sweep"})
    run = TrackedRun(id=folder.id, name="a-sweep", kind="sweep")
    for trial in TRIALS:
        folder.write(trial)
    track(f"sqlite:///{tmp_path / 'mlflow.db'}", *TRIALS, end="finished", run=run)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder.path), str(tmp_path / "pictures")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # What the pages said, and not what the records do.
    seen = re.findall(r"^  (\S+)  val/rsum (\S+)$", done.stdout, re.MULTILINE)
    expected = {"trial-000": 300.25, "trial-001": 361.0, "trial-002": 61.3}
    assert len(seen) == 2 * len(expected)
    for page in (seen[: len(expected)], seen[len(expected) :]):
        shown = {name: float(rsum) for name, rsum in page}
        assert shown == pytest.approx(expected, abs=0.05)
    for name in ("mlflow-trials.png", "mlflow-curves.png"):
        start = (tmp_path / "pictures" / name).read_bytes()[:24]
        assert start[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", start[16:])
        assert width >= 1280
        assert height >= 400


def test_a_page_without_a_trial_or_with_another_rsum_is_no_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("draw_tracking", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    right = {"trial-000": "300.25", "trial-001": "361", "trial-002": "61.3", "a-sweep": "-"}
    assert module.complete(TRIALS, lambda: right) == {
        name: rsum for name, rsum in right.items() if name != "a-sweep"
    }
    for wrong in (
        {**right, "trial-002": "61.5"},
        {**right, "trial-002": "-"},
        {name: rsum for name, rsum in right.items() if name != "trial-001"},
    ):
        with pytest.raises(RuntimeError, match="the page shows"):
            module.complete(TRIALS, lambda wrong=wrong: wrong, seconds=0)
