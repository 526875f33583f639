"""Which machines the autoscaler gets when AWS has no spot ones, and why that needs code of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.constants import BOTO_CREATE_MAX_RETRIES
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
)

from orchestration.aws.spot_first import NO_SPOT, SpotFirst
from tests.orchestration.ec2 import Ec2

CLUSTER = yaml.safe_load((Path(__file__).parents[3] / "cluster.yaml").read_text(encoding="utf-8"))
WORKER = CLUSTER["available_node_types"]["gpu-worker"]["node_config"] | {"SubnetIds": ["subnet-0"]}
TAGS = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_NAME: "ray-cpfean-worker"}


def provider(*, on_demand_workers: int = 2) -> SpotFirst:
    given = CLUSTER["provider"] | {"on_demand_workers": on_demand_workers}
    return SpotFirst(given, CLUSTER["cluster_name"])


def on_demand(ec2: Ec2) -> list[str]:
    return [id for id, machine in ec2.machines.items() if "SpotInstanceRequestId" not in machine]


def test_spot_machines_are_taken_as_long_as_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    ec2 = Ec2(monkeypatch)
    assert len(provider().create_node(WORKER, TAGS, 3)) == 3
    assert on_demand(ec2) == []
    (request,) = ec2.requests("RunInstances")
    assert request["InstanceMarketOptions"] == {"MarketType": "spot"}


@pytest.mark.parametrize("refusal", NO_SPOT)
def test_the_same_machine_is_taken_on_demand_when_there_is_no_spot_one(
    monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    ec2 = Ec2(monkeypatch, refusal=refusal)
    started = provider().create_node(WORKER, TAGS, 1)
    assert list(started) == on_demand(ec2)
    *refused, taken = ec2.requests("RunInstances")
    assert len(refused) == BOTO_CREATE_MAX_RETRIES
    without = {name: value for name, value in refused[0].items() if name != "InstanceMarketOptions"}
    assert taken == without
    assert WORKER["InstanceMarketOptions"]  # the next request starts on the spot market again


def test_no_more_are_on_demand_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    ec2 = Ec2(monkeypatch)
    workers = provider(on_demand_workers=2)
    ordinary = {name: of for name, of in WORKER.items() if name != "InstanceMarketOptions"}
    workers.create_node(ordinary, {TAG_RAY_NODE_KIND: NODE_KIND_HEAD}, 1)  # does not count
    workers.create_node(WORKER, TAGS, 1)  # neither does a spot machine
    ec2.refusal = NO_SPOT[0]
    assert len(workers.create_node(WORKER, TAGS, 1)) == 1
    assert len(workers.create_node(WORKER, TAGS, 5)) == 1
    with pytest.raises(NodeLaunchException):
        workers.create_node(WORKER, TAGS, 1)
    workers.non_terminated_nodes({})
    workers.terminate_node(on_demand(ec2)[-1])
    assert len(workers.create_node(WORKER, TAGS, 5)) == 1


@pytest.mark.parametrize(("refusal", "most"), [("UnauthorizedOperation", 2), (NO_SPOT[0], 0)])
def test_another_refusal_is_passed_on_and_none_allowed_means_none(
    monkeypatch: pytest.MonkeyPatch, refusal: str, most: int
) -> None:
    ec2 = Ec2(monkeypatch, refusal=refusal)
    with pytest.raises(NodeLaunchException):
        provider(on_demand_workers=most).create_node(WORKER, TAGS, 1)
    assert ec2.machines == {}


def test_ray_alone_would_ask_for_the_refused_type_again() -> None:
    """When this fails, Ray falls back by itself, and a second node type does what ours does."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (
        CloudResourceMonitor,
    )
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    def worse_after(status: Any) -> bool:
        monitor = CloudResourceMonitor()
        event = InstanceUpdateEvent(instance_type="gpu-worker", new_instance_status=status)
        monitor.notify([event])
        return monitor.get_recoverable_resource_availabilities().get("gpu-worker", 1.0) < 1.0

    assert worse_after(Instance.ALLOCATION_TIMEOUT)
    assert not worse_after(Instance.ALLOCATION_FAILED)  # what a refused request becomes
