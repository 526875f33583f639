"""A page to search a gallery with a trained model: sentences find images, images find captions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.errors import ConfigError
from cpfean.files import read_file
from experiments import command_line
from experiments.trained import MODEL

if TYPE_CHECKING:
    from cpfean.search.page.answers import Answers

_EPILOG = """\
  python experiments/search.py runs/NAME --data DIR --photos DIR/images
  python experiments/search.py runs/NAME --data DIR --against runs/OTHER
  python experiments/search.py runs/NAME --data DIR --shortlist 200 --half    a million images
  python experiments/search.py runs/NAME --data DIR --host 0.0.0.0 --password-file FILE

The page is on this machine alone: open the address that is printed, or from elsewhere through
`ssh -L 7860:127.0.0.1:7860 HOST`. Any other --host needs a password, of the user "cpfean"; it goes
over the network as it is, so put a proxy with TLS in front. Every pair is scored, in the order of
`evaluate.py --protocol full`, unless --shortlist is given. Without --photos the regions are drawn.
A photograph of one's own can be dropped in where the data's provenance.json names the detector that
made its regions. The gallery is encoded once and kept in the cache. Needs: pip install -e '.[demo]'

Exit codes: 0 done, 2 flags or no Gradio, 3 data, 5 model, disk or port, 130 Ctrl-C, 143 killed.
"""
_LONGEST_PASSWORD = 1000  # bytes
_MANY = 50_000  # images


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("model", metavar="MODEL", type=Path, help=MODEL)
    parser.add_argument(
        "--data",
        metavar="DIR|URL|synthetic",
        type=command_line.place,
        help="default: the data that the model was trained on",
    )
    parser.add_argument(
        "--split",
        choices=("train", "dev", "test", "gallery"),
        help="default: test, or gallery where the data has nothing else",
    )
    parser.add_argument(
        "--photos", metavar="DIR", type=Path, help="photographs, named as the images' ids"
    )
    parser.add_argument(
        "--against", metavar="MODEL", type=Path, help="another model, to be shown beside it"
    )
    parser.add_argument(
        "--shortlist",
        metavar="K",
        type=int,
        help="score only the K images whose pooled vectors are nearest (default: every one)",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="keep the regions' embeddings in half precision: half the disk, and scores that "
        "differ in the fourth decimal",
    )
    parser.add_argument(
        "--count", metavar="N", type=int, default=12, help="images to find (default: 12)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument("--password", help="everybody on this host reads it in the process list")
    secret.add_argument("--password-file", metavar="FILE", type=Path, help="its first line")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from cpfean.listening import listening
    from cpfean.search.page.blocks import build_page, largest_request, load_gradio, mounted
    from cpfean.search.page.server import Place, serve

    command_line.positive(arguments.count, "--count", most=1000)
    if arguments.shortlist is not None:
        command_line.positive(arguments.shortlist, "--shortlist", least=arguments.count)
    if arguments.photos is not None and not arguments.photos.is_dir():
        raise ConfigError(f"--photos {arguments.photos}: expected a folder, found none.")
    place = Place(host=arguments.host, port=arguments.port, password=_password(arguments))
    load_gradio()
    with listening(place.host, place.port) as bound:
        answers, about = _answers(arguments)
        answers.prepare()
        why_no_upload = answers.why_no_upload()

        def make_app() -> object:
            return mounted(
                build_page(answers, title="CPFEAN search", about=about, why_no_upload=why_no_upload)
            )

        def ready() -> None:
            print(f"{place.url}  {about}; Ctrl-C ends it", flush=True)

        serve(make_app, place, bound, largest=largest_request(why_no_upload), ready=ready)
    return 0


def _answers(arguments: argparse.Namespace) -> tuple[Answers, str]:
    """What the page asks, and a line on it."""
    from cpfean.search.page.answers import Answers, model_names
    from cpfean.search.page.photos import Photos
    from cpfean.search.searcher import Searcher

    paths = [path for path in (arguments.model, arguments.against) if path]
    searchers: list[Searcher] = []
    for path in paths:
        searchers.append(
            Searcher.from_pretrained(
                path,
                # Both models look at the data of the first.
                data=arguments.data or (searchers[0].folder if searchers else None),
                split=arguments.split,
                precision="float16" if arguments.half else "float32",
            )
        )
    photos, names = Photos(arguments.photos), model_names(paths)
    split = searchers[0].split
    photos.check(split.image_ids)
    answers = Answers(
        searchers,
        names=names,
        photos=photos,
        count=arguments.count,
        shortlist=arguments.shortlist,
    )
    if arguments.shortlist is None and split.num_images > _MANY:
        command_line.say(
            f"every search scores all {split.num_images:,} images, which takes seconds or more; "
            "--shortlist 200 scores the nearest alone."
        )
    about = f"{split.num_images:,} images of {split.name}, searched by {' and '.join(names)}"
    return answers, about


def _password(arguments: argparse.Namespace) -> str | None:
    if arguments.password_file is None:
        given: str | None = arguments.password
        return given
    try:
        text = read_file(arguments.password_file, limit=_LONGEST_PASSWORD).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--password-file {arguments.password_file}: cannot be read: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from None
    return text.split("\n")[0].rstrip("\r")


if __name__ == "__main__":
    main()
