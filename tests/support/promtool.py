"""Prometheus's own tool, where it is installed."""

from __future__ import annotations

import os
import shutil

import pytest


def promtool(name: str = "promtool") -> str:
    """Its path. Skips the test without it, but fails in CI. `name`: of another program of Prometheus."""
    binary = shutil.which(name)
    if binary is None:
        hint = f"{name} is not installed (make prometheus)"
        pytest.fail(hint) if os.environ.get("CI") else pytest.skip(hint)
    return binary
