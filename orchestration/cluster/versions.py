"""The versions of a study: those here, those of its start, and those of the cluster's nodes.

Numbers that two versions made do not compare, and processes of two versions may not understand each
other. Either is refused before any work, unless it is allowed (--allow-drift); then the trials say
so, in their records and in MLflow. A node that cannot tell its versions, such as one without our
code, counts as one of other versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Protocol

from cpfean.errors import ConfigError, ServiceError
from cpfean.folders import expanded
from cpfean.records.run_folder import RunFolder
from cpfean.storage.check_file import check_file, read_check_file
from orchestration.versions import versions

_NUMBERS = ("python", "torch", "transformers", "numpy", "code")  # what a training comes to
_TALK = ("ray", "orchestration")  # how driver and workers talk
_NODE_SECONDS = 60.0

Answer = dict[str, str] | str  # versions by name; or the last line of why there are none
Look = Callable[[], dict[str, str]]


def differences(
    other: Mapping[str, str], mine: Mapping[str, str], *, names: tuple[str, str] = ("there", "here")
) -> list[str]:
    """Each version that is not the same, with both; `names` says whose they are."""
    return [
        f"{what} {other.get(what)} {names[0]}, {version} {names[1]}"
        for what, version in mine.items()
        if other.get(what) != version
    ]


def since_start(folder: RunFolder, *, allowed: bool, here: Mapping[str, str] | None = None) -> str:
    """How the versions here differ from those that the study was started with; empty: not at all.

    Raises ConfigError if they do, unless that is allowed.
    """
    then, here = folder.versions, here or versions()
    # What was not written down cannot be compared.
    now = {name: here[name] for name in _NUMBERS if name in then}
    found = differences(then, now, names=("then", "now"))
    if found and not allowed:
        commit = f" (commit {folder.commit})" if folder.commit else ""
        raise ConfigError(
            f"{folder.name} was started with other versions{commit}, and numbers of two versions "
            "do not compare:\n"
            + "\n".join(f"  {difference}" for difference in found)
            + "\nGo back to those, start anew under another --name, or go on with --allow-drift, "
            "which the trials will tell."
        )
    return ", ".join(found)


def among_nodes(answers: Mapping[str, Answer], *, allowed: bool) -> str:
    """How the versions of nodes differ from those here; empty: not at all.

    Raises ServiceError if they do, or are not known, unless that is allowed.
    """
    here = versions()
    here = {name: here[name] for name in (*_NUMBERS, *_TALK)}
    found = []
    for host, answer in answers.items():
        if isinstance(answer, str):
            found.append(f"{host} does not tell its versions: {answer}")
        elif drift := differences(answer, here):
            found.append(f"{host}: {', '.join(drift)}")
    if found and not allowed:
        raise ServiceError(
            "nodes of the cluster have other versions than this one, or cannot tell theirs:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\n`ray up` again installs the same on all nodes; --allow-drift runs the trials all "
            "the same, and they will tell."
        )
    return "; ".join(found)


class Nodes(Protocol):
    """The nodes of a cluster."""

    def living(self) -> dict[str, str]:
        """Ids of the nodes that live, by host name and address."""

    def ask(self, nodes: Mapping[str, str], look: Look) -> dict[str, Answer]:
        """What `look` returns on each of the nodes, by host name and address."""


class RayNodes:
    """Those of the cluster that this process has joined."""

    def living(self) -> dict[str, str]:
        import ray

        return {
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": node["NodeID"]
            for node in ray.nodes()
            if node["Alive"]
        }

    def ask(self, nodes: Mapping[str, str], look: Look) -> dict[str, Answer]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0)(look)
        asked = {}
        for host, node in nodes.items():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[host] = task.options(scheduling_strategy=there).remote()
        answers: dict[str, Answer] = {}
        for host, reference in asked.items():
            try:
                answers[host] = ray.get(reference, timeout=_NODE_SECONDS)
            except Exception as error:  # Ray raises many kinds
                answers[host] = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        return answers


def ask_nodes(
    storage: str | None, *, known: Collection[str] = (), nodes: Nodes | None = None
) -> dict[str, Answer]:
    """Versions of every node that lives, by host name and address; or what is wrong with it.

    A node that gives no answer is asked once more. One that has died by then is left out.

    Args:
        storage: that all have to see.
        known: nodes that need not be asked.

    Raises:
        ServiceError: the storage cannot be written.
    """
    cluster = nodes or RayNodes()
    with check_file(storage) if storage else nullcontext("") as token:

        def look() -> dict[str, str]:
            seen = {"storage": read_check_file(storage, token)} if storage else {}
            return versions() | seen

        asked = {host: node for host, node in cluster.living().items() if host not in known}
        answers = cluster.ask(asked, look)
        silent = [host for host, answer in answers.items() if isinstance(answer, str)]
        if silent:
            living = cluster.living()
            answers |= cluster.ask({host: living[host] for host in silent if host in living}, look)
            living = cluster.living()
            for host in silent:
                if isinstance(answers[host], str) and host not in living:
                    del answers[host]
    for host, answer in answers.items():
        if not isinstance(answer, str) and answer.pop("storage", token) != token:
            answers[host] = f"does not see {storage}"
    return answers


def missing_workers(there: int) -> str:
    """On the head of a cluster made by `ray up`: says so if fewer workers are there than asked for.

    Empty on other machines, and where Ray was started by hand: nobody knows how many are to come.
    """
    try:
        file = expanded("~/ray_bootstrap_config.yaml", what="HOME")
        types = json.loads(file.read_text(encoding="utf-8"))["available_node_types"]
        wanted = sum(kind.get("min_workers", 0) for kind in types.values())
    except (OSError, ConfigError, ValueError, LookupError):  # without a home it is no head
        return ""
    return f"{there} of {wanted} worker(s) have joined" if there < wanted else ""
