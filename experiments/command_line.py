"""What the commands share: flags, how mistakes are answered, and the way to a checked plan."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TypeVar

from cpfean.config import ExperimentConfig, Plain, nearest
from cpfean.errors import ConfigError, CpfeanError
from cpfean.folders import can_be_written, check_text, expanded
from cpfean.records.budget import Budget, Prices
from cpfean.records.run_folder import newest_unfinished
from cpfean.records.trial_record import TUNING
from cpfean.writing import cannot_write, is_disk_error
from experiments.baselines import BASELINES
from experiments.terminal import make_forgiving
from orchestration.proposals.search_space import Choice, SearchSpace
from orchestration.runners.protocol import Runner
from orchestration.settings import Settings, check_name, prepare_environment
from orchestration.study.plan import StudyPlan
from orchestration.study.records_copy import fetch_records
from orchestration.study.stopping import Interrupted

# A setting -> the file that data must have for it to make a difference, and what is in it.
_NEEDS = {
    "model.regions.iou_threshold": ("train_boxes.npy", "boxes"),
    "model.regions.graph": ("train_boxes.npy", "boxes"),
    "model.regions.geometry": ("train_boxes.npy", "boxes"),
    "model.regions.prior": ("train_labels.npy", "object labels"),
    "model.regions.label_confidence": ("train_scores.npy", "confidences of the labels"),
}


_AGAIN_SECONDS = 3.0  # after which a Ctrl-C that was lost is sent once more
_LONGEST = 4096  # characters of a flag's value, and bytes of a path
_LONGEST_PART = 255  # bytes of a file's name
_LARGEST = 2**31 - 1
_MOST_SEEDS = 1000
_MOST = 100_000  # of anything else that is counted: beyond it lies a slip


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasName)


class Parser(argparse.ArgumentParser):
    """Refuses abbreviated, repeated and unknown flags; names the nearest known one.

    So it does values that nothing can be done with: empty ones, "--", those with characters that
    cannot be shown or are not UTF-8, and numbers and paths beyond what a system can hold. What was
    typed is `typed` of what comes out.
    """

    def __init__(self, *, description: str, epilog: str) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        for given, read in ((None, _text), (Path, _path), (int, _whole), (float, _number)):
            self.register("type", given, read)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = tuple(sys.argv[1:] if args is None else args)
        for word in words:
            flag, _, value = word.partition("=")
            # argparse drops such a value, and hands on an empty list.
            if value == "--" and flag in self._option_string_actions:
                self.error(f"argument {flag}: no value can be '--'; of a path, write './--'")
        parsed, unknown = self.parse_known_args(words, namespace)
        parsed.typed = words
        for word in unknown:
            if word.startswith("-"):
                flag = word.split("=")[0]
                known = [name for name in self._option_string_actions if name.startswith("--")]
                self.error(f"no flag {flag}{nearest(flag, known)}")
        if unknown:
            self.error(f"unexpected: {' '.join(unknown)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


class _Once(argparse.Action):
    """Stores a flag's value; a second one would silently win."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = namespace.__dict__.setdefault("_given", set())
        if option_string and self.dest in given:
            raise argparse.ArgumentError(self, "given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def _text(value: str) -> str:
    """What can be shown, and written into files."""
    try:
        check_text(Path(_shown(value)), what="")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
    return value


def _shown(value: str) -> str:
    """What can be shown, be it in another encoding than this terminal's."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave it out")
    if len(value) > _LONGEST:
        raise argparse.ArgumentTypeError(
            f"expected at most {_LONGEST} characters, found {len(value)}"
        )
    read = value.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
    if not read.isprintable():
        odd = next(letter for letter in read if not letter.isprintable())
        raise argparse.ArgumentTypeError(f"{value!r} has {odd!r}, which cannot be shown")
    return value


def _path(value: str) -> Path:
    """A path that the system can be asked for; it need not be one that can be written down."""
    path = Path(_shown(value))
    for part in path.parts:
        if len(os.fsencode(part)) > _LONGEST_PART:
            raise argparse.ArgumentTypeError(
                f"no file can have a name of {len(part)} characters: {part[:40]}..."
            )
    try:
        return expanded(path, what="")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None


def place(value: str) -> str:
    """A folder, or a name or URL that stands for one; the type of flags."""
    if "://" in _text(value):
        return value
    path = str(_path(value))
    return path if value.startswith("~") else value  # "./small" is not "small"


def output_folder(value: str) -> Path:
    """A folder that is there or can be made; the type of flags."""
    path = _path(_text(value))
    there = next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), path)
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, and {there} is none")
    return path


def _whole(value: str) -> int:
    number = int(_text(value))
    if abs(number) > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected a whole number within ±{_LARGEST}")
    return number


def _number(value: str) -> float:
    return float(_text(value))


def add_run_flags(parser: Parser, *, workers: int, workers_help: str) -> None:
    """The flags of every command that trains."""
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--data",
        metavar="DIR|URL|synthetic",
        type=place,
        help="folder in the native format (docs/data.md), s3:// URL of one, or the generated set",
    )
    what.add_argument(
        "--config",
        metavar="NAME|FILE.toml",
        type=place,
        help=f"a complete configuration: {', '.join(BASELINES)}, or a file such as a sweep's "
        "best_config.toml (default: small with --data DIR, else synthetic)",
    )
    what.add_argument(
        "--set",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="change any setting, e.g. --set loss.margin=0.3; may be repeated",
    )
    what.add_argument("--epochs", metavar="N", help="optim.epochs")
    what.add_argument("--seed", metavar="N", help="of weights, data order and search")
    where = parser.add_argument_group("where, and under which name")
    where.add_argument("--workers", metavar="N", type=int, default=workers, help=workers_help)
    where.add_argument(
        "--min-workers",
        metavar="N",
        type=int,
        help="go on with as few as that where hosts are lost (default: --workers)",
    )
    where.add_argument(
        "--address",
        metavar="HOST:PORT",
        help='a running Ray cluster; "local" uses this machine alone (default: RAY_ADDRESS, else '
        "the cluster whose head runs here, else this machine)",
    )
    where.add_argument("--name", help="of the folder and of the tracking run (default: by date)")
    where.add_argument(
        "--output", metavar="DIR", type=output_folder, default=Path("runs"), help="default: runs"
    )
    where.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="of MLflow (default: MLFLOW_TRACKING_URI, else a sqlite file in the output folder)",
    )
    where.add_argument(
        "--resume",
        action="store_true",
        help="go on where it stopped, whatever stopped it: the same flags again, and --name or the "
        "newest unfinished one",
    )
    where.add_argument(
        "--retry-failed",
        action="store_true",
        help="with --resume: run trials that failed once more, from their newest checkpoints",
    )
    where.add_argument(
        "--allow-drift",
        action="store_true",
        help="resume with other versions than those at the start, or run on nodes that have other "
        "versions; the trials tell (cpfean.drift)",
    )
    where.add_argument("--debug", action="store_true", help="show where an error came from")


def add_comparison_flags(parser: Parser, *, seeds: int) -> None:
    """The flags of commands that run variants on seeds."""
    parser.add_argument(
        "--seeds",
        metavar="K",
        type=int,
        default=seeds,
        help=f"runs of each, on the seeds after --seed (default: {seeds})",
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=output_folder,
        help="folder of what runs came to; those in it are not trained again, and files from other "
        "machines may be put there (default: results in the output folder)",
    )
    add_in_process_flag(parser)


def add_register_flag(parser: Parser) -> None:
    """The flag of commands that end with a best model; `registered_name` reads it."""
    parser.add_argument(
        "--register",
        metavar="NAME",
        help="register the best model in MLflow by that name; with --resume also that of a run "
        "that has ended",
    )


def registered_name(arguments: argparse.Namespace) -> str:
    """The name to register the best model by; empty if it is not to be.

    Raises:
        ConfigError: no name that a registry takes.
    """
    given: str | None = arguments.register
    return "" if given is None else check_name(given, flag="--register")


def add_in_process_flag(parser: Parser) -> None:
    """The flag of commands that can do without Ray."""
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="one run after another in this process, without Ray",
    )


def add_budget_flags(parser: Parser, *, limits: bool = True) -> None:
    """The flags of what a study may take; limits are for studies of several trials."""
    budget = parser.add_argument_group("what it takes")
    budget.add_argument(
        "--dry-run",
        action="store_true",
        help="say how long it takes, what it costs and what disk it needs, from a few steps that "
        "are timed here; start nothing",
    )
    budget.add_argument(
        "--prices",
        metavar="FILE",
        type=Path,
        default=Path(__file__).with_name("prices.toml"),
        help="dollars an hour of the nodes (default: experiments/prices.toml)",
    )
    if limits:
        budget.add_argument(
            "--max-hours",
            metavar="H",
            type=float,
            help="begin no new trial after so many hours, all attempts together; those that run "
            "are finished, and --resume with more goes on",
        )
        budget.add_argument(
            "--max-cost", metavar="USD", type=float, help="the same in dollars of the whole cluster"
        )


def budget(arguments: argparse.Namespace) -> Budget:
    """What the study may take.

    Raises:
        ConfigError: a limit that is none, or a file of prices that cannot be understood.
    """
    return Budget(
        max_hours=getattr(arguments, "max_hours", None),
        max_cost=getattr(arguments, "max_cost", None),
        prices=Prices.read(arguments.prices),
    )


def run(parser: Parser, body: Callable[[argparse.Namespace], int]) -> NoReturn:
    """Parses, runs, and turns what went wrong into a message and an exit code."""
    make_forgiving()
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("cpfean").setLevel(logging.INFO)
    try:
        prepare_environment()
        sys.exit(body(arguments))
    except Interrupted as stopped:
        # All is written; what libraries do at the end of a process can take seconds.
        sys.stdout.flush()
        os._exit(stopped.exit_code)
    except KeyboardInterrupt:
        # What was started ends with this process, and sooner than if it were asked to.
        sys.stdout.flush()
        os._exit(130)
    except CpfeanError as error:
        if arguments.debug:
            raise
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if arguments.debug or not is_disk_error(error):
            raise
        # From a library that names no file.
        told = cannot_write(getattr(arguments, "output", Path.cwd()), error)
        print(f"{parser.prog}: {told}", file=sys.stderr)
        sys.exit(told.exit_code)


def say(line: str) -> None:
    """Shows the user a line at once, with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def configuration(arguments: argparse.Namespace) -> ExperimentConfig:
    """The configuration that the flags ask for.

    Raises:
        ConfigError: an unknown name, path or value, or a setting that is given twice.
    """
    synthetic = arguments.data in (None, "synthetic")
    name = arguments.config or ("synthetic" if synthetic else "small")
    if name in BASELINES:
        config = BASELINES[name]
    elif name.endswith(".toml") or "/" in name:
        config = ExperimentConfig.from_toml(Path(name))
    else:
        raise ConfigError(f"no configuration {name!r}{nearest(name, BASELINES)}")
    overrides: dict[str, Any] = {}
    flags = (("data", "data.path"), ("epochs", "optim.epochs"), ("seed", "seed"))
    for flag, path in flags:
        if (given := getattr(arguments, flag, None)) is not None:
            check_text(Path(given), what=f"--{flag}")
            overrides[path] = given
    for text in arguments.set:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set needs PATH=VALUE, e.g. --set loss.margin=0.3; got {text!r}.")
        if path in overrides:
            raise ConfigError(f"{path} is given twice.")
        overrides[path] = value
    config = config.with_overrides(overrides)
    # Workers run in other folders and on other machines.
    places: dict[str, Any] = {
        "data.path": _absolute(config.data.path, "synthetic", setting="data.path")
    }
    encoder = config.model.text.encoder
    absolute = _absolute(encoder, "scratch", setting="model.text.encoder")
    if os.path.isdir(str(absolute)):
        places["model.text.encoder"] = absolute
    return config.with_overrides(places)


def settings(arguments: argparse.Namespace) -> Settings:
    """Where things are; what trains in this process asks for no cluster.

    Raises:
        ConfigError: as `Settings.resolve`, or an output folder that a training cannot write to.
        ServiceError: as `Settings.resolve`.
    """
    address = arguments.address
    if getattr(arguments, "in_process", False) or getattr(arguments, "workers", None) == 0:
        # A flag that is no address is a mistake nevertheless; a variable is not about this.
        address = (address or "").strip() or "local"
    where = Settings.resolve(
        output=arguments.output, tracking_uri=arguments.tracking_uri, address=address
    )
    if not getattr(arguments, "dry_run", True) and not can_be_written(where.output):
        raise ConfigError(
            f"--output {where.output}: this user cannot write there; name another folder."
        )
    return where


def chosen(
    names: Sequence[str], known: Sequence[_Named], *, flag: str, what: str
) -> Sequence[_Named]:
    """Those that a repeated flag names, or all.

    Raises:
        ConfigError: an unknown name, or one that is given twice.
    """
    by_name = {one.name: one for one in known}
    for name in names:
        if name not in by_name:
            raise ConfigError(f"no {what} {name!r}{nearest(name, by_name)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{flag} names the same {what} twice.")
    return [by_name[name] for name in names] or known


def positive(value: int, flag: str, *, least: int = 1, most: int = _MOST) -> int:
    """Raises ConfigError if a count is too small or too large."""
    if value < least:
        raise ConfigError(f"{flag} must be at least {least}; got {value}.")
    if value > most:
        raise ConfigError(f"{flag} must be at most {most}; got {value}.")
    return value


def fewest_workers(arguments: argparse.Namespace) -> int:
    """What --min-workers asks for; 0 where it does not.

    Raises:
        ConfigError: more than --workers.
    """
    if arguments.min_workers is None:
        return 0
    fewest = positive(arguments.min_workers, "--min-workers")
    if fewest > arguments.workers:
        raise ConfigError(
            f"--min-workers must be at most --workers, {arguments.workers}; got {fewest}."
        )
    return fewest


def run_name(arguments: argparse.Namespace, kind: str, where: Settings) -> str:
    """The name given, or of the newest unfinished run for a resume, or one made of the date.

    The folder of a run that is to be resumed is fetched from the storage if it is not here.

    Raises:
        ConfigError: a name that cannot be one, or nothing to resume.
        ServiceError: the folder is not here, and the storage does not answer.
    """
    if arguments.retry_failed and not arguments.resume:
        raise ConfigError("--retry-failed goes with --resume: a new run has no failed trials.")
    if arguments.name is not None:
        name = check_name(arguments.name)
        if arguments.resume:
            for each in (name, name + TUNING) if kind == "comparison" else (name,):
                fetch_records(each, where, say=say)
        return name
    if arguments.resume:
        kinds = (kind, "tuning") if kind == "comparison" else (kind,)
        newest = newest_unfinished(
            where.output, *kinds, with_failed=arguments.retry_failed, say=say
        )
        name = newest.name.removesuffix(TUNING)
        say(f"resuming {name}")
        return name
    name = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    # Machines that share a storage do not see each other's folders.
    return name if where.storage is None else f"{name}-{uuid.uuid4().hex[:6]}"


@contextmanager
def named(plan: StudyPlan, arguments: argparse.Namespace, where: Settings) -> Iterator[StudyPlan]:
    """The plan under a name that no other command has, if it is a new one that was given none.

    Several commands may start in the same second, on several hosts: who makes the folder has it.
    It is made when everything else has been checked, and gone again if nothing was written to it.

    Raises:
        ServiceError: the folder cannot be made.
    """
    if arguments.name is not None or arguments.resume:
        yield plan
        return
    made = not where.output.exists()
    names = itertools.chain([plan.name], (f"{plan.name}-{n}" for n in itertools.count(2)))
    for name in names:
        folder = where.output / name
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(folder, error) from error
    trials = [replace(t, name=name) if t.name == plan.name else t for t in plan.fixed]
    try:
        yield replace(plan, name=name, fixed=tuple(trials))
    finally:
        for empty in (folder, *([where.output] if made else [])):
            with suppress(OSError):
                empty.rmdir()


def start_early(arguments: argparse.Namespace, where: Settings) -> None:
    """Lets Ray start on this machine while the data is checked, for a study that will need it.

    What is resumed may have nothing left to run.
    """
    if arguments.dry_run or arguments.resume or where.address is not None:
        return
    from orchestration.cluster import connection

    def interrupt(number: int, _frame: object) -> None:
        # Python drops what is raised in the callbacks of its imports, of which there are many now.
        again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)  # until the study hears of it itself
    say("starting Ray on this machine, and checking the data meanwhile.")
    connection.start_early(where)


def checked_data(
    config: ExperimentConfig, where: Settings, *, num_regions: int
) -> tuple[Path, str]:
    """Fetches or makes the data and checks all of it; returns its folder and fingerprint.

    A text encoder that is damaged, is none, or does not know the captions' words is found here too,
    and not by every worker again.

    Args:
        num_regions: the most that any trial asks for.

    Raises:
        DataError: every fault that was found, or data that the protocol was not made for.
        ConfigError: no such text encoder, or what is wrong with it.
    """
    from cpfean.data.sources import resolve_data
    from cpfean.data.split import check_folder, data_fingerprint
    from cpfean.training.text_check import check_text

    folder = resolve_data(config.data, cache_dir=where.cache_dir)
    check_folder(
        folder,
        num_regions=num_regions,
        train_images=config.data.train_images,
        cache_dir=where.cache_dir,
    )
    check_text(config, data_folder=folder)
    if config.evaluation.protocol != "full":
        from cpfean.training.evaluation import check_protocol  # seconds to import

        check_protocol(folder, config.evaluation.protocol)
    return folder, data_fingerprint(folder)


def check_needs(folder: Path, paths: Sequence[str], *, who: str, instead: str) -> None:
    """Refuses to vary what the data lacks: all trials would be the same.

    Raises:
        ConfigError: names the file that is missing.
    """
    for path in paths:
        file, what = _NEEDS.get(path, ("", ""))
        if file and not (folder / file).exists():
            raise ConfigError(
                f"{who} varies {path}, and {folder} has no {what} ({file}): it would make no "
                f"difference. {instead}"
            )


def stored_regions(folder: Path) -> int:
    """Regions that every image of the data has."""
    import numpy as np

    from cpfean.data.split import split_stem

    files = [folder / f"{split_stem(folder, s)}_ims.npy" for s in ("train", "dev", "test")]
    return min(np.load(file, mmap_mode="r").shape[1] for file in files if file.exists())


def fitting_space(space: SearchSpace, stored: int) -> SearchSpace:
    """The space without region counts that the data does not have."""
    counts = space.parameters.get("data.num_regions")
    if not isinstance(counts, Choice):
        return space
    kept = tuple(count for count in counts.values if isinstance(count, int) and count <= stored)
    kept = kept or (stored,)
    if kept == counts.values:
        return space
    counts_kept = ", ".join(map(str, kept))
    say(f"the data has {stored} regions an image: region counts {counts_kept} are tried.")
    parameters = dict(space.parameters) | {"data.num_regions": Choice(kept)}
    return SearchSpace(
        name=space.name, question=space.question, parameters=parameters, only_if=space.only_if
    )


def comparison_plan(
    arguments: argparse.Namespace, kind: Literal["ablations", "comparison"]
) -> tuple[StudyPlan, Settings, range]:
    """What commands that run variants on seeds start from, its trials to be filled in; and seeds.

    Raises:
        ConfigError, DataError: flags or data that do not do.
    """
    num_seeds = positive(arguments.seeds, "--seeds", most=_MOST_SEEDS)
    workers = positive(arguments.workers, "--workers")
    check_in_process(arguments, workers)
    config = configuration(arguments)
    may_take = budget(arguments)
    where = settings(arguments)
    name = run_name(arguments, kind, where)
    folder, fingerprint = checked_data(config, where, num_regions=config.data.num_regions)
    results = (arguments.results or where.output / "results").absolute()
    plan = StudyPlan(
        kind=kind,
        name=name,
        base=config,
        trials=0,
        workers=workers,
        min_workers=fewest_workers(arguments),
        data_folder=folder,
        data_fingerprint=fingerprint,
        results=results,
        budget=may_take,
        allow_drift=arguments.allow_drift,
        retry_failed=arguments.retry_failed,
        typed=arguments.typed,
    )
    return plan, where, range(config.seed + 1, config.seed + 1 + num_seeds)


def runner(where: Settings, *, in_process: bool) -> Runner:
    """What runs trials: Ray, or this process."""
    if in_process:
        from orchestration.runners.in_process import InProcess

        return InProcess()
    from orchestration.runners.on_ray import OnRay

    return OnRay(where)


def check_in_process(arguments: argparse.Namespace, workers: int) -> None:
    """Raises ConfigError if several workers are asked for in one process."""
    if arguments.in_process and workers > 1:
        raise ConfigError(f"--in-process is one process; got --workers {workers}.")


def _absolute(path: str, name: str, *, setting: str) -> Plain:
    """The path from any folder; what is none stays: the name that stands for one, or a URL."""
    if path == name or "://" in path:
        return path
    try:
        return str(_path(_text(path)).absolute())
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{setting}: {str(error).rstrip('.')}.") from None
