"""What the router itself asks of a server that has OpenAI's API: whether it is well, and which paths it has.

Each call is over a connection of its own, since a pooled one would not show that a server accepts no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiohttp
import msgspec

from router.engines.base import NotAsked, ProbeFailed
from router.errors import UNREADABLE_JSON, is_out_of_descriptors

_MODELS = "/v1/models"
_ERROR_CHARACTERS = 300
_CHECK_SECONDS = 10.0
_MISSING = frozenset((404, 405))


class _Row(msgspec.Struct, frozen=True):
    id: str = ""


class _Models(msgspec.Struct, frozen=True):
    data: tuple[_Row, ...]


async def listed_models(url: str, headers: Mapping[str, str], timeout_seconds: float) -> tuple[str, ...]:
    """The server's own names of its models.

    Raises:
        ProbeFailed: no usable answer within the timeout.
        NotAsked: the router has no file descriptor left.
    """
    where = url + _MODELS
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            _session(headers) as session,
            session.get(where, allow_redirects=False) as reply,
        ):
            status, raw = reply.status, await reply.read()
        if status != 200:
            raise ProbeFailed(f"{where} answers {status}: {raw[:_ERROR_CHARACTERS].decode(errors='replace')}")
        return tuple(row.id for row in msgspec.json.decode(raw, type=_Models).data)
    except TimeoutError as error:
        raise ProbeFailed(f"{where} does not answer within {timeout_seconds:g} s") from error
    except UNREADABLE_JSON as error:
        raise ProbeFailed(f"{where} does not list models as OpenAI's API does: {error}") from error
    except (aiohttp.ClientError, OSError) as error:
        if is_out_of_descriptors(error):
            raise NotAsked(f"{where}: {error}") from error
        raise ProbeFailed(f"{where}: {error}") from error


async def has_path(url: str, path: str, headers: Mapping[str, str]) -> bool:
    """Whether the server has the path: an empty request to one that it has is refused otherwise than by 404 or 405.

    Raises:
        ProbeFailed: it cannot be asked.
    """
    try:
        async with (
            asyncio.timeout(_CHECK_SECONDS),
            _session(headers) as session,
            session.post(url + path, json={}, allow_redirects=False) as reply,
        ):
            return reply.status not in _MISSING
    except TimeoutError as error:
        raise ProbeFailed(f"{url}{path} does not answer within {_CHECK_SECONDS:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ProbeFailed(f"{url}{path}: {error}") from error


async def is_healthy(url: str, timeout_seconds: float) -> bool:
    """Whether the server answers its health check with 200 in time."""
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            _session({}) as session,
            session.get(url, allow_redirects=False) as reply,
        ):
            return reply.status == 200
    except (TimeoutError, aiohttp.ClientError, OSError):
        return False


async def answers(url: str, model: str, *, is_embedding: bool) -> None:
    """Asks for one token, or one vector. Its caller sets a deadline.

    Raises:
        ProbeFailed: the server refused it, or did not answer.
    """
    path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    if is_embedding:
        path, body = "/v1/embeddings", {"input": "hi"}
    try:
        async with (
            _session({}) as session,
            session.post(url + path, json={"model": model, **body}, allow_redirects=False) as reply,
        ):
            raw = await reply.read()
    except (aiohttp.ClientError, OSError) as error:
        raise ProbeFailed(f"{url}{path}: {error}") from error
    if reply.status != 200:
        raise ProbeFailed(f"{url}{path} answers {reply.status}: {raw[:_ERROR_CHARACTERS].decode(errors='replace')}")


def _session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=1), headers=headers)
