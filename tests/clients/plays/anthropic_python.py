"""Runs PyPI `anthropic` against the server at the given URL; prints the results as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import anthropic
from facts import HI, PICTURE

_SOURCE = {"type": "base64", "media_type": "image/png", "data": PICTURE}
_IMAGE_MESSAGES = [{"role": "user", "content": [{"type": "image", "source": _SOURCE}, {"type": "text", "text": "hi"}]}]
_TOOL = {"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def play(url: str) -> dict[str, Any]:
    """Results of each feature, without values that vary between runs: the API has no seed."""
    client: Any = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)
    request = {"model": "tiny", "max_tokens": 4, "messages": HI}
    return {
        "once": _outcome(lambda: _summary(client.messages.create(**request))),
        "stream": _outcome(lambda: _streamed(client, request)),
        "tools": _outcome(lambda: client.messages.create(**{**request, "model": "toolish"}, tools=[_TOOL]).type),
        "image": _outcome(lambda: client.messages.create(**{**request, "messages": _IMAGE_MESSAGES}).type),
        "error": _outcome(lambda: client.messages.create(**{**request, "model": "nope"}).type),
        "cancel": _outcome(lambda: _cancelled(client)),
    }


def _summary(message: Any) -> list[Any]:
    return [message.type, message.stop_reason, message.usage.output_tokens, bool(message.content[0].text)]


def _streamed(client: Any, request: dict[str, Any]) -> list[Any]:
    with client.messages.stream(**request) as stream:
        event_types = list(dict.fromkeys(event.type for event in stream))
        return [event_types, *_summary(stream.get_final_message())]


def _cancelled(client: Any) -> int:
    """Closes a stream after two events; the only slot must then be free."""
    long = {"model": "big", "max_tokens": 3000, "messages": HI}
    with client.messages.create(**long, stream=True) as stream:
        read = [event for event, _ in zip(stream, range(2), strict=False)]
    after = client.messages.create(**{**long, "max_tokens": 2})
    return len(read) + after.usage.output_tokens


def _outcome(call: Any) -> list[Any]:
    try:
        return [200, call()]
    except anthropic.APIStatusError as error:
        return [error.status_code, type(error).__name__]


if __name__ == "__main__":
    print(json.dumps(play(sys.argv[1])))
