"""Reads streams with heartbeats with other PyPI packages; prints the results."""

from __future__ import annotations

import sys
from typing import Any

import anthropic
from facts import HI, print_outcomes
from langchain_ollama import ChatOllama
from llama_index.llms.ollama import Ollama


def _anthropic(url: str, model: str) -> str:
    client: Any = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
    with client.messages.stream(model=model, messages=HI, max_tokens=5) as stream:
        return "".join(stream.text_stream)


def _langchain(url: str, model: str) -> str:
    return "".join(str(part.content) for part in ChatOllama(model=model, base_url=url).stream("hi"))


def _llama_index(url: str, model: str) -> str:
    parts = Ollama(model=model, base_url=url, context_window=100).stream_complete("hi")
    return "".join(part.delta or "" for part in parts)


if __name__ == "__main__":
    clients = {"anthropic": _anthropic, "langchain-ollama": _langchain, "llama-index-llms-ollama": _llama_index}
    print_outcomes(sys.argv[1], clients)
