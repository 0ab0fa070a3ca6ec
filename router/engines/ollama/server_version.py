"""Ollama's version numbers, as far as what a load takes differs by them."""

from __future__ import annotations

import re
from functools import lru_cache

ServerVersion = tuple[int, int, int]
"""Major, minor and patch: rules change with patch levels too (gemma4's flash attention came with 0.20.4)."""

UNKNOWN_COUNTS_AS: ServerVersion = (0, 24, 0)
"""A server that has not told its version is taken for the last one of the older family."""

CURRENT = "0.34.0"
"""The version that a server is taken to have that is still to be installed: the newest that the tests run against."""

LLAMA_SERVER_SINCE: ServerVersion = (0, 30, 0)
"""From here every model runs in a separate `llama-server`; before, some ran on Ollama's own engine."""


@lru_cache(maxsize=64)
def parse_version(text: str | None) -> ServerVersion | None:
    """`0.33.0-rc2` -> (0, 33, 0); None where no version can be read."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match is not None else None


def version_or_default(text: str | None) -> ServerVersion:
    """The parsed version, or the one that an unknown server counts as."""
    return parse_version(text) or UNKNOWN_COUNTS_AS
