"""Reads who a request is from, and its priority and layout, from its headers. Pure.

With an access key the client is that key's user, whatever else the request says. Without one, what a client says of
itself only affects fairness and cache affinity, so a false claim gains nothing but another client's place in the
queue. Keys are secrets: only a digest of them is ever kept, logged or shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

from router.domain.access_key import PRIORITIES, AccessKey
from router.domain.gpu import Gpu, GpuUuid
from router.domain.request import Layout, LayoutKind
from router.errors import BadRequest, LayoutUnavailable
from router.http1.headers import HeaderLookup

GpuLookup = Callable[[], Mapping[GpuUuid, Gpu]]
"""The GPUs there are now."""

LAYOUT_HEADER = "X-Llamayard-Layout"
PRIORITY_HEADER = "X-Llamayard-Priority"

NO_KEYS = frozenset(
    {"", "ollama", "unused", "none", "null", "dummy", "x", "no-key", "not-needed", "sk-no-key-required"}
)
"""Placeholder keys from client manuals: they do not distinguish one client from another."""

_SCHEMES = frozenset({"bearer", "basic"})
_NAME_CHARACTERS_MAX = 64
_DIGEST_CHARACTERS = 12
_UNSAFE = re.compile(r"[^\w.@:+-]", re.ASCII)
_LAYOUT_FORMS = "single, spread, or gpu: with a GPU's UUID or index"


def client_of(header: HeaderLookup, address: str, access_key: AccessKey | None = None) -> str:
    """The access key's user. Without such a key: the key (`Authorization`, or Anthropic's `X-Api-Key`) and the user
    named by the client; else its address."""
    if access_key is not None:
        user = _sanitized(header("x-openwebui-user-id")) if access_key.forwards_users else ""
        return f"key:{access_key.user}/user:{user}" if user else f"key:{access_key.user}"
    key = _key_digest(header("authorization") or header("x-api-key"))
    user = _sanitized(header("x-openwebui-user-id"))
    parts = [f"key:{key}"] if key else []
    parts += [f"user:{user}"] if user else []
    return "/".join(parts) or address


def session_of(header: HeaderLookup) -> str:
    """The conversation that the request belongs to; "" where the client names none."""
    return _sanitized(header("x-session-id")) or _sanitized(header("x-openwebui-chat-id"))


def priority_of(header: HeaderLookup) -> int | None:
    """None where the header is absent.

    Raises:
        BadRequest: the header names no priority.
    """
    text = header(PRIORITY_HEADER.lower())
    if text is None:
        return None
    name = text.strip().lower()
    if name not in PRIORITIES:
        raise BadRequest(f"{PRIORITY_HEADER}: unknown priority {text.strip()!r}; use low, normal or high")
    return PRIORITIES[name]


def layout_of(header: HeaderLookup, gpus: GpuLookup) -> Layout | None:
    """
    Raises:
        BadRequest: the header names no layout.
        LayoutUnavailable: it names a GPU that does not exist.
    """
    text = header(LAYOUT_HEADER.lower())
    return parse_layout(text, gpus()) if text else None


def parse_layout(text: str, gpus: Mapping[GpuUuid, Gpu]) -> Layout:
    """Parses `single`, `spread`, `gpu:0` or `gpu:GPU-8a0c…`.

    Raises:
        BadRequest: none of these.
        LayoutUnavailable: there is no such GPU.
    """
    kind, _, gpu = text.strip().partition(":")
    kind, gpu = kind.strip().lower(), gpu.strip()
    if kind in ("single", "spread") and not gpu:
        return Layout(LayoutKind(kind))
    if kind != "gpu" or not gpu:
        raise BadRequest(f"{LAYOUT_HEADER}: unknown layout {text.strip()!r}; use {_LAYOUT_FORMS}")
    found = next((g for g in gpus.values() if gpu in (str(g.index), g.uuid) or gpu.lower() == g.uuid.lower()), None)
    if found is None:
        present = ", ".join(f"{g.index} ({g.uuid})" for g in sorted(gpus.values(), key=lambda g: g.index)) or "none"
        raise LayoutUnavailable(f"{LAYOUT_HEADER}: there is no GPU {gpu!r}; GPUs here: {present}")
    return Layout(LayoutKind.GPU, found.uuid)


def _key_digest(authorization: str | None) -> str:
    """A digest of the key; "" where there is none, or only a placeholder."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    key = key.strip() or ("" if scheme.lower() in _SCHEMES else scheme)
    if key.lower() in NO_KEYS:
        return ""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:_DIGEST_CHARACTERS]


def _sanitized(text: str | None) -> str:
    """Fit for logs: plain characters, bounded length."""
    return _UNSAFE.sub("", text or "")[:_NAME_CHARACTERS_MAX]
