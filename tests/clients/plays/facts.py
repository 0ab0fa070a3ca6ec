"""Shared test data of all plays: a greeting, a tool with the only call that its schema allows, and an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

HI = [{"role": "user", "content": "hi"}]

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"const": "add"},
        "parameters": {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]},
    },
    "required": ["name", "parameters"],
}
"""Makes a noise model call `add(a=7)`."""
ANSWER = [["add", {"a": 7}]]

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
"""A one-pixel PNG, in base64."""


def print_outcomes(url: str, clients: Mapping[str, Callable[[str, str], str]]) -> None:
    """Prints what each client reads for the models `works` and `fails`."""

    def outcome(call: Callable[[str, str], str], model: str) -> str:
        try:
            return call(url, model)
        except Exception as error:
            return f"raised {error}"

    print(json.dumps({name: [outcome(call, "works"), outcome(call, "fails")] for name, call in clients.items()}))
