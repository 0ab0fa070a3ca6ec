"""Parses model names in every form that Ollama accepts, and gives each a canonical form.

A name is `[scheme://][host/][namespace/]model[:tag][:source]`, parsed like `types/model/name.go` (v0.11.4 to v0.24) and
`internal/modelref/modelref.go` (v0.24): letter case and surrounding blanks are ignored, the defaults `:latest` and
`registry.ollama.ai/library` can be omitted, and the source suffix says where the model runs: `:local`, `:cloud`, or a
tag that ends in `-cloud`. Whether the model exists is not checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

ANY_MODEL = "*"
"""In place of a name: the rule for all models without their own."""

_SHORT = 512
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")


@dataclass(frozen=True, slots=True)
class Name:
    """A fully qualified name, lower-cased."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def full(self) -> str:
        """`registry.ollama.ai/library/tiny:latest`."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def shortest(self) -> str:
        """As in `/api/tags`: with the tag, without default host and namespace."""
        if self.host != DEFAULT_HOST:
            return self.full
        if self.namespace != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"


def parse_name(text: str) -> Name:
    """The canonical name.

    Raises:
        ValueError: Ollama would answer `invalid model name`.
    """
    return _parse_short(text) if len(text) <= _SHORT else _parse(text)


def _parse(text: str) -> Name:
    base, source = _cut_source(text.strip())
    if source and _cut_source(base)[1]:
        raise ValueError(f"invalid model name: {text!r}: use either :local or :cloud, not both")
    rest, tag = _cut_tag(base)
    if source == "cloud":
        tag = f"{tag}-cloud" if tag else "cloud"  # as in the stored names of these models
    tag = DEFAULT_TAG if tag is None else tag
    parts = rest.rsplit("/", 2)
    model = parts[-1]
    namespace = parts[-2] if len(parts) > 1 else DEFAULT_NAMESPACE
    host = _without_scheme(parts[0]) if len(parts) > 2 else DEFAULT_HOST
    valid = (
        _HOST.fullmatch(host) and _NAMESPACE.fullmatch(namespace) and _PART.fullmatch(model) and _PART.fullmatch(tag)
    )
    if not valid:
        raise ValueError(f"invalid model name: {text!r}")
    return Name(host.lower(), namespace.lower(), model.lower(), tag.lower())


_parse_short = lru_cache(maxsize=4096)(_parse)
"""Cached because the same names recur; long names are not cached."""


def canonical(text: str) -> str:
    """One key for all forms of a name: `registry.ollama.ai/library/tiny:latest`.

    Raises:
        ValueError: Ollama would answer `invalid model name`.
    """
    return _canonical_short(text) if len(text) <= _SHORT else _parse(text).full


def rule_key(name: str) -> str:
    """The key of a rule in the configuration: `ANY_MODEL`, or the canonical name. Errors as `canonical`."""
    return name if name == ANY_MODEL else canonical(name)


@lru_cache(maxsize=4096)
def _canonical_short(text: str) -> str:
    """Cached as text, because every request looks its model up by it."""
    return _parse(text).full


def shortest(text: str) -> str:
    """The shortest form with its tag, lower-cased: `tiny:latest`.

    Raises:
        ValueError: Ollama would answer `invalid model name`.
    """
    return parse_name(text).shortest


def is_cloud(text: str) -> bool:
    """True if ollama.com runs the model: `gpt-oss:20b:cloud`, `gpt-oss:20b-cloud`, `qwen3:cloud`. Never raises."""
    return _cut_source(text.strip())[1] == "cloud"


def _cut_source(text: str) -> tuple[str, str]:
    """The name without its source suffix, and the source: `local`, `cloud` or ""."""
    before, colon, after = text.rpartition(":")
    suffix = after.strip().lower()
    if colon and suffix in ("cloud", "local"):
        return before, suffix
    if colon and "/" not in suffix and suffix.endswith("-cloud"):
        return before + colon + after.strip()[: -len("-cloud")], "cloud"
    return text, ""


def _cut_tag(text: str) -> tuple[str, str | None]:
    """The name without its tag, and the tag or None. A colon before the last slash belongs to the port of a host."""
    if text.rfind(":") <= text.rfind("/"):
        return text, None
    rest, _, tag = text.rpartition(":")
    return rest, tag


def _without_scheme(host: str) -> str:
    _, separator, rest = host.partition("://")
    return rest if separator else host
