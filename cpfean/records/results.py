"""What every run came to, kept by what the run was: nothing is trained twice.

    <folder>/<key>.json    one finished run; the key is a hash of its configuration, of the data and
                           of the code that trained it

Files from several machines may be put into one folder: the same run has the same name everywhere.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from cpfean.fingerprints import encoder_fingerprint, training_fingerprint
from cpfean.json_files import RecordError, read_fields
from cpfean.records.trial_record import TrialRecord, check_outcome, relocated
from cpfean.writing import cannot_write, write_json

logger = logging.getLogger("cpfean.results")

_FORMAT = 1
_WITHOUT = "Without it its run is trained again."


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """What a file holds."""

    format: int
    name: str
    data_fingerprint: str
    code_fingerprint: str  # of what a training runs
    commit: str | None
    best_rsum: float
    test: dict[str, float]
    seconds: float
    checkpoint: str
    config: dict[str, Any]
    history: list[dict[str, float]]


class Results:
    """The finished runs of a folder.

    Args:
        folder: made with the first result.
        data_fingerprint: of the data that all runs asked for are trained on.
        commit: said in what is kept; not part of the key.
        code: fingerprint of the code that trains; None: of this one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data_fingerprint: str,
        commit: str | None,
        code: str | None = None,
    ) -> None:
        self._folder = folder
        self._data = data_fingerprint
        self._commit = commit
        self._code = code or training_fingerprint()

    def file_of(self, config: ExperimentConfig) -> Path:
        """Where the result of a configuration is, or will be."""
        # Where data and text encoder lie says nothing: what they hold tells which they are.
        here = {"data.path": "synthetic"}
        if held := encoder_fingerprint(config):
            here["model.text.encoder"] = held
        moved = config.with_overrides(here)
        text = "\n".join((moved.fingerprint(), self._data, self._code))
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def fill(self, record: TrialRecord, *, tested: bool) -> bool:
        """Makes a finished record of a waiting one, if its run is known.

        Args:
            record: with its configuration.
            tested: whether the metrics on the test split are needed too.

        Raises:
            RecordError: the file of that run is damaged or of another release.
        """
        file = self.file_of(record.experiment)
        known = self._known(file)
        if known is None or (tested and not known.test):
            return False
        record.history, record.test = known.history, known.test
        record.seconds, record.checkpoint = known.seconds, self._moved(known.checkpoint)
        record.complete, record.state, record.reused = True, "finished", file.name
        return True

    def keep(self, record: TrialRecord) -> None:
        """Keeps what a finished run came to; a known result that says more stays."""
        file = self.file_of(record.experiment)
        try:
            known = self._known(file)
        except RecordError as error:  # since the study began
            logger.warning("%s The result of %s is not kept there.", error.line, record.name)
            return
        if known is not None and known.test and not record.test:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        result = _Result(
            format=_FORMAT,
            name=record.name,
            data_fingerprint=self._data,
            code_fingerprint=self._code,
            commit=self._commit,
            best_rsum=record.best_rsum,
            test=record.test,
            seconds=record.seconds,
            checkpoint=record.checkpoint,
            config=record.config,
            history=record.history,
        )
        write_json(file, asdict(result))

    def _known(self, file: Path) -> _Result | None:
        """What is kept in a file; None if there is none.

        Raises:
            RecordError: it is damaged or of another release.
        """
        given = read_fields(file, _Result, without=_WITHOUT)
        if given is None:
            return None
        result = _Result(**given)
        try:
            if result.format != _FORMAT:
                raise ConfigError(f"format must be {_FORMAT}; got {result.format}")
            check_outcome(result.history, result.test, seconds=result.seconds)
        except ConfigError as error:
            raise RecordError(file, str(error), without=_WITHOUT) from None
        return result

    def _moved(self, checkpoint: str) -> str:
        """A checkpoint of another run, of which the folder may have moved together with this one.

        Of a path `.../<output>/<run>/train/...` the run is looked for beside the results.
        """
        parts = PurePath(checkpoint).parts
        for depth in (3, 4):
            if len(parts) >= depth and not Path(checkpoint).is_dir():
                found = relocated(checkpoint, self._folder.parent / parts[-depth])
                if found != checkpoint:
                    return found
        return checkpoint
