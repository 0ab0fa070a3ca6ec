"""Runs PyPI `openai` against the server at the given URL; prints the results as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
from facts import ANSWER, HI, PICTURE, SCHEMA, TOOL

_IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
_IMAGE_MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hi"}, _IMAGE]}]


def play(url: str) -> dict[str, Any]:
    """Results of each feature, without values that vary between runs."""
    client: Any = openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
    chat = client.chat.completions
    events = list(
        chat.create(
            model="tiny", messages=HI, max_tokens=5, seed=1, stream=True, stream_options={"include_usage": True}
        )
    )
    json_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    tools = chat.create(model="toolish", messages=HI, tools=[TOOL], response_format=json_format, max_tokens=200, seed=1)
    calls = tools.choices[0].message.tool_calls
    return {
        "stream": "".join(event.choices[0].delta.content or "" for event in events if event.choices),
        "usage": events[-1].usage.completion_tokens,
        "once": chat.create(model="tiny", messages=HI, max_tokens=5, seed=1).choices[0].message.content,
        "text": client.completions.create(model="tiny", prompt="hi", max_tokens=3, seed=1).choices[0].text,
        "embed": [len(item.embedding) for item in client.embeddings.create(
            model="embed", input=["a", "b"], encoding_format="float").data],
        "tools": [[call.function.name, json.loads(call.function.arguments)] for call in calls],
        "models": sorted(model.id for model in client.models.list()),
        "model": client.models.retrieve("tiny").id,
        "image": _outcome(lambda: chat.create(model="tiny", messages=_IMAGE_MESSAGES, max_tokens=3, seed=1)),
        "error": _outcome(lambda: chat.create(model="nope", messages=HI)),
        "responses": _outcome(lambda: client.responses.create(model="tiny", input="hi", max_output_tokens=3)),
        "cancel": _cancelled(chat),
    }  # fmt: skip


def _cancelled(chat: Any) -> int:
    """Closes a stream after two events; the only slot must then be free."""
    with chat.create(model="big", messages=HI, max_tokens=3000, seed=1, stream=True) as stream:
        read = [next(stream), next(stream)]
    after = chat.create(model="big", messages=HI, max_tokens=2, seed=1)
    return len(read) + after.usage.completion_tokens


def _outcome(call: Any) -> list[Any]:
    try:
        return [200, call().object]
    except openai.APIStatusError as error:
        return [error.status_code, type(error).__name__]


if __name__ == "__main__":
    result = play(sys.argv[1])
    assert result["tools"] == ANSWER, result
    print(json.dumps(result))
