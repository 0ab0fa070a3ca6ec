"""Every exported metric is documented, and every documented one exported."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.exported import exported_families

_ROW = re.compile(r"^\| (`llamayard_[^|]*) \|", re.MULTILINE)


def _documented(root: Path) -> set[str]:
    """Names in the table of metrics; `…_used_bytes` replaces the last two words of the name before it."""
    names: set[str] = set()
    for row in _ROW.findall((root / "docs/operations.md").read_text(encoding="utf-8")):
        first, *others = re.findall(r"`([^`]+)`", row)
        stem = "_".join(first.split("_")[:-2])
        names |= {first, *(other.replace("…", stem) for other in others)}
    return names


def test_the_documented_metrics_are_those_that_are_exported(root: Path) -> None:
    assert exported_families() == _documented(root)
