"""The model of an ordinary body at a glance: one pass of two searches and a decoder in C, or no answer.

It refuses to guess: where anything else that routing heeds might stand in the body, only `gateway/peek.py` can tell.
"""

from __future__ import annotations

import re

import msgspec

GLANCE_BYTES_MAX = 65536
"""Longer bodies are not looked at twice."""


class _Plain(msgspec.Struct):
    model: str = ""


_PLAIN = msgspec.json.Decoder(_Plain)
_HEEDED = re.compile(
    rb'"(?:keep_alive|num_ctx|num_batch|num_gpu|main_gpu|num_thread|use_mmap)"'  # what else routing heeds
    rb"|\\u00[4-7]"  # a letter or underscore written as an escape, which could be in a key
    rb"|\xe2\x84\xaa|\xc5\xbf",  # the Kelvin sign and the long s, which Go folds to k and s
    re.IGNORECASE,
)
_MODEL = re.compile(rb'"model"', re.IGNORECASE)


def glance(body: bytes) -> str | None:
    """The model of an ordinary body, or None where only `peek` can tell.

    Ordinary is one whose only member that routing heeds is a plain `"model"`, written once: what is looked for could
    stand anywhere in it, in any letter case, so what is not found cannot be there. For such a body `peek` gives the
    same model, no `keep_alive` and no runner option.
    """
    if len(body) > GLANCE_BYTES_MAX or _HEEDED.search(body) is not None or len(_MODEL.findall(body)) != 1:
        return None
    try:
        return _PLAIN.decode(body).model or None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
