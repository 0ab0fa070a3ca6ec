"""Health check of a server: requests its version, over a new connection each time.

A pooled connection would not show that a server no longer accepts any.
"""

from __future__ import annotations

from typing import Any

import aiohttp

from router.engines.base import NotAsked, ProbeFailed
from router.errors import is_out_of_descriptors


async def probe_version(url: str, timeout_seconds: float) -> str:
    """The version of the server at `url` (no path).

    Raises:
        ProbeFailed: no valid answer within the timeout.
        NotAsked: the router has no file descriptor left.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    connector = aiohttp.TCPConnector(force_close=True, limit=1)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(f"{url}/api/version", allow_redirects=False) as reply,
        ):
            if reply.status != 200:
                raise ProbeFailed(f"{url}/api/version answers {reply.status}")
            return _version(await reply.json(content_type=None))
    except TimeoutError as error:
        raise ProbeFailed(f"{url}/api/version does not answer within {timeout_seconds:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if is_out_of_descriptors(error):
            raise NotAsked(f"{url}/api/version: {error}") from error
        raise ProbeFailed(f"{url}/api/version: {error}") from error


def _version(reply: Any) -> str:
    version = reply.get("version") if isinstance(reply, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] (JSON)
    if not isinstance(version, str):
        raise ProbeFailed(f"this is no Ollama: /api/version answers {str(reply)[:100]!r}")  # pyright: ignore[reportUnknownArgumentType] (JSON)
    return version
