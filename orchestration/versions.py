"""What this process runs: our code, the commit that is checked out, and libraries."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from cpfean.fingerprints import code_fingerprint

LIBRARIES = ("ray", "torch", "transformers", "numpy", "mlflow", "optuna")


def versions() -> dict[str, str]:
    """Python, libraries and our own code; what is not installed is "none"."""
    ours = {"code": code_fingerprint(), "orchestration": code_fingerprint("orchestration")}
    # CPU and CUDA builds of one version go together.
    libraries = {name: (_version(name) or "none").split("+")[0] for name in LIBRARIES}
    return {"python": platform.python_version()} | ours | libraries


@functools.cache
def version_tags() -> dict[str, str]:
    """For the tracker: builds of libraries, and the commit if this is a checkout.

    Found out once: what a process runs does not change with the checkout.
    """
    found = {f"version.{name}": _version(name) for name in (*LIBRARIES, "cpfean")}
    found["mlflow.source.git.commit"] = git_commit()
    return {name: version for name, version in found.items() if version}


def git_commit() -> str | None:
    """The commit that is checked out, with "-dirty" if files differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-c", f"safe.directory={root}", "-C", str(root), *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
