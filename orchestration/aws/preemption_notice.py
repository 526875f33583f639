"""A spot machine of AWS passes on the notice that it will be taken away.

    python -m orchestration.aws.preemption_notice

AWS tells it two minutes ahead, in the machine's own metadata and to nobody else. This process looks
there, tells Ray on this machine, and ends. Ray tells the workers, which save. cluster.yaml starts
one on every worker; standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from http.client import HTTPException

_PAUSE_SECONDS = 5.0  # as often as AWS asks for
_ANSWER_SECONDS = 2.0
_RESERVE_SECONDS = 10  # AWS names the earliest moment, and clocks differ


def listen(metadata: str, *, pause: float = _PAUSE_SECONDS) -> None:
    """Returns once Ray has taken the notice.

    Args:
        metadata: address of the metadata service.
        pause: seconds between two looks.
    """
    while not _passed_on(metadata):
        time.sleep(pause)


def _passed_on(metadata: str) -> bool:
    """Looks once; whether there is a notice that Ray has taken.

    No answer, or one that makes no sense, is no notice; neither ends the listening. Nor does a Ray
    that is not up yet.
    """
    try:
        told = json.loads(_ask(metadata))
        at = datetime.fromisoformat(told["time"])
        left = int((at - datetime.now(UTC)).total_seconds()) - _RESERVE_SECONDS
    except (OSError, HTTPException, ValueError, TypeError, KeyError):
        return False
    drain = [
        *("ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", f"AWS takes this machine away at {told['time']}"),
        *("--deadline-remaining-seconds", str(max(left, 1))),
    ]
    print(f"notice of AWS: {told}", file=sys.stderr, flush=True)
    try:
        return subprocess.run(drain).returncode == 0
    except OSError:  # no `ray` there yet
        return False


def _ask(metadata: str) -> bytes:
    """What the metadata says of the notice; as long as there is none, that is an HTTPError."""
    # No proxy knows the way to this address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(path: str, headers: dict[str, str], method: str = "GET") -> bytes:
        request = urllib.request.Request(metadata + path, headers=headers, method=method)
        with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
            body: bytes = answer.read(65536)
        return body

    # A token for each look: none expires while we wait.
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = read("/latest/api/token", ttl, method="PUT").decode("ascii")
    return read("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})


if __name__ == "__main__":
    # The AWS tools' own variable names another server.
    listen(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254")
