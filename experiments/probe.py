"""Probe trained models: spoilt captions, labels and features, crowded images, other data."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError, CpfeanError
from cpfean.folders import expanded
from cpfean.training.trained import checked_split, model_folder, trained_configuration
from experiments import command_line
from experiments.trained import MODEL, cache_folder

if TYPE_CHECKING:
    from cpfean.analysis.probe_report import CurvePanel, ProbeResult
    from cpfean.data.dataset import RetrievalDataset
    from cpfean.data.split import Split
    from cpfean.metrics.retrieval import RetrievalMetrics
    from cpfean.progress import Progress
    from cpfean.training.setup import TrainedModel

_EPILOG = """\
  python experiments/probe.py --model full=runs/a --model full=runs/b --model scan=runs/c --data DIR
  python experiments/probe.py --model full=runs/a --data DIR --transfer DIR2
  python experiments/probe.py --model full=runs/a --data DIR --only objects

Models of one NAME are seeds of one variant: tables and plots show their mean and 95 % interval, the
CSV files each of them. All are shown the same test split, disturbed in the same way; undisturbed,
rSum is that of evaluate.py. What is measured:

  curves    words dropped, replaced, shuffled; labels replaced; noise on the features
  regions   rSum with the first 12, 18, 24, 30, 36 regions of an image, as many as the data has
  objects   recalls of images, and of their captions, by how many objects the image shows
  transfer  rSum on the test split of other data (--transfer)

Written are curves.csv, curves.png, regions.csv, objects.csv, objects.png and transfer.csv.

Exit codes: 0 done, 2 flags or configuration, 3 data, 5 checkpoint.
"""

# A disturbance of cpfean.analysis.probing -> its shares.
SHARES: dict[str, tuple[float, ...]] = {
    "words dropped": (0.0, 0.1, 0.2, 0.3, 0.4),
    "words replaced": (0.0, 0.1, 0.2, 0.3, 0.4),
    "words shuffled": (0.0, 0.1, 0.2, 0.3, 0.4),
    "labels replaced": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "feature noise": (0.0, 0.25, 0.5, 0.75, 1.0),
}
REGIONS = (12, 18, 24, 30, 36)
PARTS = ("curves", "regions", "objects")
_SPLIT = "test"
# What may differ between the seeds of a variant: where an encoder lies says nothing.
_NO_MATTER = ("model.text.encoder",)


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--model",
        metavar="NAME=FOLDER",
        action="append",
        required=True,
        help=f"{MODEL}, and what to call it; may be repeated",
    )
    parser.add_argument(
        "--data",
        metavar="DIR|URL|synthetic",
        required=True,
        type=command_line.place,
        help="data with a test split",
    )
    parser.add_argument(
        "--transfer",
        metavar="DIR|URL",
        type=command_line.place,
        help="other data: rSum on its test split, not disturbed",
    )
    parser.add_argument(
        "--only",
        choices=PARTS,
        action="append",
        default=[],
        help="measure this alone; may be repeated (default: all)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the disturbances (default: 0)"
    )
    parser.add_argument(
        "--confidence",
        metavar="Q",
        type=float,
        default=0.3,
        help="a region is a detected object if the confidence in its label is above (default: 0.3)",
    )
    parser.add_argument(
        "--area",
        metavar="A",
        type=float,
        default=0.05,
        help="a box is large if it covers more than this share of the image (default: 0.05)",
    )
    parser.add_argument(
        "--bins", metavar="N", type=int, default=4, help="of images by objects (default: 4)"
    )
    parser.add_argument(
        "--protocol",
        choices=("full", "coco-1k"),
        help="of curves and regions: rank among the whole split, or mean over folds of 1000 images "
        "(default: the models')",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="DIR",
        type=command_line.place,
        help="where the models' frozen text encoder is now",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=command_line.output_folder,
        default=Path("runs/probe"),
        help="default: runs/probe",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    command_line.run(parser, body)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A model to probe.

    Attributes:
        variant: the name that seeds of one variant share.
        folder: of the model.
        shown: the folder as it was given.
        config: that it was trained with.
        protocol: of its evaluation.
        trained: the model and the test split.
    """

    variant: str
    folder: Path
    shown: str
    config: ExperimentConfig
    protocol: Literal["full", "coco-1k"]
    trained: TrainedModel


def body(arguments: argparse.Namespace) -> int:
    from cpfean.analysis.probing import open_whole, region_counts
    from cpfean.output_folders import own_folder

    command_line.positive(arguments.seed, "--seed", least=0)
    command_line.positive(arguments.bins, "--bins")
    for flag in ("confidence", "area"):
        value = getattr(arguments, flag)
        if not 0 <= value < 1:
            raise ConfigError(f"--{flag} must be a share, from 0 to below 1; got {value}.")
    given = named_models(arguments.model)
    configs = [trained_configuration(model_folder(path)) for _, path in given]
    check_variants(given, configs)
    cache_dir = cache_folder()
    folder = elsewhere = None
    for config in {each.data.num_regions: each for each in configs}.values():
        folder = checked_split(config, arguments.data, split=_SPLIT, cache_dir=cache_dir)
        if arguments.transfer is not None:
            elsewhere = checked_split(config, arguments.transfer, split=_SPLIT, cache_dir=cache_dir)
    assert folder is not None
    own_folder(arguments.output, flag="--output")
    models = open_models(given, configs, arguments, data_folder=folder, cache_dir=cache_dir)
    whole = open_whole(folder, _SPLIT)

    parts = arguments.only or list(PARTS)
    counts = region_counts(whole.regions.num_regions, REGIONS)
    shares = {name: some for name, some in SHARES.items() if _applies(name, whole)}
    conditions = 1 + ("objects" in parts) + (elsewhere is not None)
    conditions += sum(len(some) - 1 for some in shares.values()) if "curves" in parts else 0
    conditions += len(counts) if "regions" in parts else 0
    probe = Probe(models, whole, arguments, total=conditions * len(models))

    panels, files = [], []
    if "curves" in parts:
        found, of_curves = probe.curves(shares)
        panels += of_curves
        files += probe.publish_curves(found)
    if "regions" in parts:
        found, panel = probe.regions(counts)
        panels.append(panel)
        files += probe.publish_regions(found)
    if panels:
        files.append(probe.draw(panels))
    if "objects" in parts:
        files += probe.objects()
    if elsewhere is not None:
        files += probe.transfer(elsewhere, cache_dir=cache_dir)
    print("\n".join(str(file) for file in files))
    return 0


class Probe:
    """Measures all models, condition by condition.

    Args:
        models: what to probe.
        whole: the test split, with all its regions.
        arguments: the command line's.
        total: measurements to come, for the time that is left.
    """

    def __init__(
        self, models: Sequence[Probed], whole: Split, arguments: argparse.Namespace, *, total: int
    ) -> None:
        from cpfean.progress import Progress

        self.models = models
        self.whole = whole
        self.arguments = arguments
        self._progress: Progress = Progress("probing", total=total)
        self._done = 0
        command_line.say(
            f"{len(models)} model{'s' * (len(models) > 1)} on {whole.num_images:,} images with "
            f"{whole.num_captions:,} captions"
        )
        self._plain = [self._evaluated(model, model.trained.dataset) for model in models]

    def curves(
        self, shares: dict[str, tuple[float, ...]]
    ) -> tuple[list[ProbeResult], list[CurvePanel]]:
        """rSum along every disturbance."""
        from cpfean.analysis.probe_report import CurvePanel, write_results
        from cpfean.analysis.probing import DISTURBANCES

        results, panels = [], []
        for name, some in shares.items():
            kind, points = DISTURBANCES[name], []
            for share in some:
                at = {"disturbance": name, "share": share}
                if share == 0:
                    group = [self._result(at, *both) for both in self._with(self._plain)]
                else:
                    split = kind.apply(self.whole, share, self.arguments.seed)
                    group = self._measured(at, split)
                results += group
                points.append((100 * share, group))
            # Hours may lie between the first and the last.
            write_results(results, self.arguments.output / "curves.csv")
            unit = f"% of the {kind.unit}"
            panels.append(CurvePanel(title=name, x_label=unit, points=points))
        return results, panels

    def publish_curves(self, results: list[ProbeResult]) -> list[Path]:
        """The table and the file of the curves."""
        from cpfean.analysis.probe_report import rsum_table

        print("\nrSum by the share that is disturbed (mean ± 95 % interval over seeds)\n")
        for name in dict.fromkeys(result.at["disturbance"] for result in results):
            some = [result for result in results if result.at["disturbance"] == name]
            print(
                rsum_table(
                    some,
                    rows=["disturbance"],
                    columns=lambda each: f"{float(each.at['share']):.0%}",
                )
            )
        return [self.arguments.output / "curves.csv"]

    def regions(self, counts: Sequence[int]) -> tuple[list[ProbeResult], CurvePanel]:
        """rSum with the first so many regions."""
        from cpfean.analysis.probe_report import CurvePanel
        from cpfean.analysis.probing import first_regions

        results, points = [], []
        for count in counts:
            group = self._measured(
                {"regions": count}, first_regions(self.whole, count), num_regions=count
            )
            results += group
            points.append((float(count), group))
        panel = CurvePanel(title="regions at test time", x_label="regions", points=points)
        return results, panel

    def publish_regions(self, results: list[ProbeResult]) -> list[Path]:
        """The table and the file of the region counts."""
        from cpfean.analysis.probe_report import rsum_table, write_results

        print("rSum with the first regions of every image\n")
        print(rsum_table(results, rows=[], columns=lambda each: f"{each.at['regions']} regions"))
        return [write_results(results, self.arguments.output / "regions.csv")]

    def draw(self, panels: Sequence[CurvePanel]) -> Path:
        """The picture of all curves."""
        from cpfean.analysis.probe_report import draw_curves

        return draw_curves(
            panels,
            heading=f"{self.whole.name}, {self.whole.num_images:,} images: rSum under disturbance",
            file=self.arguments.output / "curves.png",
        )

    def objects(self) -> list[Path]:
        """Recalls by the number of prominent objects."""
        import torch

        from cpfean.analysis.probe_report import (
            ProbeResult,
            draw_objects,
            rsum_table,
            write_results,
        )
        from cpfean.analysis.probing import object_counts, quantile_bins, recalls_of
        from cpfean.metrics.retrieval import query_ranks
        from cpfean.training.evaluation import score_matrix

        confidence, area = self.arguments.confidence, self.arguments.area
        counted = object_counts(self.whole, least_confidence=confidence, least_area=area)
        if not counted:
            command_line.say("the data has neither boxes nor labels: objects are not counted.")
            return []
        bins = {name: quantile_bins(n, self.arguments.bins) for name, n in counted.items()}
        ranks = []
        for model in self.models:
            scores = score_matrix(
                model.trained.model,
                model.trained.dataset,
                gallery=range(self.whole.num_images),
                **_how(model),
            )
            ranks.append(query_ranks(scores, torch.from_numpy(self.whole.groups.image_of_caption)))
            self._step()
        results = []
        for name, some in bins.items():
            for each in some:
                images = int(each.images.sum())
                at: dict[str, Any] = {
                    "counted": name,
                    "bin": each.label,
                    "images": images,
                    "captions": int(self.whole.groups.sizes[each.images].sum()),
                }
                results += [
                    ProbeResult(
                        variant=model.variant,
                        model=model.shown,
                        at=at,
                        metrics=recalls_of(of_model, each.images, groups=self.whole.groups),
                    )
                    for model, of_model in zip(self.models, ranks, strict=True)
                ]
        print(
            "Sum of the six recalls of the images, and captions of images, with so many objects,\n"
            f"among all {self.whole.num_images:,} images and {self.whole.num_captions:,} captions\n"
        )
        for name in bins:
            shown = [result for result in results if result.at["counted"] == name]
            rows = ["counted", "bin", "images", "captions"]
            print(rsum_table(shown, rows=rows, columns=lambda each: "rSum"))
        titles = {
            "detected objects": f"detected objects (confidence > {confidence:g})",
            "different labels": "different labels of these",
            "large boxes": f"boxes over {100 * area:g} % of the image",
        }
        picture = draw_objects(
            results,
            titles={name: titles[name] for name in bins},
            heading=f"{self.whole.name}, {self.whole.num_images:,} images: recall by the number of "
            "objects",
            file=self.arguments.output / "objects.png",
        )
        return [write_results(results, self.arguments.output / "objects.csv"), picture]

    def transfer(self, folder: Path, *, cache_dir: Path) -> list[Path]:
        """rSum on other data, without training on it."""
        from cpfean.analysis.probe_report import ProbeResult, rsum_table, write_results
        from cpfean.analysis.probing import chance_metrics, open_whole
        from cpfean.training.setup import evaluate_checkpoint

        other = open_whole(folder, _SPLIT)
        at: dict[str, Any] = {
            "data": Path(self.arguments.transfer.rstrip("/")).name,
            "images": other.num_images,
            "captions": other.num_captions,
        }
        results = []
        for model in self.models:
            with _named(model.variant, model.shown):
                metrics = evaluate_checkpoint(
                    model.folder,
                    data_folder=folder,
                    split=_SPLIT,
                    protocol="full",
                    cache_dir=cache_dir,
                    num_regions=model.config.data.num_regions,
                    text_encoder=self.arguments.text_encoder,
                    **_how(model),
                )
            results.append(self._result(at, model, metrics))
            self._step()
        chance = chance_metrics(other.groups)
        results.append(ProbeResult(variant="chance", model="", at=at, metrics=chance))
        print(f"rSum on {at['data']}, without training on it; ranked among all its test images\n")
        rows = ["data", "images", "captions"]
        print(rsum_table(results, rows=rows, columns=lambda each: "rSum"))
        return [write_results(results, self.arguments.output / "transfer.csv")]

    def _measured(
        self, at: dict[str, Any], split: Split, *, num_regions: int | None = None
    ) -> list[ProbeResult]:
        """Every model on a split."""
        from cpfean.analysis.probing import dataset_for

        results = []
        # Models with the same frozen text encoder share what it makes of disturbed captions, which
        # nobody needs again afterwards.
        with tempfile.TemporaryDirectory(prefix="cpfean-probe-") as scratch:
            for model, plain in self._with(self._plain):
                own = model.config.data.num_regions
                if num_regions == own:
                    results.append(self._result(at, model, plain))
                    self._step()
                    continue
                dataset = dataset_for(
                    model.trained,
                    split,
                    num_regions=num_regions or own,
                    cache_dir=Path(scratch),
                )
                results.append(self._result(at, model, self._evaluated(model, dataset)))
        return results

    def _evaluated(self, model: Probed, dataset: RetrievalDataset) -> RetrievalMetrics:
        from cpfean.training.evaluation import evaluate

        metrics = evaluate(model.trained.model, dataset, protocol=model.protocol, **_how(model))
        self._step()
        return metrics

    def _with(
        self, metrics: Sequence[RetrievalMetrics]
    ) -> Iterator[tuple[Probed, RetrievalMetrics]]:
        return zip(self.models, metrics, strict=True)

    def _result(self, at: dict[str, Any], model: Probed, metrics: RetrievalMetrics) -> ProbeResult:
        from cpfean.analysis.probe_report import ProbeResult

        return ProbeResult(variant=model.variant, model=model.shown, at=at, metrics=metrics)

    def _step(self) -> None:
        self._done += 1
        self._progress.step(self._done)


def named_models(given: Sequence[str]) -> list[tuple[str, Path]]:
    """Names and folders of --model.

    Raises:
        ConfigError: not NAME=FOLDER, or a folder twice.
    """
    models: list[tuple[str, Path]] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name.strip() and equals and folder):
            raise ConfigError(f"--model needs NAME=FOLDER, e.g. --model full=runs/a; got {text!r}.")
        path = expanded(folder, what="--model")
        if any(path.resolve() == other.resolve() for _, other in models):
            raise ConfigError(f"--model: {folder} is given twice, but a seed counts once.")
        models.append((name.strip(), path))
    return models


def check_variants(given: Sequence[tuple[str, Path]], configs: Sequence[ExperimentConfig]) -> None:
    """Refuses models of one name that are no seeds of one variant.

    Raises:
        ConfigError: names a setting in which they differ.
    """
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for (name, path), config in zip(given, configs, strict=True):
        settings = {
            key: value
            for key, value in config.flat().items()
            if (key.startswith("model.") and key not in _NO_MATTER) or key == "data.num_regions"
        }
        other, expected = first.setdefault(name, (path, settings))
        for key, value in settings.items():
            if value != expected[key]:
                raise ConfigError(
                    f"--model {name}: {other} and {path} are no seeds of one variant: {key} is "
                    f"{expected[key]!r} and {value!r}; give them different names."
                )


def open_models(
    given: Sequence[tuple[str, Path]],
    configs: Sequence[ExperimentConfig],
    arguments: argparse.Namespace,
    *,
    data_folder: Path,
    cache_dir: Path,
) -> list[Probed]:
    """Opens all models before the test split.

    Raises:
        ConfigError: models that are evaluated by different protocols, or an encoder that is gone.
        CheckpointError: a model that cannot be read or does not fit the data.
    """
    import torch

    from cpfean.analysis.probing import share_frozen_encoder
    from cpfean.training.setup import open_checkpoint

    protocols = {arguments.protocol or config.evaluation.protocol for config in configs}
    if len(protocols) > 1:
        raise ConfigError(
            "the models are evaluated by different protocols; choose with --protocol."
        )
    models: list[Probed] = []
    encoders: dict[str, Any] = {}
    for (name, path), config in zip(given, configs, strict=True):
        with _named(name, str(path)):
            trained = open_checkpoint(
                model_folder(path),
                data_folder=data_folder,
                split=_SPLIT,
                cache_dir=cache_dir,
                device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
                num_regions=config.data.num_regions,
                text_encoder=arguments.text_encoder,
            )
        share_frozen_encoder(trained, known=encoders)
        models.append(
            Probed(
                variant=name,
                folder=model_folder(path),
                shown=str(path),
                config=config,
                protocol=arguments.protocol or config.evaluation.protocol,
                trained=trained,
            )
        )
    return models


@contextmanager
def _named(name: str, shown: str) -> Iterator[None]:
    """Says of which model an error is."""
    try:
        yield
    except CpfeanError as error:
        # Of an encoder that is not where it was: here it can be told where it is.
        moved = any(called in str(error) for called in ("text.encoder", "text encoder"))
        advice = " --text-encoder DIR tells where it is now." if moved else ""
        raise type(error)(f"--model {name}={shown}: {error}{advice}") from None


def _applies(name: str, split: Split) -> bool:
    """Whether the data has what is disturbed; says so if not."""
    from cpfean.analysis.probing import DISTURBANCES

    if DISTURBANCES[name].needs_labels and split.regions.labels is None:
        command_line.say(f"the data has no object labels: {name!r} is left out.")
        return False
    return True


def _how(model: Probed) -> dict[str, Any]:
    """What all evaluations of a model are called with."""
    from cpfean.training.precision import chosen_precision

    device = next(model.trained.model.parameters()).device
    return {
        "batch_size": model.config.evaluation.batch_size,
        "device": device,
        "products": model.config.evaluation.products,
        "precision": chosen_precision(model.config.optim.precision, device),
    }


if __name__ == "__main__":
    main()
