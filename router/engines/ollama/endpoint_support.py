"""Which of the younger endpoints the servers behind have: asked of a server once for each of its versions.

A request for `/v1/messages` to a server without it would else load its model first and fail then. A server is asked
with an empty request, which it refuses in its own words where it knows the path. Nothing is translated: what the
servers cannot do is refused, clearly.
"""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web

from router.domain.instance import InstanceView
from router.errors import InstanceLost, NotSupported

_ASK_SECONDS = 10.0
_YOUNG = ("/v1/responses", "/v1/messages", "/v1/images/", "/v1/audio/")
_UNKNOWN_PATH = b"404 page not found"


def is_young(path: str) -> bool:
    """Whether the path came to Ollama late enough that a server in use may lack it."""
    return path.startswith(_YOUNG)


class EndpointSupport:
    """Remembers answers by version; a server that is replaced by another version is asked anew."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._known: dict[tuple[str, str, str], bool] = {}

    def known(self, view: InstanceView, path: str) -> bool | None:
        """Whether the server has the path; None where it has not been asked yet."""
        return True if not is_young(path) else self._known.get(_key(view, path))

    async def has(self, view: InstanceView, path: str) -> bool:
        """Whether the server has the path.

        Raises:
            InstanceLost: it cannot be asked.
        """
        known = self.known(view, path)
        if known is None:
            known = self._known[_key(view, path)] = await self._ask(view, path)
        return known

    async def _ask(self, view: InstanceView, path: str) -> bool:
        try:
            async with asyncio.timeout(_ASK_SECONDS), self._session.post(view.spec.url + path) as reply:
                words = await reply.content.read(len(_UNKNOWN_PATH))
                return reply.status != web.HTTPNotFound.status_code or words != _UNKNOWN_PATH
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise InstanceLost(f"{view.spec.name} cannot be asked whether it has {path}: {error}") from error


def refuse_missing(view: InstanceView, path: str) -> None:
    """Says clearly that an API is not there, in that API's own form; for other paths the server's own 404 will do.

    Raises:
        NotSupported: a path of the OpenAI or Anthropic chat APIs.
    """
    if path in ("/v1/responses", "/v1/messages"):
        raise NotSupported(
            f"the servers behind this endpoint run Ollama {view.version or 'of an unknown version'}, which has no "
            f"{path}: a newer Ollama has it, and /v1/chat/completions works with this one"
        )


def _key(view: InstanceView, path: str) -> tuple[str, str, str]:
    return view.spec.url, view.version or "", path
