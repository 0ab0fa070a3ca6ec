"""What every suite shares. Fixtures that only one suite needs stand in that suite's own conftest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_CALM = [HealthCheck.too_slow]
"""A busy machine is no fault of a test: nothing generated is timed."""

settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=_CALM)
settings.register_profile("searching", deadline=None, suppress_health_check=_CALM)
settings.load_profile("repeatable")
# Whoever looks for new examples says so: --hypothesis-profile=searching, and --hypothesis-seed=N to see them again.


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).parents[1]
