"""The beginning of what a model shall read, as it stands in a request's body, told apart by fingerprints.

Where the text begins is looked for, not parsed: from the first member on that the model reads, the bytes of a body are
what its conversation's next body begins with as well. It is a hint by which a copy with a warm cache is found; it never
fails, and judges no body. Worked out only for requests that several copies could serve.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from router.llm_api.body_schema import READINGS
from router.scheduler.balancing.prefix_affinity import BYTES_PER_TOKEN, LENGTHS

LOOKED_AT_BYTES = 4096
"""A first member further back is not found: an image may stand before it."""
TOKENS_MIN = LENGTHS[0] // BYTES_PER_TOKEN
"""A shorter prompt has no fingerprint."""

_BEGINS: Mapping[str, re.Pattern[bytes]] = {
    path: re.compile(rb'"(?:%b)"[ \t\r\n]*:' % "|".join(map(re.escape, reading.texts)).encode())
    for path, reading in READINGS.items()
    if reading.texts
}


def fingerprints_of(path: str, body: bytes) -> tuple[int, ...]:
    """Those of the body's text to the server's handler of `path`; none where none is found."""
    begins = _BEGINS.get(path)
    found = begins.search(body, 0, LOOKED_AT_BYTES) if begins is not None else None
    return () if found is None else fingerprints(memoryview(body)[found.end() :])


def fingerprints(text: bytes | memoryview) -> tuple[int, ...]:
    """Of the beginnings of a text, as long as `LENGTHS`, as far as it is as long; the same in every process.

    They may collide, by chance or because somebody wants them to: then a copy is preferred for nothing.
    """
    prints: list[int] = []
    before = value = 0
    size = len(text)
    for length in LENGTHS:
        if length > size:
            break
        value = zlib.crc32(text[before:length], value)
        prints.append(value)
        before = length
    return tuple(prints)
