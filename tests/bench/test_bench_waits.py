"""Accuracy of the wait estimates for waiting clients."""

from __future__ import annotations

import pytest

from bench.scheduling.bench_waits import measure
from router.lab.simulator.workload import read_trace


@pytest.mark.parametrize(("cell", "minimum"), [("2x3090/team", 0.65), ("4x3090/wide", 0.65)])
def test_most_wait_estimates_are_accurate(cell: str, minimum: float) -> None:
    estimates = measure(cell, (1,), read_trace())
    assert len(estimates.pairs) > 300
    assert estimates.accurate_share >= minimum
