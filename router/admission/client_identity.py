"""Who asks, and on what terms, read from a request's headers. Pure; it authenticates nobody.

What a client says of itself only shares out slots and finds caches, so that a false word gains nothing but another's
place in the queue. Keys are secrets: only a digest of them is ever kept, logged or shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router.domain.gpu import Gpu, GpuUuid
from router.domain.request import Layout, LayoutKind
from router.errors import BadRequest, LayoutUnavailable

Header = Callable[[str], str | None]
"""A request's header by its name in lower case, None where it is absent."""

LAYOUT_HEADER = "X-Llamayard-Layout"
PRIORITY_HEADER = "X-Llamayard-Priority"

NO_KEYS = frozenset(
    {"", "ollama", "unused", "none", "null", "dummy", "x", "no-key", "not-needed", "sk-no-key-required"}
)
"""Made-up keys that manuals tell people to write where a client demands one: they tell nobody from anybody."""

_PRIORITIES = {"low": -1, "normal": 0, "high": 1}
_SCHEMES = frozenset({"bearer", "basic"})
_NAME_CHARACTERS = 64
_DIGEST_CHARACTERS = 12
_ODD = re.compile(r"[^\w.@:+-]", re.ASCII)
_LAYOUT_WORDS = "single, spread, or gpu: with a GPU's UUID or index"


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Who asks, and on what terms."""

    client: str = ""
    """For fairness and logs: `key:` and a digest, `user:` and a name, both, or the address."""
    session: str = ""
    """The conversation; "" where the client does not tell."""
    priority: int = 0
    layout: Layout | None = None


def identify_client(header: Header, address: str, gpus: Callable[[], Mapping[GpuUuid, Gpu]]) -> ClientIdentity:
    """The asker by its headers, else by its address.

    Raises:
        BadRequest: a header of the router's own that cannot be read.
        LayoutUnavailable: the layout names a GPU that is not there.
    """
    layout = header(LAYOUT_HEADER.lower())
    return ClientIdentity(
        client=client_of(header, address),
        session=_plain(header("x-session-id")) or _plain(header("x-openwebui-chat-id")),
        priority=_priority(header(PRIORITY_HEADER.lower())),
        layout=parse_layout(layout, gpus()) if layout else None,
    )


def client_of(header: Header, address: str) -> str:
    """A key (`Authorization`, or Anthropic's `X-Api-Key`) and the user that it asks for, as told; else the address."""
    key, user = _secret(header("authorization") or header("x-api-key")), _plain(header("x-openwebui-user-id"))
    known = [f"key:{key}"] if key else []
    known += [f"user:{user}"] if user else []
    return "/".join(known) or address


def parse_layout(text: str, gpus: Mapping[GpuUuid, Gpu]) -> Layout:
    """`single`, `spread`, `gpu:0`, `gpu:GPU-8a0c…`.

    Raises:
        BadRequest: none of these.
        LayoutUnavailable: there is no such GPU.
    """
    kind, _, gpu = text.strip().partition(":")
    kind, gpu = kind.strip().lower(), gpu.strip()
    if kind in ("single", "spread") and not gpu:
        return Layout(LayoutKind(kind))
    if kind != "gpu" or not gpu:
        raise BadRequest(f"{LAYOUT_HEADER}: {text.strip()!r} is no layout: write {_LAYOUT_WORDS}")
    found = next((g for g in gpus.values() if gpu in (str(g.index), g.uuid) or gpu.lower() == g.uuid.lower()), None)
    if found is None:
        there = ", ".join(f"{g.index} ({g.uuid})" for g in sorted(gpus.values(), key=lambda g: g.index)) or "none"
        raise LayoutUnavailable(f"{LAYOUT_HEADER}: there is no GPU {gpu!r}; GPUs here: {there}")
    return Layout(LayoutKind.GPU, found.uuid)


def _priority(text: str | None) -> int:
    if text is None:
        return 0
    word = text.strip().lower()
    if word not in _PRIORITIES:
        raise BadRequest(f"{PRIORITY_HEADER}: {text.strip()!r} is no priority: write low, normal or high")
    return _PRIORITIES[word]


def _secret(authorization: str | None) -> str:
    """A digest of the key; "" where there is none that tells anybody apart."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    key = key.strip() or ("" if scheme.lower() in _SCHEMES else scheme)
    if key.lower() in NO_KEYS:
        return ""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:_DIGEST_CHARACTERS]


def _plain(text: str | None) -> str:
    """Fit for logs: plain characters, not too many."""
    return _ODD.sub("", text or "")[:_NAME_CHARACTERS]
