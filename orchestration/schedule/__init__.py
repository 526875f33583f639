"""Suites of ablations on a schedule: when they are due, and that two rounds never overlap.

A suite is a selection of ablations that runs at the times of a cron expression, in UTC. Each such
time is a slot, and a slot is one round: a Ray job whose id is made of suite and slot. Ray refuses a
second job of the same id, so a slot is run once, however many schedulers look after the suite and
however often they are killed and started. A slot whose predecessor still runs is skipped; of slots
that passed while no scheduler ran, the last is caught up with. A suite whose last rounds all failed
is paused until somebody resumes it.

Schedulers hold no lock: one that is stopped for an hour holds nobody up. What it submits when it
wakes may be late, so a round looks itself whether another one of its suite runs.

    <folder>/suites.json       what runs, and when
    <folder>/schedule.jsonl    what became of each slot, and why; lines are only added
    <folder>/.SUITE.lock       held by the round that runs
"""
