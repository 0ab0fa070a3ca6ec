"""Names that stand for models, and models that stand in for others: what the operator has written, looked up.

Pure. An alias leads to its model once, never to another alias. A fallback is tried only for the reasons that it was
given for. What a name is replaced with goes to the server in the body, and to the client in a header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from router.domain.model_names import canonical

ANY = "*"
"""The key of what holds for all models without an entry of their own."""

REASONS: Mapping[str, str] = {
    "model_not_found": "unknown_model",
    "model_too_large": "too_large",
    "queue_full": "queue_full",
}
"""Stable code of an error -> the reason for a fallback; other errors have none."""


@dataclass(frozen=True, slots=True)
class Fallback:
    to: tuple[str, ...]
    """Names as written, in order."""
    reasons: frozenset[str]


@dataclass(frozen=True, slots=True)
class Substitutes:
    """Keys are canonical names or `ANY`; build it with `substitutes`."""

    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    fallbacks: Mapping[str, Fallback] = field(default_factory=dict[str, Fallback])
    listed: tuple[str, ...] = ()
    """Aliases that are shown among the models, as written."""

    def target(self, model: str) -> str | None:
        """The model that an alias stands for; None for a name that is no alias."""
        if not self.aliases:
            return None
        key = _key(model)
        return None if key is None else self.aliases.get(key)

    def instead_of(self, asked: str, tried: Iterable[str], code: str) -> str | None:
        """The next model for a request that named `asked`, after those `tried` failed, the last with `code`."""
        if not self.fallbacks:
            return None
        reason = REASONS.get(code)
        names = [asked, self.target(asked) or asked]
        keys = [key for key in (*map(_key, names), ANY) if key is not None and key in self.fallbacks]
        if not keys or reason not in self.fallbacks[keys[0]].reasons:
            return None
        seen = {_key(name) for name in tried}
        return next((name for name in self.fallbacks[keys[0]].to if _key(name) not in seen), None)


def substitutes(
    aliases: Mapping[str, str], fallbacks: Mapping[str, tuple[Iterable[str], Iterable[str]]], *, listed: bool = False
) -> Substitutes:
    """From names as written. `fallbacks`: model -> (models to try, reasons). `listed`: whether aliases are shown."""
    return Substitutes(
        aliases={canonical(name): target for name, target in aliases.items()},
        fallbacks={
            name if name == ANY else canonical(name): Fallback(tuple(to), frozenset(reasons))
            for name, (to, reasons) in fallbacks.items()
        },
        listed=tuple(aliases) if listed else (),
    )


def _key(name: str) -> str | None:
    try:
        return canonical(name)
    except ValueError:
        return None
