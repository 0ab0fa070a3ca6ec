"""Asks a server for its version, the cheapest sign of life. Opens a connection of its own each time.

A pooled connection would not show that a server no longer accepts any.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

Probe = Callable[[str, float], Awaitable[str]]
"""URL of a server, deadline in seconds -> its version. Raises ProbeFailed."""


class ProbeFailed(Exception):
    """No version came; the text says why."""


def version_probe(session: aiohttp.ClientSession) -> Probe:
    """A probe over the session, which should not keep connections (`TCPConnector(force_close=True)`)."""

    async def probe(url: str, timeout_seconds: float) -> str:
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            async with session.get(f"{url}/api/version", timeout=timeout, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise ProbeFailed(f"{url}/api/version answers {answer.status}")
                return _version(await answer.json(content_type=None))
        except TimeoutError as error:
            raise ProbeFailed(f"{url}/api/version does not answer within {timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ProbeFailed(f"{url}/api/version: {error}") from error

    return probe


def _version(answer: Any) -> str:
    version = answer.get("version") if isinstance(answer, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] (JSON)
    if not isinstance(version, str):
        raise ProbeFailed(f"this is no Ollama: /api/version answers {str(answer)[:100]!r}")  # pyright: ignore[reportUnknownArgumentType] (JSON)
    return version
