"""An access key: who it belongs to, and what its requests may do. Pure; knows the digest of a key, never the key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from router.domain.model_names import parse_name
from router.domain.request import LayoutKind

PRIORITIES = {"low": -1, "normal": 0, "high": 1}
"""Words for priorities, in headers and keys."""


class RouteClass(StrEnum):
    """What a request does, as far as keys tell requests apart."""

    INFERENCE = "inference"
    """Uses models: generates, embeds, lists and shows."""
    MANAGEMENT = "management"
    """Changes the model store: pull, create, copy, delete, push, blobs, and the server's account."""
    ADMIN = "admin"
    """Reads the router's own state: `/metrics` and `/llamayard/...`."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much a key's requests may take; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and output tokens, as the servers count them."""
    tokens_per_day: int | None = None
    concurrent_requests: int | None = None
    """Inference requests in progress, those that wait included."""


UNLIMITED = KeyLimits()


@dataclass(frozen=True, slots=True)
class AccessKey:
    """One key. Several may belong to one user, who then has one fair share."""

    name: str
    """Unique; stands for the key in logs, metrics and messages."""
    sha256: str
    """Hexadecimal digest of the key."""
    user: str
    created_at: float
    """Seconds since 1970, as `expires_at`."""
    expires_at: float | None = None
    classes: frozenset[RouteClass] = frozenset({RouteClass.INFERENCE})
    models: tuple[str, ...] = ("*",)
    """Patterns; see `matches`."""
    limits: KeyLimits = UNLIMITED
    priority: int = 0
    """The highest priority that its requests may ask for, and what they get if they ask for none."""
    context_length_max: int | None = None
    """Largest context in tokens that a request may ask for or be raised to."""
    keep_alive_seconds_min: float | None = None
    keep_alive_seconds_max: float | None = None
    """Bounds of what a request may ask for; negative is for ever."""
    layouts: frozenset[LayoutKind] = field(default=frozenset(LayoutKind))
    """Layouts that `X-Llamayard-Layout` may ask for."""
    forwards_users: bool = False
    """Whether it is a program's that names its users in `X-OpenWebUI-User-Id`: each then has a fair share."""

    def is_valid(self, wall_seconds: float) -> bool:
        return self.expires_at is None or wall_seconds < self.expires_at

    @property
    def sees_all_models(self) -> bool:
        return "*" in self.models

    def allows_model(self, name: str) -> bool:
        """Whether it may use the model of that name, in any form that Ollama accepts."""
        return self.sees_all_models or matches(self.models, name)

    def bounded_priority(self, asked: int | None) -> int:
        """`asked`: None where the request names none."""
        return self.priority if asked is None else min(asked, self.priority)

    def bounded_keep_alive(self, seconds: float | None) -> float | None:
        """What a request asks for, within the key's bounds; None where it asks for nothing."""
        if seconds is None:
            return None
        least, most = self.keep_alive_seconds_min, self.keep_alive_seconds_max
        if most is not None and most >= 0 and (seconds < 0 or seconds > most):
            seconds = most
        if least is not None and (least < 0 or 0 <= seconds < least):
            seconds = least
        return seconds

    @property
    def bounds_requests(self) -> bool:
        """Whether it has limits that depend on what a request's body says, besides its model."""
        bounds = (self.context_length_max, self.keep_alive_seconds_min, self.keep_alive_seconds_max)
        return self.limits != UNLIMITED or any(bound is not None for bound in bounds)

    @property
    def may_unload(self) -> bool:
        """Whether a request may end a model's residency with `keep_alive: 0`."""
        return not self.keep_alive_seconds_min


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a model's name matches one of the patterns: `*` any characters, `?` one.

    A pattern is compared with the name as `/api/tags` shows it (`qwen3:8b`) and with the whole name
    (`registry.ollama.ai/library/qwen3:8b`). One without a tag and without `*` means the tag `latest`, as in Ollama.
    Case is ignored. An invalid name matches only `*`.
    """
    try:
        parsed = parse_name(name)
    except ValueError:
        return "*" in patterns
    names = (parsed.shortest, parsed.full)
    return any(_pattern(pattern).fullmatch(each) is not None for pattern in patterns for each in names)


@lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str]:
    text = text.strip().lower()
    if "*" not in text and text.rfind(":") <= text.rfind("/"):
        text += ":latest"
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(character) or re.escape(character) for character in text), re.DOTALL)
