"""What the benchmarks measure with."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_the_peak_of_a_call_is_what_it_holds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from measure import peak_memory

    def call() -> None:
        for _ in range(3):  # one after the other
            np.ones(64 * MB, dtype=np.uint8)

    assert 63 * MB < peak_memory(call) < 100 * MB
    assert peak_memory(lambda: None) < 16 * MB
