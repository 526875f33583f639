"""EC2 as far as Ray's provider asks it: remembers machines and every call; sends nothing."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError


class Ec2:
    """Takes the place of the network.

    Attributes:
        refusal: the error code with which requests for spot machines are answered; "" gives them.
        calls: the name and the parameters of every call.
        machines: what runs, by id, as EC2 describes it.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, refusal: str = "") -> None:
        self.refusal = refusal
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.machines: dict[str, dict[str, Any]] = {}
        patch.setattr(BaseClient, "_make_api_call", lambda _, name, given: self._call(name, given))

    def requests(self, name: str) -> list[dict[str, Any]]:
        """The parameters of every call of this name."""
        return [given for called, given in self.calls if called == name]

    def _call(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((name, given))
        return getattr(self, f"_{name}")(given)

    def _RunInstances(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        spot = "InstanceMarketOptions" in given
        if spot and self.refusal:
            answer: Any = {"Error": {"Code": self.refusal, "Message": "no"}}
            raise ClientError(answer, "RunInstances")
        started = []
        for _ in range(given["MaxCount"]):
            machine = {
                "InstanceId": f"i-{len(self.machines):017x}",
                "State": {"Name": "running"},
                "Tags": given["TagSpecifications"][0]["Tags"],
            }
            if spot:
                machine["SpotInstanceRequestId"] = "sir-1"
            self.machines[machine["InstanceId"]] = machine
            started.append(machine)
        return {"Instances": started}

    def _DescribeInstances(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        wanted = {
            (asked["Name"].removeprefix("tag:"), *asked["Values"])
            for asked in given.get("Filters", [])
            if asked["Name"].startswith("tag:")
        }
        found = [
            machine
            for machine in self.machines.values()
            if wanted <= {(tag["Key"], tag["Value"]) for tag in machine["Tags"]}
        ]
        return {"Reservations": [{"Instances": found}]}

    def _CreateTags(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {}

    def _TerminateInstances(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        for id in given["InstanceIds"]:
            del self.machines[id]
        return {}

    def _DescribeKeyPairs(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"KeyPairs": []}

    def _CreateKeyPair(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"KeyName": given["KeyName"], "KeyMaterial": "a key"}

    def _DescribeSubnets(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        subnet = {
            "SubnetId": "subnet-00000000000000000",
            "VpcId": "vpc-1",
            "State": "available",
            "AvailabilityZone": "us-west-2a",
            "MapPublicIpOnLaunch": False,
        }
        return {"Subnets": [subnet]}

    def _DescribeSecurityGroups(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"SecurityGroups": [{"GroupId": "sg-00000000000000000", "VpcId": "vpc-1"}]}
