"""Compare the full model with the field's scorers: equal tuning for all, then the same seeds."""

from __future__ import annotations

import argparse
from dataclasses import replace

from experiments import command_line
from experiments.methods import COMMON, METHODS

_EPILOG = (
    """\
Each method is tuned over as many configurations as the others, judged on dev, on one seed; the best
of each then runs on further seeds and is tested. What ran before (same configuration, data and
training code) is taken from the folder of results and not trained again. Margins and
temperatures are searched from each method's published ones on, whatever --set gives. The methods:

"""
    + "\n".join(f"  {method.name:36}{method.source}" for method in METHODS)
    + """

  python experiments/compare.py --data DIR                     all methods, 5 seeds
  python experiments/compare.py --methods full --methods scan --seeds 2 --tuning 1
  python experiments/compare.py --data DIR --in-process        one run after another, without Ray
  python experiments/compare.py --dry-run                      hours, dollars and disk alone
  python experiments/compare.py --resume                       after a crash: finished runs stay
  python experiments/compare.py --register NAME                the best model, in MLflow

Exit codes: 0 done, 2 flags or configuration, 3 data, 4 some runs failed, 5 cluster or storage,
130 or 143 stopped.
"""
)


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--methods",
        metavar="NAME",
        action="append",
        default=[],
        help="only these; may be repeated (default: all)",
    )
    parser.add_argument(
        "--tuning",
        metavar="N",
        type=int,
        default=4,
        help="configurations that each method is tuned over; 1 takes it as it stands (default: 4)",
    )
    command_line.add_comparison_flags(parser, seeds=5)
    command_line.add_run_flags(
        parser, workers=1, workers_help="data-parallel processes of a run (default: 1)"
    )
    command_line.add_register_flag(parser)
    command_line.add_budget_flags(parser)
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from experiments.dry_run import print_dry_run
    from experiments.outcome import print_closing, print_comparison
    from orchestration.study.comparison import (
        compare_methods,
        report_folder,
        seeds_study,
        tuning_study,
    )

    points = command_line.positive(arguments.tuning, "--tuning")
    chosen = command_line.chosen(arguments.methods, METHODS, flag="--methods", what="method")
    register = command_line.registered_name(arguments)
    plan, where, seeds = command_line.comparison_plan(arguments, "comparison")
    plan = replace(plan, register=register)
    if any("model.regions.prior" in method.overrides for method in chosen):
        command_line.check_needs(
            plan.data_folder,
            ["model.regions.prior"],
            who="a baseline as published",
            instead="Name those on the full encoder with --methods.",
        )
    if arguments.dry_run:
        plans = [tuning_study(plan, chosen, COMMON, points=points)] if points > 1 else []
        plans.append(seeds_study(plan, chosen, seeds=seeds, settings=where))
        return print_dry_run(plans, where, in_process=arguments.in_process)
    with command_line.named(plan, arguments, where) as plan:
        result, variants = compare_methods(
            plan,
            chosen,
            COMMON,
            points=points,
            seeds=seeds,
            settings=where,
            resume=arguments.resume,
            runner=command_line.runner(where, in_process=arguments.in_process),
            say=command_line.say,
        )
    if not variants:
        print_closing(result, where)
        return result.exit_code
    print_comparison(result, report_folder(plan, where), where)
    return result.exit_code


if __name__ == "__main__":
    main()
