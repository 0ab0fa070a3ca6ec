"""`/api/generate`, `/api/chat`, `/api/embed` and `/api/embeddings` of the EMULATED server.

Modelled on server/routes.go (v0.24): the order of the checks decides which error a client sees. Responses go to a sink,
so that the middlewares of the other APIs can convert them to their own formats.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from router.engines.ollama.blob_store import DEFAULT_TEMPLATE, StoredModel
from router.engines.ollama.gguf_header import single
from router.lab.emulator.completion import CompletionOutcome, CompletionRequest, RunnerFailedError, complete
from router.lab.emulator.config import now_text
from router.lab.emulator.context import Service
from router.lab.emulator.http_server import ClientDisconnectedError, Request
from router.lab.emulator.loaded_model import LoadedModel
from router.lab.emulator.options import Options
from router.lab.emulator.response_writer import ApiError, Sink
from router.lab.emulator.text_generation import GenerationRequest, Piece, logprobs_of, prompt_tokens, token_ids, vector

_SHARED = {"model": "string", "stream": "bool", "format": "any", "keep_alive": "any", "options": "map", "think": "any",
           "truncate": "bool", "shift": "bool", "logprobs": "bool", "top_logprobs": "number"}  # fmt: skip
GENERATE = {**_SHARED, "prompt": "string", "suffix": "string", "system": "string", "template": "string",
            "context": "slice", "raw": "bool", "images": "slice"}  # fmt: skip
CHAT = {**_SHARED, "messages": "slice", "tools": "slice"}
EMBED = {"model": "string", "input": "any", "keep_alive": "any", "truncate": "bool", "dimensions": "number",
         "options": "map"}  # fmt: skip
EMBEDDINGS = {"model": "string", "prompt": "string", "keep_alive": "any", "options": "map"}
_EFFORTS = ("high", "medium", "low")


def not_found(text: str) -> ApiError:
    return ApiError(404, f"model '{text}' not found")


def not_pulled(text: str) -> ApiError:
    return ApiError(404, f'model "{text}" not found, try pulling it first')


@dataclass(frozen=True, slots=True)
class _GenerationContext:
    """One generate or chat request in progress."""

    service: Service
    request: Request
    sink: Sink
    body: Mapping[str, Any]
    stored: StoredModel
    started_at: float
    is_chat: bool

    @property
    def name(self) -> str:
        return self.body.get("model", "")

    @property
    def streams(self) -> bool:
        return self.body.get("stream", True)

    def answer(self, **fields: Any) -> dict[str, Any]:
        return {"model": self.name, "created_at": now_text(), **fields}

    def text(self, content: str, thinking: str = "", calls: Sequence[Any] = ()) -> dict[str, Any]:
        """The part of an answer that holds the generated text."""
        if not self.is_chat:
            return {"response": content, **({"thinking": thinking} if thinking else {})}
        message: dict[str, Any] = {"role": "assistant", "content": content}
        message |= {"thinking": thinking} if thinking else {}
        message |= {"tool_calls": list(calls)} if calls else {}
        return {"message": message}


async def generate(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/generate`, with a parsed body."""
    started_at, name = time.monotonic(), body.get("model", "")
    keep_alive = service.keep_alive(body.get("keep_alive"))
    stored = service.find(name)
    if stored is None:
        raise not_found(name)
    context = _GenerationContext(service, request, sink, body, stored, started_at, is_chat=False)
    prompt = body.get("prompt", "")
    if not prompt and service.unloads(keep_alive):
        await _unload(context)
        return
    if "completion" not in service.capabilities(stored):
        raise ApiError(400, f'"{name}" does not support generate')
    thinks = _thinks(context)
    options = service.options(stored, body.get("options", {}))
    async with service.loaded_model(request, stored, options, keep_alive) as loaded:
        if not prompt:
            await sink.single(200, context.answer(response="", done=True, done_reason="load"))
            return
        text = prompt if body.get("raw") else _render(stored, [("system", body.get("system", "")), ("user", prompt)])
        generation = GenerationRequest(text, options.seed, thinks and not body.get("raw"), format=_format(context))
        await _answer(context, loaded, options, generation)


async def chat(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/chat`, with a parsed body."""
    started_at, name = time.monotonic(), body.get("model", "")
    keep_alive = service.keep_alive(body.get("keep_alive"))
    messages = cast("list[Any]", body.get("messages", []))
    if not name:
        raise ApiError(400, "model is required")
    parsed_name = service.name(name)
    if parsed_name is None:
        raise ApiError(400, "model is required" if service.config.is_pre_0_12 else "invalid model name")
    stored = service.store.get(parsed_name)
    if stored is None:
        raise not_pulled(name) if service.config.is_pre_0_12 else not_found(name)
    context = _GenerationContext(service, request, sink, body, stored, started_at, is_chat=True)
    if not messages and service.unloads(keep_alive):
        await _unload(context)
        return
    capabilities = service.capabilities(stored)
    if "completion" not in capabilities:
        raise ApiError(400, f'"{name}" does not support chat')
    tools = tuple(cast("list[Mapping[str, Any]]", body.get("tools", [])))
    if tools and "tools" not in capabilities:
        raise ApiError(400, f"{stored.name.full} does not support tools")
    thinks = _thinks(context)
    options = service.options(stored, body.get("options", {}))
    async with service.loaded_model(request, stored, options, keep_alive) as loaded:
        if not messages:
            await sink.single(200, context.answer(**context.text(""), done=True, done_reason="load"))
            return
        text = _render(stored, [_message(item) for item in messages], tools)
        await _answer(context, loaded, options, GenerationRequest(text, options.seed, thinks, tools, _format(context)))


async def _unload(context: _GenerationContext) -> None:
    fault = context.service.behaviour(context.stored.name.shortest).unload
    if fault == "refuse":
        raise ApiError(500, "the model cannot be unloaded")
    if fault is None:
        context.service.scheduler.expire(context.stored.weights.digest)
    await context.sink.single(200, context.answer(**context.text(""), done=True, done_reason="unload"))


def _thinks(context: _GenerationContext) -> bool:
    """Whether the model thinks: if it can, unless the request disables it. Raises ApiError.

    0.11.4 does not recognise a template that ends the prompt with `<think>`: its thoughts are ordinary content.
    """
    think = context.body.get("think")
    if think is not None and not isinstance(think, bool) and think not in _EFFORTS:
        raise ApiError(
            400, f'invalid think value: {json.dumps(think)} (must be "high", "medium", "low", true, or false)'
        )
    can_think = "thinking" in context.service.capabilities(context.stored)
    if think and not can_think:
        display_name = context.stored.name.full if context.service.config.is_pre_0_12 else f'"{context.name}"'
        raise ApiError(400, f"{display_name} does not support thinking")
    return can_think and not context.service.config.is_pre_0_12 and (think is None or bool(think))


def _format(context: _GenerationContext) -> Any:
    """`json`, a schema or None. Raises ApiError, like the real runner only after the model is loaded."""
    requested_format: Any = context.body.get("format")
    if requested_format in (None, "", "json") or isinstance(requested_format, dict):
        return cast("Any", requested_format) or None
    message = (
        f'invalid format: {json.dumps(json.dumps(requested_format))}; expected "json" or a valid JSON Schema object'
    )
    raise ApiError(500, message, is_late=True)


def _message(value: Any) -> tuple[str, str]:
    """Role and text of a message; tool calls count as text."""
    given = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    calls = json.dumps(given["tool_calls"]) if given.get("tool_calls") else ""
    return str(given.get("role", "")).lower(), str(given.get("content") or "") + calls


def _render(stored: StoredModel, messages: list[tuple[str, str]], tools: Sequence[Any] = ()) -> str:
    """Renders messages approximately as the model's template does."""
    relevant = [(role, text) for role, text in messages if role in ("system", "user", "assistant", "tool") and text]
    if stored.template == DEFAULT_TEMPLATE:
        return "".join(text for role, text in relevant if role in ("system", "user"))
    tools_text = json.dumps(list(tools)) + "\n" if tools else ""
    return tools_text + "".join(f"{role}: {text}\n" for role, text in relevant) + "assistant: "


# --- the answer -------------------------------------------------------------------------------------------


async def _answer(
    context: _GenerationContext, loaded: LoadedModel, options: Options, generation: GenerationRequest
) -> None:
    loaded_seconds = time.monotonic() - context.started_at
    outcome = CompletionOutcome()
    collected: list[Piece] = []
    pieces = _pieces(context, loaded, options, generation, outcome)
    try:
        async with contextlib.aclosing(pieces):
            if context.streams:
                async for piece in pieces:
                    await context.sink.line(_stream_line(context, piece))
            else:
                collected = [piece async for piece in pieces]
    except RunnerFailedError as error:
        await context.sink.fail(500, str(error), context.streams)
        return
    if context.streams:
        if outcome.is_complete:
            final_fields = _final_fields(context, generation, outcome, loaded_seconds)
            await context.sink.line(context.answer(**context.text(""), done=True, **final_fields))
        return
    await context.sink.single(200, _full_answer(context, collected, generation, outcome, loaded_seconds))


async def _pieces(
    context: _GenerationContext,
    loaded: LoadedModel,
    options: Options,
    generation: GenerationRequest,
    outcome: CompletionOutcome,
) -> AsyncGenerator[Piece]:
    service = context.service
    # From 0.30 llama-server formats chats without a template of Ollama's, and nobody counts their tokens.
    is_counted = not (service.config.is_0_30 and context.is_chat and context.stored.template == DEFAULT_TEMPLATE)
    completion = CompletionRequest(generation, options.limit(loaded.context_length), options.stop, is_counted)
    stream = complete(
        loaded,
        context.request,
        completion,
        outcome,
        service.rng,
        service.runner_lost_messages,
        lambda: service.leaks_slot(loaded),
    )
    async with contextlib.aclosing(stream):
        async for piece in stream:
            outcome.texts.append(piece.text)
            yield piece


def _stream_line(context: _GenerationContext, piece: Piece) -> dict[str, Any]:
    answer = context.answer(**_text_fields(context, [piece]), done=False)
    return answer | _logprobs(context, [piece])


def _text_fields(context: _GenerationContext, pieces: Sequence[Piece]) -> dict[str, Any]:
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    thinking = "".join(piece.text for piece in pieces if piece.kind == "thinking")
    calls = [_call(context, index, piece.text) for index, piece in enumerate(p for p in pieces if p.kind == "call")]
    return context.text(content, thinking, calls)


def _call(context: _GenerationContext, index: int, text: str) -> dict[str, Any]:
    value = json.loads(text)
    function = {"index": index, "name": value["name"], "arguments": value["parameters"]}
    if context.service.config.is_pre_0_12:
        del function["index"]
        return {"function": function}
    return {"id": context.service.call_id(), "function": function}


def _logprobs(context: _GenerationContext, pieces: Sequence[Piece]) -> dict[str, Any]:
    if not context.body.get("logprobs") or context.service.config.is_pre_0_12:
        return {}
    top = int(context.body.get("top_logprobs", 0))
    return {"logprobs": [logprobs_of(piece.text, top, context.service.rng) for piece in pieces]}


def _full_answer(
    context: _GenerationContext,
    pieces: Sequence[Piece],
    generation: GenerationRequest,
    outcome: CompletionOutcome,
    loaded_seconds: float,
) -> dict[str, Any]:
    text_fields = _text_fields(context, pieces)
    if not outcome.is_complete:
        return context.answer(**text_fields, done=False)
    final_fields = _final_fields(context, generation, outcome, loaded_seconds)
    return context.answer(**text_fields, done=True, **final_fields, **_logprobs(context, pieces))


def _final_fields(
    context: _GenerationContext, generation: GenerationRequest, outcome: CompletionOutcome, loaded_seconds: float
) -> dict[str, Any]:
    """Done reason, context and statistics of the final line."""
    token_context: dict[str, Any] = {}
    if not context.is_chat and not context.body.get("raw"):
        token_context["context"] = token_ids(generation.prompt + "".join(outcome.texts))
    has_cached_count = context.service.config.is_0_30
    cached_count = {"prompt_eval_cached_count": outcome.cached_tokens} if has_cached_count else {}
    return {
        "done_reason": outcome.done_reason,
        **token_context,
        "total_duration": int((time.monotonic() - context.started_at) * 1e9),
        "load_duration": int(loaded_seconds * 1e9),
        "prompt_eval_count": outcome.prompt_tokens,
        **cached_count,
        "prompt_eval_duration": int(outcome.prompt_seconds * 1e9),
        "eval_count": outcome.tokens,
        "eval_duration": int(outcome.eval_seconds * 1e9),
    }


# --- embeddings -------------------------------------------------------------------------------------------


async def embed(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/embed`, with a parsed body."""
    started_at, name = time.monotonic(), body.get("model", "")
    keep_alive = service.keep_alive(body.get("keep_alive"))
    inputs = _inputs(body.get("input"))
    stored = service.find(name)
    if stored is None:
        raise not_found(name) if not name and not service.config.is_pre_0_12 else not_pulled(name)
    options = service.options(stored, body.get("options", {}))
    async with service.loaded_model(request, stored, options, keep_alive) as loaded:
        if not inputs:
            await sink.single(200, {"model": name, "embeddings": []})
            return
        _check_embeds(service, stored, 501)
        loaded_seconds = time.monotonic() - started_at
        counts = _counts(service, loaded, inputs, body.get("truncate", True))
        await _evaluate(service, request, loaded, inputs, counts)
        vectors = [vector(text, loaded.facts.embedding_length) for text in inputs]
        answer = {
            "model": name,
            "embeddings": [[single(value) for value in row] for row in vectors],
            "total_duration": int((time.monotonic() - started_at) * 1e9),
            "load_duration": int(loaded_seconds * 1e9),
            "prompt_eval_count": sum(counts),
        }
        await sink.single(200, answer)


async def embeddings(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/embeddings`, the legacy endpoint."""
    name, prompt = body.get("model", ""), body.get("prompt", "")
    keep_alive = service.keep_alive(body.get("keep_alive"))
    if not name:
        raise ApiError(400, "model is required")
    parsed_name = service.name(name)
    if parsed_name is None:
        raise ApiError(400, "invalid model name")
    stored = service.store.get(parsed_name)
    if stored is None:
        raise not_pulled(name)
    options = service.options(stored, body.get("options", {}))
    async with service.loaded_model(request, stored, options, keep_alive) as loaded:
        if not prompt:
            await sink.single(200, {"embedding": []})
            return
        _check_embeds(service, stored, 500)
        await _evaluate(service, request, loaded, [prompt], _counts(service, loaded, [prompt], True))
        await sink.single(200, {"embedding": vector(prompt, loaded.facts.embedding_length)})


def _check_embeds(service: Service, stored: StoredModel, status: int) -> None:
    """Raises ApiError for a model without embeddings: from 0.30 llama-server is not started for them."""
    if service.config.is_0_30 and "embedding" not in service.capabilities(stored):
        raise ApiError(status, "This server does not support embeddings. Start it with `--embeddings`")


def _inputs(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in cast("list[Any]", value)):
        return cast("list[str]", value)
    raise ApiError(400, "invalid input type")


def _counts(service: Service, loaded: LoadedModel, inputs: Sequence[str], truncates: bool) -> list[int]:
    """Token count of each input, truncated to the context. Raises ApiError if truncation is disabled."""
    counts = [prompt_tokens(loaded.header, text) for text in inputs]
    if max(counts) > loaded.context_length and not truncates:
        old_message = "input length exceeds maximum context length"
        raise ApiError(
            400, old_message if service.config.is_pre_0_12 else "the input length exceeds the context length"
        )
    return [min(count, loaded.context_length) for count in counts]


async def _evaluate(
    service: Service, request: Request, loaded: LoadedModel, inputs: Sequence[str], counts: Sequence[int]
) -> None:
    """Evaluates all inputs concurrently, each as soon as a slot is free."""

    async def evaluate_input(text: str, count: int) -> None:
        async with loaded.slot(text, lambda: False) as use:
            use.sequence = sequence = loaded.process.run(count, 0)
            await sequence.token()

    try:
        with request.cancel_on_disconnect():
            async with asyncio.TaskGroup() as tasks:
                for text, count in zip(inputs, counts, strict=True):
                    tasks.create_task(evaluate_input(text, count))
    except BaseExceptionGroup as error:
        if not request.disconnected.is_set():
            raise ApiError(500, service.runner_lost_messages.before_first_token) from error
        raise ClientDisconnectedError from None
