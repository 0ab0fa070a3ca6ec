"""Merges the `keep_alive` of several requests for one model."""

from __future__ import annotations

import pytest

from router.domain.keep_alive import FOR_EVER, merged_keep_alive


@pytest.mark.parametrize(
    ("current", "asked", "alone", "shared"),
    [
        (300.0, None, 300.0, 300.0),
        (300.0, 60.0, 60.0, 300.0),
        (60.0, 300.0, 300.0, 300.0),
        (300.0, 0.0, 0.0, 300.0),
        (0.0, 60.0, 60.0, 60.0),
        (FOR_EVER, 60.0, 60.0, FOR_EVER),
        (60.0, FOR_EVER, FOR_EVER, FOR_EVER),
        (FOR_EVER, 0.0, 0.0, FOR_EVER),
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_newest_value_wins_alone_and_the_longest_among_several(
    current: float, asked: float | None, alone: float, shared: float
) -> None:
    assert merged_keep_alive(current, asked, others_hold=False) == alone
    assert merged_keep_alive(current, asked, others_hold=True) == shared
