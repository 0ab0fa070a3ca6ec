"""Changes bytes at random, knowing which pieces mean something: a seed gives the same inputs on every machine."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

NUMBERS = (
    *(b"0", b"-0", b"-1", b"1", b"+1", b"00", b"1e9", b"0x10", b"1_0", b"1.5", b"255", b"65536", b"2147483648"),
    *(b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"1e999", b"NaN", b"9" * 400),
)
ODD_BYTES = (
    *(b"\x00", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\t", b"\x0b", b"\x7f", b"\x80", b"\xff", b"\xc0\xaf", b" ", b"  "),
    *(b"\xef\xbb\xbf", b"\xc5\xbf", b"\xe2\x84\xaa", b"\xed\xa0\x80", b"%00", b"%2e%2e", b"%", b'"', b"\\", b":", b";"),
    *(b",", b"{", b"}", b"[", b"]", b"//", b"../", b"A" * 300),
)
_DIGITS = re.compile(rb"[0-9]+")


class Mutator:
    """`words`: pieces of the format that are worth putting in."""

    def __init__(self, rng: random.Random, words: Sequence[bytes]) -> None:
        self._rng = rng
        self._words = words

    def mutate(self, data: bytes, changes_max: int = 3) -> bytes:
        for _ in range(self._rng.randint(1, changes_max)):
            data = self._change(data)
        return data

    def _change(self, data: bytes) -> bytes:
        rng = self._rng
        start, end = self._range(data)
        match rng.randrange(9):
            case 0:
                return data[:start] + bytes((rng.randrange(256),)) + data[start + 1 :]
            case 1:
                return data[:start] + rng.choice(ODD_BYTES) + data[start:]
            case 2:
                return data[:start] + rng.choice(self._words) + data[start:]
            case 3:
                return data[:start] + data[end:]
            case 4:
                return data[:end] + data[start:end] + data[end:]
            case 5:
                return data[:start] + rng.choice(self._words) + data[end:]
            case 6:
                return data[:end]
            case 7:
                return self._with_another_number(data)
            case _:
                return data[:start] + data[start:end].swapcase() + data[end:]

    def _range(self, data: bytes) -> tuple[int, int]:
        start = self._rng.randint(0, len(data))
        return start, min(len(data), start + self._rng.choice((0, 1, 1, 2, 4, 16, 64)))

    def _with_another_number(self, data: bytes) -> bytes:
        found = [*_DIGITS.finditer(data)]
        if not found:
            return data
        chosen = self._rng.choice(found)
        return data[: chosen.start()] + self._rng.choice(NUMBERS) + data[chosen.end() :]


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces, as a network may deliver them."""
    if rng.random() < 0.5 or len(data) < 2:
        return [data]
    cuts = sorted({rng.randint(1, len(data) - 1) for _ in range(rng.randint(1, 6))})
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
