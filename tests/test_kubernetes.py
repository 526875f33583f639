"""docs/kubernetes, checked without a cluster: fields, a policy, references, and what is run there.

The fields are written down here by hand, those that the files use and no others, from the reference
of KubeRay's resources (docs.ray.io, "KubeRay CRD API reference", which said that it was of
v1.6.2), and from that of Kubernetes.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestration.cluster.capacity import Cluster, Node, allocate, workers_that_fit
from tests.experiments.test_command_line import call
from tests.test_project import PROJECT, constraints

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "kubernetes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
OF_KUBERAY = ("raycluster", "rayjob", "raycronjob")

Plain = dict[str, Any]


@cache
def _read(name: str) -> str:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return json.dumps(list(yaml.safe_load_all(text)))


def objects(name: str) -> list[Plain]:
    """A file's; what it says once for several places is a copy for each of them here."""
    return json.loads(_read(name))


def documents() -> list[Plain]:
    """Every object of the folder."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [thing for name in names for thing in objects(name)]


def document(name: str) -> Plain:
    (only,) = objects(name)
    return only


def job_spec(name: str) -> Plain:
    spec = document(name)["spec"]
    return spec["jobTemplate"] if name == "raycronjob" else spec


def cluster_spec(name: str) -> Plain:
    return document(name)["spec"] if name == "raycluster" else job_spec(name)["rayClusterSpec"]


# Fields and their types.


def fields(needed: Plain | None = None, **optional: Any) -> Plain:
    """An object that has the needed fields, perhaps the others, and nothing else."""
    return {
        "type": "object",
        "required": list(needed or ()),
        "properties": {**(needed or {}), **optional},
        "additionalProperties": False,
    }


def some(items: Plain) -> Plain:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> Plain:
    return {"enum": list(values)}


TEXT, TRUTH = {"type": "string"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
NAME = {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$"}  # KubeRay's limit: 47
CRON = {"type": "string", "pattern": r"^(\S+ ){4}\S+$"}
METADATA = fields({"name": NAME})
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = fields({"requests": AMOUNTS, "limits": AMOUNTS})
CONFINED = fields(
    allowPrivilegeEscalation=TRUTH,
    readOnlyRootFilesystem=TRUTH,
    capabilities=fields(drop=some(TEXT)),
)
SELECTOR = fields(matchLabels=TEXTS)

CONTAINER = fields(
    {"name": NAME, "image": TEXT},
    command=some(TEXT),
    args=some(TEXT),
    workingDir=TEXT,
    env=some(
        fields(
            {"name": TEXT},
            value=TEXT,
            valueFrom=fields(secretKeyRef=fields({"name": NAME, "key": TEXT})),
        )
    ),
    envFrom=some(
        fields(
            configMapRef=fields({"name": NAME}, optional=TRUTH),
            secretRef=fields({"name": NAME}, optional=TRUTH),
        )
    ),
    ports=some(fields({"name": NAME, "containerPort": COUNT})),
    resources=RESOURCES,
    securityContext=CONFINED,
    volumeMounts=some(fields({"name": NAME, "mountPath": TEXT})),
)
POD = fields(
    {"containers": some(CONTAINER)},
    automountServiceAccountToken=TRUTH,
    nodeSelector=TEXTS,
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    securityContext=fields(
        runAsNonRoot=TRUTH,
        runAsUser=COUNT,
        runAsGroup=COUNT,
        fsGroup=COUNT,
        seccompProfile=fields({"type": one_of("RuntimeDefault", "Localhost", "Unconfined")}),
    ),
    tolerations=some(
        fields(
            key=TEXT,
            operator=one_of("Exists", "Equal"),
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    volumes=some(
        fields(
            {"name": NAME},
            persistentVolumeClaim=fields({"claimName": NAME}),
            emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
        )
    ),
)
TEMPLATE = fields({"spec": POD}, metadata=fields(labels=TEXTS))

RAY_CLUSTER = fields(
    {"headGroupSpec": fields({"template": TEMPLATE}, rayStartParams=TEXTS)},
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("disabled", "token"), secretName=NAME),
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT,
        resources=RESOURCES,
        securityContext=CONFINED,
    ),
    workerGroupSpecs=some(
        fields(
            {"groupName": NAME, "minReplicas": COUNT, "maxReplicas": COUNT, "template": TEMPLATE},
            replicas=COUNT,
            rayStartParams=TEXTS,
        )
    ),
)
RAY_JOB = fields(
    {"rayClusterSpec": RAY_CLUSTER},
    entrypoint=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    shutdownAfterJobFinishes=TRUTH,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT | {"minimum": 1},
    backoffLimit=COUNT,
)
PEER = fields(podSelector=SELECTOR, namespaceSelector=SELECTOR)
KINDS = {
    "RayCluster": ("ray.io/v1", RAY_CLUSTER),
    "RayJob": ("ray.io/v1", RAY_JOB),
    "RayCronJob": ("ray.io/v1", fields({"jobTemplate": RAY_JOB, "schedule": CRON}, suspend=TRUTH)),
    "CronJob": (
        "batch/v1",
        fields(
            {
                "schedule": CRON,
                "jobTemplate": fields(
                    {
                        "spec": fields(
                            {"template": fields({"spec": POD})},
                            backoffLimit=COUNT,
                            activeDeadlineSeconds=COUNT,
                        )
                    }
                ),
            },
            concurrencyPolicy=one_of("Allow", "Forbid", "Replace"),
            startingDeadlineSeconds=COUNT,
            successfulJobsHistoryLimit=COUNT,
            failedJobsHistoryLimit=COUNT,
        ),
    ),
    "PersistentVolumeClaim": (
        "v1",
        fields(
            {
                "accessModes": some(one_of("ReadWriteOnce", "ReadWriteMany")),
                "resources": fields({"requests": AMOUNTS}),
            },
            storageClassName=TEXT,
        ),
    ),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        fields(
            {"podSelector": SELECTOR},
            policyTypes=some(one_of("Ingress", "Egress")),
            ingress=some(
                fields(
                    {"from": some(PEER)},
                    ports=some(fields(protocol=one_of("TCP", "UDP"), port=COUNT)),
                )
            ),
        ),
    ),
}


def schema(kind: str) -> Plain:
    if kind == "ConfigMap":
        content: Plain = {"data": TEXTS}
    else:
        content = {"spec": KINDS[kind][1]}
    version = "v1" if kind == "ConfigMap" else KINDS[kind][0]
    return fields(
        {"apiVersion": one_of(version), "kind": one_of(kind), "metadata": METADATA, **content}
    )


def strange(thing: Plain) -> list[str]:
    """What a resource's definition does not know, with the place of each."""
    checker = jsonschema.Draft202012Validator(schema(thing["kind"]))
    return [f"{error.json_path}: {error.message}" for error in checker.iter_errors(thing)]


def test_every_field_is_one_of_its_resource() -> None:
    found = documents()
    assert {thing["kind"] for thing in found} == {*KINDS, "ConfigMap"}
    for thing in found:
        assert strange(thing) == [], thing["kind"]


def worker_of(spec: Plain) -> Plain:
    (group,) = spec["workerGroupSpecs"]
    return group


SPOILT: dict[str, Callable[[Plain], Any]] = {
    "a misspelt field": lambda s: s.update(enableInTreeAutoScaling=True),
    "a number for a text": lambda s: s["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    "no head": lambda s: s.pop("headGroupSpec"),
    "a group without a name": lambda s: worker_of(s).pop("groupName"),
    "a text for a number": lambda s: worker_of(s).update(replicas="1"),
    "an amount that is none": lambda s: worker_of(s)["template"]["spec"]["containers"][0][
        "resources"
    ]["limits"].update(memory="32 GB"),
    "a mode that is none": lambda s: s["authOptions"].update(mode="on"),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("file", OF_KUBERAY)
def test_the_definitions_see(name: str, file: str) -> None:
    thing = document(file)
    spec = thing["spec"]
    spec = spec["jobTemplate"] if file == "raycronjob" else spec
    SPOILT[name](spec if file == "raycluster" else spec["rayClusterSpec"])
    assert strange(thing)


# What one file says of another.


def test_all_three_have_the_same_cluster() -> None:
    assert cluster_spec("raycluster") == cluster_spec("rayjob") == cluster_spec("raycronjob")


def pods() -> Iterator[tuple[str, Plain]]:
    spec = cluster_spec("raycluster")
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    yield "worker", worker_of(spec)["template"]["spec"]
    of_job = document("cronjob")["spec"]["jobTemplate"]["spec"]
    yield "cronjob", of_job["template"]["spec"]


def referred(thing: Any, key: str) -> set[str]:
    """Names under a key, at any depth."""
    if isinstance(thing, list):
        return {name for part in thing for name in referred(part, key)}
    if not isinstance(thing, dict):
        return set()
    own = thing.get(key)
    here = {own} if isinstance(own, str) else {own["name"]} if isinstance(own, dict) else set()
    return here | {name for part in thing.values() for name in referred(part, key)}


def test_everything_that_is_referred_to_is_there_or_made_by_a_command_of_the_page() -> None:
    things = documents()
    there = {
        kind: {thing["metadata"]["name"] for thing in things if thing["kind"] == kind}
        for kind in ("ConfigMap", "PersistentVolumeClaim")
    }
    made = set(re.findall(r"kubectl create secret generic (\S+)", README))
    assert referred(things, "configMapRef") == there["ConfigMap"]
    assert referred(things, "claimName") == there["PersistentVolumeClaim"]
    secrets = {"secretKeyRef", "secretRef", "secretName"}
    assert {name for key in secrets for name in referred(things, key)} == made
    assert "--from-file=auth_token=" in README
    (head,) = {thing["metadata"]["name"] for thing in things if thing["kind"] == "RayCluster"}
    jobs = document("cronjob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert f"http://{head}-head-svc:8265" in jobs["args"]
    assert f"service/{head}-head-svc" in README
    for name, pod in pods():
        mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}, name


def test_no_secret_is_in_a_file() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in FOLDER.iterdir())
    assert "kind: Secret" not in text
    assert not re.search(r"AKIA\w{16}|auth_token=[0-9a-f]{8}", text)
    assert not {"RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"} & objects("settings")[0]["data"].keys()


def test_every_file_is_on_the_page_and_every_one_on_the_page_is_there() -> None:
    named = set(re.findall(r"^\| \[(\S+)\]\(\1\)", README, flags=re.MULTILINE))
    assert named == {path.name for path in FOLDER.iterdir()} - {"README.md"}
    applied = set(re.findall(r"-f docs/kubernetes/(\S+)", README))
    assert applied == named


# Images and amounts.


def amount(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    units = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}
    return float(number) * units[unit]


def test_one_image_with_the_versions_of_this_project_is_in_every_pod() -> None:
    images = {each["image"] for _, pod in pods() for each in pod["containers"]}
    assert images == {f"REGISTRY/cpfean:{PROJECT['version']}"}
    assert f"-t REGISTRY/cpfean:{PROJECT['version']} ." in DOCKERFILE
    assert cluster_spec("raycluster")["rayVersion"] == str(constraints()["ray"])
    users = {pod["securityContext"]["runAsUser"] for _, pod in pods()}
    assert users == {int(re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[0])}


def test_the_image_has_all_that_is_shipped_to_a_cluster_of_hosts() -> None:
    mounts = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["file_mounts"]
    shipped = {local[2:] for local in mounts.values() if local.startswith("./")}
    copied = set()
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        copied |= set(sources)
    assert copied == shipped
    assert "-c constraints.txt -e '.[aws]'" in DOCKERFILE


def test_requests_are_within_limits_and_shared_memory_holds_rays_object_store() -> None:
    for name, pod in pods():
        for each in pod["containers"]:
            asked, most = each["resources"]["requests"], each["resources"]["limits"]
            assert asked.keys() == most.keys()
            assert all(amount(asked[of]) <= amount(most[of]) for of in asked), name
            shared = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
            if shared:  # Ray takes three tenths of the memory
                held = amount(shared[0]["sizeLimit"])
                assert 0.3 * amount(most["memory"]) <= held < amount(most["memory"])


def test_a_node_of_two_cards_has_two_processes_of_a_trial() -> None:
    group = worker_of(cluster_spec("raycluster"))
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    node = Node(cpus=int(limits["cpu"]), gpus=int(limits["nvidia.com/gpu"]))
    assert node.gpus == 2
    head = Node(cpus=0, gpus=0)
    nodes = (head, *[node] * group["minReplicas"])
    there = Cluster(
        cpus=sum(one.cpus for one in nodes),
        gpus=sum(one.gpus for one in nodes),
        is_local=False,
        nodes=nodes,
    )
    given = allocate(there, workers=2, trials=20)
    assert given.use_gpu
    assert given.concurrent == 1
    assert workers_that_fit([node], cpus=given.cpus, use_gpu=True) == 2
    for name in ("rayjob", "raycronjob"):
        asked = set(re.findall(r"--workers (\d+)", job_spec(name)["entrypoint"]))
        assert asked == {str(there.gpus)}


# The policy.


def faults(spec: Plain) -> list[str]:
    """What a cluster of KubeRay may not be."""
    found = []

    def need(holds: object, rule: str) -> None:
        if not holds:
            found.append(rule)

    need(spec.get("authOptions", {}).get("mode") == "token", "the token is asked for")
    need(spec.get("authOptions", {}).get("secretName"), "the token is ours")
    head, group = spec["headGroupSpec"], worker_of(spec)
    need(head["rayStartParams"].get("num-cpus") == "0", "no trial beside the driver")
    need("serviceType" not in head, "the head is not open to the world")
    need(0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] <= 16, "bounded")
    idle = spec.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 0)
    need(0 < idle <= 3600, "idle workers are given back within the hour")
    worker = group["template"]["spec"]
    need(worker.get("automountServiceAccountToken") is False, "workers: no rights in Kubernetes")
    taints = [one.get("key") for one in worker.get("tolerations", [])]
    need("nvidia.com/gpu" in taints, "workers: on nodes that are for GPUs alone")
    need(worker.get("nodeSelector"), "workers: on nodes with a card")
    for name, pod in (("head", head["template"]["spec"]), ("worker", worker)):
        rights = pod.get("securityContext", {})
        need(rights.get("runAsNonRoot") is True and rights.get("runAsUser"), f"{name}: not root")
        need(rights.get("seccompProfile") == {"type": "RuntimeDefault"}, f"{name}: seccomp")
        for each in pod["containers"]:
            may = each.get("securityContext", {})
            need(may.get("allowPrivilegeEscalation") is False, f"{name}: no more rights later")
            need(may.get("capabilities") == {"drop": ["ALL"]}, f"{name}: no capabilities")
            limits = each["resources"]["limits"]
            need({"cpu", "memory"} <= limits.keys(), f"{name}: limits")
            need(("nvidia.com/gpu" in limits) == (name == "worker"), f"{name}: cards for workers")
            need(":" in each["image"] and not each["image"].endswith(":latest"), "a known image")
    return found


def test_the_cluster_keeps_the_policy() -> None:
    assert faults(cluster_spec("raycluster")) == []


def container(spec: Plain, of: str) -> Plain:
    group = spec["headGroupSpec"] if of == "head" else worker_of(spec)
    return group["template"]["spec"]["containers"][0]


MUTATIONS: dict[str, Callable[[Plain], Any]] = {
    "no token": lambda s: s.pop("authOptions"),
    "a token that nobody knows": lambda s: s["authOptions"].pop("secretName"),
    "trials on the head": lambda s: s["headGroupSpec"]["rayStartParams"].clear(),
    "a public head": lambda s: s["headGroupSpec"].update(serviceType="LoadBalancer"),
    "no bound": lambda s: worker_of(s).update(maxReplicas=500),
    "never idle": lambda s: s.pop("autoscalerOptions"),
    "rights": lambda s: worker_of(s)["template"]["spec"].pop("automountServiceAccountToken"),
    "no toleration": lambda s: worker_of(s)["template"]["spec"].pop("tolerations"),
    "any node": lambda s: worker_of(s)["template"]["spec"].pop("nodeSelector"),
    "root": lambda s: s["headGroupSpec"]["template"]["spec"].pop("securityContext"),
    "capabilities": lambda s: container(s, "worker")["securityContext"].pop("capabilities"),
    "no card": lambda s: container(s, "worker")["resources"]["limits"].pop("nvidia.com/gpu"),
    "a card for the head": lambda s: container(s, "head")["resources"]["limits"].update(
        {"nvidia.com/gpu": "1"}
    ),
    "any image": lambda s: container(s, "head").update(image="REGISTRY/cpfean:latest"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_policy_sees(name: str) -> None:
    spec = cluster_spec("raycluster")
    MUTATIONS[name](spec)
    assert faults(spec)


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_a_job_ends_with_its_cluster_whatever_happens(name: str) -> None:
    spec = job_spec(name)
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["activeDeadlineSeconds"] <= 24 * 3600
    assert spec["backoffLimit"] <= 3


def test_only_the_namespace_and_the_operator_reach_the_pods() -> None:
    policy = next(thing["spec"] for thing in documents() if thing["kind"] == "NetworkPolicy")
    assert policy["podSelector"] == {}
    assert policy["policyTypes"] == ["Ingress"]
    ours, operator = policy["ingress"]
    assert ours == {"from": [{"podSelector": {}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    (peer,) = operator["from"]
    assert peer["podSelector"]["matchLabels"]


# What arrives on the head, and whether our scripts take it.


def arrived(name: str, tmp_path: Path, *, runs: Path) -> list[str]:
    """The words that `python` is called with on the head, through all shells on the way.

    KubeRay puts the entrypoint into a line of bash, behind `ray job submit ... --`; Ray joins what
    arrives there and gives it to a shell of the head.
    """
    from ray.dashboard.modules.job.cli import submit

    line = job_spec(name)["entrypoint"].replace("/runs", str(runs))
    script = tmp_path / "ray"
    script.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done > "$HERE/submitted"\n')
    script.chmod(0o755)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done > "$HERE/called"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HERE": str(tmp_path)}
    submitter = ["bash", "-c", f"ray job submit --address http://head:8265 -- {line} ; true"]
    assert subprocess.run(submitter, env=environment).returncode == 0
    words = (tmp_path / "submitted").read_text().splitlines()
    assert words[:2] == ["job", "submit"]
    given = submit.make_context("submit", words[2:]).params["entrypoint"]
    entrypoint = subprocess.list2cmdline(given)
    assert subprocess.run(entrypoint, shell=True, env=environment).returncode == 0
    return (tmp_path / "called").read_text().splitlines()


def run_there(words: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Our script with these words, but for the data, which is not here."""
    script = Path(words[0])
    assert script.parent == Path("/cpfean/experiments")
    assert (ROOT / "experiments" / script.name).exists()
    words = [str(tmp_path / "none") if word.startswith("s3://") else word for word in words[1:]]
    return call(script.name, *words, cwd=tmp_path)


def test_the_sweep_of_the_job_starts_and_goes_on(tmp_path: Path) -> None:
    first = arrived("rayjob", tmp_path, runs=tmp_path / "runs")
    assert "--resume" not in first
    # Nothing is started: the data is looked for first.
    refused = run_there([*first, "--dry-run"], tmp_path)
    assert refused.returncode == 3, refused.stderr
    assert "none" in refused.stderr
    run = tmp_path / "runs" / first[first.index("--name") + 1]
    run.mkdir(parents=True)
    (run / "sweep.json").touch()
    again = arrived("rayjob", tmp_path, runs=tmp_path / "runs")
    assert [word for word in again if word != "--resume"] == first
    assert again.count("--resume") == 1
    refused = run_there(again, tmp_path)
    assert refused.returncode == 3, refused.stderr


def test_a_night_of_the_cron_job_is_a_round_of_its_time(tmp_path: Path) -> None:
    words = arrived("raycronjob", tmp_path, runs=tmp_path / "runs")
    assert words[1:3] == ["round", "nightly"]
    assert re.fullmatch(r"\d{8}T\d{6}Z", words[3])
    refused = run_there(words, tmp_path)
    assert refused.returncode == 3, refused.stderr
    journal = (tmp_path / "runs" / "schedule.jsonl").read_text(encoding="utf-8")
    assert words[3] in journal


def test_a_round_goes_by_the_name_that_the_next_one_looks_for(tmp_path: Path) -> None:
    from experiments.schedule import _round_before

    words = arrived("raycronjob", tmp_path, runs=tmp_path / "runs")
    before = tmp_path / "runs" / f"{words[2]}-{words[3]}"
    before.mkdir(parents=True)
    (before / "summary.json").touch()
    assert _round_before(tmp_path / "runs" / "nightly-29990101T000000Z", "nightly") == before


def commands() -> list[str]:
    """The lines of the page that call our scripts, continued lines joined."""
    joined = README.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    return [line for line in lines if "/experiments/" in line]


def test_the_scripts_and_flags_of_the_page_are_ours(tmp_path: Path) -> None:
    lines = commands()
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line[line.index("/cpfean/experiments/") :])
        at = words.index("--") if "--" in words else len(words)
        helped = call(Path(words[0]).name, "--help", cwd=tmp_path).stdout
        more = call("run_ablations.py", "--help", cwd=tmp_path).stdout if at < len(words) else ""
        for flags, text in ((words[1:at], helped), (words[at + 1 :], more)):
            unknown = [flag for flag in flags if flag.startswith("--") and flag not in text]
            assert unknown == [], line
