"""The model card: what a model is, what it came to, and how it is used; for people and the Hub.

Every figure on it is from a record. What is not known is said to be not known.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from cpfean.model.cpfean import Cpfean
from cpfean.publishing.origin import Origin, published

_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
_CUTOFFS = (1, 5, 10)
_PAPER = "https://arxiv.org/abs/2311.02183"
_TASK = "image-text-retrieval"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_PROTOCOLS = {
    "full": "ranked among the whole split",
    "coco-1k": "the mean over folds of 1,000 images, each ranked by itself",
}


def model_card(
    model: Cpfean, origin: Origin, *, repo: str, config: ExperimentConfig, licence: str | None
) -> str:
    """The text of README.md.

    Args:
        model: as it is published.
        origin: what is known of it.
        repo: "user/name".
        config: the experiment as it is published, without places of this machine.
        licence: an identifier of the Hub; None to leave it to be filled in.

    Raises:
        ConfigError: no such identifier can be.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ConfigError(
            f"--licence must be an identifier of the Hub, such as apache-2.0, mit or cc-by-4.0; "
            f"got {licence!r}."
        )
    frozen = not model.backbone.trainable
    encoder = config.model.text.encoder
    # One that was a folder, and is trained, has left its name only.
    is_named = encoder != "scratch" and (frozen or encoder == origin.config.model.text.encoder)
    data = ModelCardData(
        model_name=repo,
        library_name="cpfean",
        license=licence,
        base_model=encoder if is_named else None,
        tags=["image-text-matching", "image-text-retrieval", "cross-modal-retrieval", "cpfean"],
        eval_results=_eval_results(origin) or None,
    )
    sections = [
        f"# {repo}",
        _introduction(config),
        "## Results\n\n" + _results(origin),
        "## How to use it\n\n" + _usage(repo, config, frozen=frozen),
        "## What it reads\n\n" + _inputs(model, config, frozen=frozen),
        "## How it was made\n\n" + _making(origin, config),
        "## Limits\n\n" + _limits(model, origin),
        "## Licence\n\n" + _licence(licence),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _introduction(config: ExperimentConfig) -> str:
    kind = config.model.alignment.kind
    what = (
        "prominent-fragment alignment"
        if kind == "prominent"
        else f"the scorer `{kind}` in place of prominent-fragment alignment"
    )
    return (
        "Scores how well a caption describes an image, from the features of the image's regions: "
        f"an implementation of [CPFEAN]({_PAPER}), with {what}. It finds the captions of an image "
        "and the images of a caption."
    )


def _results(origin: Origin) -> str:
    lines = []
    if origin.test:
        data = _data_name(origin)
        protocol = origin.config.evaluation.protocol
        size = "whose size is not known here"
        if origin.gallery is not None:
            size = "{:,} images with {:,} captions".format(*origin.gallery)
        lines += [
            f"Test split of {data}, {size}, {_PROTOCOLS[protocol]} (protocol `{protocol}`); recall "
            "in percent, a tie counts against the model:",
            "",
            "| | " + " | ".join(f"R@{k}" for k in _CUTOFFS) + " |",
            "| --- |" + " ---: |" * len(_CUTOFFS),
        ]
        for direction, title in _DIRECTIONS.items():
            cells = (f"{origin.test[f'{direction}_r{k}']:.1f}" for k in _CUTOFFS)
            lines.append(f"| {title} | {' | '.join(cells)} |")
        lines += ["", f"rSum, the sum of the six (0 to 600): **{origin.test['rsum']:.1f}**", ""]
    if origin.dev_rsum is not None:
        chosen = "chosen by" if origin.test else "known is only"
        lines.append(f"The epoch was {chosen} rSum on dev: {origin.dev_rsum:.1f}.")
    if not lines:
        return (
            "Not known: this model came without the record of a run. `experiments/evaluate.py` "
            "measures it."
        )
    if not origin.test:
        lines[0] = (
            f"Best rSum on dev: {origin.dev_rsum:.1f}. It has not been shown a test split, as far "
            "as its record tells."
        )
    return "\n".join(lines).strip()


def _usage(repo: str, config: ExperimentConfig, *, frozen: bool) -> str:
    first = f"The text encoder `{config.model.text.encoder}` is fetched too. " if frozen else ""
    return (
        "With the code of the project installed:\n\n"
        "```python\n"
        "from cpfean.training.setup import read_model\n\n"
        f'model, tokenizer = read_model("{repo}")\n'
        "```\n\n"
        f"{first}On region features of your own, a folder in the project's format:\n\n"
        "```sh\n"
        f"python experiments/evaluate.py {repo} --data DIR\n"
        "```"
    )


def _inputs(model: Cpfean, config: ExperimentConfig, *, frozen: bool) -> str:
    inputs = model.inputs
    regions = (
        f"up to {config.data.num_regions} regions an image, {inputs.feature_dim} features each"
    )
    lines = [f"- {regions}, {'with' if inputs.has_boxes else 'without'} boxes"]
    if inputs.label_names is not None:
        some = ", ".join(inputs.label_names[:5])
        lines.append(
            f"- an object label for each region, out of the {len(inputs.label_names):,} it was "
            f"trained with ({some} ...)"
        )
    lines.append(f"- captions, cut to {config.data.max_tokens} word pieces")
    name = config.model.text.encoder
    if frozen:
        lines.append(
            f"- the frozen text encoder `{name}`, **whose weights are not included**; fingerprint "
            f"`{model.backbone.fingerprint()}`, and others are refused"
        )
    elif name == "scratch":
        lines.append("- its text encoder was trained from nothing and is included")
    else:
        lines.append(f"- its text encoder, trained further from `{name}`, is included")
    return "\n".join(lines)


def _making(origin: Origin, config: ExperimentConfig) -> str:
    unknown = "not known"
    made_by = None if origin.provenance is None else published(origin.provenance)
    rows = {
        "data": _data_name(origin),
        "data fingerprint": f"`{origin.data}`" if origin.data else unknown,
        "features": _features(made_by),
        "run": f"{origin.run}, trial {origin.trial} ({origin.kind})" if origin.run else unknown,
        "epochs": str(origin.epochs) if origin.epochs else unknown,
        "seed": str(config.seed),
        "code": f"commit `{origin.commit}`" if origin.commit else unknown,
        "versions": ", ".join(f"{k} {v}" for k, v in origin.versions.items()) or unknown,
    }
    if origin.drift:
        rows["changed on the way"] = origin.drift
    lines = ["| | |", "| --- | --- |", *(f"| {k} | {_cell(v)} |" for k, v in rows.items())]
    parts = ["\n".join(lines), f"All settings:\n\n```toml\n{config.to_toml().strip()}\n```"]
    if made_by is not None:
        plain = json.dumps(made_by, indent=1, ensure_ascii=False)
        parts.append(f"How the regions were made:\n\n```json\n{plain}\n```")
    return "\n\n".join(parts)


def _limits(model: Cpfean, origin: Origin) -> str:
    lines = [
        "- Scores are cosines and compare images of one gallery or captions of one set; they are "
        "no probabilities, and there is no threshold above which a caption is right.",
        "- It reads region features and not pixels: features of another detector, or labels of "
        "another vocabulary, mean nothing to it.",
        "- It knows the kind of images and captions that it was trained on, with their biases; "
        "what it makes of others has to be measured.",
    ]
    if model.config.text.encoder == "scratch":
        lines.append(
            f"- Its vocabulary of {model.backbone.piece_embeddings().num_embeddings:,} word pieces "
            "is that of the training captions; other words are unknown to it."
        )
    if origin.test:
        lines.append("- One training on one seed: another seed comes to other figures.")
    return "\n".join(lines)


def _licence(licence: str | None) -> str:
    if licence is not None:
        return (
            f"{licence}, as far as its author is concerned; data and text encoder have their own."
        )
    return (
        "To be filled in by its author: `license:` at the head of this card. Data and text encoder "
        "have their own."
    )


def _eval_results(origin: Origin) -> list[Any]:
    from huggingface_hub import EvalResult

    if not origin.test:
        return []
    named = {
        f"{direction}_r{k}": (f"{title} R@{k}", f"recall_at_{k}")
        for direction, title in _DIRECTIONS.items()
        for k in _CUTOFFS
    } | {"rsum": ("rSum", "rsum")}
    data = _data_name(origin)
    return [
        EvalResult(
            task_type=_TASK,
            task_name="Image-text retrieval",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "data",
            dataset_name=data,
            dataset_split="test",
            dataset_args={"fingerprint": origin.data},
            metric_type=kind,
            metric_name=title,
            metric_value=round(origin.test[key], 2),
            metric_args={"protocol": origin.config.evaluation.protocol},
        )
        for key, (title, kind) in named.items()
    ]


def _data_name(origin: Origin) -> str:
    path = origin.config.data.path
    if path == "synthetic":
        return "the generated set"
    return path.rstrip("/").rsplit("/", 1)[-1] or "data"


def _features(provenance: Any) -> str:
    """Detector and backbone in a line."""
    if provenance is None:
        return "not known"
    names = []
    for part in ("detector", "backbone"):
        told = provenance.get(part)
        if isinstance(told, dict) and isinstance(told.get("name"), str):
            names.append(f"{part} {told['name']}")
    return ", ".join(names) or "see below"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
