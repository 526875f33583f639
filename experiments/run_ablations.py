"""Ablations: what does each part of the model add? Full model and variants on the same seeds."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from experiments import command_line
from experiments.ablations import ABLATIONS

if TYPE_CHECKING:
    from orchestration.study.variants import Ablation

_EPILOG = (
    """\
Ends with rSum on the test split (best epoch on dev) as mean and 95 % interval over the seeds, and
each variant's difference from the full model, paired by seed. What ran before (same configuration,
data and code) is taken from the folder of results and not trained again. The variants:

"""
    + "\n".join(f"  {ablation.name:28}{ablation.question}" for ablation in ABLATIONS)
    + """

  python experiments/run_ablations.py --seeds 3
  python experiments/run_ablations.py --only no_fusion --only no_priors --data DIR
  python experiments/run_ablations.py --in-process          one run after another, without Ray
  python experiments/run_ablations.py --dry-run             hours, dollars and disk alone
  python experiments/run_ablations.py --resume              after a crash: finished runs stay

Exit codes: 0 done, 2 flags or configuration, 3 data, 4 some runs failed, 5 cluster or storage,
130 or 143 stopped.
"""
)


def main() -> None:
    command_line.run(make_parser(), body)


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="this variant and the full model; may be repeated",
    )
    command_line.add_comparison_flags(parser, seeds=3)
    command_line.add_run_flags(
        parser, workers=1, workers_help="data-parallel processes of a run (default: 1)"
    )
    command_line.add_budget_flags(parser)
    return parser


def body(arguments: argparse.Namespace) -> int:
    from cpfean.analysis.statistics import FULL
    from experiments.dry_run import print_dry_run
    from experiments.outcome import print_comparison
    from orchestration.study.comparison import compare_variants, report_folder, seeds_study
    from orchestration.study.variants import Ablation

    chosen = command_line.chosen(arguments.only, ABLATIONS, flag="--only", what="ablation")
    plan, where, seeds = command_line.comparison_plan(arguments, "ablations")
    plan = replace(plan, tags=getattr(arguments, "tags", {}))  # set by schedule.py
    possible = []
    for ablation in chosen:
        try:
            _check(ablation, plan.base, plan.data_folder)
        except ConfigError as error:
            if arguments.only:
                raise
            command_line.say(f"left out: {error}")
        else:
            possible.append(ablation)
    full = Ablation(name=FULL, question="The full model.", overrides={})
    if arguments.dry_run:
        study = seeds_study(plan, [full, *possible], seeds=seeds, settings=where)
        return print_dry_run([study], where, in_process=arguments.in_process)
    with command_line.named(plan, arguments, where) as plan:
        result = compare_variants(
            plan,
            [full, *possible],
            seeds=seeds,
            settings=where,
            resume=arguments.resume,
            runner=command_line.runner(where, in_process=arguments.in_process),
            say=command_line.say,
        )
    print_comparison(result, report_folder(plan, where), where)
    return result.exit_code


def _check(ablation: Ablation, base: ExperimentConfig, folder: Path) -> None:
    """Raises ConfigError if the ablation changes nothing here, or needs what is not there."""
    from cpfean.data.tokens import spacy_parser

    who = f"ablation {ablation.name!r}"
    try:
        config = base.with_overrides(ablation.overrides)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}") from None
    if config == base:
        raise ConfigError(f"{who} is the configuration as it stands.")
    command_line.check_needs(
        folder, list(ablation.overrides), who=who, instead="Name others with --only."
    )
    stored = command_line.stored_regions(folder)
    if config.data.num_regions > max(stored, base.data.num_regions):
        raise ConfigError(
            f"{who} asks for {config.data.num_regions} regions, and {folder} has {stored} an image."
        )
    if config.model.words.graph == "syntax":
        spacy_parser()


if __name__ == "__main__":
    main()
