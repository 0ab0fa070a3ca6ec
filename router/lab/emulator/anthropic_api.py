"""`/v1/messages` of the EMULATED server: Anthropic's format over the native chat, like the real middleware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from router.lab.emulator import ollama_api
from router.lab.emulator.context import Service
from router.lab.emulator.go_json import BodyError, dump, read_struct
from router.lab.emulator.http_server import Request, Response
from router.lab.emulator.openai_api import run_native_handler
from router.lab.emulator.response_writer import EVENTS, JSON, PLAIN_JSON, Sink, send_error_body

_FIELDS = {"model": "string", "max_tokens": "number", "messages": "slice", "system": "any", "stream": "bool",
           "temperature": "number", "top_p": "number", "top_k": "number", "stop_sequences": "slice", "tools": "slice",
           "tool_choice": "any", "thinking": "map", "metadata": "any"}  # fmt: skip
_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_REASONS: Mapping[str, str] = {"stop": "end_turn", "length": "max_tokens"}
_CHARACTERS_PER_TOKEN = 4


def _random_hex(service: Service) -> str:
    return f"{service.rng.getrandbits(96):024x}"


def _error(service: Service, status: int, message: str) -> bytes:
    error = {"type": _TYPES.get(status, "api_error"), "message": message}
    return dump({"type": "error", "error": error, "request_id": "req_" + _random_hex(service)})


class _MessagesSink(Sink):
    def __init__(self, response: Response, service: Service, estimated_tokens: int) -> None:
        super().__init__(response)
        self._service = service
        self._estimated_tokens = estimated_tokens
        self._index = 0
        self._open_block = ""
        self._has_called = False

    async def fail(self, status: int, message: str, streams: bool = False) -> None:
        """After the first event, the stream just stops."""
        if self.response.started:
            return
        await send_error_body(self.response, status, _error(self._service, status, message) + b"\n", streams)

    async def single(self, status: int, value: Any, content_type: str = JSON) -> None:
        del content_type
        message = cast("dict[str, Any]", value.get("message", {}))
        content: list[Any] = []
        if message.get("thinking"):
            content.append({"type": "thinking", "thinking": message["thinking"]})
        if message.get("content") or not message.get("tool_calls"):
            content.append({"type": "text", "text": message.get("content", "")})
        content += [{**self._tool(call), "input": call["function"]["arguments"]} for call in _calls(message)]
        self._has_called = bool(_calls(message))
        message_object = {"id": "msg_" + _random_hex(self._service), "type": "message", "role": "assistant",
                  "model": value.get("model", ""), "content": content, "stop_reason": self._reason(value),
                  "usage": _usage(value)}  # fmt: skip
        self.response.send_whole(status, dump(message_object) + b"\n", PLAIN_JSON)

    async def line(self, value: Any) -> None:
        message = cast("dict[str, Any]", value.get("message", {}))
        if not self.response.started:
            await self._start(value.get("model", ""))
        if message.get("thinking"):
            await self._delta("thinking", {"type": "thinking", "thinking": ""}, "thinking", message["thinking"])
        if message.get("content"):
            await self._delta("text", {"type": "text", "text": ""}, "text", message["content"])
        for call in _calls(message):
            await self._call(call)
        if value.get("done"):
            await self._close()
            delta = {"stop_reason": self._reason(value)}
            await self._event("message_delta", delta=delta, usage=_usage(value))
            await self._event("message_stop")

    async def _start(self, model: str) -> None:
        usage = {"input_tokens": self._estimated_tokens, "output_tokens": 0}
        content: list[Any] = []
        message = {"id": "msg_" + _random_hex(self._service), "type": "message", "role": "assistant", "model": model,
                   "content": content, "usage": usage}  # fmt: skip
        await self._event("message_start", message=message)

    async def _delta(self, kind: str, block: Mapping[str, Any], key: str, text: str) -> None:
        if self._open_block != kind:
            await self._close()
            self._open_block = kind
            await self._event("content_block_start", index=self._index, content_block=block)
        delta = {"type": f"{kind}_delta", key: text}
        await self._event("content_block_delta", index=self._index, delta=delta)

    async def _call(self, call: Mapping[str, Any]) -> None:
        await self._close()
        self._open_block, self._has_called = "tool_use", True
        await self._event("content_block_start", index=self._index, content_block={**self._tool(call), "input": {}})
        text = json.dumps(call["function"]["arguments"], separators=(",", ":"))
        delta = {"type": "input_json_delta", "partial_json": text}
        await self._event("content_block_delta", index=self._index, delta=delta)

    async def _close(self) -> None:
        if self._open_block:
            await self._event("content_block_stop", index=self._index)
            self._index += 1
            self._open_block = ""

    async def _event(self, kind: str, **fields: Any) -> None:
        data = dump({"type": kind, **fields})
        await self.response.chunk(b"event: %s\ndata: %s\n\n" % (kind.encode(), data), EVENTS)

    def _tool(self, call: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "tool_use", "id": call.get("id", ""), "name": call["function"]["name"]}

    def _reason(self, value: Mapping[str, Any]) -> str | None:
        if self._has_called:
            return "tool_use"
        return _REASONS.get(value.get("done_reason") or "")


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return message.get("tool_calls") or ()


def _usage(value: Mapping[str, Any]) -> dict[str, Any]:
    input_tokens, cached_tokens = value.get("prompt_eval_count", 0), value.get("prompt_eval_cached_count")
    cached = {} if cached_tokens is None else {"cache_read_input_tokens": cached_tokens}
    return {"input_tokens": input_tokens - (cached_tokens or 0), **cached, "output_tokens": value.get("eval_count", 0)}


async def messages(service: Service, request: Request, response: Response) -> None:
    """`/v1/messages`."""
    try:
        body = read_struct(await request.body(), "anthropic.MessagesRequest", _FIELDS)
    except BodyError as error:
        response.send_whole(400, _error(service, 400, str(error)), JSON)
        return
    error_text = _validation_error(body)
    if error_text:
        response.send_whole(400, _error(service, 400, error_text), JSON)
        return
    native_messages = _native_messages(body)
    if body.get("stream"):
        response.headers.update({"Cache-Control": "no-cache", "Connection": "keep-alive"})
    native_request: dict[str, Any] = {
        "model": body["model"],
        "messages": native_messages,
        "options": _options(body),
        "stream": body.get("stream", False),
        "tools": [_native_tool(tool) for tool in body.get("tools", [])],
    }
    kind = body.get("thinking", {}).get("type")
    native_request |= {"think": kind != "disabled"} if kind else {}
    estimated_tokens = sum(len(message["content"]) for message in native_messages) // _CHARACTERS_PER_TOKEN
    await run_native_handler(
        ollama_api.chat, service, request, _MessagesSink(response, service, max(1, estimated_tokens)), native_request
    )


def _validation_error(body: Mapping[str, Any]) -> str | None:
    if not body.get("model"):
        return "model is required"
    if body.get("max_tokens", 0) <= 0:
        return "max_tokens is required and must be positive"
    return None if body.get("messages") else "messages is required"


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    names = {"max_tokens": "num_predict", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
             "stop_sequences": "stop"}  # fmt: skip
    return {native_name: body[name] for name, native_name in names.items() if name in body}


def _native_tool(tool: Any) -> dict[str, Any]:
    given = cast("dict[str, Any]", tool) if isinstance(tool, dict) else {}
    return {"type": "function", "function": {"name": given.get("name"), "parameters": given.get("input_schema")}}


def _native_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    converted = [{"role": "system", "content": _text(body["system"])}] if body.get("system") else []
    for item in body["messages"]:
        message = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        converted.append({"role": str(message.get("role", "")), "content": _text(message.get("content"))})
    return converted


def _text(content: Any) -> str:
    """The text of a content value, recursively."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [cast("dict[str, Any]", part) for part in cast("list[Any]", content) if isinstance(part, dict)]
    return "".join(str(part.get("text") or _text(part.get("content"))) for part in parts)
