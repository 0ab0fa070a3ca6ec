"""What every suite shares. Fixtures that only one suite needs stand in that suite's own conftest."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.product import Product
from tests.support.signals import default_signals_for_children

default_signals_for_children()

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real processes are played once more where they fail: a machine that others use, and a server that is not
    ours, have failures of their own. What fails twice has failed; what passes then is told as RERUN, with its words."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("ollama", "rig")):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Beside a failed test's words stands what the router said meanwhile, its requests aside: it may not fail again."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Product) and value.log.is_file():
                report.sections.append(("log of the router", _told(value.log_text())))
    return report


def _told(log: str) -> str:
    """Its last lines without the access log."""
    return "\n".join([line for line in log.splitlines() if not _is_access(line)][-60:])


def _is_access(line: str) -> bool:
    try:
        return json.loads(line).get("event") == "request"
    except (ValueError, AttributeError):
        return False
