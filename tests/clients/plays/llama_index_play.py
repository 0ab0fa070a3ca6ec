"""Runs PyPI `llama-index-llms-ollama` (and its embeddings) against the server at the given URL; prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from facts import ANSWER, PICTURE, SCHEMA
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.llms.ollama import Ollama


def add(a: int) -> int:
    """adds"""
    return a


def play(url: str) -> dict[str, Any]:
    """Results of each feature, without values that vary between runs."""

    def model(name: str, max_tokens: int) -> Ollama:
        options = {"num_predict": max_tokens, "seed": 1}
        return Ollama(model=name, base_url=url, context_window=4096, additional_kwargs=options, request_timeout=300.0)

    hi = [ChatMessage(role="user", content="hi")]
    image_messages = [ChatMessage(role="user", blocks=[TextBlock(text="hi"), ImageBlock(image=PICTURE.encode())])]
    tool = FunctionTool.from_defaults(fn=add)
    caller = model("toolish", 200)
    answer = caller.chat(hi, tools=[tool.metadata.to_openai_tool()], format=SCHEMA)  # as chat_with_tools does
    calls = caller.get_tool_calls_from_response(answer, error_on_no_tool_call=False)
    stream = model("big", 3000).stream_chat(hi)
    read = [next(stream), next(stream)]
    stream.close()
    embedding = OllamaEmbedding(model_name="embed", base_url=url)
    return {
        "stream": [part.delta for part in model("tiny", 6).stream_complete("hi")],
        "chat": [part.delta for part in model("tiny", 6).stream_chat(hi)],
        "once": model("tiny", 6).complete("hi").text,
        "embed": [len(vector) for vector in embedding.get_text_embedding_batch(["a", "b"])],
        "tools": [[call.tool_name, call.tool_kwargs] for call in calls],
        "image": _outcome(lambda: model("tiny", 3).chat(image_messages).message.content),
        "error": _outcome(lambda: model("nope", 3).complete("hi").text),
        "cancel": [len(read), model("big", 2).complete("hi").text],
    }


def _outcome(call: Any) -> list[Any]:
    try:
        return [200, call()]
    except Exception as error:
        return [getattr(error, "status_code", 0), type(error).__name__, str(error)]


if __name__ == "__main__":
    result = play(sys.argv[1])
    assert result["tools"] == ANSWER, result
    print(json.dumps(result))
