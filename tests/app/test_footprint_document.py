"""docs/footprints.md shows what the code says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.tools.generate_footprint_table import DOCUMENT, LOADS, with_tables

ROOT = Path(__file__).parents[2]


def test_the_tables_of_footprints_have_not_drifted() -> None:
    text = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert with_tables(text, ROOT / LOADS) == text, "run `python -m router.tools.generate_footprint_table`"


def test_a_document_without_a_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="architectures: generated"):
        with_tables("<!-- measured loads: generated -->\n<!-- measured loads: end -->\n", ROOT / LOADS)
