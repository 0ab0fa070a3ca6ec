"""The simulator and emulated servers (processes with real HTTP) give similar results for the same trace."""

from __future__ import annotations

import pytest

from bench.scheduling.agreement import Comparison, compare
from bench.scheduling.servers import ROUTER, STOCK_VERSIONS
from router.lab.scenarios import ScenarioSpec

pytestmark = pytest.mark.rig

IN_TIME_TOLERANCE = 0.15
"""Three of twenty requests. Measured on two busy cores: zero to one."""
SPEEDS = (5.0, 2.5, 1.25)
"""Speeds of the emulated clock and the router's. Process starts and proxying are not scaled, so on a busy machine they
are late under a fast clock: then a slower one is tried. A real difference shows at every speed."""
SPEC = ScenarioSpec("4x3090", "team", seed=1, seconds=40.0, requests_per_second=0.46)


def differences(found: Comparison, *, by_loads: bool) -> list[str]:
    """Descriptions of the differences; empty if both agree."""
    emulated, simulated = found.in_ten_seconds()
    messages = [one.error for one in found.emulated if one.error]
    if len(found.emulated) != len(found.simulated):
        messages.append(f"{len(found.emulated)} requests emulated, {len(found.simulated)} simulated")
    if abs(emulated - simulated) > IN_TIME_TOLERANCE:
        messages.append(f"within 10 s: {emulated:.0%} emulated, {simulated:.0%} simulated")
    if by_loads and found.loads[0][:6] != found.loads[1][:6]:
        messages.append(f"first loads: {found.loads[0][:6]} emulated, {found.loads[1][:6]} simulated")
    return messages


def differences_at_every_speed(policy: str, *, by_loads: bool) -> dict[float, list[str]]:
    """Differences by speed; empty if any speed shows none. Slower speeds are tried only if needed."""
    found: dict[float, list[str]] = {}
    for speed in SPEEDS:
        found[speed] = differences(compare(policy, SPEC, speed), by_loads=by_loads)
        if not found[speed]:
            return {}
    return found


@pytest.mark.parametrize("policy", STOCK_VERSIONS)
def test_simulator_and_emulated_server_agree_on_the_team(policy: str) -> None:
    assert differences_at_every_speed(policy, by_loads=True) == {}


def test_simulator_and_router_agree_on_the_team() -> None:
    assert differences_at_every_speed(ROUTER, by_loads=False) == {}
