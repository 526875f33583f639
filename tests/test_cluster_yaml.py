"""cluster.yaml, checked without an account: Ray's schema, AWS's requests, and a policy.

The policy holds what neither Ray nor AWS insists on: a token, nothing open to the world, no public
address, encrypted disks, metadata version 2, rights of our own choosing, and an end to all cost.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "cluster.yaml"
TEXT = FILE.read_text(encoding="utf-8")

Cluster = dict[str, Any]
_LONGEST_MINUTES = 3 * 24 * 60


def cluster() -> Cluster:
    # What the file says once for several nodes is a copy for each of them here.
    return json.loads(json.dumps(yaml.safe_load(TEXT)))


def violations(config: Cluster) -> list[str]:
    """Everything about a cluster that the policy does not allow."""
    head = config["head_node_type"]
    found = []

    def need(holds: object, rule: str) -> None:
        if not holds:
            found.append(rule)

    for role in ("head", "worker"):
        starts = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        need(starts, f"{role}: Ray is started")
        for line in starts:
            mode = re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", line)
            need(mode, f"{role}: the token is asked for")
            hosts = re.findall(r"--dashboard-host[= ](\S+)", line)
            loopback = set(hosts) <= {"127.0.0.1", "localhost"}
            need(loopback and (hosts or role == "worker"), f"{role}: dashboard on loopback")
    need("~/.ray/auth_token" in config["file_mounts"], "the token comes from a file")
    need(
        any("chmod 600 ~/.ray/auth_token" in line for line in config["setup_commands"]),
        "only the owner reads the token",
    )
    need("RAY_AUTH_TOKEN" not in json.dumps(config), "no token in the file itself")
    servers = [line for line in config["head_setup_commands"] if "tracking_server.py" in line]
    need(servers, "several drivers have one tracking server")
    need(not re.search(r"--host\b", "".join(servers)), "tracking server on loopback")
    need(
        any(
            "orchestration.aws.preemption_notice" in line
            for line in config["worker_setup_commands"]
        ),
        "workers hear that AWS will take them away",
    )
    storage = re.findall(r"\bCPFEAN_STORAGE=(\S+)", "\n".join(config["setup_commands"]))
    need(storage and storage[0].startswith("s3://"), "checkpoints outlive the spot machines")

    provider = config["provider"]
    need(provider.get("use_internal_ips") is True, "private addresses only")
    need("security_group" not in provider, "no security group made or changed by Ray")
    need(provider.get("cache_stopped_nodes") is False, "instances end, and do not just stop")
    need(0 < config["idle_timeout_minutes"] <= 60, "idle workers are given back within the hour")
    need(
        provider.get("module") == "orchestration.aws.spot_first.SpotFirst",
        "on demand where spot has none",
    )
    ordinary = provider.get("on_demand_workers", -1)
    need(0 <= ordinary <= config["max_workers"], "machines on demand are bounded both ways")

    groups = set()
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        interfaces = node.get("NetworkInterfaces", [])
        need(interfaces, f"{name}: its own network interface")
        for interface in interfaces:
            public = interface.get("AssociatePublicIpAddress")
            need(public is False, f"{name}: no public address")
            need(interface.get("Groups"), f"{name}: a security group of ours")
            groups.update(interface.get("Groups", []))
        metadata = node.get("MetadataOptions", {})
        need(metadata.get("HttpTokens") == "required", f"{name}: metadata version 2")
        disks = node.get("BlockDeviceMappings", [])
        need(disks, f"{name}: its disk is described")
        for disk in disks:
            need(disk["Ebs"].get("Encrypted") is True, f"{name}: disks are encrypted")
            need(disk["Ebs"].get("DeleteOnTermination") is True, f"{name}: disks end with it")
        need(node.get("IamInstanceProfile"), f"{name}: rights of our own choosing")
        ends = node.get("InstanceInitiatedShutdownBehavior") == "terminate"
        need(ends, f"{name}: a machine that shuts down is gone, and not just stopped")
        script = node.get("UserData", "")
        minutes = re.findall(r"^shutdown -h \+(\d+)$", script, flags=re.MULTILINE)
        bounded = len(minutes) == 1 and 0 < int(minutes[0]) <= _LONGEST_MINUTES
        need(bounded, f"{name}: ends itself some time, whatever happens")
        gpus = kind["resources"].get("GPU", 0)
        spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        if name == head:
            need(gpus == 0, "head: no GPU")
            need(not spot, "head: not on spot, it keeps the state")
            need(kind.get("max_workers") == 0, "head: no second machine of its type")
        else:
            need(gpus >= 1, f"{name}: a GPU")
            need(spot, f"{name}: spot")
            need("raylet" in script, f"{name}: does not outlive the head")
            least, most = kind.get("min_workers", 0), kind.get("max_workers", 0)
            need(0 <= least <= most <= config["max_workers"], f"{name}: bounded both ways")
    need(len(groups) <= 1, "one security group, which lets in only itself")
    return found


def test_the_cluster_keeps_the_policy() -> None:
    assert violations(cluster()) == []


def node(config: Cluster, name: str) -> Cluster:
    return config["available_node_types"][name]["node_config"]


def without_token_mode(config: Cluster, role: str) -> None:
    lines = config[f"{role}_start_ray_commands"]
    lines[:] = [line.replace("RAY_AUTH_MODE=token ", "") for line in lines]


def open_ssh(config: Cluster) -> None:
    world = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": ["0.0.0.0/0"]}
    config["provider"]["security_group"] = {"IpPermissions": [world]}


def dashboard_on(config: Cluster, host: str) -> None:
    lines = config["head_start_ray_commands"]
    lines[:] = [line.replace("--dashboard-host=127.0.0.1", host) for line in lines]


def public_address(config: Cluster, name: str) -> None:
    node(config, name)["NetworkInterfaces"][0]["AssociatePublicIpAddress"] = True


def group_left_to_ray(config: Cluster) -> None:
    interface = node(config, "gpu-worker").pop("NetworkInterfaces")[0]
    node(config, "gpu-worker")["SubnetIds"] = [interface["SubnetId"]]


def second_group(config: Cluster) -> None:
    node(config, "head")["NetworkInterfaces"][0]["Groups"].append("sg-11111111111111111")


def replace_in(config: Cluster, old: str, new: str) -> None:
    lines = config["setup_commands"]
    lines[:] = [line.replace(old, new) for line in lines]


MUTATIONS: dict[str, Callable[[Cluster], Any]] = {
    "head without token": lambda c: without_token_mode(c, "head"),
    "workers without token": lambda c: without_token_mode(c, "worker"),
    "token mode switched off": lambda c: c["head_start_ray_commands"].append(
        "RAY_AUTH_MODE=disabled ~/venv/bin/ray start --head --dashboard-host=127.0.0.1"
    ),
    "token not shipped": lambda c: c["file_mounts"].pop("~/.ray/auth_token"),
    "token for all to read": lambda c: c["setup_commands"].pop(0),
    "token in the file": lambda c: c["setup_commands"].append("export RAY_AUTH_TOKEN=abc"),
    "dashboard on every address": lambda c: dashboard_on(c, "--dashboard-host=0.0.0.0"),
    "dashboard on Ray's default": lambda c: dashboard_on(c, ""),
    "SSH open to the world": open_ssh,
    "group left to Ray": group_left_to_ray,
    "second group": second_group,
    "public worker": lambda c: public_address(c, "gpu-worker"),
    "public head": lambda c: public_address(c, "head"),
    "SSH over public addresses": lambda c: c["provider"].pop("use_internal_ips"),
    "metadata version 1": lambda c: node(c, "gpu-worker").pop("MetadataOptions"),
    "metadata version optional": lambda c: node(c, "head")["MetadataOptions"].update(
        HttpTokens="optional"
    ),
    "plain disk": lambda c: node(c, "head")["BlockDeviceMappings"][0]["Ebs"].pop("Encrypted"),
    "disk of the image": lambda c: node(c, "gpu-worker").pop("BlockDeviceMappings"),
    "full rights": lambda c: node(c, "head").pop("IamInstanceProfile"),
    "head on spot": lambda c: node(c, "head").update(InstanceMarketOptions={"MarketType": "spot"}),
    "worker without GPU": lambda c: c["available_node_types"]["gpu-worker"]["resources"].pop("GPU"),
    "no upper bound": lambda c: c["available_node_types"]["gpu-worker"].update(max_workers=80),
    "never idle": lambda c: c.update(idle_timeout_minutes=10**6),
    "stopped, not ended": lambda c: c["provider"].update(cache_stopped_nodes=True),
    "head without an end": lambda c: node(c, "head").pop("UserData"),
    "worker without an end": lambda c: node(c, "gpu-worker").update(UserData="pgrep raylet"),
    "an end next month": lambda c: node(c, "head").update(UserData="shutdown -h +43200"),
    "shut down, but paid for": lambda c: node(c, "head").pop("InstanceInitiatedShutdownBehavior"),
    "stopped at its end": lambda c: node(c, "gpu-worker").update(
        InstanceInitiatedShutdownBehavior="stop"
    ),
    "worker that outlives the head": lambda c: node(c, "gpu-worker").update(
        UserData="shutdown -h +1440"
    ),
    "spot or nothing": lambda c: c["provider"].update(type="aws", module=""),
    "on demand without a word": lambda c: c["provider"].pop("on_demand_workers"),
    "on demand without a bound": lambda c: c["provider"].update(on_demand_workers=1000),
    "tracking open to others": lambda c: c["head_setup_commands"].append(
        "python experiments/tracking_server.py --host 0.0.0.0 --auth"
    ),
    "a tracking file for each driver": lambda c: c["head_setup_commands"].clear(),
    "workers that hear nothing": lambda c: c["worker_setup_commands"].clear(),
    "checkpoints on the machine": lambda c: replace_in(c, "s3://BUCKET/cpfean/runs", "/tmp/runs"),
    "checkpoints wherever": lambda c: replace_in(c, "CPFEAN_STORAGE=", "STORAGE="),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_policy_sees(name: str) -> None:
    config = cluster()
    MUTATIONS[name](config)
    assert config != cluster()
    assert violations(config)


# What Ray and AWS themselves say.


def prepared() -> Cluster:
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(cluster())


def test_ray_accepts_the_file() -> None:
    from ray.autoscaler._private.util import validate_config

    config = prepared()
    validate_config(config)
    assert config["available_node_types"]["gpu-worker"]["max_workers"] <= config["max_workers"]


def test_the_file_says_all_that_ray_says_only_for_providers_of_its_own() -> None:
    from ray.autoscaler._private.util import prepare_config

    config = cluster()
    config["provider"]["type"] = "aws"
    assert prepare_config(config).keys() <= prepared().keys()


def test_ray_refuses_a_node_type_without_resources_or_an_unknown_key() -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    for spoil in (
        lambda c: c["available_node_types"]["head"].pop("resources"),
        lambda c: c.update(idle_timeout=5),
    ):
        config = prepared()
        spoil(config)
        with pytest.raises(jsonschema.ValidationError):
            validate_config(config)


def test_ray_finds_a_security_group_for_every_node_and_makes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.autoscaler._private.aws import config as aws

    def called(*_: Any) -> None:
        raise AssertionError("Ray would make or change a security group")

    monkeypatch.setattr(aws, "_upsert_security_groups", called)
    config = aws._configure_security_group(aws._configure_from_network_interfaces(prepared()))
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"]


def test_aws_knows_every_field_of_the_nodes() -> None:
    import boto3
    from botocore.validate import ParamValidator

    client = boto3.client(
        "ec2", region_name="us-west-2", aws_access_key_id="none", aws_secret_access_key="none"
    )
    request = client.meta.service_model.operation_model("RunInstances").input_shape

    def report(node_config: Cluster) -> str:
        call = {**node_config, "MinCount": 1, "MaxCount": 1}
        return ParamValidator().validate(call, request).generate_report()

    config = cluster()
    for name in config["available_node_types"]:
        assert report(node(config, name)) == ""
    misspelt = copy.deepcopy(node(config, "head"))
    misspelt["MetadataOptions"]["HttpToken"] = "required"
    assert "HttpToken" in report(misspelt)


# What the file says about this project.


def test_everything_that_is_shipped_exists_and_is_all_that_an_installation_needs() -> None:
    shipped = cluster()["file_mounts"]
    ours = {local: remote for remote, local in shipped.items() if local.startswith("./")}
    assert {local for local in ours if not (ROOT / local).exists()} == set()
    assert {"./pyproject.toml", "./constraints.txt", "./README.md", "./LICENSE"} <= ours.keys()
    packages = {f"./{path.parent.name}" for path in ROOT.glob("*/__init__.py")} - {"./tests"}
    assert packages <= ours.keys()
    assert all(remote == f"~/cpfean/{local[2:]}" for local, remote in ours.items())


def test_the_region_is_the_same_where_it_is_named() -> None:
    regions = set(re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", TEXT))
    assert regions == {cluster()["provider"]["region"]}


def test_a_machine_whose_card_cannot_be_used_does_not_join(tmp_path: Path) -> None:
    import torch

    (tmp_path / "venv").symlink_to(sys.prefix)
    (check,) = [line for line in cluster()["worker_setup_commands"] if "import torch" in line]
    done = subprocess.run(
        ["bash", "-c", check], env={"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode == 0) == torch.cuda.is_available(), done.stderr
    assert "SyntaxError" not in done.stderr


def test_every_card_of_a_machine_has_a_worker_of_a_trial() -> None:
    from orchestration.cluster.capacity import Cluster as Hosts
    from orchestration.cluster.capacity import Node, allocate, workers_that_fit

    def workers_on_one(resources: dict[str, int]) -> tuple[int, int]:
        head = cluster()["available_node_types"]["head"]["resources"]
        one = Node(cpus=resources["CPU"], gpus=resources["GPU"])
        nodes = (Node(cpus=head["CPU"], gpus=0), one)
        hosts = Hosts(
            cpus=sum(node.cpus for node in nodes), gpus=one.gpus, is_local=False, nodes=nodes
        )
        given = allocate(hosts, workers=one.gpus, trials=6)
        return given.concurrent, workers_that_fit([one], cpus=given.cpus, use_gpu=given.use_gpu)

    assert workers_on_one(cluster()["available_node_types"]["gpu-worker"]["resources"]) == (1, 1)
    # The machine of several cards that the file speaks of, by its own words.
    cpus, gpus = re.findall(r"\{CPU: (\d+), GPU: (\d+)\} above", TEXT)[0]
    assert workers_on_one({"CPU": int(cpus), "GPU": int(gpus)}) == (1, int(gpus))
    assert workers_on_one({"CPU": 8, "GPU": 2}) == (1, 2)


def test_workers_are_told_nothing_of_networks_and_nccl_tells_why_it_fails() -> None:
    said = "\n".join(cluster()["setup_commands"])
    assert "NCCL_DEBUG=WARN" in said
    assert "NCCL_SOCKET_IFNAME" not in said
    for name, kind in cluster()["available_node_types"].items():
        assert len(kind["node_config"]["NetworkInterfaces"]) == 1, name


def test_a_worker_ends_itself_once_ray_has_left_it(tmp_path: Path) -> None:
    """Its start-up script, with programs that note down how they are called."""
    for name, does in {
        "shutdown": 'echo shutdown "$@" >> "$HERE/said"',
        "sleep": 'echo sleep "$@" >> "$HERE/said"',
        "systemd-run": 'shift; exec "$@"',
        # Ray runs, is started anew, runs, and is gone.
        "pgrep": 'sed -i 1d "$HERE/ray"; exec test "$(head -n 1 "$HERE/ray")" = runs',
    }.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(0o755)
    (tmp_path / "ray").write_text("begin\nruns\naway\nruns\naway\naway\n")
    done = subprocess.run(
        ["sh", "-c", node(cluster(), "gpu-worker")["UserData"]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HERE": str(tmp_path)},
        timeout=30,
    )
    assert done.returncode == 0
    seen = ["sleep 1800", "sleep 300", "sleep 60", "sleep 300", "sleep 60"]
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["shutdown -h +1440", *seen, "shutdown -h now"]


HEAD = r"""
set -eu
python - <<'END'
import fcntl, socket, struct

def up(name, address):
    sock = socket.socket()
    if address:
        given = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(sock, 0x8916, given)  # SIOCSIFADDR
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh", name, 0x1 | 0x40))  # up and running

up(b"lo", None)
up(b"lo:1", "10.99.0.1")  # the address of the host, for whoever is not on it
END
mkdir -p /tmp/ray
mount -t tmpfs none /tmp/ray
export HOME="$1" RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate > /dev/null 2>&1
bash -c "$2 --node-ip-address=10.99.0.1 --num-cpus=1 --object-store-memory=100000000" >&2
python - "$HOME/.ray/auth_token" <<'END'
import json, sys, time, urllib.error, urllib.request

def status(path, token):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:8265{path}", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code

def listening():
    # Ports by the addresses that they are open on: loopback, one of the host's, or every one.
    ports = {"loopback": [], "one": [], "every": []}
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(file).readlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, port = local.split(":")
            if state == "0A":
                loopback = address.endswith("0100007F")
                kind = "every" if set(address) == {"0"} else "loopback" if loopback else "one"
                ports[kind].append(int(port, 16))
    return ports

token = open(sys.argv[1]).read()
paths = ("/api/jobs/", "/api/v0/nodes")
for _ in range(60):
    if {status(path, token) for path in paths} == {200}:
        break
    time.sleep(0.5)
answers = {name: sorted({status(path, given) for path in paths})
           for name, given in (("right", token), ("none", ""), ("wrong", "0" * 64))}
print(json.dumps({"answers": answers, "listening": listening()}))
END
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_head_started_by_the_file_answers_nobody_without_the_token(tmp_path: Path) -> None:
    """In namespaces of its own, where it meets no other Ray and ends with the test."""
    apart = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*apart, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs Linux and the right to make namespaces (root)")
    (tmp_path / "venv").symlink_to(sys.prefix)
    start = next(line for line in cluster()["head_start_ray_commands"] if "ray start" in line)
    start = start.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    done = subprocess.run(
        [*apart, "bash", "-c", HEAD, "head", str(tmp_path), start],
        env={"PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["answers"] == {"right": [200], "none": [401], "wrong": [403]}
    # The dashboard takes jobs. The others are for the workers: the network has to close them.
    on = {name: set(ports) for name, ports in seen["listening"].items()}
    assert 8265 in on["loopback"] - on["one"] - on["every"]
    assert 6379 in on["every"]
    assert not on["every"] & {8265, 10001, 52365}


# The file for hosts that are there already.


def test_the_lab_is_started_as_the_cluster_is() -> None:
    lab = yaml.safe_load((ROOT / "cluster.lab.yaml").read_text(encoding="utf-8"))
    aws = cluster()
    for same in ("file_mounts", "rsync_exclude"):
        assert lab[same] == aws[same]
    # Ray is started alike, but for how much of the one machine each host may take.
    share = r" --num-cpus=\d --object-store-memory=\d+$"
    for role in ("head", "worker"):
        lines = [re.sub(share, "", line) for line in lab[f"{role}_start_ray_commands"]]
        assert lines[:2] == aws[f"{role}_start_ray_commands"]
    assert aws["setup_commands"][0] in lab["setup_commands"]


def test_ray_accepts_the_file_for_the_lab() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    from tests.lab.hosts import address

    lab = yaml.safe_load((ROOT / "cluster.lab.yaml").read_text(encoding="utf-8"))
    assert lab["provider"]["head_ip"] == address("head")
    workers = [address(host) for host in ("worker-1", "worker-2")]
    assert lab["provider"]["worker_ips"] == workers
    assert lab["min_workers"] == lab["max_workers"] == len(workers)
    validate_config(prepare_config(lab))
