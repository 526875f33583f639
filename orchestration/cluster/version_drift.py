"""Drift: other versions than those a study was started with, or than its nodes have.

A node that cannot tell its versions, such as one without our code, counts as one of others.

Numbers that two versions made do not compare, and processes of two versions may not understand each
other. Either is refused before any work, unless it is allowed; then the trials say so, in their
records and in MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping

from cpfean.errors import ConfigError
from orchestration.cluster.doctor import differences, versions
from orchestration.settings import ServiceError
from orchestration.study.records import RunFolder

_NUMBERS = ("python", "torch", "transformers", "numpy", "code")  # what a training comes to
_TALK = ("ray", "orchestration")  # how driver and workers talk


def since_start(folder: RunFolder, *, allowed: bool) -> str:
    """How the versions here differ from those that the study was started with; empty: not at all.

    Raises:
        ConfigError: they differ and may not.
    """
    then = folder.versions
    # What was not written down cannot be compared.
    now = {name: versions()[name] for name in _NUMBERS if name in then}
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


def among_nodes(answers: Mapping[str, Mapping[str, str] | str], *, allowed: bool) -> str:
    """How the versions of nodes differ from those here; empty: not at all.

    Args:
        answers: of `orchestration.cluster.doctor.ask_nodes`.
        allowed: whether they may.

    Raises:
        ServiceError: they differ, or a node cannot tell them, and may not.
    """
    here = {name: versions()[name] for name in (*_NUMBERS, *_TALK)}
    found = []
    for host, answer in answers.items():
        if isinstance(answer, str):
            found.append(f"{host} does not tell its versions: {answer}")
        elif drift := differences(answer, here, names=("there", "here")):
            found.append(f"{host}: {', '.join(drift)}")
    if found and not allowed:
        raise ServiceError(
            "nodes of the cluster have other versions than this one, or cannot tell theirs:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\n`ray up` again installs the same on all nodes; --allow-drift runs the trials all "
            "the same, and they will tell."
        )
    return "; ".join(found)
