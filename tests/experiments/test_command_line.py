"""What users mistype: refused in about a second, by name, without a traceback."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from cpfean.data.synthetic import write_synthetic
from cpfean.errors import ConfigError
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TUNING
from experiments import command_line
from experiments.baselines import BASELINES
from orchestration.settings import Settings
from tests.environment import FAIR, of_a_user
from tests.experiments.conftest import Run
from tests.lab.hosts import wait_until
from tests.orchestration.samples import TINY

ROOT = Path(__file__).resolve().parents[2]


def call(
    script: str,
    *words: str,
    cwd: Path,
    timeout: float = 120,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=of_a_user() | FAIR | {"CPFEAN_CACHE": str(cwd / "cache")} | dict(environment or {}),
        timeout=timeout,
    )


@pytest.mark.parametrize(
    "script",
    [
        "sweep.py",
        "train.py",
        "evaluate.py",
        "run_ablations.py",
        "validate.py",
        "prepare.py",
        "show.py",
        "probe.py",
        "schedule.py",
        "compare.py",
        "tracking_server.py",
        "doctor.py",
    ],
)
def test_help_says_what_it_is_with_examples_and_exit_codes(script: str, run: Run) -> None:
    answer = run(script, "--help")
    assert answer.returncode == 0
    assert f"python experiments/{script}" in answer.stdout
    assert "Exit codes" in answer.stdout


SWEEP, TRAIN, ABLATE = "sweep.py", "train.py", "run_ablations.py"
COMPARE = "compare.py"
PREPARE = "prepare.py"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        # an unknown setting, value or name: the nearest known one is named
        (TRAIN, "--set loss.margn=0.3", "did you mean 'loss.margin'"),
        (TRAIN, "--set margin=0.3", "did you mean 'loss.margin'"),
        (TRAIN, "--config syntetic", "did you mean 'synthetic'"),
        (TRAIN, "--config no/such.toml", "no/such.toml"),
        (SWEEP, "--space defualt", "did you mean 'default'"),
        (ABLATE, "--only no_fussion", "did you mean 'no_fusion'"),
        # given twice
        (TRAIN, "--set loss.margin=0.3 --set loss.margin=0.4", "loss.margin is given twice"),
        (TRAIN, "--seed 1 --set seed=2", "seed is given twice"),
        (TRAIN, "--seed 1 --seed 2", "--seed: given twice"),
        (ABLATE, "--only no_gcn --only no_gcn", "twice"),
        # a text where a number or a truth value belongs
        (TRAIN, "--set optim.learning_rate=fast", "must be a number"),
        (TRAIN, "--set model.regions.prior=maybe", "must be true or false"),
        (TRAIN, "--epochs 2.5", "optim.epochs must be a whole number"),
        (TRAIN, "--set loss.margin", "PATH=VALUE"),
        # outside its range
        (TRAIN, "--set optim.learning_rate=nan", "must be finite"),
        (TRAIN, "--set loss.margin=0", "loss.margin must be in (0, 2]"),
        (TRAIN, "--set optim.batch_size=1", "at least 2"),
        (TRAIN, "--set model.regions.iou_threshold=1.5", "in [0, 1]"),
        (TRAIN, "--set model.regions.iou_threshold=nan", "must be finite"),
        (TRAIN, "--epochs 0", "optim.epochs must be at least 1"),
        (TRAIN, "--workers -1", "--workers must be at least 0"),
        (TRAIN, "--name ../escape", "--name must be"),
        (TRAIN, "--address nowhere", "host:port"),
        (SWEEP, "--trials 0", "--trials must be at least 1"),
        (SWEEP, "--workers 0", "--workers must be at least 1"),
        (SWEEP, "--set model.alignment.fusion=false", "search space 'default'"),
        (ABLATE, "--seeds 0", "--seeds must be at least 1"),
        (ABLATE, "--only regions_36 --set data.synthetic.train_images=16", "36 regions"),
        (COMPARE, "--methods skan", "did you mean 'scan'"),
        (COMPARE, "--methods scan --methods scan", "twice"),
        (COMPARE, "--tuning 0", "--tuning must be at least 1"),
        (COMPARE, "--in-process --workers 2", "--in-process is one process"),
        (COMPARE, "--resume", "nothing to resume"),
        (SWEEP, "--resume", "nothing to resume"),
        # what it may take
        (SWEEP, "--max-hours 0", "--max-hours must be a number above 0"),
        (ABLATE, "--max-cost -1", "--max-cost must be a number above 0"),
        (COMPARE, "--max-hours nan", "--max-hours must be a number above 0"),
        (SWEEP, "--max-hours long", "invalid float value"),
        (SWEEP, "--prices none.toml", "none.toml: cannot be read"),
        (TRAIN, "--max-hours 1", "no flag --max-hours"),  # a training is one trial
        # flags
        (SWEEP, "--trails 3", "did you mean '--trials'"),
        (SWEEP, "--trial 3", "did you mean '--trials'"),
        (SWEEP, "--epo 3", "no flag --epo"),
        (TRAIN, "more words", "unexpected: more words"),
        # flags that need or exclude each other
        (PREPARE, "out", "--scan DIR or from --table FILE"),
        (PREPARE, "out --scan a --table b", "give one of them"),
        (PREPARE, "out --table b", "--karpathy FILE or --captions"),
        (PREPARE, "out --table b --karpathy c --boxes d", "--boxes goes with --scan"),
        (PREPARE, "out --scan a --vocabulary b", "--vocabulary goes with --table"),
        (PREPARE, "out --table b --karpathy c --vocabulary d --no-labels", "exclude each other"),
        (PREPARE, "out --table b --captions val=c", "train, dev or test"),
        (PREPARE, "out --scan a --regions 0", "--regions must be at least 1"),
        (PREPARE, "out --scan a --feature-type float16", "--feature-type goes with --table"),
        (PREPARE, "out --scan a --box-order xyyx", "invalid choice"),
        (PREPARE, "out --scan a --labels-from 2", "invalid choice"),
    ],
)
def test_a_mistake_is_refused_with_exit_code_2(
    script: str, words: str, said: str, run: Run, tmp_path: Path
) -> None:
    answer = run(script, *words.split(" "))
    assert answer.returncode == 2, answer.stderr
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_limit_in_dollars_without_a_price_is_refused_as_ray_starts(tmp_path: Path) -> None:
    answer = call(SWEEP, "--max-cost", "3", "--address", "local", cwd=tmp_path)
    assert answer.returncode == 2, answer.stderr
    assert "has none for 'other'" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[loss]\nmargin = 0.3\nmargin = 0.4\n", "not valid TOML"),
        ("[loss]\nmargn = 0.3\n", "did you mean 'margin'"),
        ('[optim]\nlearning_rate = "1e-4"\n', "must be a number"),
        ('[model.regions]\nprior = "no"\n', "must be true or false"),
        ("[loss]\nmargin = -0.1\n", "in (0, 2]"),
    ],
)
def test_a_bad_configuration_file_is_refused_by_name(
    text: str, said: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "my.toml").write_text(text)
    answer = run(TRAIN, "--config", "my.toml")
    assert answer.returncode == 2
    assert "my.toml" in answer.stderr
    assert said in answer.stderr


def test_bad_data_is_refused_with_exit_code_3_before_anything_starts(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    # Of what runs on Ray this is the half that starts none; test_head_start.py has the other.
    for script, *words in (
        (SWEEP, "--dry-run"),
        (TRAIN,),
        (ABLATE, "--dry-run"),
        (COMPARE, "--in-process"),
    ):
        answer = run(script, "--data", "data", *words)
        assert answer.returncode == 3
        assert "train_ims.npy" in answer.stderr
        assert not (tmp_path / "runs").exists()
    answer = run("validate.py", "data", "--json")
    assert answer.returncode == 3
    findings = json.loads(answer.stdout)["findings"]
    assert any("train_ims.npy" in finding["where"] for finding in findings)


def test_what_cannot_be_converted_is_refused_with_exit_code_3(run: Run, tmp_path: Path) -> None:
    for words, said in (
        ("--scan scan", "scan: expected a folder"),
        ("--table a.tsv --karpathy splits.json", "splits.json: cannot be read"),
        ("--table a.tsv --captions train=notes.json", "notes.json: cannot be read"),
    ):
        answer = run(PREPARE, "out", *words.split(" "))
        assert answer.returncode == 3
        assert said in answer.stderr
        assert "Traceback" not in answer.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_conversion_ends_with_what_is_there_and_a_line_that_trains_on_it(
    run: Run, tmp_path: Path
) -> None:
    """From a folder with x and y exchanged, by the commands that are printed, to a training."""
    old = tmp_path / "my $data's"
    write_synthetic(old, TINY.data.synthetic)
    for split in ("train", "dev", "test"):
        boxes = np.load(old / f"{split}_boxes.npy")
        np.save(old / f"{split}_boxes.npy", boxes[..., [1, 0, 3, 2]])
    answer = run("validate.py", str(old))
    assert answer.returncode == 3
    (line, *_) = re.findall(r": (\S*python\S* .*) \[box-format\]", answer.stdout)
    done = subprocess.run(
        ["/bin/bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ) | {"CPFEAN_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert any(row.startswith("train") and " 5 " in row for row in told)
    assert any(row.startswith("commonest labels: ") for row in told)
    assert shlex.split(told[-1])[-3].endswith("train.py")
    assert shlex.split(told[-1])[-2:] == ["--data", f"{old}.new"]
    sound = run("validate.py", f"{old}.new", "--json")
    assert sound.returncode == 0
    summary = json.loads(sound.stdout)["summary"]
    assert summary["splits"]["dev"]["images"] == TINY.data.synthetic.dev_images
    assert len(summary["examples"]) == 3


def test_a_text_encoder_that_is_not_there_is_refused_before_anything_starts(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(
        TINY.with_overrides({"model.text.encoder": "no/such-encoder"}).to_toml()
    )
    answer = run(SWEEP, "--config", "tiny.toml", "--dry-run")
    assert answer.returncode == 2
    assert "no/such-encoder" in answer.stderr
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_that_is_none_is_refused(run: Run, tmp_path: Path) -> None:
    answer = run("evaluate.py", str(tmp_path))
    assert answer.returncode == 5
    assert "no folder of a finished run" in answer.stderr


def test_a_training_is_evaluated_as_json_with_what_it_printed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.to_toml())
    trained = run(TRAIN, "--config", "tiny.toml", "--name", "t")
    assert trained.returncode == 0, trained.stderr
    answer = run("evaluate.py", "runs/t", "--split", "test")
    assert answer.returncode == 0, answer.stderr
    metrics = json.loads(answer.stdout)
    size = {key: metrics.pop(key) for key in ("images", "captions", "folds")}
    images = TINY.data.synthetic.test_images
    assert size == {"images": images, "captions": 5 * images, "folds": 1}
    assert f"test: ranked among {images} images and {5 * images} captions" in answer.stderr
    recalls = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert set(metrics) == {*recalls, "rsum"}
    assert metrics["rsum"] == pytest.approx(sum(metrics[name] for name in recalls))
    assert metrics == json.loads((tmp_path / "runs/t/summary.json").read_text())["test"]
    again = run(TRAIN, "--config", "tiny.toml", "--name", "t")
    assert again.returncode == 2
    assert "--resume" in again.stderr
    (data,) = (path for path in (tmp_path / "cache").glob("synthetic-*") if path.is_dir())
    valid = run("validate.py", str(data))
    assert (valid.returncode, valid.stderr) == (0, "")


@pytest.mark.parametrize(
    ("script", "words", "trials"),
    [
        (SWEEP, "--address local --trials 5", "5 of 5 to run"),
        (COMPARE, "--in-process --methods full --methods scan --seeds 2 --tuning 3", "10 of 10"),
    ],
)
def test_a_dry_run_says_what_it_would_take_and_starts_nothing(
    script: str, words: str, trials: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.to_toml())
    (tmp_path / "p.toml").write_text("[nodes]\nother = { dollars = 36000.0 }\n")
    answer = run(
        script,
        *("--config tiny.toml --dry-run --prices p.toml " + words).split(),
        environment={"RAY_TMPDIR": str(tmp_path / "r")},
    )
    assert answer.returncode == 0, answer.stderr
    lines = {line[:16].strip(): line[16:] for line in answer.stdout.splitlines()}
    assert trials in lines["trials"]
    assert "2 epochs of 2 steps" in lines["trials"]  # 80 pairs, 40 in a batch
    hours = float(re.search(r", ([\d.e-]+) hours", lines["time"])[1])  # type: ignore[index]
    dollars = float(re.search(r"\$([\d.]+) for 1 x other", lines["cost"])[1])  # type: ignore[index]
    assert hours > 0
    assert dollars == pytest.approx(36000 * hours, rel=0.01, abs=0.01)
    assert "2 kept" in lines["disk"]
    assert "not counted" in answer.stdout
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "r").exists()


def test_the_named_configurations_survive_a_file() -> None:
    for config in BASELINES.values():
        assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("kind", "names"), [("sweep", ["s"]), ("comparison", ["s", f"s{TUNING}"])])
def test_what_is_to_be_resumed_is_fetched_if_it_is_not_here(
    tmp_path: Path, kind: str, names: list[str]
) -> None:
    where = Settings(
        output=tmp_path / "runs",
        cache_dir=tmp_path,
        tracking_uri="",
        storage=str(tmp_path / "storage"),
    )
    for name in ("s", f"s{TUNING}"):
        RunFolder(tmp_path / "storage" / "studies" / name).create({"kind": kind})
    asked = argparse.Namespace(name="s", resume=False, retry_failed=False)
    assert command_line.run_name(asked, kind, where) == "s"
    assert not where.output.exists()
    asked.resume = True
    assert command_line.run_name(asked, kind, where) == "s"
    assert sorted(path.name for path in where.output.iterdir()) == names


@pytest.mark.long
def test_the_line_that_goes_on_with_a_training_does_so_when_it_is_pasted(tmp_path: Path) -> None:
    tiny = TINY.with_overrides({"optim.epochs": 200})
    (tmp_path / "my tiny.toml").write_text(tiny.to_toml())
    environment = of_a_user() | FAIR | {"CPFEAN_CACHE": str(tmp_path / "cache")}
    words = ["--config", "my tiny.toml", "--output", "it's $HOME `x`", "--set", "optim.patience=4"]
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "experiments" / TRAIN), *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=environment,
        )
        wait_until(lambda: "epoch 1/" in log.read_text(), seconds=120, what="the first epoch")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    told, line = log.read_text().splitlines()[-2:]
    assert told.endswith("Stopped; continue with:")
    (name,) = (path.parent.name for path in (tmp_path / "it's $HOME `x`").glob("*/sweep.json"))
    assert line.endswith(f"--resume --name {name}")
    again = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr
    assert "resuming from " in again.stdout
    assert "test rSum" in again.stdout


@pytest.mark.parametrize("asked", [{"workers": 0}, {"workers": 1, "in_process": True}])
def test_what_trains_in_this_process_does_not_mind_an_address_of_something_else(
    asked: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    flags = {"output": tmp_path, "tracking_uri": None, "address": None} | asked
    assert command_line.settings(argparse.Namespace(**flags)).address is None
    with pytest.raises(ConfigError, match="--address"):
        command_line.settings(argparse.Namespace(**flags | {"address": "nowhere"}))
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        command_line.settings(argparse.Namespace(**flags | {"workers": 1, "in_process": False}))
