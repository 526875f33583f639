"""Timer and CronJob: what calls schedule.py from outside calls it rightly, and with few rights."""

from __future__ import annotations

import configparser
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.experiments.test_command_line import call

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "schedule"

Job = dict[str, Any]


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((FOLDER / name).read_text(encoding="utf-8"))
    return parser


def cronjob() -> Job:
    file = ROOT / "docs" / "kubernetes" / "cronjob.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def container(job: Job) -> dict[str, Any]:
    (only,) = pod(job)["containers"]
    return only


def pod(job: Job) -> dict[str, Any]:
    return job["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def commands() -> dict[str, list[str]]:
    only = container(cronjob())
    return {
        "systemd": shlex.split(unit("cpfean-schedule.service")["Service"]["ExecStart"]),
        "kubernetes": only["command"] + only["args"],
    }


@pytest.mark.parametrize("of", ["systemd", "kubernetes"])
def test_the_command_does_what_is_due_and_ends(of: str, tmp_path: Path) -> None:
    python, script, *words = commands()[of]
    assert Path(python).name == "python"
    assert (ROOT / script).name == "schedule.py"
    assert words[:2] == ["run", "--once"]
    folder = words.index("--output") + 1
    assert Path(words[folder]).is_absolute()  # nobody stands in a folder
    words[folder] = str(tmp_path / "runs")
    done = call("schedule.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing is due" in done.stdout


def test_the_timer_starts_the_service_on_the_head_of_the_cluster() -> None:
    timer, service = unit("cpfean-schedule.timer"), unit("cpfean-schedule.service")
    assert timer["Timer"]["OnCalendar"]
    assert "Unit" not in timer["Timer"]  # the service of the same name
    assert service["Service"]["Type"] == "oneshot"  # the next one waits for it
    user = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["auth"]["ssh_user"]
    assert service["Service"]["User"] == user
    assert service["Service"]["WorkingDirectory"] == f"/home/{user}/cpfean"
    assert service["Service"]["ExecStart"].startswith(f"/home/{user}/venv/bin/python ")


def faults(job: Job) -> list[str]:
    """What the policy for pods does not allow."""
    found = []

    def need(holds: object, rule: str) -> None:
        if not holds:
            found.append(rule)

    whole, only = pod(job), container(job)
    rights, may = whole.get("securityContext", {}), only.get("securityContext", {})
    need(job["spec"].get("concurrencyPolicy") == "Forbid", "one at a time")
    need(job["spec"]["jobTemplate"]["spec"].get("activeDeadlineSeconds", 0) > 0, "it ends")
    need(whole.get("restartPolicy") == "Never", "the next time is soon enough")
    need(whole.get("automountServiceAccountToken") is False, "no rights in Kubernetes")
    need(rights.get("runAsNonRoot") is True and rights.get("runAsUser", 0) > 0, "not root")
    need(rights.get("seccompProfile") == {"type": "RuntimeDefault"}, "system calls are filtered")
    need(may.get("readOnlyRootFilesystem") is True, "nothing in the image is written")
    need(may.get("allowPrivilegeEscalation") is False, "no more rights later")
    need(may.get("capabilities") == {"drop": ["ALL"]}, "no capabilities")
    need(not may.get("privileged") and not whole.get("hostNetwork"), "apart from the host")
    for kind in ("requests", "limits"):
        amounts = only.get("resources", {}).get(kind, {})
        need({"cpu", "memory"} <= amounts.keys(), f"{kind} of CPU and memory")
    need(not only["image"].endswith(":latest") and ":" in only["image"], "a known image")
    token = [one for one in only["env"] if one["name"] == "RAY_AUTH_TOKEN"]
    need(token and "secretKeyRef" in token[0].get("valueFrom", {}), "the token from a secret")
    mounted = {mount["name"]: mount["mountPath"] for mount in only["volumeMounts"]}
    need(mounted.keys() == {volume["name"] for volume in whole["volumes"]}, "volumes are mounted")
    words = [*only["command"], *only["args"]]
    need(words[words.index("--output") + 1] == mounted.get("runs"), "records on the volume")
    need(not any("hostPath" in volume for volume in whole["volumes"]), "no folder of the host")
    return found


def test_the_cron_job_keeps_the_policy() -> None:
    assert faults(cronjob()) == []


MUTATIONS: dict[str, Callable[[Job], Any]] = {
    "two at once": lambda j: j["spec"].update(concurrencyPolicy="Allow"),
    "without an end": lambda j: j["spec"]["jobTemplate"]["spec"].pop("activeDeadlineSeconds"),
    "again and again": lambda j: pod(j).update(restartPolicy="OnFailure"),
    "root": lambda j: pod(j).pop("securityContext"),
    "rights in Kubernetes": lambda j: pod(j).pop("automountServiceAccountToken"),
    "writable": lambda j: container(j)["securityContext"].update(readOnlyRootFilesystem=False),
    "sudo": lambda j: container(j)["securityContext"].pop("allowPrivilegeEscalation"),
    "capabilities": lambda j: container(j)["securityContext"].pop("capabilities"),
    "all the memory": lambda j: container(j)["resources"].pop("limits"),
    "some image": lambda j: container(j).update(image="REGISTRY/cpfean:latest"),
    "the token for all to read": lambda j: container(j)["env"].__setitem__(
        1, {"name": "RAY_AUTH_TOKEN", "value": "abc"}
    ),
    "records in the container": lambda j: container(j).update(args=["--output", "/tmp/runs"]),
    "the host's files": lambda j: pod(j)["volumes"].append(
        {"name": "host", "hostPath": {"path": "/"}}
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_policy_sees(name: str) -> None:
    job = json.loads(json.dumps(cronjob()))
    MUTATIONS[name](job)
    assert job != cronjob()
    assert faults(job)
