"""Models by their names on the Hugging Face Hub: fetched once, then a folder like any other.

A name is "user/name", "user/name@revision" or either with "hf://" in front. What is fetched are the
files that a model of ours consists of, and nothing that could run: no code, no pickle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cpfean.errors import CheckpointError, CpfeanError, message_of
from cpfean.files import is_there
from cpfean.json_files import read_object

LIBRARY = "cpfean"  # as the Hub knows it
# All that is read of a model, and all that is published of one but for its card.
FILES = ("config.json", "model.safetensors", "config.toml")
TOKENIZER_FILES = ("tokenizer/*.json", "tokenizer/*.txt", "tokenizer/*.model")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
# A path that was made of "hf://a/b" has lost a slash.
_NAME = re.compile(rf"(?P<scheme>hf:/{{1,2}})?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>\S+))?")
_OF_OURS = {"format", "model", "inputs", "text_encoder"}  # keys of config.json


class HubName(NamedTuple):
    """A model on the Hub.

    Attributes:
        repo: "user/name".
        revision: a branch, tag or commit; None for the newest.
        is_certain: it was written as one of the Hub, and cannot be meant for a folder.
    """

    repo: str
    revision: str | None = None
    is_certain: bool = False


def hub_name(text: str) -> HubName | None:
    """What a text names on the Hub, if it can be such a name at all."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text:
        return None
    is_certain = found["scheme"] is not None or found["revision"] is not None
    return HubName(found["repo"], found["revision"], is_certain)


def model_at(model: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a model: the one that is given, or the one that is fetched for a Hub name.

    A folder of that name comes first. What is fetched is kept in huggingface_hub's cache, and taken
    from there where the Hub cannot be reached or HF_HUB_OFFLINE is set.

    Args:
        model: a path or a name.
        revision: of a name: a branch, tag or commit.

    Raises:
        CheckpointError: no such model on the Hub, a gated one, none of ours, or not to be reached;
            a revision of a folder.
    """
    text = str(model)
    name = None if is_there(Path(text)) else hub_name(text)
    if name is None:
        if revision is not None:
            raise CheckpointError(
                f"{text} has no revision {revision!r}: expected the name of a model on the Hub, "
                f"found {'a folder' if is_there(Path(text)) else 'something else'}."
            )
        return Path(text)
    if revision is not None and name.revision is not None:
        raise CheckpointError(f"{text}: another revision is asked for, {revision!r}; give one.")
    parent = name.repo.split("/")[0]
    if not name.is_certain and Path(parent).is_dir():
        raise CheckpointError(
            f"{text}: missing: there is a folder {parent}, and it holds no such model. For the "
            f"model of that name on the Hub write hf://{text}."
        )
    return _fetched(name._replace(revision=revision or name.revision))


def is_ours(config: Path) -> bool:
    """Whether a `config.json` describes a model of this project."""
    return read_object(config, error=CheckpointError).keys() >= _OF_OURS


@contextmanager
def told(name: HubName, *, error: type[CpfeanError] = CheckpointError) -> Iterator[None]:
    """Turns what huggingface_hub raises into an error of ours that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as theirs

    hub = constants.ENDPOINT
    what = f"{name.repo}{f'@{name.revision}' if name.revision else ''}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except theirs.GatedRepoError as reason:
        raise error(
            f"{what} is gated: its owner has to let you in. Ask at {hub}/{name.repo}, and {login}; "
            f"the Hub says: {_line(reason)}."
        ) from None
    except theirs.RepositoryNotFoundError:
        folder = "" if name.is_certain else f"there is no folder {name.repo} here, and "
        raise error(
            f"{what}: {folder}{hub} shows no such model; see how it is spelled, and if it is "
            f"private, {login}."
        ) from None
    except theirs.RevisionNotFoundError:
        raise error(f"{what}: {name.repo} is on {hub}, but has no such revision.") from None
    except (theirs.OfflineModeIsEnabled, theirs.LocalEntryNotFoundError) as reason:
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE is set; unset it, or fetch the model once where it is not"
        else:
            why = f"{hub} cannot be reached ({_line(reason.__cause__ or reason)})"
        folder = "" if name.is_certain else f"there is no folder {name.repo} here, "
        raise error(
            f"{what}: {folder}it is not in {constants.HF_HUB_CACHE}, or not whole, and {why}."
        ) from None
    except theirs.EntryNotFoundError:
        raise error(
            f"{what} is on {hub}, but is no model of this project: it has no config.json."
        ) from None
    except theirs.HFValidationError as reason:
        raise error(f"{what}: no name of a model on {hub}: {_line(reason)}.") from None
    except theirs.HfHubHTTPError as reason:
        status = reason.response.status_code
        remedy = f" {login[0].upper()}{login[1:]}." if status in (401, 403) else ""
        raise error(f"{what}: {hub} answers {status}: {_line(reason)}.{remedy}") from None
    except theirs.LocalTokenNotFoundError:
        raise error(f"{what}: {hub} has to know who you are: {login}.") from None


def _fetched(name: HubName) -> Path:
    """The folder of the files of a model, in huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        with told(name):
            # Weights of something else, which can be large, are not fetched to find that out.
            config = Path(
                hf_hub_download(
                    name.repo, "config.json", revision=name.revision, library_name=LIBRARY
                )
            )
            if not is_ours(config):
                raise CheckpointError(
                    f"{name.repo}: its config.json describes no model of this project; one of "
                    f"another kind has to be read by what made it."
                )
            # The commit that the description is of: the Hub may have a newer one by now.
            folder = Path(
                snapshot_download(
                    name.repo,
                    revision=config.parent.name,
                    allow_patterns=[*FILES, *TOKENIZER_FILES],
                    library_name=LIBRARY,
                )
            )
    except CpfeanError:
        raise
    except Exception as error:  # of the disk, or of a network that breaks off
        raise CheckpointError(f"{name.repo} cannot be fetched: {message_of(error)}") from None
    if missing := [file for file in FILES[:2] if not is_there(folder / file)]:
        raise CheckpointError(
            f"{name.repo} is no whole model of this project: it has no {', '.join(missing)}."
        )
    return folder


def _line(error: BaseException) -> str:
    """What went wrong, without the sentence's end; of an answer what the Hub itself says."""
    said = getattr(error, "server_message", None)
    return (said if isinstance(said, str) and said else message_of(error)).rstrip(".")
