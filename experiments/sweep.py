"""Sweep: which gate, overlap threshold, margin and region count give the highest rSum?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.config import nearest
from cpfean.errors import ConfigError
from experiments import command_line
from experiments.search_spaces import SEARCH_SPACES

if TYPE_CHECKING:
    from cpfean.records.trial_record import TrialRecord
    from orchestration.proposals.search_space import SearchSpace

_EPILOG = """\
Ray Tune runs the trials, Optuna proposes them, successive halving stops those far behind, and
MLflow shows them: a parent run for the sweep, a child for each trial. Ends with a table of trials,
the best configuration as a file for train.py, the best model tested once on the test split, and a
report: which settings mattered, and a picture of each.

  python experiments/sweep.py                               the generated data, on this machine
  python experiments/sweep.py --data DIR --workers 2        own regions and captions
  python experiments/sweep.py --set optim.batch_size=64     any setting, fixed for all trials
  python experiments/sweep.py --dry-run                     hours, dollars and disk alone
  python experiments/sweep.py --max-hours 8                 no new trial after eight hours
  python experiments/sweep.py --in-process                  one trial after another, without Ray
  python experiments/sweep.py --resume                      after a crash: finished trials stay
  python experiments/sweep.py --register NAME               the best model under that name in MLflow

Exit codes: 0 done, 2 flags or configuration, 3 data, 4 some trials failed, 5 cluster or storage,
130 or 143 stopped.
"""


def main() -> None:
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--trials", metavar="N", type=int, default=6, help="default: 6")
    parser.add_argument(
        "--space",
        default="default",
        help="; ".join(f"{space.name}: {space.question}" for space in SEARCH_SPACES.values()),
    )
    command_line.add_in_process_flag(parser)
    command_line.add_run_flags(
        parser, workers=1, workers_help="data-parallel processes of a trial (default: 1)"
    )
    command_line.add_register_flag(parser)
    command_line.add_budget_flags(parser)
    command_line.run(parser, body)


def body(arguments: argparse.Namespace) -> int:
    from experiments.dry_run import print_dry_run
    from experiments.outcome import print_closing, print_metrics, table
    from orchestration.study.plan import StudyPlan
    from orchestration.study.study import run_study

    trials = command_line.positive(arguments.trials, "--trials")
    workers = command_line.positive(arguments.workers, "--workers")
    command_line.check_in_process(arguments, workers)
    if arguments.space not in SEARCH_SPACES:
        raise ConfigError(
            f"no search space {arguments.space!r}{nearest(arguments.space, SEARCH_SPACES)}"
        )
    config = command_line.configuration(arguments)
    space = SEARCH_SPACES[arguments.space]
    space.check(config)
    register = command_line.registered_name(arguments)
    budget = command_line.budget(arguments)
    where = command_line.settings(arguments)
    name = command_line.run_name(arguments, "sweep", where)
    if not arguments.in_process:
        command_line.start_early(arguments, where)
    folder, fingerprint = command_line.checked_data(
        config, where, num_regions=config.data.num_regions
    )
    command_line.check_needs(
        folder,
        list(space.parameters),
        who=f"search space {space.name!r}",
        instead=f"Another --space: {', '.join(SEARCH_SPACES)}.",
    )
    space = command_line.fitting_space(space, command_line.stored_regions(folder))
    epochs = config.optim.epochs
    plan = StudyPlan(
        kind="sweep",
        name=name,
        base=config,
        trials=trials,
        workers=workers,
        min_workers=command_line.fewest_workers(arguments),
        space=space,
        # The epoch after the warm-up is no guide yet; of a few epochs all are needed to judge.
        grace=max(3, epochs // 4) if epochs >= 4 else 0,
        data_folder=folder,
        data_fingerprint=fingerprint,
        register=register,
        budget=budget,
        allow_drift=arguments.allow_drift,
        retry_failed=arguments.retry_failed,
        typed=arguments.typed,
    )
    if arguments.dry_run:
        return print_dry_run([plan], where, in_process=arguments.in_process)
    with command_line.named(plan, arguments, where) as plan:
        report = where.output / plan.name / "report"
        result = run_study(
            replace(plan, report=lambda records: write_report(records, space, report)),
            where,
            runner=command_line.runner(where, in_process=arguments.in_process),
            resume=arguments.resume,
            say=command_line.say,
        )
    print(f"\n{table(result.records)}")
    if result.test:
        print(f"\n{result.best.name if result.best else ''} on the test split:")
        print_metrics(result.test)
    print_closing(result, where, report=report)
    return result.exit_code


def write_report(
    records: Sequence[TrialRecord], space: SearchSpace, folder: Path
) -> Sequence[Path]:
    """Which settings of the space mattered, as files; the same for the same records."""
    from cpfean.analysis.search_report import SearchedTrial, Setting, write_search_report
    from orchestration.proposals.optuna_study import NEEDED, Proposals
    from orchestration.proposals.search_space import Choice

    settings = [
        Setting(path=path, choices=values.values)
        if isinstance(values, Choice)
        else Setting(path=path, low=values.low, high=values.high, log=values.log)
        for path, values in space.parameters.items()
    ]
    trials = [
        SearchedTrial(state=record.state, rsum=record.best_rsum, values=record.overrides)
        for record in records
        if record.state in ("finished", "pruned") and math.isfinite(record.best_rsum)
    ]
    # It proposes nothing here: no baseline, and whatever seed.
    search = Proposals(space, name="report", seed=0, baseline=None, trials=len(records))
    mattered = search.importance(records)
    return write_search_report(trials, settings, mattered, folder, needed=NEEDED)


if __name__ == "__main__":
    main()
