"""What waiting clients are told of their waits, against what comes."""

from __future__ import annotations

import pytest

from bench.scheduling.bench_waits import tell
from router.lab.simulator.workload import read_trace


@pytest.mark.parametrize(("cell", "least"), [("2x3090/team", 0.7), ("4x3090/wide", 0.7)])
def test_most_waits_are_as_long_as_was_told(cell: str, least: float) -> None:
    told = tell(cell, (1,), read_trace())
    assert len(told.pairs) > 300
    assert told.well_told >= least
