"""Check a data folder in the native format, and list everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cpfean.config import ExperimentConfig
from cpfean.errors import DataError
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
    from cpfean.data.split import splits_of, validate_folder
    from cpfean.data.summary import summarize

    if arguments.regions is not None:
        command_line.positive(arguments.regions, "--regions")
    splits = splits_of(arguments.folder)
    findings = validate_folder(arguments.folder, num_regions=arguments.regions, splits=splits)
    if not findings and "train" in splits:
        _tell_unknown(arguments.folder)
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


def _tell_unknown(folder: Path) -> None:
    """Warns of captions that a vocabulary made from the training captions knows nothing of.

    No fault of the data: a pretrained text encoder may know them.
    """
    from cpfean.training.text_check import check_text

    try:
        check_text(ExperimentConfig(), data_folder=folder)
    except DataError as error:
        print(f'warning, for model.text.encoder = "scratch": {error}', file=sys.stderr)


if __name__ == "__main__":
    main()
