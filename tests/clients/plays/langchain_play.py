"""Runs PyPI `langchain-ollama` against the server at the given URL; prints the results as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from facts import ANSWER, PICTURE, SCHEMA, TOOL
from langchain_core.messages import HumanMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM


def play(url: str) -> dict[str, Any]:
    """Results of each feature, without values that vary between runs."""

    def chat(model: str, max_tokens: int, **options: Any) -> ChatOllama:
        return ChatOllama(model=model, base_url=url, num_predict=max_tokens, seed=1, **options)

    image_content = [
        {"type": "text", "text": "hi"},
        {"type": "image_url", "image_url": f"data:image/png;base64,{PICTURE}"},
    ]
    tools = chat("toolish", 200, format=SCHEMA).bind_tools([TOOL]).invoke("hi")
    stream = chat("big", 3000).stream("hi")
    read = [next(stream), next(stream)]
    stream.close()
    return {
        "stream": "".join(str(part.content) for part in chat("tiny", 6).stream("hi")),
        "once": chat("tiny", 6).invoke("hi").content,
        "text": OllamaLLM(model="tiny", base_url=url, num_predict=6, seed=1).invoke("hi"),
        "embed": [len(vector) for vector in OllamaEmbeddings(model="embed", base_url=url).embed_documents(["a", "b"])],
        "tools": [[call["name"], call["args"]] for call in tools.tool_calls],
        "image": _outcome(lambda: chat("tiny", 3).invoke([HumanMessage(content=image_content)]).content),
        "error": _outcome(lambda: chat("nope", 3).invoke("hi").content),
        "cancel": [len(read), chat("big", 2).invoke("hi").content],
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
