"""A short run of `make chaos`: requests end answered or with a clear error while everything fails; nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.reliability.chaos import ANSWERED, CUT, LOST, report, run

pytestmark = pytest.mark.rig


async def test_no_stream_is_cut_silently_and_no_request_is_lost(tmp_path: Path) -> None:
    tally, left = await run(streams=12, seconds=10.0, seed=3, folder=tmp_path)
    words = report(tally, left, 12, 10.0, 3)
    assert (tally.outcomes[CUT], tally.outcomes[LOST], left) == (0, 0, []), words
    assert tally.outcomes[ANSWERED] > 12, words
    assert sum(tally.faults.values()) > 0, words
