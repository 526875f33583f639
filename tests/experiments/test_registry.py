"""Every named configuration, search space and ablation can be run."""

from pathlib import Path

import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.sources import resolve_data
from cpfean.training.setup import open_experiment
from experiments.ablations import ABLATIONS
from experiments.baselines import BASELINES
from experiments.methods import COMMON, METHODS
from experiments.search_spaces import SEARCH_SPACES
from orchestration.study.comparison import plan_trials, tuning_study
from orchestration.study.plan import StudyPlan
from orchestration.study.variants import Ablation, Method
from tests.orchestration.samples import TINY


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def idle_parameters(config: ExperimentConfig, cache_dir: Path) -> list[str]:
    """Trained parameters that a batch's scores do not depend on."""
    folder = resolve_data(config.data, cache_dir=cache_dir)
    experiment = open_experiment(
        config, data_folder=folder, cache_dir=cache_dir, device=torch.device("cpu")
    )
    model = experiment.model
    images = model.encode_images(**experiment.train.image_batch(range(4))._asdict())
    captions = model.encode_captions(**experiment.train.caption_batch(range(8))._asdict())
    model.score(images, captions).sum().backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
def test_every_ablation_trains_and_builds_nothing_that_it_switches_off(
    ablation: Ablation, cache_dir: Path
) -> None:
    base = TINY.with_overrides({"data.synthetic.num_regions": 36})
    (variant,) = plan_trials(base, [ablation], [0])
    assert variant.config != base
    if ablation.name == "syntax_words":
        pytest.importorskip("spacy", reason="dependency edges need the syntax extra")
    # A parameter without a gradient makes data-parallel training fail in its second step.
    assert idle_parameters(variant.config, cache_dir) == []


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_ablation_and_search_space_fits_every_baseline(baseline: str) -> None:
    config = BASELINES[baseline]
    assert len(plan_trials(config, ABLATIONS, [0, 1])) == 2 * len(ABLATIONS)
    plan = StudyPlan(
        kind="comparison",
        name="c",
        base=config,
        workers=1,
        data_folder=Path(),
        data_fingerprint="",
        trials=0,
    )
    assert tuning_study(plan, METHODS, COMMON, points=3).trials == 3 * len(METHODS)
    for space in SEARCH_SPACES.values():
        space.check(config)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_trains_and_builds_nothing_that_it_does_not_use(
    method: Method, cache_dir: Path
) -> None:
    assert idle_parameters(TINY.with_overrides(method.overrides), cache_dir) == []


def test_every_method_has_the_same_number_of_settings_to_tune() -> None:
    assert {len({**COMMON, **method.knobs}) for method in METHODS} == {len(COMMON) + 2}
    # What a method is published with may be searched beside it.
    published = {"loss.margin", "model.alignment.region_temperature"}
    published.add("model.alignment.word_temperature")
    for method in METHODS:
        assert {*method.knobs, *COMMON} & {*method.overrides} <= published


def test_names_are_unique_and_questions_are_asked() -> None:
    names = [ablation.name for ablation in ABLATIONS] + [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert all(ablation.question.endswith("?") for ablation in ABLATIONS)
    assert all(space.question.endswith("?") for space in SEARCH_SPACES.values())


def test_the_sweep_starts_from_the_default_configuration() -> None:
    default = SEARCH_SPACES["default"].baseline(BASELINES["synthetic"])
    assert default is not None
    assert BASELINES["synthetic"].with_overrides(default) == BASELINES["synthetic"]


@pytest.mark.parametrize("gate", ["soft", "hard", "off"])
def test_every_gate_of_the_search_space_trains_without_idle_parameters(
    gate: str, cache_dir: Path
) -> None:
    config = TINY.with_overrides({"model.alignment.gate": gate})
    assert idle_parameters(config, cache_dir) == []
