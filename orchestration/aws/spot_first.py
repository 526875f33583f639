"""Workers on AWS: spot machines, and ordinary ones where no spot machine is to be had.

Ray's second autoscaler does not fall back by itself. Among node types that fit alike it takes the
one with the higher `priority`, then the first in the file, and passes over a type whose machines
came and never ran Ray; a type whose request AWS refuses it asks for again and again. (The first
autoscaler does the same, and takes the type whose name sorts last.) A second node type for ordinary
machines would never be used, or be used first. So the fallback is made where the refusal arrives:
the same node type, asked for once more without the spot market.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

# What EC2 answers when it has no spot machine to give, or none at the price, or none left for us.
NO_SPOT = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
)

_log = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):
    """Ray's provider for AWS, with `provider.on_demand_workers` as the most ordinary workers."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._most = int(provider_config.get("on_demand_workers", 0))
        self._one_at_a_time = threading.Lock()  # launches come from several threads

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Starts machines; those that exist are returned by id.

        Raises:
            NodeLaunchException: neither market gives one, or no more ordinary ones are allowed.
        """
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as refusal:
            if "InstanceMarketOptions" not in node_config or refusal.category not in NO_SPOT:
                raise
            with self._one_at_a_time:
                workers = self.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER})
                on_spot = [self.cached_nodes[id].spot_instance_request_id for id in workers]
                allowed = min(count, self._most - sum(not request for request in on_spot))
                if allowed < 1:
                    raise
                _log.warning(
                    "No spot machine (%s): %d on demand instead.", refusal.category, allowed
                )
                ordinary = dict(node_config)
                del ordinary["InstanceMarketOptions"]
                return super().create_node(ordinary, tags, allowed)
