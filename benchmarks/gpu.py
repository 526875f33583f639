"""What is true of this project on the GPU of this machine?

    python benchmarks/gpu.py
    python benchmarks/gpu.py --model runs/NAME --data DIR    # its rSum in each type, too
    python benchmarks/gpu.py --only kernels gradients --device cpu

Checks what has to be right and measures what has to be fast, in about ten minutes, on any NVIDIA
card; prints a table as it goes and writes all of it as JSON, with card, driver, versions and
commit. Without a card, or with `--device cpu`, it does the same at small sizes, by the kernels for
processors; those for cards have tests of their own. What needs a card says so. Ends with 1 if a
check does not hold or a section fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_checks.cards import several_processes
from gpu_checks.ceilings import ceilings
from gpu_checks.kernels import gradients, kernels, repeats
from gpu_checks.report import Check, Given, Sizes
from gpu_checks.scoring import rsum_by_type, scoring
from gpu_checks.training import evaluation, losses, steps, syncs
from measure import parser_of, publish, say, table

SECTIONS: dict[str, Callable[[Given], list[Check]]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "gradients": gradients,
    "repeats": repeats,
    "losses": losses,
    "syncs": syncs,
    "scoring": scoring,
    "steps": steps,
    "evaluation": evaluation,
    "rsum": rsum_by_type,
    "processes": several_processes,
}


def main() -> None:
    """Runs the sections, prints and publishes."""
    parser = parser_of(__doc__, "gpu")
    parser.set_defaults(runs=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=10, help="no section begins later (10)")
    parser.add_argument("--model", type=Path, help="a trained model, for its rSum in each type")
    parser.add_argument("--data", type=Path, help="and the data that it is evaluated on")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        parser.error(f"--device {arguments.device}: not a device, like cpu, cuda or cuda:1")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {arguments.device}: cpu or a card of NVIDIA")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()} card(s) by torch {torch.__version__}"
            parser.error(f"--device {arguments.device}: {found}")
        torch.cuda.set_device(device)  # what follows is of this card
    # float32 products are to be float32, so that what is compared is the kernel and not TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = run(arguments)
    rows = [check.as_row() for check in checks]
    publish(arguments.output, rows, device=arguments.device, **card(device))
    broken = [check for check in checks if check.holds is False]
    for check in broken:
        print(f"does not hold: {check.section}, {check.what}: {check.found}, {check.bound}")
    held = sum(check.holds is True for check in checks)
    print(f"{held} checks hold, {len(broken)} do not; {len(checks) - held - len(broken)} figures")
    if broken:
        sys.exit(1)


def run(arguments: argparse.Namespace) -> list[Check]:
    """All sections asked for that have time left; each one's table as soon as it is there."""
    began = time.monotonic()
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        given = Given(
            device=torch.device(arguments.device),
            sizes=Sizes.for_device(torch.device(arguments.device).type),
            runs=arguments.runs,
            folder=Path(folder),
            model=arguments.model,
            data=arguments.data,
        )
        names = arguments.only or list(SECTIONS)
        for number, name in enumerate(names, start=1):
            spent = (time.monotonic() - began) / 60
            say(f"{number} of {len(names)}: {name}, after {spent:.1f} of {arguments.minutes:g} min")
            if spent > arguments.minutes:
                found = [Check.left_out(name, f"no time left of --minutes {arguments.minutes:g}")]
            else:
                found = tried(name, given)
            checks += found
            say(table([check.as_row() for check in found]))
    return checks


def tried(name: str, given: Given) -> list[Check]:
    """A section's checks; one that does not hold, if it fails: the others are to be had still."""
    try:
        return SECTIONS[name](given)
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        if given.on_card:
            torch.cuda.empty_cache()
        return [Check(section=name, what="runs", found="it failed", holds=False, note=why)]


def card(device: torch.device) -> dict[str, object]:
    """Name, memory, capability and driver of the card."""
    if device.type == "cpu":
        return {"card": None}
    properties = torch.cuda.get_device_properties(device)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "memory_gib": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "driver_and_power_limit": driver.stdout.strip().splitlines(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


if __name__ == "__main__":
    main()
