"""A context length as people write it."""

from __future__ import annotations

_MIN, _MAX = 4, 2**24
_DIGITS_MAX = 9


def parse_context_length(text: str) -> int:
    """Tokens. Raises ValueError, whose text says what to write."""
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS_MAX or not _MIN <= int(text) <= _MAX:
        raise ValueError(f"must be a number of tokens from {_MIN} to {_MAX}")
    return int(text)
