"""What an EMULATED model says: made-up words, JSON after a schema, thoughts and tool calls, token by token.

Models of the catalogue say first that their answer is emulated, then words of no meaning, and come to an end by
themselves; small models of random weights talk noise for ever, one byte of prompt costing one token, as the real ones
do that the tests write. The same prompt with the same seed gives the same words. Pure but for the random source that is
passed in.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast

from router.lab.emulator.model_facts import is_embedding
from router.lab.emulator.store import Header

_SYLLABLES = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
_SENTENCE = " This answer is emulated: no model has read the question. What follows has no meaning."
_WORDS = re.findall(
    r"[a-z]+",
    """
    a able about above across after again air all along always and answer any area ask at back be before begin
    below best between both build but by call GPU carry case change city clear close come common cool count
    cover cut day deep do draw each early earth ease east end even ever every example far fast few figure find
    first follow for form found four from full give go good great ground group grow half hand hard have head
    hear heat help here high hold home hot hour house how if in is it just keep kind know land large last late
    learn leave left less letter life light like line list little live long look low main make many mark mean
    measure might mind more most move much name near need never new next night north not note now number of
    off often old on one only open or order other out over own page part pass pattern place plain plan point
    port pose power press print problem produce quick quiet rain reach read ready real rest right river road
    rock room round rule run same say sea second see seem serve set several shape short show side simple sing
    sit size slow small snow so some song soon sort sound south space spell stand star start state stay step
    still stop story street strong study such sun sure table take talk tell test that the then there thing
    think this time to together top toward travel tree true turn two under unit until up use usual vary very
    voice vowel wait walk warm watch water way week weigh well west wheel where while white whole wide will
    wind with wonder wood word work world write year yet young
    """,
)
_EXAMPLES: Mapping[str, Any] = {"integer": 7, "number": 7.5, "boolean": True, "null": None}
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or a whole tool call."""

    kind: Literal["content", "thinking", "call"]
    text: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What an answer shall be made of."""

    prompt: str
    seed: int | None = None
    thinks: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    format: Any = None
    """`json`, a schema, or nothing."""


def prompt_tokens(header: Header, text: str) -> int:
    """How many tokens a prompt costs."""
    size = len(text.encode())
    if is_embedding(header) and header.is_noise:
        return 2 + sum(not character.isspace() for character in text)
    if header.is_noise:
        return 1 + (3 + size if size else 0)
    return 1 + -(-size // _CHARACTERS_A_TOKEN)


def say(header: Header, wish: Wish, source: random.Random) -> Iterator[Piece]:
    """The tokens of an answer in order; without end where the model is noise."""
    chance = random.Random(f"{wish.seed}|{wish.prompt}") if wish.seed is not None else source
    if wish.format is not None:
        return _formatted(header, wish)
    call = _wanted_call(wish)
    if call is not None:
        return _structured(header, json.dumps(call), is_call=True)
    thoughts = _thoughts(header, chance) if wish.thinks else iter(())
    content = _noise(chance) if header.is_noise else _language(chance)
    return chain(thoughts, (Piece("content", text) for text in content))


def _thoughts(header: Header, chance: random.Random) -> Iterator[Piece]:
    """The first without the blank before it, as a real server cuts it."""
    words = _noise(chance) if header.is_noise else _rambling(chance, chance.randrange(20, 160))
    yield Piece("thinking", next(words).lstrip())
    for word in words:
        yield Piece("thinking", word)


def _noise(chance: random.Random) -> Iterator[str]:
    while True:
        yield " " + chance.choice(_SYLLABLES) + chance.choice(_SYLLABLES)


def _language(chance: random.Random) -> Iterator[str]:
    yield from (" " + word for word in _SENTENCE.split())
    yield from _rambling(chance, chance.randrange(20, 400))


def _rambling(chance: random.Random, count: int) -> Iterator[str]:
    starts = True
    for left in range(count, 0, -1):
        word = chance.choice(_WORDS)
        ends = left == 1 or (not starts and chance.random() < 0.1)
        yield " " + (word.capitalize() if starts else word) + ("." if ends else "")
        starts = ends


def _wanted_call(wish: Wish) -> dict[str, Any] | None:
    """A call of the first tool that the prompt names; models of the catalogue call tools when asked to by name."""
    for tool in wish.tools:
        function = cast("dict[str, Any]", tool.get("function") or {})
        name = str(function.get("name") or "")
        if name and name in wish.prompt.rpartition("user: ")[2]:
            return {"name": name, "parameters": example_of(function.get("parameters") or {})}
    return None


def _formatted(header: Header, wish: Wish) -> Iterator[Piece]:
    value: Any = {} if wish.format == "json" else example_of(wish.format)
    is_call = bool(wish.tools) and isinstance(value, dict) and {"name", "parameters"} <= set(cast("Any", value))
    return _structured(header, json.dumps(value), is_call)


def _structured(header: Header, text: str, is_call: bool) -> Iterator[Piece]:
    """A text in tokens; a call takes its tokens' time in silence and comes whole."""
    step = 1 if header.is_noise else _CHARACTERS_A_TOKEN
    parts = [text[at : at + step] for at in range(0, len(text), step)]
    if not is_call:
        yield from (Piece("content", part) for part in parts)
        return
    yield from (Piece("content", "") for _ in parts[:-1])
    yield Piece("call", text)


def example_of(schema: Any) -> Any:
    """A value that fits a JSON schema, as far as one is needed here: the first of what is allowed."""
    if not isinstance(schema, dict):
        return {}
    given = cast("dict[str, Any]", schema)
    if "const" in given:
        return given["const"]
    if given.get("enum"):
        return given["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if given.get(key):
            return example_of(given[key][0])
    kinds: Any = given.get("type", "object" if "properties" in given else "string")
    kind = str(cast("list[Any]", kinds)[0] if isinstance(kinds, list) and kinds else cast("Any", kinds))
    if kind == "object":
        properties = cast("dict[str, Any]", given.get("properties") or {})
        return {name: example_of(inner) for name, inner in properties.items()}
    if kind == "array":
        return [example_of(given["items"])] if given.get("minItems") and "items" in given else []
    return _EXAMPLES.get(kind, "emulated")


def vector(text: str, length: int) -> list[float]:
    """An embedding of length one, the same for the same text, in single precision."""
    chance = random.Random(hashlib.sha256(text.encode()).digest())
    raw = [chance.gauss(0.0, 1.0) for _ in range(length)]
    norm = sum(value * value for value in raw) ** 0.5 or 1.0
    return [struct.unpack("f", struct.pack("f", value / norm))[0] for value in raw]


def token_ids(text: str) -> list[int]:
    """Ids that stand for a text in `context`: the bytes of blanks and letters, shifted as in the tests' vocabulary."""
    return [byte + 3 for byte in text.replace(" ", "▁").encode()]


def logprobs_of(text: str, top: int, chance: random.Random) -> dict[str, Any]:
    """A made-up entry of `logprobs` for one token."""
    entry: dict[str, Any] = {"token": text, "logprob": -5.0 * chance.random(), "bytes": list(text.encode())}
    if top > 0:
        others: Sequence[str] = [text, *(" " + chance.choice(_WORDS) for _ in range(top - 1))]
        entry["top_logprobs"] = [
            {"token": one, "logprob": -0.5 - index, "bytes": list(one.encode())} for index, one in enumerate(others)
        ]
    return entry
