"""Typed client of one Ollama server: what the router itself asks of it. Clients' requests do not pass through here.

Every call has a deadline and ends in a value or in an `OllamaError`. An answer that cannot be read is an error, never
an empty result: a server that fails to list its loaded models is not a server without any. It retries nothing, decides
nothing and holds no state but its session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import aiohttp
import msgspec

from router.domain.events import LoadedModel
from router.engines.base import EngineError

UNREACHABLE = 502
"""Status of an error that no server sent: no connection, or one that broke."""
TIMED_OUT = 504
"""Status of an error that no server sent: the call's deadline passed."""

CONNECT_SECONDS = 5.0
_FOR_EVER = -1

_T = TypeVar("_T")


class OllamaError(EngineError):
    """A call that did not succeed. `status` is the server's, or UNREACHABLE or TIMED_OUT; `message` is its text."""


class TagRow(msgspec.Struct, frozen=True):
    """One model of `/api/tags`. `digest` is the manifest's, without `sha256:`; `size` the sum of all its layers."""

    name: str
    digest: str = ""
    size: int = 0
    remote_host: str = ""
    """Where a cloud model really runs; "" for one of this server."""


class TensorRow(msgspec.Struct, frozen=True):
    """One tensor of `/api/show`; `shape` is ggml's, the row length first."""

    name: str
    type: str
    shape: tuple[int, ...]


class ShowReply(msgspec.Struct, frozen=True):
    """`/api/show`, as far as it is used. Values of `model_info` stay JSON: verbose ones hold whole vocabularies."""

    modelfile: str = ""
    parameters: str | None = None
    model_info: dict[str, msgspec.Raw] | None = None
    tensors: tuple[TensorRow, ...] | None = None
    capabilities: tuple[str, ...] | None = None


class _Version(msgspec.Struct, frozen=True):
    version: str


class _Tags(msgspec.Struct, frozen=True):
    models: tuple[TagRow, ...] | None


class _PsRow(msgspec.Struct, frozen=True):
    name: str
    digest: str
    size: int
    size_vram: int
    context_length: int | None = None


class _Ps(msgspec.Struct, frozen=True):
    models: tuple[_PsRow, ...] | None


class _Error(msgspec.Struct, frozen=True):
    error: str = ""


class OllamaClient:
    """Client of the server at `base_url` (no path). `session` stays the caller's, who closes it."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, timeout_seconds: float = 10.0) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds

    @property
    def base_url(self) -> str:
        return self._base_url

    async def version(self) -> str:
        """The server's version, e.g. `0.24.0`."""
        return (await self._get("/api/version", _Version)).version

    async def tags(self) -> tuple[TagRow, ...]:
        """The models of the server's store."""
        return (await self._get("/api/tags", _Tags)).models or ()

    async def ps(self) -> tuple[LoadedModel, ...]:
        """The loaded models. Raises where the server cannot say (0.24 answers 500 with no body now and then)."""
        rows = (await self._get("/api/ps", _Ps)).models or ()
        return tuple(LoadedModel(r.name, r.digest, r.size, r.size_vram, r.context_length) for r in rows)

    async def show(self, name: str, *, verbose: bool = False) -> ShowReply:
        """Facts of one model. `verbose` adds the values of arrays, which are null without it.

        Raises:
            OllamaError: 404 for a model that the server does not have.
        """
        body = {"model": name, "verbose": True} if verbose else {"model": name}
        return await self._post("/api/show", body, ShowReply)

    async def create(self, name: str, blob: str, timeout_seconds: float) -> None:
        """Makes a model of weights that are in the store already."""
        body = {"model": name, "files": {"model.gguf": blob}, "stream": False}
        await self._call(self._session, "POST", "/api/create", body, timeout_seconds, dict[str, msgspec.Raw])

    async def delete(self, name: str) -> None:
        """Removes a model, and of its files those that no other names."""
        await self._call(self._session, "DELETE", "/api/delete", {"model": name}, self._timeout_seconds, bytes)

    async def load(
        self,
        name: str,
        options: Mapping[str, int | bool],
        *,
        embedding: bool,
        timeout_seconds: float,
        num_gpu: int | None = None,
    ) -> None:
        """Loads a model to stay until it is unloaded, and returns when it can serve.

        `num_gpu`: layers to put on the GPUs, overruling the server's estimate; None leaves it to the server.
        The call has a connection of its own, closed behind it: to break it off is to abort the load.
        """
        wanted: dict[str, int | bool] = dict(options)
        if num_gpu is not None:
            wanted["num_gpu"] = num_gpu
        body: dict[str, Any] = {"model": name, "keep_alive": _FOR_EVER, **({"options": wanted} if wanted else {})}
        if embedding:  # `/api/generate` refuses models that cannot generate
            await self._residency("/api/embed", body, timeout_seconds)
        else:
            await self._residency("/api/generate", {**body, "stream": False}, timeout_seconds)

    async def unload(self, name: str, timeout_seconds: float | None = None) -> None:
        """Asks for a model to be unloaded once its running requests end; returns before that.

        Embedding models too go through `/api/generate`, which unloads before it looks at what a model can do
        (server/routes.go, v0.11.4 and v0.24). `/api/embed` would first load a model that is not loaded, or that is
        loaded with other options.
        """
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        await self._residency("/api/generate", {"model": name, "keep_alive": 0, "stream": False}, seconds)

    async def _residency(self, path: str, body: Mapping[str, Any], timeout_seconds: float) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=1)) as session:
            await self._call(session, "POST", path, body, timeout_seconds, dict[str, msgspec.Raw])

    async def _get(self, path: str, kind: type[_T]) -> _T:
        return await self._call(self._session, "GET", path, None, self._timeout_seconds, kind)

    async def _post(self, path: str, body: Mapping[str, Any], kind: type[_T]) -> _T:
        return await self._call(self._session, "POST", path, body, self._timeout_seconds, kind)

    async def _call(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_seconds: float,
        kind: type[_T],
    ) -> _T:
        what = f"{method} {self._base_url}{path}"
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                session.request(method, self._base_url + path, data=data, headers=headers, timeout=timeout) as reply,
            ):
                raw = await reply.read()
        except TimeoutError as error:
            raise OllamaError(TIMED_OUT, f"{what}: no answer within {timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise OllamaError(UNREACHABLE, f"{what}: {error or type(error).__name__}") from error
        return _read(what, reply.status, raw, kind)


def _read(what: str, status: int, raw: bytes, kind: type[_T]) -> _T:
    """The answer's value; an error for another status than 200 and for one that carries an `error`."""
    words = _error_words(raw)
    if status != 200:
        raise OllamaError(status, words or f"{what}: status {status} without a word")
    if words:
        raise OllamaError(500, words)  # 0.11.4 may say 200 and put the error in the body
    if kind is bytes:  # what it says does not matter
        return cast("_T", raw)
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.MsgspecError as error:
        raise OllamaError(UNREACHABLE, f"{what}: unreadable answer: {error}") from error


def _error_words(raw: bytes) -> str:
    try:
        return msgspec.json.decode(raw, type=_Error).error
    except msgspec.MsgspecError:
        return ""
