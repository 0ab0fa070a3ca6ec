"""What a client used of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class UsageTotals(NamedTuple):
    """Sums over requests that had a slot."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    gpu_seconds: float = 0.0
    """Of GPU time; a second in which a GPU served several requests is shared equally between them."""
    energy_wh: float = 0.0
    """Watt-hours of the GPUs, shared the same way: an estimate from readings of their power draw."""

    def plus(self, other: UsageTotals) -> UsageTotals:
        return UsageTotals(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.output_tokens + other.output_tokens,
            self.gpu_seconds + other.gpu_seconds,
            self.energy_wh + other.energy_wh,
        )


class UsageRow(NamedTuple):
    """What one client used of one model on one day."""

    day: str
    """In UTC, as 2026-01-31."""
    client: str
    model: str
    totals: UsageTotals


def summarize(rows: Sequence[UsageRow], by: Sequence[str]) -> dict[tuple[str, ...], UsageTotals]:
    """Totals by these fields of the rows (`day`, `client`, `model`), sorted by them."""
    found: dict[tuple[str, ...], UsageTotals] = {}
    for row in rows:
        key = tuple(str(getattr(row, field)) for field in by)
        found[key] = found.get(key, UsageTotals()).plus(row.totals)
    return dict(sorted(found.items()))
