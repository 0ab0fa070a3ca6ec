"""Reads from a request's body the few members that routing needs, exactly as the server behind will read them.

Ollama reads a body with Go's encoding/json: keys match without regard to case and may be escaped, the last of several
wins, null leaves a field as it was, bytes after the first value are ignored, and what is not UTF-8 is replaced. A
router that reads the model otherwise can be made to check one model and run another. Hence the rule that everything
here keeps: whatever Go accepts is seen as Go sees it, and only what Go refuses is called unreadable. It judges nothing
else: a body that is readable may still be refused by the server, in the server's words.

Sources: encoding/json (decode.go, scanner.go, stream.go); api/types.go, server/routes.go, openai/openai.go (v0.11.4);
anthropic/anthropic.go, middleware/openai.go (v0.24).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import msgspec

from router.errors import BadRequest, UnsupportedEncoding
from router.llm_api.body_schema import READINGS, Emptiness, Reading, Streaming
from router.llm_api.json_members import Malformed, Member, TooComplex, scan, text_of
from router.llm_api.key_folding import fold
from router.llm_api.prompt_size import prompt_size

RUNNER_OPTION_NAMES = frozenset(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap"))
"""Options of which another value makes a server reload the model, matched exactly: `options` is a map in Go."""

_NULL = b"null"
_NULL_BODY = re.compile(rb"[ \t\n\r]*+null")
_EMPTY_LIST = re.compile(rb"\[[ \t\n\r]*+\]")
_INTEGER = re.compile(rb"-?[0-9]+")


class ParsedBody(msgspec.Struct, frozen=True):
    """What a body says. Absent and null are None; a member that the route does not read is absent."""

    model: str | None = None
    """As written, blanks included; the older `name` where the route takes it, `source` for a copy."""
    stream: bool | None = None
    keep_alive: object = None
    """As given: int, float, str, bool; a list or object as its JSON bytes. The server takes numbers and strings."""
    options: Mapping[str, object] = msgspec.field(default_factory=dict[str, object])
    """Those of `RUNNER_OPTION_NAMES` that are given, not null; values as for `keep_alive`."""
    output_tokens_max: int | None = None
    """`num_predict`, `max_tokens` and the like, where it is a number; negative has the server's meanings."""
    is_load_only: bool = False
    """True where the server loads (or, with `keep_alive` 0, unloads) the model and generates nothing."""
    prompt_bytes: int = 0
    """Size of what the model shall read as it stands in the body, images left out: a hint, never a limit."""
    ambiguous: tuple[str, ...] = ()
    """Members that are written more than once or in other case: readers other than Go may see another value."""
    unreadable: bool = False
    """Go refuses the body: only a server can say why in its own words. All other fields are then empty."""


def parse_body(body: bytes, path: str) -> ParsedBody:
    """What `body` says to the server's handler of `path` (decoded, without query).

    Raises:
        BadRequest: the server might read it, but it has too many parts to be looked at within bounds.
    """
    reading = READINGS.get(path, Reading())
    try:
        return _Peeker(body, reading, _members(body)).parse_body()
    except Malformed:
        return ParsedBody(unreadable=True)
    except TooComplex as error:
        raise BadRequest(f"the body cannot be read: {error}") from error


def last_value(body: bytes, name: str) -> bytes:
    """The JSON of a member that no `Reading` has, as Go reads it: the last that is not null; b"" where there is none.

    Raises:
        Malformed: Go refuses the body.
        TooComplex: it has too many parts to be looked at within bounds.
    """
    found = b""
    for one in _members(body):
        if fold(one.key) == name and not body.startswith(_NULL, one.value_start):
            found = body[one.value_start : one.value_end]
    return found


def refuse_encoded(path: str, content_encoding: str | None) -> None:
    """Refuses a body that the server would unpack after the router has looked at it packed.

    Ollama unpacks zstd on `/v1/*` from v0.17 on, and no other encoding anywhere.

    Raises:
        UnsupportedEncoding: such a body.
    """
    if content_encoding and path.startswith("/v1/") and "zstd" in content_encoding.lower():
        raise UnsupportedEncoding("zstd request bodies are not taken here: send the body without Content-Encoding")


def _members(body: bytes) -> tuple[Member, ...]:
    """The body's members; none for null, which Go takes for an object without any."""
    return () if _NULL_BODY.match(body) else scan(body).members


class _Peeker:
    """One body's members, by the names of the fields that Go puts them in."""

    __slots__ = ("_ambiguous", "_body", "_reading", "_spans")

    def __init__(self, body: bytes, reading: Reading, members: Iterable[Member]) -> None:
        self._body = body
        self._reading = reading
        self._spans: dict[str, list[tuple[int, int]]] = {}
        ambiguous: dict[str, None] = {}
        for member in members:
            name = fold(member.key)
            if name not in reading.names:
                continue
            if name in self._spans or name != member.key:
                ambiguous[name] = None
            self._spans.setdefault(name, []).append((member.value_start, member.value_end))
        self._ambiguous = tuple(ambiguous)

    def parse_body(self) -> ParsedBody:
        reading = self._reading
        options = self._options() if reading.is_ollama else {}
        limit = options.get("num_predict") if reading.is_ollama else self._limit()
        return ParsedBody(
            model=self._model(),
            stream=self._stream(),
            keep_alive=self._any("keep_alive") if reading.is_ollama else None,
            options={name: value for name, value in options.items() if name in RUNNER_OPTION_NAMES},
            output_tokens_max=int(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) else None,
            is_load_only=self._is_load_only(),
            prompt_bytes=sum(prompt_size(self._body, *self._spans[n][-1]) for n in reading.texts if n in self._spans),
            ambiguous=self._ambiguous,
        )

    def _values(self, name: str) -> list[bytes]:
        return [self._body[start:end] for start, end in self._spans.get(name, ())]

    def _model(self) -> str | None:
        """The first name that is not empty: Go's `cmp.Or(req.Model, req.Name)`."""
        given = [self._string(name) for name in self._reading.models]
        return next((text for text in given if text), None)

    def _string(self, name: str) -> str:
        """A field of type string: null leaves what was read before."""
        text = ""
        for value in self._values(name):
            if value == _NULL:
                continue
            if not value.startswith(b'"'):
                raise Malformed(f"{name} is not a string")
            text = text_of(value)
        return text

    def _stream(self) -> bool | None:
        """A pointer to bool, which null empties, or a bool, which null leaves."""
        stream: bool | None = None
        for value in self._values("stream"):
            if value == _NULL:
                stream = None if self._reading.stream is Streaming.POINTER else stream
            elif value in (b"true", b"false"):
                stream = value == b"true"
            else:
                raise Malformed("stream is not a boolean")
        return stream

    def _any(self, name: str) -> object:
        """A field that takes any type, or a pointer: the last counts, null too."""
        values = self._values(name)
        return _decoded(values[-1]) if values else None

    def _limit(self) -> object:
        given = (self._any(name) for name in self._reading.limits)
        return next((value for value in given if value is not None), None)

    def _options(self) -> dict[str, object]:
        """A map: maps given one after the other are merged, null empties, and null values count as absent."""
        merged: dict[str, object] = {}
        for value in self._values("options"):
            if value == _NULL:
                merged = {}
                continue
            for member in scan(value).members:
                wanted = member.key in RUNNER_OPTION_NAMES or member.key == "num_predict"
                if wanted:
                    merged[member.key] = _decoded(value[member.value_start : member.value_end])
        return {name: value for name, value in merged.items() if value is not None}

    def _is_load_only(self) -> bool:
        reading = self._reading
        spans = self._spans.get(reading.prompt, [])
        if reading.empty is Emptiness.NEVER:
            return False
        if reading.empty is Emptiness.STRING:
            # Null leaves a string field as it was.
            spans = [(start, end) for start, end in spans if not self._is_null(start, end)]
        if not spans:
            return reading.absent_is_empty
        return self._is_empty(*spans[-1])

    def _is_null(self, start: int, end: int) -> bool:
        return end - start == 4 and self._body.startswith(_NULL, start)

    def _is_empty(self, start: int, end: int) -> bool:
        """`""`, `[]` or null, as far as the field takes it; a wrong type is the server's to refuse."""
        if self._is_null(start, end):
            return self._reading.absent_is_empty
        if self._body.startswith(b'"', start):
            return end - start == 2 and self._reading.empty is not Emptiness.LIST
        return self._reading.empty is not Emptiness.STRING and bool(_EMPTY_LIST.match(self._body, start))


def _decoded(value: bytes) -> object:
    """A scalar as Python has it; a list or object as it is written.

    Raises:
        Malformed: a number that is no float64, which Go refuses wherever it has to make one.
    """
    if value == _NULL:
        return None
    if value in (b"true", b"false"):
        return value == b"true"
    if value.startswith(b'"'):
        return text_of(value)
    if value.startswith((b"{", b"[")):
        return value
    number = float(value)
    if math.isinf(number):
        raise Malformed("a number is out of range")
    return int(value) if _INTEGER.fullmatch(value) else number
