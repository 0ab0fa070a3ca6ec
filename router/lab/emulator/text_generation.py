"""Generates the output of an EMULATED model: made-up text, JSON for a schema, thinking and tool calls, token by token.

Catalogue models first say that their answer is emulated, then generate meaningless text of finite length. Small models
with random weights generate endless noise and need one token per prompt byte, like the real tiny models of the tests.
The same prompt and seed give the same text. Pure, except for the random source that is passed in.
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

from router.engines.ollama.gguf_facts import is_embedding
from router.lab.emulator.store import Header

_SYLLABLES = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
_SENTENCE = " This answer is emulated: no model has read the question. What follows has no meaning."
_WORDS = re.findall(
    r"[a-z]+",
    """
    a able about above across after again air all along always and answer any area ask at back be before begin
    below best between both build but by call carry case change city clear close come common cool count
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
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or a whole tool call."""

    kind: Literal["content", "thinking", "call"]
    text: str


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Input of one generation."""

    prompt: str
    seed: int | None = None
    thinks: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    format: Any = None
    """`json`, a JSON schema, or None."""


def prompt_tokens(header: Header, text: str) -> int:
    """Number of prompt tokens."""
    size = len(text.encode(errors="replace"))
    if is_embedding(header) and header.is_noise:
        return 2 + sum(not character.isspace() for character in text)
    if header.is_noise:
        return 1 + (3 + size if size else 0)
    return 1 + -(-size // _CHARACTERS_PER_TOKEN)


def generate_pieces(header: Header, generation: GenerationRequest, rng: random.Random) -> Iterator[Piece]:
    """Yields the tokens of an answer; endless for a noise model."""
    rng = random.Random(f"{generation.seed}|{generation.prompt}") if generation.seed is not None else rng
    if generation.format is not None:
        return _formatted(header, generation)
    call = _tool_call(generation)
    if call is not None:
        return _structured(header, json.dumps(call), is_call=True)
    thoughts = _thoughts(header, rng) if generation.thinks else iter(())
    content = _noise(rng) if header.is_noise else _catalogue_text(rng)
    return chain(thoughts, (Piece("content", text) for text in content))


def _thoughts(header: Header, rng: random.Random) -> Iterator[Piece]:
    """Thinking tokens; the first without its leading space, as a real server trims it."""
    words = _noise(rng) if header.is_noise else _random_sentences(rng, rng.randrange(20, 160))
    yield Piece("thinking", next(words).lstrip())
    for word in words:
        yield Piece("thinking", word)


def _noise(rng: random.Random) -> Iterator[str]:
    while True:
        yield " " + rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES)


def _catalogue_text(rng: random.Random) -> Iterator[str]:
    yield from (" " + word for word in _SENTENCE.split())
    yield from _random_sentences(rng, rng.randrange(20, 400))


def _random_sentences(rng: random.Random, count: int) -> Iterator[str]:
    starts_sentence = True
    for remaining in range(count, 0, -1):
        word = rng.choice(_WORDS)
        ends_sentence = remaining == 1 or (not starts_sentence and rng.random() < 0.1)
        yield " " + (word.capitalize() if starts_sentence else word) + ("." if ends_sentence else "")
        starts_sentence = ends_sentence


def _tool_call(generation: GenerationRequest) -> dict[str, Any] | None:
    """A call of the first tool that the last user message names, or None."""
    for tool in generation.tools:
        function = cast("dict[str, Any]", tool.get("function") or {})
        name = str(function.get("name") or "")
        if name and name in generation.prompt.rpartition("user: ")[2]:
            return {"name": name, "parameters": example_of(function.get("parameters") or {})}
    return None


def _formatted(header: Header, generation: GenerationRequest) -> Iterator[Piece]:
    value: Any = {} if generation.format == "json" else example_of(generation.format)
    is_call = bool(generation.tools) and isinstance(value, dict) and {"name", "parameters"} <= set(cast("Any", value))
    return _structured(header, json.dumps(value), is_call)


def _structured(header: Header, text: str, is_call: bool) -> Iterator[Piece]:
    """Splits text into tokens; a tool call yields empty tokens and then the whole call."""
    step = 1 if header.is_noise else _CHARACTERS_PER_TOKEN
    parts = [text[start : start + step] for start in range(0, len(text), step)]
    if not is_call:
        yield from (Piece("content", part) for part in parts)
        return
    yield from (Piece("content", "") for _ in parts[:-1])
    yield Piece("call", text)


def example_of(schema: Any) -> Any:
    """An example value for a JSON schema (partial support): the first allowed alternative."""
    if not isinstance(schema, dict):
        return {}
    fields = cast("dict[str, Any]", schema)
    if "const" in fields:
        return fields["const"]
    if fields.get("enum"):
        return fields["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if fields.get(key):
            return example_of(fields[key][0])
    types: Any = fields.get("type", "object" if "properties" in fields else "string")
    kind = str(cast("list[Any]", types)[0] if isinstance(types, list) and types else cast("Any", types))
    if kind == "object":
        properties = cast("dict[str, Any]", fields.get("properties") or {})
        return {name: example_of(inner) for name, inner in properties.items()}
    if kind == "array":
        return [example_of(fields["items"])] if fields.get("minItems") and "items" in fields else []
    return _EXAMPLES.get(kind, "emulated")


def vector(text: str, length: int) -> list[float]:
    """A deterministic unit-length embedding of the text, in single precision."""
    rng = random.Random(hashlib.sha256(text.encode(errors="replace")).digest())
    raw = [rng.gauss(0.0, 1.0) for _ in range(length)]
    norm = sum(value * value for value in raw) ** 0.5 or 1.0
    return [struct.unpack("f", struct.pack("f", value / norm))[0] for value in raw]


def token_ids(text: str) -> list[int]:
    """Token ids of a text for `context`: its bytes, shifted as in the tests' vocabulary."""
    return [byte + 3 for byte in text.replace(" ", "▁").encode(errors="replace")]


def logprobs_of(text: str, top: int, rng: random.Random) -> dict[str, Any]:
    """A made-up `logprobs` entry for one token."""
    entry: dict[str, Any] = {
        "token": text,
        "logprob": -5.0 * rng.random(),
        "bytes": list(text.encode(errors="replace")),
    }
    if top > 0:
        alternatives: Sequence[str] = [text, *(" " + rng.choice(_WORDS) for _ in range(top - 1))]
        entry["top_logprobs"] = [
            {"token": token, "logprob": -0.5 - index, "bytes": list(token.encode(errors="replace"))}
            for index, token in enumerate(alternatives)
        ]
    return entry
