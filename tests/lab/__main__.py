"""The lab by hand.

python -m tests.lab up
python -m tests.lab run head -- ray status
python -m tests.lab cut worker-1        # its power
python -m tests.lab boot worker-1
python -m tests.lab unplug worker-2     # its network
python -m tests.lab plug worker-2
python -m tests.lab down

python -m tests.lab drill               # `ray up`, a sweep, a power cut, every record, `ray down`
python -m tests.lab drill --fault network
"""

import argparse
import os
import shlex
import sys
import time

from tests.lab.drill import FAULTS, Drill, Fault, missing_services, told
from tests.lab.hosts import HOSTS, Lab, address


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the hosts, fresh")
    commands.add_parser("down", help="end them and remove all that they wrote")
    drilled = commands.add_parser("drill", help="ray up, a sweep with a fault, ray down")
    drilled.add_argument(
        "--fault", choices=FAULTS, default="power", help="what a host loses (default: power)"
    )
    drilled.add_argument(
        "--services", action="store_true", help="with PostgreSQL and S3 on the head"
    )
    for name, what in (
        ("run", "run a command on a host"),
        ("cut", "cut the power of a host"),
        ("boot", "start it again"),
        ("unplug", "pull its network cable"),
        ("plug", "put the cable back in"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("host", choices=HOSTS)
        if name == "run":
            command.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    arguments = parser.parse_args()
    lab = Lab()
    try:
        if arguments.command == "up":
            lab.up()
            for host in HOSTS:
                print(f"{host:10}{address(host)}")
        elif arguments.command == "down":
            lab.down()
        elif arguments.command == "drill":
            if arguments.services and arguments.fault != "power":
                parser.error("--services goes with --fault power alone.")
            drill(lab, fault=arguments.fault, with_services=arguments.services)
        elif arguments.command == "run":
            words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
            line = words[0] if len(words) == 1 else shlex.join(words)
            command = lab.command(arguments.host, line)
            os.execvp(command[0], command)
        else:
            actions = {
                "cut": lab.cut_power,
                "boot": lab.boot,
                "unplug": lab.cut_network,
                "plug": lab.join_network,
            }
            actions[arguments.command](arguments.host)
    except RuntimeError as error:
        sys.exit(f"lab: {error}")


def drill(lab: Lab, *, fault: Fault, with_services: bool) -> None:
    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)

    lack = missing_services() if with_services else ""
    if lack:
        sys.exit(f"lab: --services needs {lack}.")
    lab.up()
    try:
        print(told(Drill(lab, say=say, fault=fault, with_services=with_services).run()))
    except (AssertionError, TimeoutError) as error:
        sys.exit(f"lab: {error}\nThe hosts are still up: look, then `python -m tests.lab down`.")
    lab.down()


if __name__ == "__main__":
    main()
