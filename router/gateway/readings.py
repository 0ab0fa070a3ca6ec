"""What each route reads from its body, as data: the names and types of the fields of Go's request structs.

Only fields that routing needs are here. A path that is not in the table is read for its `model` alone.

Sources: api/types.go, server/routes.go, openai/openai.go (v0.11.4); anthropic/anthropic.go, middleware (v0.24).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Emptiness(Enum):
    """When a prompt counts as none, so that the server only loads the model."""

    NEVER = "never"
    STRING = "an empty string"
    LIST = "an empty list"
    EITHER = "an empty string or list"


@dataclass(frozen=True, slots=True)
class Reading:
    models: tuple[str, ...] = ("model",)
    """Fields that name the model; the first that is not empty counts."""
    is_ollama: bool = False
    """Whether `keep_alive` and `options` are fields: the compatible APIs have neither."""
    null_empties_stream: bool = False
    """Whether `stream` is a pointer in Go, which null resets."""
    limits: tuple[str, ...] = ()
    """Fields that bound the answer's tokens, where `options` does not."""
    prompt: str = ""
    """The field whose emptiness makes a request load-only."""
    empty: Emptiness = Emptiness.NEVER
    absent_is_empty: bool = True
    texts: tuple[str, ...] = ()
    """Fields that the model reads."""
    names: frozenset[str] = field(init=False)
    """All of them."""

    def __post_init__(self) -> None:
        own = {"keep_alive", "options"} if self.is_ollama else set[str]()
        names = {"stream", *own, *self.models, *self.limits, *self.texts}
        object.__setattr__(self, "names", frozenset(names | {self.prompt} - {""}))


def _ollama(prompt: str, empty: Emptiness, *texts: str) -> Reading:
    return Reading(is_ollama=True, null_empties_stream=True, prompt=prompt, empty=empty, texts=(prompt, *texts))


def _named(*models: str) -> Reading:
    return Reading(models=models, null_empties_stream=True)


READINGS: Mapping[str, Reading] = {
    "/api/generate": _ollama("prompt", Emptiness.STRING, "suffix", "system", "template", "context"),
    "/api/chat": _ollama("messages", Emptiness.LIST, "tools"),
    "/api/embed": _ollama("input", Emptiness.EITHER),
    "/api/embeddings": _ollama("prompt", Emptiness.STRING),
    "/api/show": _named("model", "name"),
    "/api/delete": _named("model", "name"),
    "/api/pull": _named("model", "name"),
    "/api/push": _named("model", "name"),
    "/api/create": _named("model", "name"),
    "/api/copy": _named("source"),
    "/v1/chat/completions": Reading(limits=("max_completion_tokens", "max_tokens"), texts=("messages", "tools")),
    "/v1/completions": Reading(
        limits=("max_tokens",), prompt="prompt", empty=Emptiness.STRING, texts=("prompt", "suffix")
    ),
    "/v1/embeddings": Reading(
        prompt="input", empty=Emptiness.LIST, absent_is_empty=False, texts=("input",)
    ),  # "" is embedded there, and no input is refused
    "/v1/responses": Reading(
        null_empties_stream=True, limits=("max_output_tokens",), texts=("input", "instructions", "tools")
    ),
    "/v1/messages": Reading(limits=("max_tokens",), texts=("messages", "system", "tools")),
}
