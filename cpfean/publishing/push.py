"""From a trained model's folder to the Hugging Face Hub: the files to publish, and one commit.

What is published is what `cpfean.hub` fetches, and a card. Places of this machine, as of data and
text encoder, do not go out: the data's is cut to its name, and a frozen encoder has to have a name
under which others find it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpfean.config import ExperimentConfig
from cpfean.data.tokens import CaptionTokenizer
from cpfean.errors import CheckpointError, ConfigError, CpfeanError, ServiceError, message_of
from cpfean.files import read_file
from cpfean.hub import FILES, LIBRARY, TOKENIZER_FILES, HubName, hub_name, is_ours, told
from cpfean.model.cpfean import Cpfean
from cpfean.publishing.card import model_card
from cpfean.publishing.origin import Origin, origin_of

CARD = "README.md"
_LARGEST_CARD = 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is to be published.

    Attributes:
        repo: "user/name".
        folder: that holds the files and nothing else.
        card: the text of its README.md.
        origin: what is known of the model.
    """

    repo: str
    folder: Path
    card: str
    origin: Origin

    @property
    def files(self) -> list[Path]:
        """All files, by name."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@contextmanager
def prepared(
    model: Path,
    repo: str,
    *,
    config: ExperimentConfig,
    licence: str | None = None,
    text_encoder: str | None = None,
    card: Path | None = None,
) -> Iterator[Publication]:
    """The files to publish of a model, in a folder that is gone afterwards.

    The model is read and built first, so that nothing is published that cannot be loaded.

    Args:
        model: its folder: of a run's best model, of a checkpoint, or one that `save_pretrained`
            wrote with its tokenizer.
        repo: "user/name".
        config: the experiment that it comes from.
        licence: as in `model_card`.
        text_encoder: the name under which others find the frozen text encoder; its weights have to
            be the ones that the model was trained with.
        card: a file to publish in place of the card that is written here.

    Raises:
        ConfigError: no name of a model, a licence or card that cannot be, or a frozen text encoder
            that is a folder of this machine.
        CheckpointError: not such a folder, damaged, or of another text encoder.
    """
    name = _repo(repo)
    if card is not None and licence is not None:
        raise ConfigError("a card of your own names its licence itself: leave --licence out.")
    own = None if card is None else _own_card(card)
    source = model / "best" if (model / "best").is_dir() else model
    origin = origin_of(model, config)
    loaded = Cpfean.from_pretrained(source, text_encoder=text_encoder)
    CaptionTokenizer.load(source / "tokenizer")
    public = _public(config, loaded, text_encoder=text_encoder)
    with tempfile.TemporaryDirectory(prefix="cpfean-push-") as temporary:
        folder = Path(temporary)
        if text_encoder is None and public.model == loaded.config:
            for copied in FILES[:2]:
                shutil.copyfile(source / copied, folder / copied)
        else:
            loaded.config = public.model
            loaded.save_pretrained(folder)
        (folder / "config.toml").write_text(public.to_toml(), encoding="utf-8")
        (folder / "tokenizer").mkdir()
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / "tokenizer" / file.name)
        text = own or model_card(loaded, origin, repo=name.repo, config=public, licence=licence)
        (folder / CARD).write_text(text, encoding="utf-8")
        yield Publication(repo=name.repo, folder=folder, card=text, origin=origin)


def push_to_hub(publication: Publication, *, private: bool = False) -> str:
    """Publishes a model as one commit; makes its repository if there is none.

    Args:
        publication: what `prepared` gave.
        private: of a new repository: for its owner alone.

    Returns:
        The address of the commit.

    Raises:
        ServiceError: the Hub cannot be reached or does not let us.
        CheckpointError: the repository holds a model of another kind, which would be replaced.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name=LIBRARY)
    name = HubName(publication.repo, is_certain=True)
    operations = [
        CommitOperationAdd(path.relative_to(publication.folder).as_posix(), path)
        for path in publication.files
    ]
    try:
        with told(name, error=ServiceError):
            api.create_repo(name.repo, private=private, exist_ok=True)
            _check_replaces_ours(name)
            # One commit: whoever fetches meanwhile has the old model or the new one.
            done = api.create_commit(
                name.repo, operations, commit_message=f"Publish {publication.origin.run or 'model'}"
            )
    except CpfeanError:
        raise
    except Exception as error:  # of a network that breaks off
        raise ServiceError(f"{name.repo} cannot be published: {message_of(error)}") from None
    return str(done.commit_url)


def _repo(text: str) -> HubName:
    name = hub_name(text)
    if name is None or name.revision is not None:
        raise ConfigError(
            f"expected the name of a model on the Hub, such as user/flickr30k-cpfean; got {text!r}."
        )
    return name


def _own_card(file: Path) -> str:
    try:
        text = read_file(file, limit=_LARGEST_CARD).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--card {file}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--card {file}: expected UTF-8, found {error.reason}.") from None
    if not text.strip():
        raise ConfigError(f"--card {file}: expected a card, found an empty file.")
    return text


def _public(
    config: ExperimentConfig, model: Cpfean, *, text_encoder: str | None
) -> ExperimentConfig:
    """The experiment without places of this machine.

    Raises:
        ConfigError: a frozen text encoder that is one.
    """
    encoder = model.config.text.encoder
    is_place = Path(encoder).is_absolute() or Path(encoder).is_dir()
    if is_place and not model.backbone.trainable:
        raise ConfigError(
            f"the frozen text encoder is a folder of this machine, {encoder}, and its weights are "
            "not published with the model: give the name under which others find it "
            "(--text-encoder USER/NAME); an own one has to be published first."
        )
    if text_encoder is not None and model.backbone.trainable:
        raise ConfigError(
            "--text-encoder names a frozen text encoder, and this model's was trained with it."
        )
    changed = {"model.text.encoder": Path(encoder).name if is_place else encoder}
    if Path(config.data.path).is_absolute():
        changed["data.path"] = Path(config.data.path).name or "data"
    return config.with_overrides(changed)


def _check_replaces_ours(name: HubName) -> None:
    """Refuses a repository that holds a model of another kind."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        config = Path(hf_hub_download(name.repo, "config.json", library_name=LIBRARY))
    except EntryNotFoundError:
        return
    if not is_ours(config):
        raise CheckpointError(
            f"{name.repo} holds a model of another kind, which would be replaced; choose another "
            "name."
        )
