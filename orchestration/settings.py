"""Where things are: the cluster, the tracker, records and checkpoints.

What is asked for on the command line wins over the environment, which wins over the defaults.
Nothing here belongs to an experiment: the same configuration gives the same model anywhere.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpfean.errors import ConfigError, ServiceError
from cpfean.folders import cache_folder, can_be_written, check_text, expanded, private_folder
from orchestration.cluster.ray_address import find_cluster, parse_address
from orchestration.tracking.address import tracking_address

# What Ray, Tune and MLflow read from the environment; a value that the user has set is kept.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a lost worker is seen
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a cluster may have to start machines
    "RAY_prestart_worker_first_driver": "0",  # processes for tasks, of which a study has none
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # a failed trial is told once, by the study
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # nobody reads Tune's snapshots, and they grow
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own records say more
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # that the workers have begun has no rSum
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # uv.lock of the folder it stands in, beside a model
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # among the lines of progress
    "GIT_PYTHON_REFRESH": "quiet",
    "TOKENIZERS_PARALLELISM": "false",
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where the cluster, the tracking server and the storage are.

    Attributes:
        output: folder of the records; a run or sweep has its own folder in it.
        cache_dir: folder on every node for data that was fetched or generated.
        tracking_uri: of MLflow.
        address: of a Ray cluster, host:port; None starts Ray on this machine.
        address_source: who names the address: a flag, a variable, or a file that Ray has left.
        storage: URL or folder that all nodes can write checkpoints to, and that gets a copy of the
            records; None: in the output folder, which is enough on one machine.
        silence: seconds after which a worker that does not answer is given up.
    """

    output: Path
    cache_dir: Path
    tracking_uri: str
    address: str | None = None
    address_source: str = "--address"
    storage: str | None = None
    silence: int = 600

    @classmethod
    def resolve(
        cls,
        *,
        output: Path,
        tracking_uri: str | None = None,
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Settings:
        """Settings from what was asked for and from the environment.

        MLFLOW_TRACKING_URI, RAY_ADDRESS, CPFEAN_STORAGE, CPFEAN_CACHE (default ~/.cache/cpfean) and
        CPFEAN_TIMEOUT (default 600 s) are read. Without an address, a cluster that this user has
        started on this host with `ray start` or `ray up` is used.

        Raises:
            ConfigError: an address that is not host:port, one of MLflow's that cannot be, a
                time-out that is no number, or a folder whose name is no text.
            ServiceError: the address is "auto", and no cluster runs here.
        """
        environment = os.environ if environment is None else environment
        output = expanded(output, what="--output").absolute()
        check_text(output, what="--output")
        cluster = find_cluster(address, environment)
        silence = environment.get("CPFEAN_TIMEOUT") or "600"
        if not silence.isdecimal() or int(silence) < 1:
            raise ConfigError(f"CPFEAN_TIMEOUT must be a number of seconds; got {silence!r}.")
        return cls(
            output=output,
            cache_dir=cache_folder(environment),
            tracking_uri=_tracking_uri(tracking_uri, output, environment),
            address=None if cluster is None else str(cluster),
            address_source="--address" if cluster is None else cluster.source,
            storage=environment.get("CPFEAN_STORAGE") or None,
            silence=int(silence),
        )

    def check_address(self) -> None:
        """Raises ServiceError if nothing listens at the address; Ray itself would wait long."""
        if self.address is None:
            return
        head = parse_address(self.address, source=self.address_source)
        try:
            socket.create_connection((head.host, head.port), timeout=5).close()
        except OSError as error:
            raise ServiceError(
                f"no Ray cluster answers at {head} (from {head.source}: {error}); start one with "
                "`ray up` or `ray start --head`, or run on this machine with --address local."
            ) from None


def _tracking_uri(asked: str | None, output: Path, environment: Mapping[str, str]) -> str:
    """Where MLflow is, from any folder: asked for, of the environment, or beside the records."""
    name = "--tracking-uri"
    if not asked:
        asked, name = environment.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI"
    if not asked:
        asked, name = f"sqlite:///{output / 'mlflow.db'}", "--output"
    return tracking_address(asked, asked=name, environment=environment)


def prepare_environment() -> None:
    """Sets what Ray and MLflow read when they are imported; call it before that."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if os.environ.get(name) == "":  # the working folder, to Ray
            del os.environ[name]
    _give_this_user_a_home()
    # `ray start` asks for the token wherever there is one; a client with an explicit address would
    # not show it unless told to. A home that may not be looked into has none.
    if os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(token_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _give_this_user_a_home() -> None:
    """What libraries ask of a user, and fall over where there is none: a home and a name."""
    try:
        home = Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"  # as containers have it
        home = Path("/")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second one in later versions of Python
        os.environ["USER"] = str(os.getuid())
    if not can_be_written(home / ".config" / "matplotlib") and (mine := private_folder()):
        os.environ.setdefault("MPLCONFIGDIR", str(mine / "matplotlib"))


def token_file() -> Path:
    """Where the token of Ray's clusters is, unless a variable holds it."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return expanded(given, what="RAY_AUTH_TOKEN_PATH")


def check_name(name: str, *, flag: str = "--name") -> str:
    """The name, if it can be that of a folder, a run and a file on any storage.

    Raises:
        ConfigError: anything but 1 to 80 letters, digits, dots, dashes and underscores.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{flag} must be 1 to 80 letters, digits, '.', '-' or '_', and start with a letter or "
            f"digit; got {name[:100]!r}."
        )
    return name
