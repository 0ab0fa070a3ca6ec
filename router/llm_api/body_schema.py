"""What each route reads from its body: names and types of the fields of Go's request structs.

Only fields that routing needs are listed. Of a path that is not in the table only `model` is read.

Sources: api/types.go, server/routes.go, openai/openai.go (v0.11.4); anthropic/anthropic.go, middleware (v0.24).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Emptiness(Enum):
    """When a prompt counts as empty, so that the server only loads the model."""

    NEVER = "never"
    STRING = "an empty string"
    LIST = "an empty list"
    EITHER = "an empty string or list"


class Streaming(Enum):
    """Whether `stream` is a field, and what null does to an earlier value."""

    NONE = "no such field"
    POINTER = "null resets it"
    VALUE = "null leaves it"


class Kind(Enum):
    """What a member of a body is to routing."""

    IGNORED = "of no meaning"
    SETTING = "one that its clients often send alike"
    TEXT = "read by the model"


ORDINARY_KEYS = frozenset(
    (
        "format", "think", "raw", "images", "temperature", "top_p", "stop", "seed", "tool_choice", "response_format",
        "stream_options", "user", "n", "truncate", "dimensions", "frequency_penalty", "presence_penalty",
        "reasoning_effort", "parallel_tool_calls",
    )
)  # fmt: skip
"""Keys that fold to no name that routing reads; listed so that they need not be folded each time."""

_EMPTY_LIST = rb"\[[ \t\n\r]*+\]"
_EMPTY_PROMPTS: Mapping[Emptiness, re.Pattern[bytes] | None] = {
    Emptiness.NEVER: None,
    Emptiness.STRING: re.compile(rb'""'),
    Emptiness.LIST: re.compile(_EMPTY_LIST),
    Emptiness.EITHER: re.compile(rb'""|' + _EMPTY_LIST),
}


@dataclass(frozen=True, slots=True)
class BodySchema:
    models: tuple[str, ...] = ("model",)
    """Fields that name the model; the first that is not empty counts."""
    is_ollama: bool = False
    """Whether `keep_alive` and `options` are fields; the compatible APIs have neither."""
    stream: Streaming = Streaming.NONE
    limits: tuple[str, ...] = ()
    """Fields that limit the output tokens, if `options` does not."""
    prompt: str = ""
    """The field whose emptiness makes a request load-only."""
    empty: Emptiness = Emptiness.NEVER
    absent_is_empty: bool = True
    empty_prompt: re.Pattern[bytes] | None = field(init=False)
    """Matches an empty prompt's JSON; None if a prompt never counts as empty."""
    texts: tuple[str, ...] = ()
    """Fields that the model reads."""
    settings: frozenset[str] = field(init=False)
    """Fields other than the model, `stream` and the prompt."""
    names: frozenset[str] = field(init=False)
    """All of these fields."""
    kinds: Mapping[str, Kind] = field(init=False)
    """What each of these fields, and each of `ORDINARY_KEYS`, is to routing."""

    def __post_init__(self) -> None:
        settings = {"keep_alive", "options"} if self.is_ollama else set(self.limits)
        stream = {"stream"} if self.stream is not Streaming.NONE else set[str]()
        names = {*settings, *stream, *self.models, *self.limits, *self.texts}
        object.__setattr__(self, "empty_prompt", _EMPTY_PROMPTS[self.empty])
        object.__setattr__(self, "settings", frozenset(settings))
        names = names | {self.prompt} - {""}
        kinds = dict.fromkeys(ORDINARY_KEYS, Kind.IGNORED) | dict.fromkeys(names, Kind.SETTING)
        kinds |= dict.fromkeys({self.prompt, *self.texts} - {""}, Kind.TEXT)
        object.__setattr__(self, "names", frozenset(names))
        object.__setattr__(self, "kinds", kinds)


def _ollama(prompt: str, empty: Emptiness, *texts: str, stream: Streaming = Streaming.NONE) -> BodySchema:
    return BodySchema(is_ollama=True, stream=stream, prompt=prompt, empty=empty, texts=(prompt, *texts))


_POINTER, _VALUE = Streaming.POINTER, Streaming.VALUE

SCHEMAS: Mapping[str, BodySchema] = {
    "/api/generate": _ollama("prompt", Emptiness.STRING, "suffix", "system", "template", "context", stream=_POINTER),
    "/api/chat": _ollama("messages", Emptiness.LIST, "tools", stream=_POINTER),
    "/api/embed": _ollama("input", Emptiness.EITHER),
    "/api/embeddings": _ollama("prompt", Emptiness.STRING),
    "/api/show": BodySchema(models=("model", "name")),
    "/api/delete": BodySchema(models=("model", "name")),
    "/api/pull": BodySchema(models=("model", "name"), stream=_POINTER),
    "/api/push": BodySchema(models=("model", "name"), stream=_POINTER),
    "/api/create": BodySchema(models=("model", "name"), stream=_POINTER),
    "/api/copy": BodySchema(models=("source",)),
    "/v1/chat/completions": BodySchema(
        stream=_VALUE, limits=("max_completion_tokens", "max_tokens"), texts=("messages", "tools")
    ),
    "/v1/completions": BodySchema(
        stream=_VALUE, limits=("max_tokens",), prompt="prompt", empty=Emptiness.STRING, texts=("prompt", "suffix")
    ),
    # An absent input is an error there, and an empty string is embedded.
    "/v1/embeddings": BodySchema(prompt="input", empty=Emptiness.LIST, absent_is_empty=False, texts=("input",)),
    "/v1/responses": BodySchema(
        stream=_POINTER, limits=("max_output_tokens",), texts=("input", "instructions", "tools")
    ),
    "/v1/messages": BodySchema(stream=_VALUE, limits=("max_tokens",), texts=("messages", "system", "tools")),
}
