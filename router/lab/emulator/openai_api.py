"""`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` and `/v1/models` of the EMULATED server.

Middlewares as in the real server: they convert the body to a native request and the native responses to OpenAI's
format. So a runner that dies mid-stream appears as one more empty event without `[DONE]`.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from router.lab.emulator import ollama_api
from router.lab.emulator.context import Service
from router.lab.emulator.go_json import BodyError, Fields, dump, read_struct
from router.lab.emulator.http_server import Request, Response
from router.lab.emulator.response_writer import EVENTS, JSON, PLAIN_JSON, ApiError, Sink, send_error_body

_CHAT = {"model": "string", "messages": "slice", "stream": "bool", "stream_options": "map", "max_tokens": "number",
         "seed": "number", "stop": "any", "temperature": "number", "frequency_penalty": "number",
         "presence_penalty": "number", "top_p": "number", "response_format": "map", "tools": "slice",
         "reasoning": "map", "reasoning_effort": "string", "logprobs": "bool", "top_logprobs": "number"}  # fmt: skip
_COMPLETION = {"model": "string", "prompt": "string", "stream": "bool", "stream_options": "map", "max_tokens": "number",
               "seed": "number", "stop": "any", "temperature": "number", "frequency_penalty": "number",
               "presence_penalty": "number", "top_p": "number", "suffix": "string"}  # fmt: skip
_EMBEDDINGS = {"model": "string", "input": "any", "dimensions": "number", "encoding_format": "string"}
NativeHandler = Callable[[Service, Request, Sink, Mapping[str, Any]], Awaitable[None]]
_TYPES: Mapping[int, str] = {400: "invalid_request_error", 404: "not_found_error"}


def error_body(status: int, message: str, is_pre_0_12: bool = False) -> dict[str, Any]:
    """An error in OpenAI's format. Before 0.12 the type of a handler's error did not depend on the status."""
    kind = "api_error" if is_pre_0_12 else _TYPES.get(status, "api_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def read_body(request: Request, response: Response, type_name: str, fields: Fields) -> dict[str, Any] | None:
    """Parses the body; returns None after sending an error for an invalid one."""
    try:
        return read_struct(await request.body(), f"openai.{type_name}", fields)
    except BodyError as error:
        response.send_whole(400, dump(error_body(400, str(error))), JSON)
        return None


class _OpenAiSink(Sink):
    """Common part of both completion sinks."""

    prefix = ""

    def __init__(self, response: Response, service: Service, usage: bool) -> None:
        super().__init__(response, service.config.is_pre_0_12)
        self._service = service
        self._id = f"{self.prefix}-{service.rng.randrange(1000)}"
        self._wants_usage = usage
        self._created = int(datetime.now(UTC).timestamp())
        self._is_0_30 = service.config.is_0_30
        self._has_called = False
        self._has_started = False

    async def fail(self, status: int, message: str, streams: bool = False) -> None:
        if self.response.started or (streams and self._is_old):
            await self.line({"error": message})
            return
        await send_error_body(self.response, status, dump(error_body(status, message, self._is_old)) + b"\n", streams)

    async def single(self, status: int, value: Any, content_type: str = JSON) -> None:
        del content_type
        self.response.send_whole(status, dump(self._whole(value)) + b"\n", PLAIN_JSON)

    async def line(self, value: Any) -> None:
        events = [self._chunk(value)]
        if value.get("done"):
            events += [self._usage_chunk(value)] if self._wants_usage else []
        data = b"".join(b"data: " + dump(event) + b"\n\n" for event in events)
        await self.response.chunk(data + (b"data: [DONE]\n\n" if value.get("done") else b""), EVENTS)

    def _time(self) -> int:
        return self._created if self._is_0_30 else int(datetime.now(UTC).timestamp())

    def _reason(self, value: Mapping[str, Any]) -> str | None:
        reason = value.get("done_reason")
        return "tool_calls" if self._has_called and reason else reason

    def _whole(self, value: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, value: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _usage_chunk(self, value: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class _ChatSink(_OpenAiSink):
    prefix = "chatcmpl"

    def _head(self, kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
        model = value.get("model", "")
        fingerprint = {"system_fingerprint": "fp_ollama"}
        return {"id": self._id, "object": kind, "created": self._time(), "model": model, **fingerprint}

    def _message_fields(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Content, reasoning and tool calls of a message; empty for an error line."""
        message = cast("dict[str, Any]", value.get("message") or {})
        fields: dict[str, Any] = {"content": message.get("content", "")}
        if message.get("thinking"):
            fields["reasoning"] = message["thinking"]
        if message.get("tool_calls"):
            self._has_called = True
            fields["tool_calls"] = [_tool_call(call, self._service.call_id) for call in message["tool_calls"]]
        return fields

    def _whole(self, value: Mapping[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", **self._message_fields(value)}
        choice = {"index": 0, "message": message, "finish_reason": self._reason(value), **_logprobs(value)}
        return {**self._head("chat.completion", value), "choices": [choice], "usage": usage_of(value)}

    def _chunk(self, value: Mapping[str, Any]) -> dict[str, Any]:
        role = {} if self._is_0_30 and self._has_started else {"role": "assistant"}
        self._has_started = True
        fields = self._message_fields(value)
        is_empty = self._is_0_30 and value.get("done") and fields == {"content": ""}
        delta = {} if is_empty else {**role, **fields}
        choice = {"index": 0, "delta": delta, "finish_reason": self._reason(value), **_logprobs(value)}
        return {**self._head("chat.completion.chunk", value), "choices": [choice]}

    def _usage_chunk(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk", value), "choices": [], "usage": usage_of(value)}


class _CompletionSink(_OpenAiSink):
    prefix = "cmpl"

    def _event(self, value: Mapping[str, Any], choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        head = {"id": self._id, "object": "text_completion", "created": self._time(), "choices": choices}
        tail = {"model": value.get("model", ""), "system_fingerprint": "fp_ollama"}
        return {**head, **tail, **({} if usage is None else {"usage": usage})}

    def _choices(self, value: Mapping[str, Any]) -> list[Any]:
        return [{"text": value.get("response", ""), "index": 0, "finish_reason": self._reason(value)}]

    def _whole(self, value: Mapping[str, Any]) -> dict[str, Any]:
        choices = self._choices(value)
        return {"id": self._id, "object": "text_completion", "created": self._time(),
                "model": value.get("model", ""), "system_fingerprint": "fp_ollama", "choices": choices,
                "usage": usage_of(value)}  # fmt: skip

    def _chunk(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return self._event(value, self._choices(value), usage_of({}) if self._wants_usage else None)

    def _usage_chunk(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return self._event(value, [], usage_of(value))


def usage_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """Token counts of a final line."""
    prompt_tokens, completion_tokens = value.get("prompt_eval_count", 0), value.get("eval_count", 0)
    cached_tokens = value.get("prompt_eval_cached_count")
    return {
        "prompt_tokens": prompt_tokens,
        **({} if cached_tokens is None else {"prompt_tokens_details": {"cached_tokens": cached_tokens}}),
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _tool_call(call: Mapping[str, Any], new_id: Callable[[], str]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], separators=(",", ":"))
    call_fields = {"index": function.get("index", 0), "type": "function"}
    return {"id": call.get("id") or new_id(), **call_fields, "function": {"name": function["name"], "arguments": text}}


def _logprobs(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"logprobs": {"content": value["logprobs"]}} if value.get("logprobs") else {}


# --- requests ---------------------------------------------------------------------------------------------


async def chat(service: Service, request: Request, response: Response) -> None:
    """`/v1/chat/completions`."""
    body = await read_body(request, response, "ChatCompletionRequest", _CHAT)
    if body is None:
        return
    if not body.get("messages"):
        response.send_whole(400, dump(error_body(400, "[] is too short - 'messages'")), JSON)
        return
    format_: dict[str, Any] = body.get("response_format", {})
    schema_format: dict[str, Any] = format_.get("json_schema") or {}
    formats: dict[str, Any] = {"json_object": "json", "json_schema": schema_format.get("schema")}
    effort = body.get("reasoning_effort") or body.get("reasoning", {}).get("effort")
    native_request: dict[str, Any] = {
        "model": body.get("model", ""),
        "messages": chat_messages(body["messages"]),
        "options": sampling(body, "max_tokens"),
        "stream": body.get("stream", False),
        "tools": body.get("tools", []),
        "format": formats.get(str(format_.get("type"))),
        "logprobs": body.get("logprobs", False),
        "top_logprobs": body.get("top_logprobs", 0),
        **({} if effort is None else {"think": False if effort == "none" else effort}),
    }
    sink = _ChatSink(response, service, _wants_usage(body))
    await run_native_handler(ollama_api.chat, service, request, sink, native_request)


async def completions(service: Service, request: Request, response: Response) -> None:
    """`/v1/completions`."""
    body = await read_body(request, response, "CompletionRequest", _COMPLETION)
    if body is None:
        return
    native_request: dict[str, Any] = {
        "model": body.get("model", ""),
        "prompt": body.get("prompt", ""),
        "suffix": body.get("suffix", ""),
        "options": sampling(body, "max_tokens"),
        "stream": body.get("stream", False),
    }
    sink = _CompletionSink(response, service, _wants_usage(body))
    await run_native_handler(ollama_api.generate, service, request, sink, native_request)


class _EmbeddingSink(Sink):
    def __init__(self, response: Response, as_base64: bool, is_pre_0_12: bool) -> None:
        super().__init__(response, is_pre_0_12)
        self._as_base64 = as_base64

    async def fail(self, status: int, message: str, streams: bool = False) -> None:
        del streams
        self.response.send_whole(status, dump(error_body(status, message, self._is_old)) + b"\n", PLAIN_JSON)

    async def single(self, status: int, value: Any, content_type: str = JSON) -> None:
        del content_type
        data = [
            {"object": "embedding", "embedding": self._encoded(vector), "index": index}
            for index, vector in enumerate(value["embeddings"])
        ]
        count = value.get("prompt_eval_count", 0)
        usage = {"prompt_tokens": count, "total_tokens": count}
        answer = {"object": "list", "data": data, "model": value["model"], "usage": usage}
        self.response.send_whole(status, dump(answer) + b"\n", PLAIN_JSON)

    def _encoded(self, vector: Sequence[float]) -> Any:
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if self._as_base64 else vector


async def embeddings(service: Service, request: Request, response: Response) -> None:
    """`/v1/embeddings`."""
    body = await read_body(request, response, "EmbedRequest", _EMBEDDINGS)
    if body is None:
        return
    if not body.get("input"):
        response.send_whole(400, dump(error_body(400, "invalid input")), JSON)
        return
    as_base64 = body.get("encoding_format") == "base64" and not service.config.is_pre_0_12
    await run_native_handler(
        ollama_api.embed, service, request, _EmbeddingSink(response, as_base64, service.config.is_pre_0_12), body
    )


async def run_native_handler(
    handler: NativeHandler, service: Service, request: Request, sink: Sink, native_request: Mapping[str, Any]
) -> None:
    """Runs a native handler and sends its errors to the sink. Cloud models are refused before that, natively."""
    service.name(native_request.get("model", ""))
    try:
        await handler(service, request, sink, native_request)
    except ApiError as error:
        await sink.fail(error.status, error.message, error.is_late and native_request.get("stream", False))


def sampling(body: Mapping[str, Any], limit: str) -> dict[str, Any]:
    """Converts sampling parameters to native options."""
    stop = body.get("stop")
    options: dict[str, Any] = {"stop": [stop] if isinstance(stop, str) else stop} if stop else {}
    names = {limit: "num_predict", "seed": "seed", "temperature": "temperature", "top_p": "top_p"}
    return options | {native_name: body[name] for name, native_name in names.items() if name in body}


def _wants_usage(body: Mapping[str, Any]) -> bool:
    return bool(body.get("stream_options", {}).get("include_usage"))


def chat_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Converts to native messages: each content part becomes a separate message."""
    converted: list[dict[str, Any]] = []
    for item in messages:
        message = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        role, content = message.get("role", ""), message.get("content")
        parts = cast("list[Any]", content) if isinstance(content, list) else [content]
        for part in parts:
            text = cast("dict[str, Any]", part).get("text", "") if isinstance(part, dict) else part
            converted.append({"role": role, "content": text or "", "tool_calls": message.get("tool_calls")})
    return converted


# --- models -----------------------------------------------------------------------------------------------


def _model_entry(key: str, modified: datetime) -> dict[str, Any]:
    return {"id": key, "object": "model", "created": int(modified.timestamp()), "owned_by": "library"}


async def models(service: Service, request: Request, response: Response) -> None:
    """`/v1/models`."""
    del request
    data = [_model_entry(stored.name.shortest, stored.modified) for stored in service.store.all()]
    response.send_whole(200, dump({"object": "list", "data": data}) + b"\n", PLAIN_JSON)


async def model(service: Service, request: Request, response: Response, name: str) -> None:
    """`/v1/models/NAME`; echoes the requested name."""
    del request
    stored = service.find(name)
    if stored is None:
        answer = error_body(404, f"model '{service.shown_name(name)}' not found", service.config.is_pre_0_12)
        response.send_whole(404, dump(answer) + b"\n", PLAIN_JSON)
        return
    response.send_whole(200, dump(_model_entry(name, stored.modified)) + b"\n", PLAIN_JSON)
