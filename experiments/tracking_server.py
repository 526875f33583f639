"""The MLflow server that many drivers write to and browsers look at."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cpfean.folders import expanded
from experiments import command_line

_EPILOG = """\
Listens on this host alone; `ssh -L 5000:127.0.0.1:5000 HOST` or `ray attach CLUSTER.yaml -p 5000`
brings it to yours. Any other --host needs --auth, and --auth needs a password for the user "admin"
in MLFLOW_AUTH_ADMIN_PASSWORD. Clients set MLFLOW_TRACKING_URI, and with --auth also
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.

  python experiments/tracking_server.py                       the runs in ./runs
  python experiments/tracking_server.py --output /mnt/runs --artifacts s3://BUCKET/artifacts
  python experiments/tracking_server.py --store postgresql://USER@HOST/mlflow --auth

Exit codes: 0 done, 2 flags, 5 storage, else MLflow's own.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--store",
        metavar="URI",
        help="database of the runs, sqlite:///FILE or postgresql://... (default: mlflow.db in the "
        "output folder)",
    )
    parser.add_argument(
        "--artifacts",
        metavar="DIR|URL",
        help="where files are kept (default: mlflow-artifacts in the output folder)",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("runs"), help="default: runs"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=5000, help="default: 5000")
    parser.add_argument("--auth", action="store_true", help="ask for user name and password")
    parser.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="name under which browsers may reach it, beside localhost; may be repeated",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from orchestration.tracking.address import shown, tracking_address
    from orchestration.tracking.server import ServerPlan

    output = expanded(arguments.output, what="--output").absolute()
    artifacts = arguments.artifacts
    if artifacts is None:
        artifacts = str(output / "mlflow-artifacts")
    elif artifacts and ":" not in artifacts:
        artifacts = str(expanded(artifacts, what="--artifacts").absolute())
    if arguments.store is None:
        store = tracking_address(f"sqlite:///{output / 'mlflow.db'}", asked="--output")
    else:
        store = tracking_address(arguments.store, asked="--store")
    plan = ServerPlan(
        store=store,
        artifacts=artifacts,
        folder=output / "tracking_server",
        host=arguments.host,
        port=arguments.port,
        auth=arguments.auth,
        allowed_hosts=tuple(arguments.allowed_host),
    )
    plan.check(os.environ)
    plan.check_port()
    environment = plan.environment(os.environ)
    output.mkdir(parents=True, exist_ok=True)
    command_line.say(f"http://{plan.host}:{plan.port} serves {shown(plan.store)}")
    command = plan.command()
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
