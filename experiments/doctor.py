"""Looks at all that a study needs, and says how to mend what is not so: one line each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.errors import ConfigError, CpfeanError, ServiceError
from experiments import command_line
from orchestration.settings import Settings

if TYPE_CHECKING:
    from orchestration.cluster.capacity import Cluster
    from orchestration.cluster.versions import Answer

_EPILOG = """\
Looks at the token, the cluster and each of its nodes (versions, storage), storage, disks, data, the
tracking server, and runs that nobody runs any more. Nothing is changed; --repair closes such runs,
after it has watched them for three minutes for a sign of life.

  python experiments/doctor.py
  python experiments/doctor.py --address HOST:6379 --data s3://BUCKET/flickr30k

Exit codes: 0 all is well, 2 flags, 5 something is not.
"""


def main() -> None:
    command_line.run(make_parser(), body)


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--data",
        metavar="DIR|URL|synthetic",
        default="synthetic",
        type=command_line.place,
        help="check this data as well (default: the generated set)",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="as for sweep.py")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=command_line.output_folder,
        default=Path("runs"),
        help="default: runs",
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="as for sweep.py")
    parser.add_argument(
        "--repair", action="store_true", help="close runs in MLflow that nobody runs"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def body(
    arguments: argparse.Namespace,
    *,
    connect: Callable[[Settings], Cluster] | None = None,
    ask: Callable[[str | None], Mapping[str, Answer]] | None = None,
) -> int:
    """Looks at all, and tells; the exit code.

    Args:
        connect: joins the cluster; None for how studies join it.
        ask: for the versions of the nodes; None for Ray's nodes.
    """
    from cpfean.config import DataConfig
    from orchestration.cluster import doctor
    from orchestration.cluster.ray_address import ray_folder
    from orchestration.cluster.versions import ask_nodes

    refused: CpfeanError | None = None
    try:
        where = command_line.settings(arguments)
    except (ConfigError, ServiceError) as error:
        # If that is about the cluster, the rest can be looked at all the same.
        where = Settings.resolve(
            output=arguments.output, tracking_uri=arguments.tracking_uri, address="local"
        )
        refused = error

    def check_cluster() -> str:
        if refused is not None:
            raise refused
        return doctor.check_cluster(where, connect=connect)

    def check_data() -> str:
        from cpfean.data.sources import resolve_data
        from cpfean.data.split import check_folder

        folder = resolve_data(DataConfig(path=arguments.data), cache_dir=where.cache_dir)
        check_folder(folder, cache_dir=where.cache_dir)
        return str(folder)

    on_cluster: dict[str, Callable[[], str]] = {}
    if where.address is not None:
        on_cluster = {"token": doctor.check_token}
    checks: dict[str, Callable[[], str]] = {
        **on_cluster,
        "cluster": check_cluster,
        **({} if refused else {"nodes": lambda: doctor.check_nodes(where, ask=ask or ask_nodes)}),
        "storage": lambda: doctor.check_storage(where),
        "disk": lambda: doctor.check_disk([where.output, where.cache_dir, ray_folder()[0]]),
        "data": check_data,
        "tracking": lambda: doctor.check_tracking(where),
        "runs": lambda: doctor.check_runs(where, repair=arguments.repair, say=command_line.say),
    }
    healthy = True
    for finding in doctor.examine(checks):
        healthy &= finding.ok
        fix = "" if finding.ok else f"\n                fix: {finding.fix}"
        print(
            f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:10}{finding.text}{fix}", flush=True
        )
    return 0 if healthy else 5


if __name__ == "__main__":
    main()
