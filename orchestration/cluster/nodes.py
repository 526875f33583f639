"""What Ray tells of the nodes that there are now, and of those that may come."""

from __future__ import annotations

import json

import ray

from cpfean.records.budget import OTHER
from orchestration.cluster.capacity import Cluster, Demand, Node, Resources


def cluster_now(*, is_local: bool) -> Cluster:
    """What the Ray that this process has joined or started has now."""
    nodes = _nodes()
    return Cluster(
        cpus=sum(node.cpus for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        is_local=is_local,
        nodes=nodes,
    )


def _nodes() -> tuple[Node, ...]:
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return tuple(Node(cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0))) for has in found)


def node_types() -> list[str]:
    """The type of every node that lives, as the autoscaler's file calls it; none if Ray is gone."""
    try:
        labels = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    except Exception:  # Ray raises many kinds; what is lost is told elsewhere
        return []
    return [of.get("ray.io/node-group") or OTHER for of in labels]


def demand_of(resources: Resources) -> Demand | None:
    """A trial beside the cluster as it is now; None if the cluster does not answer."""
    try:
        return Demand(
            workers=resources.min_workers or resources.workers,
            cpus=resources.cpus,
            use_gpu=resources.use_gpu,
            nodes=_nodes(),
            grows=_grows(),
        )
    except Exception:  # as above
        return None


def _grows() -> bool | None:
    """Whether the autoscaler adds nodes for what waits now; None if there is no telling.

    A head that was started without an autoscaler's file has one that only looks on. Ray's second
    autoscaler tells what it cannot give whatever it adds; the first one does not.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        client = ray._raylet.GcsClient(ray.get_runtime_context().gcs_address)
        reply = GetClusterStatusReply()
        reply.ParseFromString(client.get_cluster_status(timeout_s=10))
        state = reply.autoscaling_state
        if state.pending_instance_requests or state.pending_instances:
            return True
        # Those that an autoscaler starts know the machine that they are; where none does, this one
        # only looks on, and cannot even tell that: parts of a resource, of which our trials have
        # one, are an error in its own list of what there is.
        if not any(node.instance_id for node in reply.cluster_resource_state.node_states):
            return False
        cannot = state.infeasible_gang_resource_requests or state.infeasible_resource_requests
        return False if cannot else None
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    report = status.get("autoscaler_report")
    if not report:
        return None
    if report["pending_nodes"] or report["pending_launches"]:
        return True
    # Nodes that nobody described go by their own ids.
    known = report["active_nodes"]
    return False if known and all(name.startswith("node_") for name in known) else None
