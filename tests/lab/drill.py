"""From `ray up` to a result on several hosts, with a fault in the middle; then every record.

What a user types is typed on the lab's laptop. The head tracks with an MLflow server of its own,
records and checkpoints are on the storage that the hosts share, and each worker host has one CPU,
so that a trial of two workers needs both. When the second trial has begun, one of them is lost:

power      it comes back half a minute later, with nothing running
network    nobody reaches it and it reaches nobody but the storage, until the trial's next attempt,
           with one worker if need be, has come further; its old processes are all there then
notice     its metadata say, as those of a spot machine, that it will be taken away in two minutes;
           when its trial has been saved in mid-epoch it loses its power, as above

In the end the records, Tune's folders and MLflow have to tell the same, also of two smaller sweeps
that were sent in other ways, and nothing may be left running.

With services, MLflow keeps its runs in PostgreSQL, and data, checkpoints and artifacts are on S3.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from cpfean.storage.checkpoint_names import MARKER
from cpfean.storage.checkpoints import CheckpointFolder
from tests.faults import moto_program, postgres_program
from tests.lab.hosts import Lab, address, wait_until
from tests.orchestration.samples import TINY

ROOT = Path(__file__).resolve().parents[2]
TRIALS, EPOCHS, WORKERS = 4, 6, 2
WORKER_HOSTS = ("worker-1", "worker-2")
NAME = "drill"
OTHERS = ("submitted", "job")  # sweeps of one trial
SILENCE = 30  # seconds, of a host without network

Fault = Literal["power", "network", "notice"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

_OUTPUT = "/mnt/runs"
_SERVER = "http://127.0.0.1:5000"
_JOBS = "http://127.0.0.1:8265"
_RAY = ("raylet", "gcs_server", "ray::", "ray/dashboard", "monitor.py")


@dataclass(kw_only=True, slots=True)
class Kept:
    """What is kept of one sweep.

    Attributes:
        records: of the trials.
        folders: of Tune's trials, by number.
        runs: MLflow's, as plain data: role, state, status and the points of val/rsum.
    """

    records: list[TrialRecord]
    folders: set[int]
    runs: list[dict[str, Any]]


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What was seen.

    Attributes:
        seconds: that each part took.
        nodes: that were part of the cluster, by host name.
        notes: what the sweep has said of its trials, but for their epochs.
        sweeps: what is kept of each, by name.
        left: processes of Ray after `ray down`, by host.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sweeps: dict[str, Kept] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)


class Drill:
    """One drill in a lab that is up.

    Args:
        lab: fresh.
        say: told of each part.
        fault: what happens to a host.
        with_services: PostgreSQL and S3 instead of a sqlite file and shared folders; not together
            another fault.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        say: Callable[[str], None],
        fault: Fault = "power",
        with_services: bool = False,
    ) -> None:
        assert fault == "power" or not with_services
        self.lab = lab
        self.outcome = Outcome()
        self._say = say
        self._fault = fault
        self._with_services = with_services
        self._environment: dict[str, str] = {}
        self._data = "synthetic"
        self.shared = lab.folder / "shared"
        self.folder = RunFolder(self.shared / "runs" / NAME)
        self.log = self.shared / "sweep.log"

    def run(self) -> Outcome:
        """All of it.

        Raises:
            RuntimeError, TimeoutError, AssertionError: what did not go as it should.
        """
        self._timed("ray up", self.up)
        self._timed("sweep", self.sweep)
        self._timed("other ways in", self.other_ways_in)
        for name in (NAME, *OTHERS):
            self.outcome.sweeps[name] = self._kept(name)
        self._timed("ray down", self.down)
        storage = "s3://lab/checkpoints/" if self._with_services else "/mnt/checkpoints/"
        judge(self.outcome.sweeps[NAME], trials=TRIALS, storage=storage)
        for name in OTHERS:
            judge(self.outcome.sweeps[name], trials=1, storage="/mnt/checkpoints/")
        return self.outcome

    def up(self) -> None:
        """The cluster, and the tracking server on its head."""
        server = self._services() if self._with_services else ""
        # Known to jobs too, as on AWS: Ray is started by the same shell.
        self._export({"MLFLOW_TRACKING_URI": _SERVER}, on=("head",))
        self.on_laptop("ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
        self.on_laptop("ray up -y cluster.lab.yaml")
        wait_until(self._is_whole, seconds=300, what="both workers to join")
        if self._with_services:
            self._put_data()
        config = TINY.with_overrides({"optim.epochs": EPOCHS, "loss.warmup_epochs": 0})
        if self._fault == "notice":  # an epoch of some seconds, to be told in the middle of one
            larger = {"model.dim": 64, "data.synthetic.train_images": 1600}
            config = config.with_overrides(larger)
        (self.shared / "tiny.toml").write_text(config.to_toml(), encoding="utf-8")
        serve = f"exec python experiments/tracking_server.py --output {_OUTPUT} {server}"
        self.lab.start("head", self._in_project(serve), log=self.shared / "server.log")
        wait_until(self._server_answers, seconds=120, what="the tracking server")

    def sweep(self) -> None:
        """Four trials, and the fault."""
        more = "" if self._fault == "power" else "--min-workers 1"
        if self._fault == "network":
            self._environment["CPFEAN_TIMEOUT"] = str(SILENCE)
        words = f"python experiments/sweep.py {self._flags(NAME, trials=TRIALS)} {more}"
        sweep = self._start_on_head(words, log=self.log)
        self._wait_for(
            sweep,
            lambda: (
                any(r.settled for r in self.folder.records())
                and any(r.state == "running" and r.epochs >= 1 for r in self.folder.records())
            ),
            what="the second trial to have come to an epoch",
        )
        before = {record.number: record for record in self.folder.records()}
        self._say(f"trials so far: {_told(list(before.values()))}")
        lost = WORKER_HOSTS[1]
        if self._fault == "power":
            self._without_power(lost)
        elif self._fault == "network":
            self._without_network(lost, sweep)
        else:
            self._with_notice(lost, sweep)
        code = sweep.wait(timeout=1200)
        assert code == 0, self._said()[-4000:]
        self.outcome.notes = [line.strip() for line in re.findall(r".*trial-\d+: .+", self._said())]
        for number, old in before.items():
            new = self.folder.records()[number]
            assert new.history[: old.epochs] == old.history, "an epoch was trained again"

    def _without_power(self, lost: str) -> None:
        self.lab.cut_power(lost)
        self._say(f"power of {lost} cut")
        time.sleep(30)  # the hosts are away for a while: nothing is waited for
        self.lab.boot(lost)
        self._say(f"{lost} boots again")

    def _without_network(self, lost: str, sweep: subprocess.Popen[bytes]) -> None:
        """The cable is pulled until the next attempt has done an epoch."""
        (trial,) = (record for record in self.folder.records() if record.state == "running")
        (marker,) = (self.shared / "checkpoints").rglob(f"*-{trial.number:03d}/{MARKER}")

        def attempt() -> int:
            return int(marker.read_text(encoding="utf-8"))

        def saved() -> dict[str, int]:
            """Checkpoints by name, with the attempt that each is of."""
            names = CheckpointFolder(str(marker.parent)).names()
            return {name: int(Path(name).suffix[1:] or 1) for name in names}

        first = attempt()
        self.lab.cut_network(lost)
        self._say(f"network of {lost} cut")
        self._wait_for(sweep, lambda: attempt() > first, what="the next attempt")
        old = {name for name, of in saved().items() if of <= first}
        self._say(f"attempt {attempt()} has taken over")
        self._wait_for(
            sweep,
            lambda: max(saved().values(), default=0) > first,
            what="the next attempt to have saved",
        )
        processes = [line for line in self.lab.processes(lost) if "ray::" in line]
        assert processes, "nothing is there that could come back"
        self.lab.join_network(lost)
        self._say(f"{lost} is reached again, with {len(processes)} processes of Ray")
        sweep.wait(timeout=1200)
        late = {name for name, of in saved().items() if of <= first} - old
        assert not late, f"attempt {first} has written after it was given up: {sorted(late)}"
        told = rf"(silent {SILENCE} s|lost) \(rank \d on {address(lost)}\), fenced; retry 1/3"
        assert re.search(told, self._said()), self._said()

    def _with_notice(self, lost: str, sweep: subprocess.Popen[bytes]) -> None:
        """Its metadata say what those of AWS would; then they are as good as their word."""
        listen = """
from datetime import timedelta
from orchestration.aws.preemption_notice import listen
from tests.faults import Metadata
listen(Metadata(timedelta(seconds=120)).url)
"""
        (self.shared / "notice.py").write_text(listen, encoding="utf-8")
        at = time.monotonic() + 120
        line = f"PYTHONPATH={shlex.quote(str(ROOT))} python /mnt/notice.py"
        listener = self.lab.start(lost, self._in_project(line), log=self.shared / "notice.log")
        self._say(f"{lost} is told that it will be taken away")
        saved = r"preempted: told to stop, saved at step \d+ of epoch \d+\. It goes on there\."
        self._wait_for(sweep, lambda: bool(re.search(saved, self._said())), what="word of it")
        assert listener.wait(timeout=60) == 0
        left = at - time.monotonic()
        assert left > 0, f"saved {-left:.0f} s too late"
        self._say(f"its trial was saved with {left:.0f} s left")
        self._without_power(lost)
        assert "retry" not in self._said(), "it has counted as a failure"

    def _said(self) -> str:
        """What the sweep has written."""
        return self.log.read_text(encoding="utf-8")

    def other_ways_in(self) -> None:
        """The same, with one trial, by `ray submit` and as a job of Ray's."""
        script = "experiments/sweep.py"
        by_submit, by_job = OTHERS
        self.on_laptop(f"ray submit cluster.lab.yaml {script} {self._flags(by_submit, trials=1)}")
        # The tunnel ends with the laptop.
        tunnel = f"cd {shlex.quote(str(ROOT))} && ray dashboard cluster.lab.yaml"
        self.lab.start("laptop", tunnel, log=self.shared / "tunnel.log")
        jobs = f"--address {_JOBS}"

        def answers(mode: str) -> bool:
            asked = f"RAY_AUTH_MODE={mode} ray job list {jobs}"
            return self.lab.run("laptop", asked, check=False).returncode == 0

        wait_until(lambda: answers("token"), seconds=120, what="the tunnel")
        assert not answers("disabled"), "jobs are taken without the token"
        words = f"cd ~/cpfean && python {script} {self._flags(by_job, trials=1)}"
        self.on_laptop(f"RAY_AUTH_MODE=token ray job submit {jobs} -- bash -c {shlex.quote(words)}")

    def down(self) -> None:
        self.on_head("pkill -f mlflow; pkill -f moto_server; pkill postgres", check=False)
        self.on_laptop("ray down -y cluster.lab.yaml")

        def ended() -> bool:
            self.outcome.left = {
                host: [line for line in self.lab.processes(host) if any(w in line for w in _RAY)]
                for host in ("head", *WORKER_HOSTS)
            }
            return not any(self.outcome.left.values())

        # Raylets end by themselves when their head has been gone for a minute.
        wait_until(ended, seconds=180, what="Ray to end on every host")

    def _services(self) -> str:
        """Starts a database and an object store on the head; returns the server's flags."""
        head = address("head")
        initdb, postgres, createdb = map(postgres_program, ("initdb", "postgres", "createdb"))
        as_nobody = "cd /tmp && setpriv --reuid=nobody --regid=nogroup --clear-groups"
        self.lab.run("head", "install -d -o nobody -g nogroup /tmp/pg")
        self.lab.run("head", f"{as_nobody} {initdb} -D /tmp/pg/data -A trust -U mlflow")
        serve = "-D /tmp/pg/data -k /tmp/pg -c listen_addresses=127.0.0.1"
        log = self.shared / "postgres.log"
        self.lab.start("head", f"{as_nobody} {postgres} {serve}", log=log)
        create = f"{createdb} -h 127.0.0.1 -U mlflow mlflow"
        wait_until(
            lambda: self.lab.run("head", create, check=False).returncode == 0,
            seconds=60,
            what="PostgreSQL",
        )
        store = self.lab.start(
            "head", f"exec {moto_program()} -H {head} -p 5555", log=self.shared / "store.log"
        )
        given = {
            "AWS_ENDPOINT_URL": f"http://{head}:5555",
            "AWS_ACCESS_KEY_ID": "lab",
            "AWS_SECRET_ACCESS_KEY": "lab",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        # Of every process of Ray: on AWS an instance has its own credentials.
        self._export(given, on=("head", *WORKER_HOSTS))
        self._environment["CPFEAN_STORAGE"] = "s3://lab/checkpoints"
        make = "import s3fs; s3fs.S3FileSystem(anon=False).mkdir('lab')"
        make = f"source ~/.bashrc; ~/venv/bin/python -c {shlex.quote(make)}"

        def made() -> bool:
            assert store.poll() is None, (self.shared / "store.log").read_text(encoding="utf-8")
            return self.lab.run("head", make, check=False).returncode == 0

        wait_until(made, seconds=60, what="the object store")
        return "--store postgresql://mlflow@127.0.0.1/mlflow --artifacts s3://lab/artifacts"

    def _export(self, given: dict[str, str], *, on: tuple[str, ...]) -> None:
        """Sets variables of every shell on these hosts."""
        lines = "".join(f"export {name}={value}\n" for name, value in given.items())
        for host in on:
            with (self.lab.folder / host / "root/.bashrc").open("a", encoding="utf-8") as file:
                file.write(lines)

    def _flags(self, name: str, *, trials: int) -> str:
        return (
            f"--config /mnt/tiny.toml --data {self._data} --trials {trials} --workers {WORKERS} "
            f"--name {name} --output {_OUTPUT}"
        )

    def _put_data(self) -> None:
        """A small data set, from the head to the object store."""
        put = """
from pathlib import Path
import s3fs
from cpfean.data.sources import resolve_data
from tests.orchestration.samples import TINY
folder = resolve_data(TINY.data, cache_dir=Path("/tmp/cache"))
s3fs.S3FileSystem().put(f"{folder}/", "lab/data/", recursive=True)
"""
        (self.shared / "put.py").write_text(put, encoding="utf-8")
        self.on_head(f"PYTHONPATH={shlex.quote(str(ROOT))} python /mnt/put.py")
        self._data = "s3://lab/data"

    def on_laptop(self, command: str) -> str:
        line = f"cd {shlex.quote(str(ROOT))} && export RAY_UP_enable_autoscaler_v2=0 && {command}"
        return self.lab.run("laptop", line, seconds=900).stdout

    def on_head(self, command: str, *, check: bool = True) -> str:
        """Runs a command where `ray exec` would run it: in a login shell, in the project."""
        return self.lab.run("head", self._in_project(command), seconds=900, check=check).stdout

    def _start_on_head(self, command: str, *, log: Path) -> subprocess.Popen[bytes]:
        inner = shlex.quote(self._in_project(command))
        line = f"cd {shlex.quote(str(ROOT))} && ray exec cluster.lab.yaml {inner}"
        return self.lab.start("laptop", line, log=log)

    def _in_project(self, command: str) -> str:
        exports = "".join(f"export {k}={shlex.quote(v)} && " for k, v in self._environment.items())
        return f"source ~/.bashrc; cd ~/cpfean && {exports}{command}"

    def _is_whole(self) -> bool:
        listed = self.on_head("ray list nodes --format json --limit 20", check=False)
        try:
            nodes = [node for node in json.loads(listed) if node["state"] == "ALIVE"]
        except ValueError:
            return False
        self.outcome.nodes = sorted(node["node_name"] for node in nodes)
        return len(nodes) == 1 + len(WORKER_HOSTS)

    def _server_answers(self) -> bool:
        probe = (
            f"python -c 'import urllib.request as u; u.urlopen(\"{_SERVER}/health\", timeout=5)'"
        )
        return self.lab.run("head", probe, check=False).returncode == 0

    def _wait_for(
        self, process: subprocess.Popen[bytes], holds: Callable[[], bool], *, what: str
    ) -> None:
        def now() -> bool:
            assert process.poll() is None, self._said()[-4000:]
            return holds()

        wait_until(now, seconds=600, what=what)

    def _kept(self, name: str) -> Kept:
        """Reads what the three keep."""
        folder = RunFolder(self.shared / "runs" / name)
        look = f"""
import json
from orchestration.tracking.stores import open_store
client, experiment = open_store("{_SERVER}")
runs = client.search_runs([experiment], "tags.`cpfean.id` = '{folder.id}'")
print(json.dumps([{{
    "role": run.data.tags["cpfean.role"],
    "trial": run.data.tags.get("cpfean.trial", ""),
    "parent": run.data.tags.get("mlflow.parentRunId", ""),
    "run": run.info.run_id,
    "state": run.data.tags["cpfean.state"],
    "status": run.info.status,
    "points": [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "val/rsum")],
}} for run in runs]))
"""
        (self.shared / "look.py").write_text(look, encoding="utf-8")
        runs = json.loads(self.on_head("python /mnt/look.py").splitlines()[-1])
        tuned = folder.path.glob("tune/attempt-*/[0-9][0-9][0-9]")
        return Kept(records=folder.records(), folders={int(path.name) for path in tuned}, runs=runs)

    def _timed(self, name: str, part: Callable[[], None]) -> None:
        self._say(f"{name} ...")
        started = time.monotonic()
        part()
        self.outcome.seconds[name] = time.monotonic() - started
        self._say(f"{name}: {self.outcome.seconds[name]:.0f} s")


def judge(kept: Kept, *, trials: int, storage: str) -> None:
    """Raises AssertionError unless records, Tune's folders and MLflow tell the same."""
    records, runs = kept.records, kept.runs
    assert [record.number for record in records] == list(range(trials)), records
    assert all(record.state in ("finished", "pruned") for record in records), records
    for record in records:
        epochs = [row["epoch"] for row in record.history]
        assert epochs == list(range(1, record.epochs + 1)), record
        assert record.checkpoint.startswith(storage), record
    assert kept.folders == set(range(trials)), kept.folders
    assert len(runs) == trials + 1, runs
    assert {run["status"] for run in runs} == {"FINISHED"}, runs
    (parent,) = (run for run in runs if run["role"] == "parent")
    children = {int(run["trial"]): run for run in runs if run is not parent}
    for record in records:
        child = children[record.number]
        assert child["parent"] == parent["run"]
        assert child["state"] == record.state
        wanted = [[row["epoch"], row["val/rsum"]] for row in record.history]
        assert child["points"] == wanted, (child, wanted)


def missing_services() -> str:
    """What this machine lacks for a drill with services; empty if nothing."""
    absent = []
    if not moto_program():
        absent.append("moto_server (make moto)")
    if not postgres_program("createdb"):
        absent.append("PostgreSQL (Debian: postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        absent.append("psycopg (pip install 'cpfean[postgres]')")
    return ", ".join(absent)


def _told(records: list[TrialRecord]) -> str:
    return ", ".join(f"{record.name} {record.state} ({record.epochs} epochs)" for record in records)


def told(outcome: Outcome) -> str:
    """The outcome as lines for people."""
    lines = [f"nodes       {', '.join(outcome.nodes)}"]
    lines += [f"said        {note}" for note in outcome.notes]
    for name, kept in outcome.sweeps.items():
        lines.append(f"{name:12}{_told(kept.records)}")
        for run in sorted(kept.runs, key=lambda run: run["trial"]):
            what = run["role"] + (f" {run['trial']}" if run["trial"] else "")
            steps = [step for step, _ in run["points"]]
            lines.append(f"  MLflow    {what:10}{run['status']:10}{run['state']:10}steps {steps}")
    lines.append("left        nothing" if not any(outcome.left.values()) else f"{outcome.left}")
    return "\n".join(lines)
