"""Who may import whom, and what no part of the product ever calls."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("cpfean", "orchestration", "experiments")
CLUSTER = frozenset({"ray", "optuna", "mlflow"})
PAGES = frozenset({"gradio", "uvicorn"})  # an extra brings the first, and one page needs them
FOUNDATION = frozenset(
    f"cpfean.{name}"
    for name in (
        "commands",
        "config",
        "errors",
        "files",
        "fingerprints",
        "folders",
        "hub",
        "json_files",
        "listening",
        "output_folders",
        "processes",
        "progress",
        "threads",
        "writing",
    )
)


ABOVE_TRAINING = FOUNDATION | {
    "cpfean.data",
    "cpfean.kernels",
    "cpfean.losses",
    "cpfean.metrics",
    "cpfean.model",
}


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the modules under one name may import.

    Attributes:
        ours: modules and packages of this project, besides the room itself.
        never: packages of others.
        only_standard_library: no package of others at all.
    """

    ours: frozenset[str]
    never: frozenset[str] = CLUSTER | PAGES
    only_standard_library: bool = False


# The room with the longest name that fits a module is its room.
ROOMS = {
    "cpfean": Room(ours=FOUNDATION),
    "cpfean.analysis": Room(ours=ABOVE_TRAINING | {"cpfean.training"}),
    "cpfean.commands": Room(ours=frozenset(), only_standard_library=True),
    "cpfean.config": Room(
        ours=frozenset({"cpfean.errors", "cpfean.files", "cpfean.model.scorers.registry"}),
        only_standard_library=True,
    ),
    "cpfean.errors": Room(ours=frozenset(), only_standard_library=True),
    "cpfean.extraction": Room(ours=FOUNDATION | {"cpfean.data", "cpfean.photographs"}),
    "cpfean.files": Room(ours=frozenset(), only_standard_library=True),
    "cpfean.data": Room(ours=FOUNDATION),
    "cpfean.losses": Room(ours=FOUNDATION),
    "cpfean.metrics": Room(ours=FOUNDATION),
    "cpfean.folders": Room(ours=frozenset({"cpfean.errors"}), only_standard_library=True),
    "cpfean.kernels": Room(ours=frozenset({"cpfean.folders"}), never=CLUSTER | PAGES | {"torch"}),
    "cpfean.model": Room(ours=FOUNDATION | {"cpfean.kernels", "cpfean.model.scorers.registry"}),
    "cpfean.model.scorers.registry": Room(ours=frozenset(), only_standard_library=True),
    "cpfean.search": Room(
        ours=ABOVE_TRAINING
        | {"cpfean.analysis", "cpfean.photographs", "cpfean.search.page", "cpfean.training"}
    ),
    "cpfean.search.page": Room(
        ours=ABOVE_TRAINING | {"cpfean.analysis", "cpfean.photographs", "cpfean.search"},
        never=CLUSTER,
    ),
    "cpfean.photographs": Room(ours=FOUNDATION),
    "cpfean.processes": Room(ours=frozenset({"cpfean.errors"})),
    "cpfean.progress": Room(ours=frozenset(), only_standard_library=True),
    "cpfean.publishing": Room(ours=ABOVE_TRAINING | {"cpfean.records", "cpfean.training"}),
    # MLflow finds it by its name; it needs no MLflow.
    "cpfean.pyfunc": Room(ours=ABOVE_TRAINING | {"cpfean.training"}),
    "cpfean.records": Room(ours=FOUNDATION),
    "cpfean.storage": Room(ours=FOUNDATION | {"cpfean.training.checkpoint"}),
    "cpfean.training": Room(ours=ABOVE_TRAINING),
    "orchestration": Room(
        ours=frozenset({"cpfean", "orchestration.proposals", "orchestration.study.follower"}),
        never=frozenset({"optuna"}) | PAGES,
    ),
    "orchestration.proposals": Room(
        ours=frozenset({"cpfean", "orchestration"}), never=frozenset({"ray", "mlflow"}) | PAGES
    ),
    "orchestration.proposals.search_space": Room(ours=FOUNDATION),
    "orchestration.schedule": Room(
        ours=frozenset({"cpfean"}), never=frozenset({"optuna", "mlflow", "torch"}) | PAGES
    ),
    # What it brings up to date comes to it, and not the other way round.
    "orchestration.study.follower": Room(ours=frozenset({"cpfean.records.trial_record"})),
    "experiments": Room(ours=frozenset({"cpfean", "orchestration"})),
}


def sources() -> Iterator[tuple[str, Path]]:
    """Name and file of every module of the product."""
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            yield module_name(path), path


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported(module: str, tree: ast.AST, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from cpfean import model` names a module, `from torch import Tensor` does not;
                # the longer name falls under the same rules either way.
                yield node.lineno, f"{origin}.{alias.name}"


def trespasses(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """The imports of a module that its room does not allow."""
    name = max((room for room in ROOMS if within(module, room)), key=len)
    room = ROOMS[name]
    found = []
    for line, target in imported(module, parsed(source), is_package=is_package):
        top = target.split(".")[0]
        if top in FLOORS:
            # A room of its own inside this one ("cpfean" holds "cpfean.data") is not this one.
            home = max((other for other in ROOMS if within(target, other)), key=len)
            allowed = home == name or any(within(target, other) for other in room.ours)
        elif top in sys.stdlib_module_names:
            allowed = True
        else:
            allowed = top not in room.never and not room.only_standard_library
        if not allowed:
            found.append(f"{module}, line {line}: {target}")
    return found


def test_every_module_keeps_to_its_room() -> None:
    found = [
        trespass
        for module, path in sources()
        for trespass in trespasses(
            module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py"
        )
    ]
    assert found == []


def test_every_package_of_the_science_has_its_row() -> None:
    packages = {module_name(path) for path in (ROOT / "cpfean").glob("*/__init__.py")}
    assert packages <= ROOMS.keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cpfean.config", "import torch"),
        ("cpfean.config", "from cpfean.data import split"),
        ("cpfean.config", "from cpfean.model.scorers.scorer import scorer_class"),
        ("cpfean.model.scorers.registry", "from cpfean.model.scorers.pairs import Pairs"),
        ("cpfean.errors", "from cpfean.config import ExperimentConfig"),
        ("cpfean.errors", "import numpy.linalg"),
        ("cpfean.data.split", "from cpfean.model.cpfean import Cpfean"),
        ("cpfean.data.split", "from ..metrics import retrieval"),
        ("cpfean.model.cpfean", "def forward():\n    from cpfean import data"),
        ("cpfean.losses.triplet", "import cpfean.training.loop"),
        ("cpfean.photographs.extractor", "from cpfean.data.split import open_split"),
        ("cpfean.photographs.detectors", "from cpfean.model.pretrained import read_encoder"),
        ("cpfean.extraction.run", "from orchestration.extraction import OnRay"),
        ("cpfean.processes", "from cpfean.config import ExperimentConfig"),
        ("cpfean.metrics.retrieval", "import ray.train"),
        ("cpfean.training.loop", "from mlflow import log_metric"),
        ("cpfean.training.loop", "def report():\n    import optuna as study"),
        ("cpfean.training.loop", "import orchestration.study.study"),
        ("cpfean.training.loop", "from cpfean.analysis.statistics import compare"),
        ("cpfean.model.cpfean", "from cpfean.analysis import views"),
        ("cpfean.analysis.report", "from cpfean.records.trial_record import TrialRecord"),
        ("cpfean.analysis.report", "def write():\n    import mlflow"),
        ("orchestration.study.follower", "def send():\n    import mlflow"),
        ("orchestration.study.follower", "from orchestration.tracking.runs import Runs"),
        ("orchestration.study.follower", "from orchestration.study import records_copy"),
        ("orchestration.study.study", "from experiments.baselines import BASELINES"),
        ("orchestration.study.study", "import optuna"),
        ("orchestration.proposals.search_space", "import optuna"),
        ("orchestration.proposals.optuna_study", "from ray import tune"),
        ("orchestration.schedule.rounds", "from orchestration.study.study import run_study"),
        ("orchestration.schedule.jobs", "import mlflow"),
        ("cpfean.search.searcher", "def look():\n    import gradio"),
        ("cpfean.training.loop", "from cpfean.search.searcher import Searcher"),
        ("experiments.search", "import gradio"),
        ("experiments.sweep", "import ray"),
        ("experiments.sweep", "from optuna.samplers import TPESampler"),
    ],
)
def test_an_import_across_the_rooms_is_found(module: str, source: str) -> None:
    assert len(trespasses(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cpfean.config", "import tomllib\nfrom cpfean.errors import ConfigError"),
        ("cpfean.data.split", "from cpfean.data.regions import RegionStore\nimport numpy as np"),
        ("cpfean.data.split", "from .regions import RegionStore\nfrom ..errors import DataError"),
        ("cpfean.training.loop", "from cpfean.model.cpfean import Cpfean\nimport torch"),
        ("cpfean.analysis.views", "from cpfean.training.evaluation import score_matrix"),
        ("cpfean.search.page.blocks", "def page():\n    import gradio"),
        ("orchestration.study.study", "import ray\nfrom cpfean.training.loop import fit"),
        ("experiments.sweep", "from orchestration.study.study import sweep\nimport argparse"),
        ("experiments.schedule", "from orchestration.schedule.rounds import Schedule"),
        ("orchestration.schedule.jobs", "from ray.job_submission import JobSubmissionClient"),
    ],
)
def test_an_import_that_the_table_allows_is_not_reported(module: str, source: str) -> None:
    assert trespasses(module, source) == []


def test_importing_all_of_the_science_loads_no_cluster_or_tracking_library() -> None:
    """The syntax tree sees our own imports only; this sees those of every library we use, too."""
    modules = [
        module
        for module, _ in sources()
        if within(module, "cpfean")
        # Triton has no build for some systems, where nothing imports its kernels.
        and (find_spec("triton") is not None or not module.startswith("cpfean.kernels.triton"))
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted({set(CLUSTER | PAGES)!r} & sys.modules.keys()))\n"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] == 'cpfean'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, ours = done.stdout.splitlines()
    assert loaded == ""
    assert set(modules) <= set(ours.split())


# What runs code out of a file or a string. No entry is ever taken out for one place.
#
# Ray's own transport is no part of this: what processes of one cluster send each other (tasks,
# actors, what they return, exceptions) Ray pickles with cloudpickle, and so does Tune with the
# snapshots and errors in its folder, which nothing of ours reads. docs/cluster.md says so.
CODE_IN_DATA = frozenset(
    {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "pickle5", "shelve"}
)
RUNS_TEXT = frozenset({"eval", "exec", "compile", "__import__"})
UNSAFE_CALLS = frozenset(
    {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "torch.load"}
)
# Whatever they are methods or functions of.
UNSAFE_NAMES = frozenset(
    {
        "get_pickled_error",  # of a trial of Tune
        "load_model",  # of MLflow's flavours
        "read_pickle",
        "unsafe_load",
        "Unpickler",
        # They unpickle what somebody has put into a database.
        *("SQLAlchemyJobStore", "MongoDBJobStore", "RedisJobStore", "ZooKeeperJobStore"),
        *("EtcdJobStore", "RethinkDBJobStore", "add_jobstore"),
    }
)
# Readers of text, the only ones whose functions may be called `loads`.
LOADS = frozenset({"json.loads", "tomllib.loads"})
SAFE_VALUES = {
    "allow_pickle": False,
    "shell": False,
    "trust_remote_code": False,
    "weights_only": True,
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute or a name; what comes before a call or an index is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> list[str]:
    """What in a source text could run code that came with a file."""
    tree = parsed(source)
    found = [
        f"line {line}: import of {target}"
        for line, target in imported("", tree, is_package=False)
        if set(target.split(".")) & (CODE_IN_DATA | UNSAFE_NAMES)
        or target in UNSAFE_CALLS
        or (target.endswith(".loads") and target not in LOADS)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if (
            name in RUNS_TEXT | UNSAFE_CALLS
            or last in UNSAFE_NAMES
            or (last == "loads" and name not in LOADS)
            or set(name.split(".")[:-1]) & CODE_IN_DATA
        ):
            found.append(f"line {node.lineno}: {name or last}()")
        for keyword in node.keywords:
            if keyword.arg in SAFE_VALUES:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if value is not SAFE_VALUES[keyword.arg]:
                    found.append(f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return found


def test_nothing_in_the_product_runs_code_out_of_data() -> None:
    found = {module: dangers(path.read_text(encoding="utf-8")) for module, path in sources()}
    assert {module: what for module, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "def read():\n    import cloudpickle as c",
        "from ray import cloudpickle",
        "from ray import cloudpickle as c, tune",
        "import ray.cloudpickle",
        "from ray.cloudpickle import loads",
        "ray.cloudpickle.load(file)",
        "serializer.loads(data)",
        "from srsly import pickle_loads, loads",
        "open(path, 'rb').unpickler().loads(data)",
        "from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore",
        "stores.SQLAlchemyJobStore(url=url)",
        "scheduler.add_jobstore('sqlalchemy', url=url)",
        "pandas.read_pickle(path)",
        "trial.get_pickled_error()",
        "from torch import load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import load",
        "mlflow.pytorch.load_model(uri)",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "subprocess.run(command, shell=True)",
        "os.system('ls')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_call_that_could_run_foreign_code_is_found(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('a')",
        "np.load(path, mmap_mode='r', allow_pickle=False)",
        "yaml.safe_load(text)",
        "subprocess.run(['git', 'status'])",
        "json.load(file)",
        "json.loads(text)",
        "tomllib.loads(text)",
        "from apscheduler.triggers.cron import CronTrigger",
    ],
)
def test_a_harmless_call_is_not_reported(source: str) -> None:
    assert dangers(source) == []


# Of a user whom nobody knows they raise, or give back the ~; cpfean.folders answers for all.
HOMES = {"expanduser", "home"}
ASKS_FOR_HOMES = {"cpfean.folders", "orchestration.settings", "orchestration.cluster.connection"}


def local_habits(source: str) -> list[str]:
    """What depends on the locale or the home of whoever runs it."""
    found = []
    for node in ast.walk(parsed(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func) or getattr(node.func, "attr", "")
        last = name.split(".")[-1]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)] + [
            value.value for value in given.values() if isinstance(value, ast.Constant)
        ]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) < 4 for mode in modes)
        reads = last in {"read_text", "write_text"} or name == "open" or last == "fdopen"
        starts = last in {"run", "Popen", "check_output"} and given.keys() & {
            "text",
            "universal_newlines",
        }
        is_text = (reads and not binary) or starts
        # `write_text` of cpfean.writing, a plain name, writes UTF-8 itself.
        if is_text and "encoding" not in given and name != "write_text":
            found.append(f"line {node.lineno}: {name}() without an encoding")
        if last in HOMES:
            found.append(f"line {node.lineno}: {name}()")
    return found


def test_files_are_utf_8_and_homes_are_asked_for_in_one_place() -> None:
    found = {
        module: habits
        for module, path in sources()
        if (habits := local_habits(path.read_text(encoding="utf-8")))
    }
    assert {module for module in found if module not in ASKS_FOR_HOMES} == set(), found
    told = [habit for module in ASKS_FOR_HOMES for habit in found.get(module, [])]
    assert [habit for habit in told if "encoding" in habit] == []


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "path.read_text()",
        "path.write_text(text)",
        "open(path, 'w')",
        "subprocess.run(words, text=True)",
        "Path('~').expanduser()",
        "os.path.expanduser(path)",
        "Path.home()",
    ],
)
def test_what_depends_on_who_runs_it_is_found(source: str) -> None:
    assert local_habits(source)


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'rb')",
        "open(path, mode='wb')",
        "path.read_text(encoding='utf-8')",
        "path.open('rb')",
        "subprocess.run(words, encoding='utf-8')",
    ],
)
def test_what_is_the_same_for_everybody_is_not_reported(source: str) -> None:
    assert local_habits(source) == []
