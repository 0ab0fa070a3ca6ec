"""When Go takes a key of a body for a field's name: without regard to case, by Unicode's simple folding.

encoding/json/fold.go (Go 1.21 and later): the smallest rune of each rune's fold set. Two runes beyond ASCII fold to
ASCII letters, U+017F (long s) and U+212A (the Kelvin sign); no other can make a key equal to one of the API's names.
"""

from __future__ import annotations

_TO_ASCII = str.maketrans({"\u017f": "s", "\u212a": "k"})


def fold(key: str) -> str:
    """`key` in the form in which the API's names are written: equal to one of them where Go would take it for that."""
    return key.lower() if key.isascii() else key.translate(_TO_ASCII).lower()
