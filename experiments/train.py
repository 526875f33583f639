"""Train one configuration, keep its best epoch by rSum on dev, and test it once."""

from __future__ import annotations

import argparse

from experiments import command_line

_EPILOG = """\
  python experiments/train.py                                    the generated data, in a minute
  python experiments/train.py --data DIR --config small          own regions and captions
  python experiments/train.py --config runs/NAME/best_config.toml
  python experiments/train.py --data DIR --workers 4             four processes share each batch
  python experiments/train.py --dry-run                          hours, dollars and disk alone
  python experiments/train.py --resume                           from the newest checkpoint
  python experiments/train.py --register NAME                    under that name in MLflow

Exit codes: 0 done, 2 flags or configuration, 3 data, 4 the training failed, 5 cluster or storage,
130 or 143 stopped.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    command_line.add_run_flags(
        parser,
        workers=0,
        workers_help="data-parallel processes, through Ray Train; 0 trains in this process "
        "(default: 0)",
    )
    command_line.add_register_flag(parser)
    command_line.add_budget_flags(parser, limits=False)
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from experiments.dry_run import print_dry_run
    from experiments.outcome import print_closing, print_metrics
    from orchestration.study.plan import StudyPlan, TrialPlan
    from orchestration.study.study import run_study

    workers = command_line.positive(arguments.workers, "--workers", least=0)
    config = command_line.configuration(arguments)
    register = command_line.registered_name(arguments)
    budget = command_line.budget(arguments)
    where = command_line.settings(arguments)
    name = command_line.run_name(arguments, "train", where)
    if workers > 0:
        command_line.start_early(arguments, where)
    folder, fingerprint = command_line.checked_data(
        config, where, num_regions=config.data.num_regions
    )
    plan = StudyPlan(
        kind="train",
        name=name,
        base=config,
        trials=1,
        workers=workers,
        min_workers=command_line.fewest_workers(arguments),
        fixed=(TrialPlan(name=name, overrides={}, config=config),),
        data_folder=folder,
        data_fingerprint=fingerprint,
        register=register,
        budget=budget,
        allow_drift=arguments.allow_drift,
        # A training that failed here is asked for again by its resume.
        retry_failed=arguments.retry_failed or workers == 0,
        typed=arguments.typed,
    )
    if arguments.dry_run:
        return print_dry_run([plan], where, in_process=workers == 0)
    with command_line.named(plan, arguments, where) as plan:
        result = run_study(
            plan,
            where,
            runner=command_line.runner(where, in_process=workers == 0),
            resume=arguments.resume,
            say=command_line.say,
        )
    if result.test:
        print(f"\n{plan.name}, best epoch, on the test split:")
        print_metrics(result.test)
    print_closing(result, where)
    return result.exit_code


if __name__ == "__main__":
    main()
