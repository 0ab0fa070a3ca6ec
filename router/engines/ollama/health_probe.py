"""Health check of a server: requests its version, over a new connection each time.

A pooled connection would not show that a server no longer accepts any.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from router.engines.base import NotAsked, ProbeFailed
from router.engines.ollama.http_get import Reply, get_once, is_plain
from router.errors import UNREADABLE_JSON, is_out_of_descriptors

_PATH = "/api/version"

_ERROR_CHARACTERS = 300


class _ErrorReply(msgspec.Struct, frozen=True):
    error: str


async def probe_version(url: str, timeout_seconds: float, headers: Mapping[str, str]) -> str:
    """The version of the server at `url` (no path).

    Raises:
        ProbeFailed: no valid answer within the timeout.
        NotAsked: the router has no file descriptor left.
    """
    try:
        get = get_once(url, _PATH, headers) if is_plain(url) else _get_with_library(url + _PATH, headers)
        async with asyncio.timeout(timeout_seconds):
            status, raw = await get
        if status != 200:
            raise ProbeFailed(f"{url}{_PATH} answers {status}{_error(raw)}")
        return _version(msgspec.json.decode(raw))
    except TimeoutError as error:
        raise ProbeFailed(f"{url}{_PATH} does not answer within {timeout_seconds:g} s") from error
    except (aiohttp.ClientError, OSError, *UNREADABLE_JSON) as error:
        if is_out_of_descriptors(error):
            raise NotAsked(f"{url}{_PATH}: {error}") from error
        raise ProbeFailed(f"{url}{_PATH}: {error}") from error


async def _get_with_library(url: str, headers: Mapping[str, str]) -> Reply:
    connector = aiohttp.TCPConnector(force_close=True, limit=1)
    async with (
        aiohttp.ClientSession(connector=connector, headers=headers) as session,
        session.get(url, allow_redirects=False) as reply,
    ):
        return reply.status, await reply.read()


def _error(body: bytes) -> str:
    """A server's or a router's own words, where there are any."""
    with contextlib.suppress(*UNREADABLE_JSON):
        return ": " + msgspec.json.decode(body, type=_ErrorReply).error[:_ERROR_CHARACTERS]
    return ""


def _version(reply: Any) -> str:
    version = reply.get("version") if isinstance(reply, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] (JSON)
    if not isinstance(version, str):
        raise ProbeFailed(f"this is no Ollama: /api/version answers {str(reply)[:100]!r}")  # pyright: ignore[reportUnknownArgumentType] (JSON)
    return version
