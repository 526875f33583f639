"""Publish a trained model on the Hugging Face Hub, with a card of what is known of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cpfean.training.trained import model_folder, trained_configuration
from experiments import command_line
from experiments.trained import MODEL

_EPILOG = """\
  python experiments/push.py runs/NAME USER/NAME --dry-run            the card, to look at
  python experiments/push.py runs/NAME USER/NAME --licence apache-2.0
  python experiments/push.py runs/NAME USER/NAME --dry-run > card.md  to write on
  python experiments/push.py runs/NAME USER/NAME --card card.md

What goes out: config.json, model.safetensors, config.toml, tokenizer/ and the card, README.md, in
one commit. Its figures are those of the run's records; a model without a record has none. A frozen
text encoder stays where it is: others fetch it by its name. Log in with `hf auth login`, or set
HF_TOKEN. Others read the model by its name: `evaluate.py USER/NAME`.

Exit codes: 0 done, 2 flags or a model that cannot go out as it is, 5 checkpoint, or the Hub.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("model", metavar="MODEL", type=Path, help=MODEL)
    parser.add_argument("repo", metavar="USER/NAME", help="on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="a new one is for its owner alone")
    parser.add_argument(
        "--licence",
        metavar="ID",
        help="of the model, by the Hub's identifier, e.g. apache-2.0 (default: left to be filled "
        "in on the card)",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="USER/NAME",
        help="under which others find a frozen text encoder that is a folder here; its weights are "
        "compared",
    )
    parser.add_argument(
        "--card", metavar="FILE", type=Path, help="in place of the card that is made"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the card on standard output, the files on standard error; nothing is sent",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from cpfean.publishing.push import prepared, push_to_hub

    model = model_folder(arguments.model)
    config = trained_configuration(model)
    with prepared(
        model,
        arguments.repo,
        config=config,
        licence=arguments.licence,
        text_encoder=arguments.text_encoder,
        card=arguments.card,
    ) as publication:
        for path in publication.files:
            name, size = path.relative_to(publication.folder), path.stat().st_size
            print(f"{size:>14,} bytes  {name}", file=sys.stderr)
        if not publication.origin.test and arguments.card is None:
            print(
                f"{arguments.model} has no record of a test: its card has no such figures.",
                file=sys.stderr,
            )
        if arguments.dry_run:
            print(publication.card, end="")
            return 0
        print(push_to_hub(publication, private=arguments.private))
    return 0


if __name__ == "__main__":
    main()
