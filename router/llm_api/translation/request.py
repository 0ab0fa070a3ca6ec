"""A request in Ollama's API as one in OpenAI's, for servers that have only that.

`/api/chat` and `/api/generate` become `/v1/chat/completions`, a raw prompt `/v1/completions`, `/api/embed` and
`/api/embeddings` `/v1/embeddings`. Where a server's default differs from Ollama's, Ollama's is sent. Options without an
equal are left out and named; what would change the answer unnoticed is refused. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import msgspec

from router.engines.base import EngineTarget, RepeatPenalty
from router.errors import UNREADABLE_JSON, BadRequest
from router.llm_api.json_members import fold
from router.llm_api.translation.images import data_url

Object = dict[str, Any]


class ReplyShape(Enum):
    """What the reply has to look like."""

    CHAT = "chat"
    GENERATE = "generate"
    RAW = "raw"
    """Of a raw prompt: as GENERATE, but from `/v1/completions`."""
    EMBED = "embed"
    EMBEDDINGS = "embeddings"


@dataclass(frozen=True, slots=True)
class TranslatedRequest:
    """For any server; `body` makes it one server's."""

    path: str
    shape: ReplyShape
    streams: bool
    members: Mapping[str, Any]
    """All of the body but the model."""
    extensions: Mapping[str, Any]
    """Options that only some servers have, by Ollama's names."""
    dropped: tuple[str, ...] = ()
    """Names of options without an equal anywhere."""

    def body(self, target: EngineTarget) -> bytes:
        return msgspec.json.encode({"model": target.name, **self.members, **_named(self.extensions, target)})

    def dropped_for(self, target: EngineTarget) -> tuple[str, ...]:
        """Names of the options that this server does not get."""
        lost = () if target.repeat_penalty is not None else tuple(self.extensions)
        return tuple(sorted({*self.dropped, *lost}))


def translated(path: str, body: bytes) -> TranslatedRequest:
    """The request with this body for a path under `/api/`.

    Raises:
        BadRequest: it cannot be read, or has a part without an equal that would change the answer.
    """
    request = _object(body)
    return _TRANSLATIONS[path](request)


def is_translated(path: str) -> bool:
    """Whether the path is one of Ollama's own that takes a slot."""
    return path in _TRANSLATIONS


# --- whole requests -------------------------------------------------------------------------------------------


def _chat(request: Object) -> TranslatedRequest:
    messages = _list(request, "messages")
    members: Object = {"messages": _Messages().translated(messages)}
    tools = _list(request, "tools")
    if tools:
        members["tools"] = tools
    return _generating("/v1/chat/completions", ReplyShape.CHAT, request, members)


def _generate(request: Object) -> TranslatedRequest:
    for name in ("suffix", "template", "context"):
        if request.get(name):
            raise BadRequest(f"{name}: the model's server has OpenAI's API, which has no equal for it: leave it out")
    prompt, images = _text(request, "prompt"), _list(request, "images")
    if request.get("raw"):
        if images:
            raise BadRequest("images: a raw prompt cannot have images on a server with OpenAI's API")
        return _generating("/v1/completions", ReplyShape.RAW, request, {"prompt": prompt})
    system = _text(request, "system")
    messages = [{"role": "system", "content": system}] if system else []
    members = {"messages": [*messages, {"role": "user", "content": _content(prompt, images, "images")}]}
    return _generating("/v1/chat/completions", ReplyShape.GENERATE, request, members)


def _generating(path: str, shape: ReplyShape, request: Object, members: Object) -> TranslatedRequest:
    streams = request.get("stream") is not False
    options = _options(request.get("options"))
    members |= {"stream": streams, **options.members}
    if streams:
        members["stream_options"] = {"include_usage": True}
    members |= _format(request.get("format"))
    if shape is not ReplyShape.RAW:
        members |= _think(request.get("think"))
    others = tuple(name for name in ("logprobs", "top_logprobs", "truncate", "shift") if request.get(name))
    return TranslatedRequest(path, shape, streams, members, options.extensions, (*options.dropped, *others))


def _embed(request: Object) -> TranslatedRequest:
    given = request.get("input")
    if not isinstance(given, str | list):
        raise BadRequest("input: must be a text or a list of texts")
    members: Object = {"input": given, "encoding_format": "float"}
    if request.get("dimensions"):
        members["dimensions"] = request["dimensions"]
    dropped = (*_options(request.get("options")).asked, *(("truncate",) if request.get("truncate") else ()))
    return TranslatedRequest("/v1/embeddings", ReplyShape.EMBED, False, members, {}, dropped)


def _embeddings(request: Object) -> TranslatedRequest:
    members: Object = {"input": _text(request, "prompt"), "encoding_format": "float"}
    dropped = _options(request.get("options")).asked
    return TranslatedRequest("/v1/embeddings", ReplyShape.EMBEDDINGS, False, members, {}, dropped)


_TRANSLATIONS: Mapping[str, Callable[[Object], TranslatedRequest]] = {
    "/api/chat": _chat,
    "/api/generate": _generate,
    "/api/embed": _embed,
    "/api/embeddings": _embeddings,
}


# --- messages -------------------------------------------------------------------------------------------------


class _Messages:
    """Translates the messages of one chat. Calls get ids, and results are paired with calls by id, name or order."""

    def __init__(self) -> None:
        self._count = 0
        self._open: deque[tuple[str, str]] = deque()
        """Id and function of each call without a result so far."""

    def translated(self, messages: list[Any]) -> list[Object]:
        return [self._message(each, f"messages[{index}]") for index, each in enumerate(messages)]

    def _message(self, given: object, where: str) -> Object:
        message = _mapping(given, where)
        role = message.get("role")
        if not isinstance(role, str):
            raise BadRequest(f"{where}.role: must be a text")
        content = _content(_text(message, "content", where), _list(message, "images", where), f"{where}.images")
        found: Object = {"role": role, "content": content}
        calls = _list(message, "tool_calls", where)
        if calls:
            found["tool_calls"] = [self._call(each, f"{where}.tool_calls[{n}]") for n, each in enumerate(calls)]
        if role == "tool":
            name = message.get("tool_name") or message.get("name")
            found["tool_call_id"] = self._result_id(message.get("tool_call_id"), name)
        return found

    def _call(self, given: object, where: str) -> Object:
        call = _mapping(given, where)
        function = _mapping(call.get("function"), f"{where}.function")
        name, arguments = _text(function, "name", where), function.get("arguments")
        identity = call.get("id") or self._new_id()
        self._open.append((str(identity), name))
        text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments or {}).decode()
        return {"id": identity, "type": "function", "function": {"name": name, "arguments": text}}

    def _result_id(self, identity: object, name: object) -> str:
        """Of the call that a result answers: as the message says, else the first open call of that function, else the
        first open one."""
        if isinstance(identity, str) and identity:
            index = next((n for n, (each, _) in enumerate(self._open) if each == identity), None)
        else:
            index = next((n for n, (_, function) in enumerate(self._open) if function == name), None)
            index = 0 if index is None and self._open else index
            identity = self._new_id() if index is None else self._open[index][0]
        if index is not None:
            del self._open[index]
        return identity

    def _new_id(self) -> str:
        self._count += 1
        return f"call_{self._count}"


def _content(text: str, images: list[Any], where: str) -> str | list[Object]:
    if not images:
        return text
    parts: list[Object] = [{"type": "text", "text": text}] if text else []
    for index, image in enumerate(images):
        parts.append({"type": "image_url", "image_url": {"url": data_url(image, f"{where}[{index}]")}})
    return parts


# --- options --------------------------------------------------------------------------------------------------

_SAME = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_DEFAULTS: Mapping[str, Any] = {"temperature": 0.8, "top_p": 0.9}
"""Ollama's, where those of other servers differ."""
_EXTENSIONS = ("top_k", "min_p", "repeat_penalty")


@dataclass(slots=True)
class _Options:
    members: Object = field(default_factory=lambda: dict(_DEFAULTS))
    extensions: Object = field(default_factory=dict[str, Any])
    dropped: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    """All that were given."""


def _options(given: object) -> _Options:
    found = _Options()
    if given is None:
        return found
    options = {name: value for name, value in _mapping(given, "options").items() if value is not None}
    found.asked = tuple(options)
    dropped: list[str] = []
    for name, value in options.items():
        if name in _SAME:
            found.members[name] = _number(name, value)
        elif name in _EXTENSIONS:
            found.extensions[name] = _number(name, value)
        elif name == "num_predict":
            if _number(name, value) > 0:  # others mean no limit
                found.members["max_tokens"] = int(value)
        elif name == "seed":
            if _number(name, value) >= 0:  # others mean a random one
                found.members["seed"] = int(value)
        elif name == "stop":
            found.members["stop"] = value
        else:
            dropped.append(name)
    found.dropped = tuple(dropped)
    return found


def _named(extensions: Mapping[str, Any], target: EngineTarget) -> Object:
    """The options that not every server has, by this server's names."""
    penalty: RepeatPenalty = target.repeat_penalty
    if penalty is None:
        return {}
    return {(penalty if name == "repeat_penalty" else name): value for name, value in extensions.items()}


def _format(given: object) -> Object:
    if given is None or given == "":
        return {}
    if given == "json":
        return {"response_format": {"type": "json_object"}}
    if not isinstance(given, dict):
        raise BadRequest('format: must be "json" or a JSON schema')
    schema = {"name": "response", "schema": cast("Object", given)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _think(given: object) -> Object:
    if given is None:
        return {}
    if isinstance(given, bool):
        return {"chat_template_kwargs": {"enable_thinking": given}}
    if isinstance(given, str):
        return {"reasoning_effort": given}
    raise BadRequest('think: must be true, false, "low", "medium" or "high"')


# --- reading --------------------------------------------------------------------------------------------------


def _object(body: bytes) -> Object:
    """The body's members, by lower-case names: an Ollama server reads them without regard to case."""
    try:
        decoded: object = msgspec.json.decode(body)
    except UNREADABLE_JSON as error:
        raise BadRequest(f"the body is no JSON: {error}") from error
    return {fold(name): value for name, value in _mapping(decoded, "the body").items()}


def _mapping(given: object, where: str) -> Object:
    if not isinstance(given, dict):
        raise BadRequest(f"{where}: must be an object")
    return cast("Object", given)


def _list(holder: Object, name: str, where: str = "") -> list[Any]:
    given = holder.get(name)
    if given is None:
        return []
    if not isinstance(given, list):
        raise BadRequest(f"{where}.{name}".lstrip(".") + ": must be a list")
    return cast("list[Any]", given)


def _text(holder: Object, name: str, where: str = "") -> str:
    given = holder.get(name)
    if given is None:
        return ""
    if not isinstance(given, str):
        raise BadRequest(f"{where}.{name}".lstrip(".") + ": must be a text")
    return given


def _number(name: str, given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise BadRequest(f"options.{name}: must be a number")
    return given
