"""A reply in OpenAI's API as one in Ollama's: streams event by event, and whole replies.

A stream ends with `done: true` only after the server's `[DONE]`. An error in it becomes an error line, and a stream
that just stops stays without an end, which the relay reports. A tool call is held back until its arguments are whole.
The durations are the server's where it tells them (llama-server's `timings`), else those measured here; a model is
always loaded, so that `load_duration` is 0. Pure: clocks are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from router.errors import UNREADABLE_JSON
from router.llm_api.translation.events import EventReader
from router.llm_api.translation.request import ReplyShape

Object = dict[str, Any]
Clock = Callable[[], float]
"""Monotonic seconds."""

_DONE = b"[DONE]"
_REASONS: Mapping[str, str] = {"tool_calls": "stop", "function_call": "stop"}
_NO_MESSAGE = "the model's server reported an error without a message"


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | Object | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None

    @property
    def thinking(self) -> str:
        return self.reasoning_content or self.reasoning or ""


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Timings(msgspec.Struct):
    """As llama-server reports them, in milliseconds."""

    prompt_ms: float | None = None
    predicted_ms: float | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: msgspec.Raw = msgspec.Raw(b"")
    object: str = ""

    @property
    def has_error(self) -> bool:
        return bytes(self.error) not in (b"", b"null") or self.object == "error"


class _Embedding(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Completion).decode
_encode = msgspec.json.Encoder().encode


class BadReply(ValueError):
    """The server's reply is not what OpenAI's API says; the text says how."""


def error_text(body: bytes) -> str:
    """The message of an error reply: `{"error": {"message": …}}`, `{"error": …}`, `{"message": …}`, `{"detail": …}`."""
    try:
        decoded: object = msgspec.json.decode(body)
    except UNREADABLE_JSON:
        return body.decode(errors="replace").strip() or _NO_MESSAGE
    return _message_of(decoded) or _NO_MESSAGE


def _message_of(found: object) -> str:
    if isinstance(found, str):
        return found
    if isinstance(found, dict):
        members = cast("Object", found)
        for name in ("error", "message", "detail"):
            if members.get(name):
                return _message_of(members[name])
    return _encode(found).decode() if found else ""


class ReplyTranslator:
    """One reply. `model` is the name that the client used; `created_at` returns the time as Ollama writes it."""

    def __init__(self, shape: ReplyShape, model: str, created_at: Callable[[], str], clock: Clock) -> None:
        self._shape = shape
        self._is_chat = shape is ReplyShape.CHAT
        self._created_at = created_at
        self._clock = clock
        self._began_at = clock()
        self._first_at: float | None = None
        self._head = b'{"model":' + _encode(model) + b',"created_at":"'
        self._before = b'","message":{"role":"assistant","content":' if self._is_chat else b'","response":'
        self._after = b'},"done":false}\n' if self._is_chat else b',"done":false}\n'
        self._model = model
        self._events = EventReader()
        self._calls: dict[int, tuple[str, str, list[str]]] = {}
        """By index: id, function, pieces of the arguments."""
        self._reason = ""
        self._usage = _Usage()
        self._timings = _Timings()
        self.is_over = False
        """Whether the last line is out."""

    # --- a stream --------------------------------------------------------------------------------------------

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines of NDJSON for a piece of the stream, each with its end.

        Raises:
            BadReply: an event is not what the API says.
        """
        return self._lines(self._events.feed(piece))

    def end(self) -> list[bytes]:
        """The lines for the end of the stream; none, and then it is not over, where it just stops."""
        return self._lines(self._events.rest())

    def _lines(self, events: list[bytes]) -> list[bytes]:
        lines: list[bytes] = []
        for data in events:
            if self.is_over:
                break
            if data.strip() == _DONE:
                lines += self._last_lines()
            else:
                self._event(data, lines)
        return lines

    def _event(self, data: bytes, lines: list[bytes]) -> None:
        try:
            event = _decode(data)
        except UNREADABLE_JSON as error:
            raise BadReply(f"an event of the stream is not as in OpenAI's API: {error}") from error
        if event.usage is not None:
            self._usage = event.usage
        if event.timings is not None:
            self._timings = event.timings
        if event.choices:
            choice = event.choices[0]
            line = self._piece(choice)
            if line is not None:
                lines.append(line)
            if choice.finish_reason:
                self._reason = choice.finish_reason
        elif event.has_error:
            lines.append(self.error_line(error_text(data)))

    def _piece(self, choice: _Choice) -> bytes | None:
        """The line of one event; None where it says nothing that a client would see."""
        delta = choice.delta
        if delta is None:
            text, thinking = choice.text or "", ""
        else:
            text, thinking = delta.content or "", delta.thinking
            if delta.tool_calls:
                self._collect(delta.tool_calls)
        if not text and not thinking:
            return None
        if self._first_at is None:
            self._first_at = self._clock()
        head = self._head + self._created_at().encode() + self._before + _encode(text)
        return head + (b',"thinking":' + _encode(thinking) if thinking else b"") + self._after

    def _collect(self, calls: list[_Call]) -> None:
        for call in calls:
            identity, name, pieces = self._calls.get(call.index, ("", "", []))
            called, text = _function(call)
            if text:
                pieces.append(text)
            self._calls[call.index] = (call.id or identity, called or name, pieces)

    def _last_lines(self) -> list[bytes]:
        self.is_over = True
        lines: list[bytes] = []
        if self._calls:
            try:
                calls = _ollama_calls((i, n, "".join(p)) for _, (i, n, p) in sorted(self._calls.items()))
            except BadReply as error:
                return [self.error_line(str(error))]
            message = {"role": "assistant", "content": "", "tool_calls": calls}
            content = {"message": message} if self._is_chat else {"response": "", "tool_calls": calls}
            lines.append(_encode({**self._start(), **content, "done": False}) + b"\n")
        content = {"message": {"role": "assistant", "content": ""}} if self._is_chat else {"response": ""}
        lines.append(_encode({**self._start(), **content, **self._end()}) + b"\n")
        return lines

    def error_line(self, message: str) -> bytes:
        """The line that ends the stream with an error."""
        self.is_over = True
        return _encode({"error": message}) + b"\n"

    # --- a whole reply ---------------------------------------------------------------------------------------

    def whole(self, body: bytes) -> bytes:
        """The JSON for a whole reply with status 200.

        Raises:
            BadReply: it is not what the API says.
        """
        try:
            if self._shape in (ReplyShape.EMBED, ReplyShape.EMBEDDINGS):
                return self._embedded(msgspec.json.decode(body, type=_Embeddings))
            completion = _decode(body)
        except UNREADABLE_JSON as error:
            raise BadReply(f"the reply is not as in OpenAI's API: {error}") from error
        if not completion.choices:
            raise BadReply(error_text(body) if completion.has_error else "the reply has no choices")
        choice = completion.choices[0]
        self._usage, self._timings = completion.usage or _Usage(), completion.timings or _Timings()
        self._reason = choice.finish_reason or ""
        message = choice.message or _Message(content=choice.text)
        calls = [(call.id or "", *_function(call)) for call in message.tool_calls or ()]
        found: Object = {"role": "assistant"} if self._is_chat else {}
        found["content" if self._is_chat else "response"] = message.content or ""
        if message.thinking:
            found["thinking"] = message.thinking
        if calls:
            found["tool_calls"] = _ollama_calls(calls)
        content = {"message": found} if self._is_chat else found
        return _encode({**self._start(), **content, **self._end()})

    def _embedded(self, reply: _Embeddings) -> bytes:
        vectors = [each.embedding for each in sorted(reply.data, key=lambda each: each.index)]
        if self._shape is ReplyShape.EMBEDDINGS:
            return _encode({"embedding": vectors[0] if vectors else []})
        found: Object = {"model": self._model, "embeddings": vectors}
        found |= {"total_duration": _nanoseconds(self._clock() - self._began_at), "load_duration": 0}
        if reply.usage is not None and reply.usage.prompt_tokens is not None:
            found["prompt_eval_count"] = reply.usage.prompt_tokens
        return _encode(found)

    # --- both ------------------------------------------------------------------------------------------------

    def _start(self) -> Object:
        return {"model": self._model, "created_at": self._created_at()}

    def _end(self) -> Object:
        """What the last line says of how it ended. Counts that the server does not tell are left out."""
        now, usage, timings = self._clock(), self._usage, self._timings
        first_at = now if self._first_at is None else self._first_at
        found: Object = {"done": True, "done_reason": _REASONS.get(self._reason, self._reason or "stop")}
        found |= {"total_duration": _nanoseconds(now - self._began_at), "load_duration": 0}
        prompt_seconds = first_at - self._began_at if timings.prompt_ms is None else timings.prompt_ms / 1000
        output_seconds = now - first_at if timings.predicted_ms is None else timings.predicted_ms / 1000
        if usage.prompt_tokens is not None:
            found["prompt_eval_count"] = usage.prompt_tokens
        found["prompt_eval_duration"] = _nanoseconds(prompt_seconds)
        if usage.completion_tokens is not None:
            found["eval_count"] = usage.completion_tokens
        found["eval_duration"] = _nanoseconds(output_seconds)
        return found


def _function(call: _Call) -> tuple[str, str]:
    function = call.function or _Function()
    arguments = function.arguments
    return function.name or "", _encode(arguments).decode() if isinstance(arguments, dict) else arguments or ""


def _ollama_calls(calls: Any) -> list[Object]:
    found: list[Object] = []
    for index, (identity, name, text) in enumerate(calls):
        try:
            arguments = msgspec.json.decode(text or "{}", type=Object)
        except UNREADABLE_JSON as error:
            raise BadReply(f"the model called {name!r} with arguments that are no JSON object: {text[:200]}") from error
        call: Object = {"function": {"index": index, "name": name, "arguments": arguments}}
        found.append({"id": identity, **call} if identity else call)
    return found


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
