"""`/v1/responses` of the EMULATED server: OpenAI's Responses format over the native chat.

As in real Ollama, `previous_response_id` is ignored. Limitation: server-side tools are silently dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from router.lab.emulator import ollama_api
from router.lab.emulator.context import Service
from router.lab.emulator.go_json import BodyError, EmptyBodyError, dump, read_struct
from router.lab.emulator.http_server import Request, Response
from router.lab.emulator.openai_api import error_body, read_body, run_native_handler, sampling
from router.lab.emulator.response_writer import EVENTS, JSON, PLAIN_JSON, Sink, send_error_body

_FIELDS = {"model": "string", "input": "any", "instructions": "string", "max_output_tokens": "number",
           "stream": "bool", "temperature": "number", "top_p": "number", "tools": "slice", "text": "map",
           "reasoning": "map", "previous_response_id": "string"}  # fmt: skip


class _ResponsesSink(Sink):
    def __init__(self, response: Response, service: Service, body: Mapping[str, Any]) -> None:
        super().__init__(response)
        self._body = body
        self._chance = service.rng
        self._response_id = f"resp_{service.rng.randrange(10**6)}"
        self._item_id = ""
        self._created = _now()
        self._sequence_number = 0
        self._text_so_far = ""
        self._output: list[dict[str, Any]] = []

    async def fail(self, status: int, message: str, streams: bool = False) -> None:
        """After the first event, the stream just stops."""
        if self.response.started:
            return
        await send_error_body(self.response, status, dump(error_body(status, message)) + b"\n", streams)

    async def single(self, status: int, value: Any, content_type: str = JSON) -> None:
        del content_type
        message = cast("dict[str, Any]", value.get("message", {}))
        output = [self._call_item(call) for call in message.get("tool_calls") or ()]
        if message.get("content") or not output:
            part: dict[str, Any] = {
                "type": "output_text",
                "text": message.get("content", ""),
                "annotations": [],
                "logprobs": [],
            }
            output.insert(0, {"id": self._new_item("msg"), "type": "message", "status": "completed",
                              "role": "assistant", "content": [part]})  # fmt: skip
        answer = self._response("completed", value.get("model", ""), output, _usage(value))
        self.response.send_whole(status, dump(answer) + b"\n", PLAIN_JSON)

    async def line(self, value: Any) -> None:
        message, model = cast("dict[str, Any]", value.get("message", {})), value.get("model", "")
        if not self.response.started:
            for kind in ("created", "in_progress"):
                await self._event(f"response.{kind}", response=self._response("in_progress", model, [], None))
        if message.get("content"):
            await self._delta(message["content"])
        for call in message.get("tool_calls") or ():
            await self._finish_text()
            item, position = self._call_item(call), {"output_index": len(self._output)}
            started_item = {**item, "arguments": "", "status": "in_progress"}
            await self._event("response.output_item.added", item=started_item, **position)
            text = {"item_id": item["id"], "arguments": item["arguments"]}
            await self._event("response.function_call_arguments.done", **text, **position)
            await self._event("response.output_item.done", item=item, **position)
            self._output.append(item)
        if value.get("done"):
            await self._finish_text()
            answer = self._response("completed", model, self._output, _usage(value))
            await self._event("response.completed", response=answer)

    async def _delta(self, text: str) -> None:
        position = {"output_index": len(self._output)}
        if not self._item_id:
            self._item_id = self._new_item("msg")
            item: dict[str, Any] = {"content": [], "id": self._item_id, "role": "assistant", "status": "in_progress"}
            item["type"] = "message"
            await self._event("response.output_item.added", item=item, **position)
            await self._part("response.content_part.added", part=_part(""))
        self._text_so_far += text
        await self._part("response.output_text.delta", delta=text, logprobs=[])

    async def _finish_text(self) -> None:
        if not self._item_id:
            return
        await self._part("response.output_text.done", text=self._text_so_far, logprobs=[])
        await self._part("response.content_part.done", part=_part(self._text_so_far))
        item = {"content": [_part(self._text_so_far)], "id": self._item_id, "role": "assistant", "status": "completed",
                "type": "message"}  # fmt: skip
        await self._event("response.output_item.done", item=item, output_index=len(self._output))
        self._output.append(item)
        self._item_id = self._text_so_far = ""

    async def _part(self, kind: str, **fields: Any) -> None:
        position = {"content_index": 0, "item_id": self._item_id, "output_index": len(self._output)}
        await self._event(kind, **position, **fields)

    async def _event(self, kind: str, **fields: Any) -> None:
        value = {**fields, "sequence_number": self._sequence_number, "type": kind}
        self._sequence_number += 1
        data = dump(dict(sorted(value.items())))
        await self.response.chunk(b"event: %s\ndata: %s\n\n" % (kind.encode(), data), EVENTS)

    def _new_item(self, kind: str) -> str:
        return f"{kind}_{self._chance.randrange(10**6)}"

    def _call_item(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        text = json.dumps(function["arguments"], separators=(",", ":"))
        return {"id": self._new_item("fc"), "type": "function_call", "status": "completed",
                "call_id": call.get("id", ""), "name": function["name"], "arguments": text}  # fmt: skip

    def _response(self, status: str, model: str, output: list[Any], usage: Any) -> dict[str, Any]:
        is_done = status == "completed"
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": _now() if is_done else None,
            "status": status,
            "incomplete_details": None,
            "model": model,
            "previous_response_id": None,
            "instructions": self._body.get("instructions"),
            "output": output,
            "error": None,
            "tools": self._body.get("tools", []),
            "tool_choice": "auto",
            "truncation": "disabled",
            "parallel_tool_calls": True,
            "text": {"format": {"type": "text"}},
            "top_p": self._body.get("top_p", 1),
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": 0,
            "temperature": self._body.get("temperature", 1),
            "reasoning": None,
            "usage": usage,
            "max_output_tokens": self._body.get("max_output_tokens"),
            "max_tool_calls": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            "metadata": {},
            "safety_identifier": None,
            "prompt_cache_key": None,
        }


def _now() -> int:
    return int(datetime.now(UTC).timestamp())


def _part(text: str) -> dict[str, Any]:
    return {"annotations": [], "logprobs": [], "text": text, "type": "output_text"}


def _usage(value: Mapping[str, Any]) -> dict[str, Any]:
    input_tokens, output_tokens = value.get("prompt_eval_count", 0), value.get("eval_count", 0)
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": input_tokens + output_tokens,
            "input_tokens_details": {"cached_tokens": value.get("prompt_eval_cached_count", 0)},
            "output_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip


async def responses(service: Service, request: Request, response: Response) -> None:
    """`/v1/responses`."""
    body = await _read_body(service, request, response)
    if body is None:
        return
    if body.get("stream"):
        response.headers.update({"Cache-Control": "no-cache", "Connection": "keep-alive"})
    effort = body.get("reasoning", {}).get("effort")
    format_: dict[str, Any] = body.get("text", {}).get("format") or {}
    native_request: dict[str, Any] = {
        "model": body.get("model", ""),
        "messages": _messages(body),
        "options": sampling(body, "max_output_tokens"),
        "stream": body.get("stream", False),
        "tools": [_tool(tool) for tool in body.get("tools", []) if tool.get("type") == "function"],
        "format": format_.get("schema"),
        **({} if effort is None else {"think": False if effort == "none" else effort}),
    }
    await run_native_handler(ollama_api.chat, service, request, _ResponsesSink(response, service, body), native_request)


async def _read_body(service: Service, request: Request, response: Response) -> dict[str, Any] | None:
    """Parses the body; returns None after sending an error. From 0.30 the errors are those of a handler of its own."""
    if not service.config.is_0_30:
        return await read_body(request, response, "ResponsesRequest", _FIELDS)
    try:
        body = read_struct(await request.body(), "openai.ResponsesRequest", _FIELDS)
    except EmptyBodyError:
        message = "missing request body"
    except BodyError as error:
        message = f"invalid Responses request: {error}"
    else:
        if body.get("model"):
            return body
        message = "model is required"
    answer = error_body(400, message)
    answer["error"]["code"] = "invalid_request_error"
    response.send_whole(400, dump(answer), JSON)
    return None


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.get("name"), "parameters": tool.get("parameters")}}


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    request_input = body.get("input", "")
    converted = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    if isinstance(request_input, str):
        return [*converted, {"role": "user", "content": request_input}]
    for entry in cast("list[Any]", request_input if isinstance(request_input, list) else []):
        item = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        content = item.get("content", item.get("output", ""))
        parts = cast("list[Any]", content) if isinstance(content, list) else [{"text": content}]
        text = "".join(str(cast("dict[str, Any]", part).get("text", "")) for part in parts if isinstance(part, dict))
        role = "tool" if item.get("type") == "function_call_output" else str(item.get("role", "user"))
        converted.append({"role": role, "content": text})
    return converted
