"""Fingerprints of the beginning of a prompt, as it is written in a request's body.

The start of the prompt is searched for, not parsed: from the first member that the model reads on, the bytes of a body
are also the beginning of the conversation's next body. The fingerprints are a hint for finding a replica with a warm
prompt cache. They never fail, and are computed only for requests that several replicas could serve.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from router.llm_api.body_schema import SCHEMAS
from router.scheduler.balancing.prefix_affinity import BYTES_PER_TOKEN, LENGTHS

SEARCHED_BYTES = 4096
"""A first member after this is not found: an image may precede it."""
TOKENS_MIN = LENGTHS[0] // BYTES_PER_TOKEN
"""Shorter prompts have no fingerprints."""

_PROMPT_STARTS: Mapping[str, re.Pattern[bytes]] = {
    path: re.compile(rb'"(?:%b)"[ \t\r\n]*:' % "|".join(map(re.escape, schema.texts)).encode())
    for path, schema in SCHEMAS.items()
    if schema.texts
}


def fingerprints_of(path: str, body: bytes) -> tuple[int, ...]:
    """Fingerprints of the prompt in a request to `path`; empty if no prompt is found."""
    start = _PROMPT_STARTS.get(path)
    found = start.search(body, 0, SEARCHED_BYTES) if start is not None else None
    return () if found is None else fingerprints(memoryview(body)[found.end() :])


def fingerprints(text: bytes | memoryview) -> tuple[int, ...]:
    """One for each prefix of `text` with a length in `LENGTHS`; the same in every process.

    They may collide, by chance or on purpose: then a replica is preferred without benefit.
    """
    prints: list[int] = []
    start = value = 0
    size = len(text)
    for length in LENGTHS:
        if length > size:
            break
        value = zlib.crc32(text[start:length], value)
        prints.append(value)
        start = length
    return tuple(prints)
