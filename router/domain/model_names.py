"""Model names in every form that Ollama takes, and one identity for each.

A written name is `[scheme://][host/][namespace/]model[:tag][:source]`, as `types/model/name.go` (v0.11.4 to v0.24) and
`internal/modelref/modelref.go` (v0.24) read it: letter case and blanks around it are ignored, `:latest` and
`registry.ollama.ai/library` are left out where they are meant, and a source suffix says where the model runs: `:local`,
`:cloud`, or a tag that ends in `-cloud`. It says what a name means, not whether such a model exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

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
        """As `/api/tags` prints it: with its tag, without the defaults before it."""
        if self.host != DEFAULT_HOST:
            return self.full
        if self.namespace != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"


def parse_name(text: str) -> Name:
    """The one identity of a written name.

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
        tag = f"{tag}-cloud" if tag else "cloud"  # as the stored names of such models are spelled
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
"""The same names recur; long ones are not worth remembering."""


def canonical(text: str) -> str:
    """The key under which every form of a name is one: `registry.ollama.ai/library/tiny:latest`.

    Raises:
        ValueError: Ollama would answer `invalid model name`.
    """
    return _canonical_short(text) if len(text) <= _SHORT else _parse(text).full


@lru_cache(maxsize=4096)
def _canonical_short(text: str) -> str:
    """Remembered whole, because a warm request looks its model up by this."""
    return _parse(text).full


def shortest(text: str) -> str:
    """The shortest form with its tag, lower-cased: `tiny:latest`.

    Raises:
        ValueError: Ollama would answer `invalid model name`.
    """
    return parse_name(text).shortest


def is_cloud(text: str) -> bool:
    """True for names that ollama.com runs: `gpt-oss:20b:cloud`, `gpt-oss:20b-cloud`, `qwen3:cloud`. Never raises."""
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
    """The name without its tag, and the tag or None; a colon before the last slash belongs to a host's port."""
    if text.rfind(":") <= text.rfind("/"):
        return text, None
    rest, _, tag = text.rpartition(":")
    return rest, tag


def _without_scheme(host: str) -> str:
    _, separator, rest = host.partition("://")
    return rest if separator else host
