"""Runs PyPI `ollama` against the server at the given URL; prints the results as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import ollama
from facts import ANSWER, HI, PICTURE, SCHEMA, TOOL


def play(url: str) -> dict[str, Any]:
    """Results of each feature, without values that vary between runs."""
    client, options = ollama.Client(host=url), {"num_predict": 6, "seed": 1}
    parts = list(client.chat("tiny", HI, stream=True, options=options))
    unstreamed = client.chat("tiny", HI, options=options)
    tools = client.chat("toolish", HI, tools=[TOOL], format=SCHEMA, options={"num_predict": 200, "seed": 1})
    results: dict[str, Any] = {
        "stream": "".join(part.message.content or "" for part in parts),
        "parts": [part.done for part in parts],
        "once": unstreamed.message.content,
        "generate": client.generate("tiny", "hello", options=options).response,
        "embed": [len(vector) for vector in client.embed("embed", ["a", "b"]).embeddings],
        "tools": [[call.function.name, dict(call.function.arguments)] for call in tools.message.tool_calls or ()],
        "models": sorted(model.model or "" for model in client.list().models),
        "loaded": sorted(model.model or "" for model in client.ps().models),
        "shown": client.show("tiny").details.family if client.show("tiny").details else "",
        "image": _outcome(lambda: client.generate("tiny", "hello", images=[PICTURE], options=options).response),
        "error": _outcome(lambda: client.generate("nope", "x").response),
        "cancel": _cancelled(client),
        "async": asyncio.run(_async(url)),
    }
    client.copy("tiny", "play-copy")
    client.delete("play-copy")
    return results


async def _async(url: str) -> str:
    client = ollama.AsyncClient(host=url)
    stream = await client.chat("tiny", HI, stream=True, options={"num_predict": 6, "seed": 1})
    return "".join([part.message.content or "" async for part in stream])


def _cancelled(client: ollama.Client) -> int:
    """Closes a stream after two tokens; the only slot must then be free."""
    stream = client.generate("big", "x", stream=True, options={"num_predict": 3000, "seed": 1})
    read = [next(stream).done, next(stream).done]
    stream.close()  # type: ignore[attr-defined]
    after = client.generate("big", "x", options={"num_predict": 2, "seed": 1}).eval_count
    return len(read) + (after or 0)


def _outcome(call: Any) -> list[Any]:
    try:
        return [200, call()]
    except ollama.ResponseError as error:
        return [error.status_code, error.error]


if __name__ == "__main__":
    result = play(sys.argv[1])
    assert result["tools"] == ANSWER, result
    print(json.dumps(result))
