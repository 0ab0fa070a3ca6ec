"""Reads from a request's body the few members that routing needs, exactly as the server will read them.

Ollama reads a body with Go's encoding/json: keys match case-insensitively and may be escaped, the last of several wins,
null leaves a field unchanged, bytes after the first value are ignored, and invalid UTF-8 is replaced. A router that
reads the model differently can be made to check one model and run another. Hence the rule of this module: whatever Go
accepts is read as Go reads it, and only what Go rejects is called unreadable. Nothing else is validated: the server may
still reject a readable body, in its own words.

Sources: encoding/json (decode.go, scanner.go, stream.go); api/types.go, server/routes.go, openai/openai.go (v0.11.4);
anthropic/anthropic.go, middleware/openai.go (v0.24).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import msgspec

from router.engines.ollama.runner_options import RUNNER_OPTION_NAMES
from router.errors import UNREADABLE_JSON, BadRequest
from router.llm_api.body_schema import SCHEMAS, BodySchema, Emptiness, Streaming
from router.llm_api.json_members import Malformed, Member, TooComplex, fold, scan, text_of
from router.llm_api.prompt_size import prompt_size

_STRINGS = msgspec.json.Decoder(list[str])
_NULL = b"null"
_NULL_BODY = re.compile(rb"[ \t\n\r]*+null")
_MODEL_ONLY = BodySchema()
"""Of paths without a schema."""
_INTEGER = re.compile(rb"-?[0-9]+")


class ParsedBody(msgspec.Struct, frozen=True):
    """What a body says. Absent and null are None; a member that the route ignores counts as absent."""

    model: str | None = None
    """As written, including spaces; the older `name` where the route accepts it, `source` for a copy."""
    stream: bool | None = None
    keep_alive: object = None
    """As given: int, float, str, bool; a list or object as its JSON bytes. The server accepts numbers and strings."""
    options: Mapping[str, object] = msgspec.field(default_factory=dict[str, object])
    """Those of `RUNNER_OPTION_NAMES` that are present and not null; values as for `keep_alive`."""
    output_tokens_max: int | None = None
    """`num_predict`, `max_tokens` or the like, if a number; negative values mean what they mean to the server."""
    is_load_only: bool = False
    """Whether the server only loads the model (or, with `keep_alive` 0, unloads it) and generates nothing."""
    prompt_bytes: int = 0
    """Size of the prompt's JSON without images: a hint, never a limit."""
    ambiguous: tuple[str, ...] = ()
    """Members written more than once or in another case: parsers other than Go's may read another value."""
    conflict: str = ""
    """The field that names the model, if it is written with different values. Go takes the last; such a request must be
    refused, because a reader in front of the router may have taken another."""
    unreadable: bool = False
    """Go rejects the body: only a server can say why in its own words. All other fields are then empty."""


def parse_body(body: bytes, path: str) -> ParsedBody:
    """Parses `body` as the server's handler of `path` (decoded, without query) does.

    Raises:
        BadRequest: the server might read it, but it has too many parts to be parsed within bounds.
    """
    schema = SCHEMAS.get(path, _MODEL_ONLY)
    try:
        return _BodyParser(body, schema, _members(body)).parse()
    except Malformed:
        return ParsedBody(unreadable=True)
    except TooComplex as error:
        raise BadRequest(f"the body cannot be read: {error}") from error


def last_value(body: bytes, name: str) -> bytes:
    """The JSON of a member that is in no `BodySchema`, as Go reads it: the last that is not null; b"" if there is none.

    Raises:
        Malformed: Go rejects the body.
        TooComplex: it has too many parts to be parsed within bounds.
    """
    found = b""
    for one in _members(body):
        if fold(one.key) == name and not body.startswith(_NULL, one.value_start):
            found = body[one.value_start : one.value_end]
    return found


def longest_text(body: bytes, name: str) -> int:
    """Bytes of the longest string of a member, which is a string or a list of them; of all of it otherwise."""
    try:
        value = last_value(body, name)
    except (Malformed, TooComplex):
        return len(body)
    try:
        return max((len(text.encode(errors="replace")) for text in _STRINGS.decode(value)), default=0)
    except UNREADABLE_JSON:
        return len(value)


def _members(body: bytes) -> tuple[Member, ...]:
    """The body's members; none for null, which Go reads as an empty object."""
    return () if _NULL_BODY.match(body) else scan(body).members


class _BodyParser:
    """One body's members, by the names of the Go fields that receive them."""

    __slots__ = ("_ambiguous", "_body", "_schema", "_spans")

    def __init__(self, body: bytes, schema: BodySchema, members: Iterable[Member]) -> None:
        self._body = body
        self._schema = schema
        self._spans: dict[str, list[tuple[int, int]]] = {}
        ambiguous: dict[str, None] = {}
        for member in members:
            name = fold(member.key)
            if name not in schema.names:
                continue
            if name in self._spans or name != member.key:
                ambiguous[name] = None
            self._spans.setdefault(name, []).append((member.value_start, member.value_end))
        self._ambiguous = tuple(ambiguous)

    def parse(self) -> ParsedBody:
        schema = self._schema
        options = self._options() if schema.is_ollama else {}
        limit = options.get("num_predict") if schema.is_ollama else self._limit()
        return ParsedBody(
            model=self._model(),
            stream=self._stream(),
            keep_alive=self._any("keep_alive") if schema.is_ollama else None,
            options={name: value for name, value in options.items() if name in RUNNER_OPTION_NAMES},
            output_tokens_max=int(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) else None,
            is_load_only=self._is_load_only(),
            prompt_bytes=sum(prompt_size(self._body, *self._spans[n][-1]) for n in schema.texts if n in self._spans),
            ambiguous=self._ambiguous,
            conflict=self._conflict() if self._ambiguous else "",
        )

    def _values(self, name: str) -> list[bytes]:
        return [self._body[start:end] for start, end in self._spans.get(name, ())]

    def _model(self) -> str | None:
        """The first name that is not empty: Go's `cmp.Or(req.Model, req.Name)`."""
        names = [self._string(name) for name in self._schema.models]
        return next((text for text in names if text), None)

    def _conflict(self) -> str:
        """Called after `_model`, so every value is a string or null."""
        for name in self._schema.models:
            texts = {text_of(value) for value in self._values(name) if value != _NULL}
            if len(texts) > 1:
                return name
        return ""

    def _string(self, name: str) -> str:
        """A string field: null leaves it unchanged."""
        text = ""
        for value in self._values(name):
            if value == _NULL:
                continue
            if not value.startswith(b'"'):
                raise Malformed(f"{name} is not a string")
            text = text_of(value)
        return text

    def _stream(self) -> bool | None:
        """A pointer to bool, which null resets, or a bool, which null leaves unchanged."""
        stream: bool | None = None
        for value in self._values("stream"):
            if value == _NULL:
                stream = None if self._schema.stream is Streaming.POINTER else stream
            elif value in (b"true", b"false"):
                stream = value == b"true"
            else:
                raise Malformed("stream is not a boolean")
        return stream

    def _any(self, name: str) -> object:
        """A field of any type, or a pointer: the last value counts, including null."""
        values = self._values(name)
        return _decoded(values[-1]) if values else None

    def _limit(self) -> object:
        given = (self._number(name) for name in self._schema.limits)
        return next((value for value in given if value is not None), None)

    def _number(self, name: str) -> object:
        """A number that Go parses only where its struct has the field, and rejects there if it is out of range."""
        try:
            return self._any(name)
        except Malformed:
            return None

    def _options(self) -> dict[str, object]:
        """A map: repeated maps are merged, null empties it, and null values count as absent."""
        merged: dict[str, object] = {}
        for value in self._values("options"):
            if value == _NULL:
                merged = {}
                continue
            for member in scan(value).members:
                if member.key in RUNNER_OPTION_NAMES or member.key == "num_predict":
                    merged[member.key] = _decoded(value[member.value_start : member.value_end])
        return {name: value for name, value in merged.items() if value is not None}

    def _is_load_only(self) -> bool:
        schema = self._schema
        spans = self._spans.get(schema.prompt, [])
        if schema.empty is Emptiness.NEVER:
            return False
        if schema.empty is Emptiness.STRING:
            # Null leaves a string field unchanged.
            spans = [(start, end) for start, end in spans if not self._is_null(start, end)]
        if not spans:
            return schema.absent_is_empty
        return self._is_empty(*spans[-1])

    def _is_null(self, start: int, end: int) -> bool:
        return end - start == 4 and self._body.startswith(_NULL, start)

    def _is_empty(self, start: int, end: int) -> bool:
        """`""`, `[]` or null, if the field accepts it; a wrong type is for the server to reject."""
        if self._is_null(start, end):
            return self._schema.absent_is_empty
        empty = self._schema.empty_prompt
        return empty is not None and empty.fullmatch(self._body, start, end) is not None


def _decoded(value: bytes) -> object:
    """A scalar as a Python value; a list or object as its bytes.

    Raises:
        Malformed: a number outside float64, which Go rejects wherever it parses one.
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
