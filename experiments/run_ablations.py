"""Ablations: what does each part of the model add? Full model and variants on the same seeds."""

from __future__ import annotations

import argparse

from cpfean.config import nearest
from cpfean.errors import ConfigError
from experiments import command_line
from experiments.ablations import ABLATIONS

_EPILOG = (
    """\
Prints rSum on dev (best epoch) as mean and 95 % interval over the seeds, and each variant's
difference from the full model, paired by seed. The variants:

"""
    + "\n".join(f"  {ablation.name:28}{ablation.question}" for ablation in ABLATIONS)
    + """

  python experiments/run_ablations.py --seeds 3
  python experiments/run_ablations.py --only no_fusion --only no_priors --data DIR
  python experiments/run_ablations.py --resume              after a crash: finished runs stay

Exit codes: 0 done, 2 flags or configuration, 3 data, 4 some runs failed, 5 cluster or storage,
130 or 143 stopped.
"""
)


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--seeds", metavar="K", type=int, default=3, help="seeds from --seed on (default: 3)"
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="this variant and the full model; may be repeated",
    )
    command_line.add_run_flags(
        parser, workers=1, workers_help="data-parallel processes of a run (default: 1)"
    )
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from orchestration.ablation import compare, comparison_table, plan_trials
    from orchestration.study import StudyPlan

    num_seeds = command_line.positive(arguments.seeds, "--seeds")
    workers = command_line.positive(arguments.workers, "--workers")
    known = {ablation.name: ablation for ablation in ABLATIONS}
    for name in arguments.only:
        if name not in known:
            raise ConfigError(f"no ablation {name!r}{nearest(name, known)}")
    if len(set(arguments.only)) < len(arguments.only):
        raise ConfigError("--only names an ablation twice.")
    chosen = [known[name] for name in arguments.only] or list(ABLATIONS)
    config = command_line.configuration(arguments)
    trials = plan_trials(config, chosen, range(config.seed, config.seed + num_seeds))
    where = command_line.settings(arguments)
    name = command_line.run_name(arguments, "ablations", where)
    folder, fingerprint = command_line.checked_data(
        config, where, num_regions=config.data.num_regions
    )
    for ablation in chosen:
        command_line.check_needs(
            folder,
            list(ablation.overrides),
            who=f"ablation {ablation.name!r}",
            instead="Name the others with --only.",
        )
    plan = StudyPlan(
        kind="ablations",
        name=name,
        base=config,
        trials=len(trials),
        workers=workers,
        fixed=trials,
        data_folder=folder,
        data_fingerprint=fingerprint,
    )
    result = command_line.finish(plan, where, resume=arguments.resume)
    print(comparison_table(compare(result.records)))
    command_line.print_closing(result, where)
    return result.exit_code


if __name__ == "__main__":
    main()
