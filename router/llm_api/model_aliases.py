"""The operator's aliases and fallbacks: names that stand for models, and models that may answer for others.

Pure. An alias is resolved once, never to another alias. A fallback is tried only for its configured reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from router.domain.model_names import ANY_MODEL, canonical, rule_key

REASONS: Mapping[str, str] = {
    "model_not_found": "unknown_model",
    "model_too_large": "too_large",
    "queue_full": "queue_full",
}
"""Stable error code -> the reason for a fallback; other errors cause none."""


@dataclass(frozen=True, slots=True)
class Fallback:
    to: tuple[str, ...]
    """Names as written, in order."""
    reasons: frozenset[str]


@dataclass(frozen=True, slots=True)
class Substitutes:
    """Built by `substitutes`. Keys are canonical names or `ANY_MODEL`."""

    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    fallbacks: Mapping[str, Fallback] = field(default_factory=dict[str, Fallback])
    listed: tuple[str, ...] = ()
    """Aliases listed among the models, as written."""

    def target(self, model: str) -> str | None:
        """The model that an alias stands for; None if the name is not an alias."""
        if not self.aliases:
            return None
        key = _key(model)
        return None if key is None else self.aliases.get(key)

    def fallback_for(self, requested: str, tried: Iterable[str], code: str) -> str | None:
        """The next model for a request for `requested`, after those `tried` failed, the last with error `code`."""
        if not self.fallbacks:
            return None
        reason = REASONS.get(code)
        names = [requested, self.target(requested) or requested]
        keys = [key for key in (*map(_key, names), ANY_MODEL) if key is not None and key in self.fallbacks]
        if not keys or reason not in self.fallbacks[keys[0]].reasons:
            return None
        tried_keys = {_key(name) for name in tried}
        return next((name for name in self.fallbacks[keys[0]].to if _key(name) not in tried_keys), None)


def substitutes(
    aliases: Mapping[str, str], fallbacks: Mapping[str, tuple[Iterable[str], Iterable[str]]], *, listed: bool = False
) -> Substitutes:
    """From names as written. `fallbacks`: model -> (models to try, reasons). `listed`: whether aliases are listed."""
    return Substitutes(
        aliases={canonical(name): target for name, target in aliases.items()},
        fallbacks={
            rule_key(name): Fallback(tuple(to), frozenset(reasons)) for name, (to, reasons) in fallbacks.items()
        },
        listed=tuple(aliases) if listed else (),
    )


def _key(name: str) -> str | None:
    try:
        return canonical(name)
    except ValueError:
        return None
