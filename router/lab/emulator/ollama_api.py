"""`/api/generate`, `/api/chat`, `/api/embed` and `/api/embeddings` of the EMULATED server.

After server/routes.go (v0.24): the order of the checks decides which error a client sees. Answers go to a sink, so that
the other APIs' middlewares can write them in their own shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from router.engines.ollama.gguf_header import single
from router.lab.emulator.completion import Ask, Outcome, RunnerFailedError, complete
from router.lab.emulator.config import now_text
from router.lab.emulator.context import Service
from router.lab.emulator.http_server import ClientLeftError, Request
from router.lab.emulator.loaded_model import Loaded
from router.lab.emulator.options import Options
from router.lab.emulator.response_writer import ApiError, Sink
from router.lab.emulator.store import DEFAULT_TEMPLATE, Stored
from router.lab.emulator.text_generation import Piece, Wish, logprobs_of, prompt_tokens, token_ids, vector

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
class _Turn:
    """One answer under way, of either endpoint."""

    service: Service
    request: Request
    sink: Sink
    body: Mapping[str, Any]
    stored: Stored
    began: float
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
        """The part of an answer that holds its words."""
        if not self.is_chat:
            return {"response": content, **({"thinking": thinking} if thinking else {})}
        message: dict[str, Any] = {"role": "assistant", "content": content}
        message |= {"thinking": thinking} if thinking else {}
        message |= {"tool_calls": list(calls)} if calls else {}
        return {"message": message}


async def generate(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/generate`, the body already read."""
    began, name = time.monotonic(), body.get("model", "")
    keep = service.keep_alive(body.get("keep_alive"))
    stored = service.find(name)
    if stored is None:
        raise not_found(name)
    turn = _Turn(service, request, sink, body, stored, began, is_chat=False)
    prompt = body.get("prompt", "")
    if not prompt and keep is not None and int(keep) == 0:
        await _unload(turn)
        return
    if "completion" not in service.capabilities(stored):
        raise ApiError(400, f'"{name}" does not support generate')
    thinks = _thinks(turn)
    options = service.options(stored, body.get("options", {}))
    async with service.leased(request, stored, options, keep) as loaded:
        if not prompt:
            await sink.single(200, turn.answer(response="", done=True, done_reason="load"))
            return
        text = prompt if body.get("raw") else _rendered(stored, [("system", body.get("system", "")), ("user", prompt)])
        wish = Wish(text, options.seed, thinks and not body.get("raw"), format=_format(turn))
        await _answer(turn, loaded, options, wish)


async def chat(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/chat`, the body already read."""
    began, name = time.monotonic(), body.get("model", "")
    keep = service.keep_alive(body.get("keep_alive"))
    messages = cast("list[Any]", body.get("messages", []))
    if not name:
        raise ApiError(400, "model is required")
    known = service.name(name)
    if known is None:
        raise ApiError(400, "model is required" if service.config.is_old else "invalid model name")
    stored = service.store.get(known)
    if stored is None:
        raise not_pulled(name) if service.config.is_old else not_found(name)
    turn = _Turn(service, request, sink, body, stored, began, is_chat=True)
    if not messages and keep is not None and int(keep) == 0:
        await _unload(turn)
        return
    able = service.capabilities(stored)
    if "completion" not in able:
        raise ApiError(400, f'"{name}" does not support chat')
    tools = tuple(cast("list[Mapping[str, Any]]", body.get("tools", [])))
    if tools and "tools" not in able:
        raise ApiError(400, f"{stored.name.full} does not support tools")
    thinks = _thinks(turn)
    options = service.options(stored, body.get("options", {}))
    async with service.leased(request, stored, options, keep) as loaded:
        if not messages:
            await sink.single(200, turn.answer(**turn.text(""), done=True, done_reason="load"))
            return
        text = _rendered(stored, [_message(one) for one in messages], tools)
        await _answer(turn, loaded, options, Wish(text, options.seed, thinks, tools, _format(turn)))


async def _unload(turn: _Turn) -> None:
    turn.service.scheduler.expire(turn.stored.weights.digest)
    await turn.sink.single(200, turn.answer(**turn.text(""), done=True, done_reason="unload"))


def _thinks(turn: _Turn) -> bool:
    """Whether thoughts come first: wherever the model can, unless it shall not. ApiError.

    0.11.4 took a template that ends the prompt with `<think>` for no thinking: the thoughts are words like others.
    """
    asked = turn.body.get("think")
    if asked is not None and not isinstance(asked, bool) and asked not in _EFFORTS:
        raise ApiError(
            400, f'invalid think value: {json.dumps(asked)} (must be "high", "medium", "low", true, or false)'
        )
    can = "thinking" in turn.service.capabilities(turn.stored)
    if asked and not can:
        named = turn.stored.name.full if turn.service.config.is_old else f'"{turn.name}"'
        raise ApiError(400, f"{named} does not support thinking")
    return can and not turn.service.config.is_old and (asked is None or bool(asked))


def _format(turn: _Turn) -> Any:
    """`json` or a schema; None for neither. Raises ApiError once the model is loaded, as the runner would."""
    asked: Any = turn.body.get("format")
    if asked in (None, "", "json") or isinstance(asked, dict):
        return cast("Any", asked) or None
    words = f'invalid format: {json.dumps(json.dumps(asked))}; expected "json" or a valid JSON Schema object'
    raise ApiError(500, words, is_late=True)


def _message(value: Any) -> tuple[str, str]:
    """Role and text; tool calls count as text."""
    given = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    calls = json.dumps(given["tool_calls"]) if given.get("tool_calls") else ""
    return str(given.get("role", "")).lower(), str(given.get("content") or "") + calls


def _rendered(stored: Stored, messages: list[tuple[str, str]], tools: Sequence[Any] = ()) -> str:
    """What becomes of messages in the model's template, roughly."""
    known = [(role, text) for role, text in messages if role in ("system", "user", "assistant", "tool") and text]
    if stored.template == DEFAULT_TEMPLATE:
        return "".join(text for role, text in known if role in ("system", "user"))
    head = json.dumps(list(tools)) + "\n" if tools else ""
    return head + "".join(f"{role}: {text}\n" for role, text in known) + "assistant: "


# --- the answer -------------------------------------------------------------------------------------------


async def _answer(turn: _Turn, loaded: Loaded, options: Options, wish: Wish) -> None:
    loaded_seconds = time.monotonic() - turn.began
    outcome = Outcome()
    collected: list[Piece] = []
    pieces = _pieces(turn, loaded, options, wish, outcome)
    try:
        async with contextlib.aclosing(pieces):
            if turn.streams:
                async for piece in pieces:
                    await turn.sink.line(_line(turn, piece))
            else:
                collected = [piece async for piece in pieces]
    except RunnerFailedError as error:
        await turn.sink.fail(500, str(error), turn.streams)
        return
    if turn.streams:
        if outcome.is_complete:
            ending = _ending(turn, wish, outcome, loaded_seconds)
            await turn.sink.line(turn.answer(**turn.text(""), done=True, **ending))
        return
    await turn.sink.single(200, _whole(turn, collected, wish, outcome, loaded_seconds))


async def _pieces(turn: _Turn, loaded: Loaded, options: Options, wish: Wish, outcome: Outcome) -> AsyncGenerator[Piece]:
    ask = Ask(wish, options.limit(loaded.context_length), options.stop)
    service = turn.service
    stream = complete(
        loaded, turn.request, ask, outcome, service.chance, service.words, lambda: service.loses_slot(loaded)
    )
    async with contextlib.aclosing(stream):
        async for piece in stream:
            outcome.said.append(piece.text)
            yield piece


def _line(turn: _Turn, piece: Piece) -> dict[str, Any]:
    answer = turn.answer(**_words(turn, [piece]), done=False)
    return answer | _logprobs(turn, [piece])


def _words(turn: _Turn, pieces: Sequence[Piece]) -> dict[str, Any]:
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    thinking = "".join(piece.text for piece in pieces if piece.kind == "thinking")
    calls = [_call(turn, index, piece.text) for index, piece in enumerate(p for p in pieces if p.kind == "call")]
    return turn.text(content, thinking, calls)


def _call(turn: _Turn, index: int, text: str) -> dict[str, Any]:
    value = json.loads(text)
    function = {"index": index, "name": value["name"], "arguments": value["parameters"]}
    if turn.service.config.is_old:
        del function["index"]
        return {"function": function}
    return {"id": turn.service.call_id(), "function": function}


def _logprobs(turn: _Turn, pieces: Sequence[Piece]) -> dict[str, Any]:
    if not turn.body.get("logprobs") or turn.service.config.is_old:
        return {}
    top = int(turn.body.get("top_logprobs", 0))
    return {"logprobs": [logprobs_of(piece.text, top, turn.service.chance) for piece in pieces]}


def _whole(turn: _Turn, pieces: Sequence[Piece], wish: Wish, outcome: Outcome, loaded_seconds: float) -> dict[str, Any]:
    words = _words(turn, pieces)
    if not outcome.is_complete:
        return turn.answer(**words, done=False)
    ending = _ending(turn, wish, outcome, loaded_seconds)
    return turn.answer(**words, done=True, **ending, **_logprobs(turn, pieces))


def _ending(turn: _Turn, wish: Wish, outcome: Outcome, loaded_seconds: float) -> dict[str, Any]:
    """Reason, context and figures, as they stand in the last line."""
    context: dict[str, Any] = {}
    if not turn.is_chat and not turn.body.get("raw"):
        context["context"] = token_ids(wish.prompt + "".join(outcome.said))
    return {
        "done_reason": outcome.done_reason,
        **context,
        "total_duration": int((time.monotonic() - turn.began) * 1e9),
        "load_duration": int(loaded_seconds * 1e9),
        "prompt_eval_count": outcome.prompt_tokens,
        "prompt_eval_duration": int(outcome.prompt_seconds * 1e9),
        "eval_count": outcome.tokens,
        "eval_duration": int(outcome.eval_seconds * 1e9),
    }


# --- embeddings -------------------------------------------------------------------------------------------


async def embed(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/embed`, the body already read."""
    began, name = time.monotonic(), body.get("model", "")
    keep = service.keep_alive(body.get("keep_alive"))
    inputs = _inputs(body.get("input"))
    stored = service.find(name)
    if stored is None:
        raise not_found(name) if not name and not service.config.is_old else not_pulled(name)
    options = service.options(stored, body.get("options", {}))
    async with service.leased(request, stored, options, keep) as loaded:
        if not inputs:
            await sink.single(200, {"model": name, "embeddings": []})
            return
        loaded_seconds = time.monotonic() - began
        counts = _counts(service, loaded, inputs, body.get("truncate", True))
        await _evaluate(service, request, loaded, inputs, counts)
        vectors = [vector(text, loaded.facts.embedding_length) for text in inputs]
        answer = {
            "model": name,
            "embeddings": [[single(value) for value in one] for one in vectors],
            "total_duration": int((time.monotonic() - began) * 1e9),
            "load_duration": int(loaded_seconds * 1e9),
            "prompt_eval_count": sum(counts),
        }
        await sink.single(200, answer)


async def embeddings(service: Service, request: Request, sink: Sink, body: Mapping[str, Any]) -> None:
    """`/api/embeddings`, the older form."""
    name, prompt = body.get("model", ""), body.get("prompt", "")
    keep = service.keep_alive(body.get("keep_alive"))
    if not name:
        raise ApiError(400, "model is required")
    known = service.name(name)
    if known is None:
        raise ApiError(400, "invalid model name")
    stored = service.store.get(known)
    if stored is None:
        raise not_pulled(name)
    options = service.options(stored, body.get("options", {}))
    async with service.leased(request, stored, options, keep) as loaded:
        if not prompt:
            await sink.single(200, {"embedding": []})
            return
        await _evaluate(service, request, loaded, [prompt], _counts(service, loaded, [prompt], True))
        await sink.single(200, {"embedding": vector(prompt, loaded.facts.embedding_length)})


def _inputs(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(one, str) for one in cast("list[Any]", value)):
        return cast("list[str]", value)
    raise ApiError(400, "invalid input type")


def _counts(service: Service, loaded: Loaded, inputs: Sequence[str], truncates: bool) -> list[int]:
    """Tokens of each input, cut to the context. Raises ApiError where they must not be cut."""
    counts = [prompt_tokens(loaded.header, text) for text in inputs]
    if max(counts) > loaded.context_length and not truncates:
        old = "input length exceeds maximum context length"
        raise ApiError(400, old if service.config.is_old else "the input length exceeds the context length")
    return [min(count, loaded.context_length) for count in counts]


async def _evaluate(
    service: Service, request: Request, loaded: Loaded, inputs: Sequence[str], counts: Sequence[int]
) -> None:
    """All inputs at once, each in a slot of its own as one becomes free."""

    async def one(text: str, count: int) -> None:
        async with loaded.slot(text, lambda: False) as use:
            use.sequence = sequence = loaded.process.run(count, 0)
            await sequence.token()

    try:
        with request.watched():
            async with asyncio.TaskGroup() as tasks:
                for text, count in zip(inputs, counts, strict=True):
                    tasks.create_task(one(text, count))
    except BaseExceptionGroup as error:
        if not request.left.is_set():
            raise ApiError(500, service.words.before) from error
        raise ClientLeftError from None
