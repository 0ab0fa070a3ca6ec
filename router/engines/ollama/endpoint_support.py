"""Finds out which of the newer endpoints a server has; once per server and version.

Otherwise a request for `/v1/messages` to a server without that endpoint would first load its model and then fail. The
check is an empty request: a server that knows the path refuses it with an error other than the 404 for unknown paths.
The router does not translate between APIs.
"""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web

from router.domain.instance import InstanceView
from router.errors import InstanceLost, NotSupported

_CHECK_SECONDS = 10.0
_YOUNG = ("/v1/responses", "/v1/messages", "/v1/images/", "/v1/audio/")
_UNKNOWN_PATH = b"404 page not found"


def is_young(path: str) -> bool:
    """Returns True if the path is new enough that a supported server may lack it."""
    return path.startswith(_YOUNG)


class EndpointSupport:
    """Caches results by server and version, so that an upgraded server is checked again."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._known: dict[tuple[str, str, str], bool] = {}

    def known(self, view: InstanceView, path: str) -> bool | None:
        """Returns whether the server has the path; None if it was not checked yet."""
        return True if not is_young(path) else self._known.get(_key(view, path))

    async def has(self, view: InstanceView, path: str) -> bool:
        """Returns whether the server has the path; checks it if necessary.

        Raises:
            InstanceLost: the server cannot be reached.
        """
        is_supported = self.known(view, path)
        if is_supported is None:
            is_supported = self._known[_key(view, path)] = await self._check(view, path)
        return is_supported

    async def _check(self, view: InstanceView, path: str) -> bool:
        try:
            url = view.spec.url + path
            async with asyncio.timeout(_CHECK_SECONDS), self._session.post(url, allow_redirects=False) as reply:
                beginning = await reply.content.read(len(_UNKNOWN_PATH))
                return reply.status != web.HTTPNotFound.status_code or beginning != _UNKNOWN_PATH
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise InstanceLost(f"{view.spec.name} cannot be asked whether it has {path}: {error}") from error


def refuse_missing(view: InstanceView, path: str) -> None:
    """Refuses a missing endpoint in the format of its API; for other paths the 404 of the server is enough.

    Raises:
        NotSupported: a path of the OpenAI or Anthropic chat APIs.
    """
    if path in ("/v1/responses", "/v1/messages"):
        raise NotSupported(
            f"the servers run Ollama {view.version or 'of an unknown version'}, which does not have {path}: upgrade "
            "Ollama, or use /v1/chat/completions"
        )


def _key(view: InstanceView, path: str) -> tuple[str, str, str]:
    return view.spec.url, view.version or "", path
