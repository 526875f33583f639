"""Check a data folder in the native format, and list everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments import command_line

_EPILOG = """\
Of each kind of fault the first 20 in each file are listed, and how many more there are. Then a
summary to be checked by eye, of the splits without a fault. docs/data.md describes the files.

  python experiments/validate.py DIR
  python experiments/validate.py DIR --json --regions 36

Exit codes: 0 nothing wrong, 2 flags, 3 faults found.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--regions", metavar="K", type=int, help="the region count that will be asked for"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from cpfean.data.split import validate_folder
    from cpfean.data.summary import summarize

    if arguments.regions is not None:
        command_line.positive(arguments.regions, "--regions")
    findings = validate_folder(arguments.folder, num_regions=arguments.regions)
    if arguments.json:
        told = {
            "folder": str(arguments.folder),
            "findings": [finding._asdict() for finding in findings],
            "summary": summarize(arguments.folder).as_dict(),
        }
        print(json.dumps(told, indent=1))
    else:
        for finding in findings:
            print(finding)
        if not findings:
            print(f"{arguments.folder}: nothing wrong.")
        for line in summarize(arguments.folder).lines():
            print(line)
    return 3 if findings else 0


if __name__ == "__main__":
    main()
