"""Reads streams with heartbeats with PyPI `ollama` and `openai`; prints the results."""

from __future__ import annotations

import sys
from typing import Any

import ollama
import openai
from facts import HI, print_outcomes


def _ollama(url: str, model: str) -> str:
    return "".join(part.message.content or "" for part in ollama.Client(host=url).chat(model, HI, stream=True))


def _openai(url: str, model: str) -> str:
    client: Any = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
    events = client.chat.completions.create(model=model, messages=HI, stream=True)
    return "".join(event.choices[0].delta.content or "" for event in events)


if __name__ == "__main__":
    print_outcomes(sys.argv[1], {"ollama": _ollama, "openai": _openai})
