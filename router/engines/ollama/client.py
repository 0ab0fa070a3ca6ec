"""Typed client of one Ollama server, for the router's own calls. Clients' requests do not pass through it.

Every call has a deadline and ends in a value or an `OllamaError`. An unreadable response is an error, never an empty
result: if listing the loaded models fails, that does not mean that there are none. There are no retries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import aiohttp
import msgspec

from router.domain.events import LoadedModel
from router.domain.measured_speed import MeasuredSpeed
from router.engines.base import EngineError
from router.engines.ollama.http_get import CONNECT_SECONDS, KeptConnections, is_plain
from router.errors import UNREADABLE_JSON, InstanceLost, InstanceUnreachable

UNREACHABLE = 502
"""Status of an error of the client itself: no connection, or it was lost."""
TIMED_OUT = 504
"""Status of an error of the client itself: the deadline of the call passed."""

_FOR_EVER = -1
_PROBE = " ".join(f"{number} is followed by {number + 1}." for number in range(40))
"""A prompt of some 300 tokens, long enough to measure how fast prompts are evaluated."""
_PROBE_TOKENS = 16

_T = TypeVar("_T")


class OllamaError(EngineError):
    """A call failed. `status`: the HTTP status of the server, or UNREACHABLE or TIMED_OUT. `message`: what happened."""


class TagRow(msgspec.Struct, frozen=True):
    """One model of `/api/tags`. `digest`: of the manifest, without `sha256:`; `size`: the sum of all its layers."""

    name: str
    digest: str = ""
    size: int = 0
    remote_host: str = ""
    """Where a cloud model runs; "" for a local model."""


class TensorRow(msgspec.Struct, frozen=True):
    """One tensor of `/api/show`; `shape` is in ggml's order, row length first."""

    name: str
    type: str
    shape: tuple[int, ...]


class ShowReply(msgspec.Struct, frozen=True):
    """The used part of `/api/show`. Values of `model_info` stay JSON: verbose ones contain whole vocabularies."""

    modelfile: str = ""
    parameters: str | None = None
    model_info: dict[str, msgspec.Raw] | None = None
    tensors: tuple[TensorRow, ...] | None = None
    capabilities: tuple[str, ...] | None = None
    projector_info: dict[str, msgspec.Raw] | None = None
    """Of an image encoder in a file of its own, whose tensors are not among `tensors`."""


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


class _Answer(msgspec.Struct, frozen=True):
    """The figures of an answer; durations in nanoseconds."""

    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class _Error(msgspec.Struct, frozen=True):
    error: str = ""


def not_queried(error: OllamaError) -> InstanceLost:
    """The error of a request for which a server had to be queried."""
    kind = InstanceUnreachable if error.status == UNREACHABLE else InstanceLost
    return kind(f"the instance could not be queried: {error.message}")


class OllamaClient:
    """Client of the server at `base_url` (no path). The caller owns `session` and `lists` and closes them.

    All calls raise `OllamaError` if the server cannot be reached, misses the deadline or answers with an error.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        timeout_seconds: float = 10.0,
        lists: KeptConnections | None = None,
    ) -> None:
        """`lists`: connections for what is only read, where the URL allows it; None: `session` for everything."""
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._lists = lists if is_plain(self._base_url) else None

    @property
    def base_url(self) -> str:
        return self._base_url

    async def version(self) -> str:
        """The server's version, e.g. `0.24.0`."""
        return (await self._get("/api/version", _Version)).version

    async def tags(self) -> tuple[TagRow, ...]:
        """The models in the server's store."""
        return (await self._get("/api/tags", _Tags)).models or ()

    async def ps(self) -> tuple[LoadedModel, ...]:
        """The loaded models.

        Raises:
            OllamaError: also while the server cannot list them (0.24 sometimes answers 500 without a body).
        """
        rows = (await self._get("/api/ps", _Ps)).models or ()
        return tuple(LoadedModel(r.name, r.digest, r.size, r.size_vram, r.context_length) for r in rows)

    async def show(self, name: str, *, verbose: bool = False) -> ShowReply:
        """Facts of one model. `verbose` includes the values of arrays, which are null otherwise.

        Raises:
            OllamaError: status 404 if the server does not have the model.
        """
        body = {"model": name, "verbose": True} if verbose else {"model": name}
        return await self._post("/api/show", body, ShowReply)

    async def create(self, name: str, blob: str, timeout_seconds: float) -> None:
        """Creates a model from weights that are already in the store; `blob` is their digest."""
        body = {"model": name, "files": {"model.gguf": blob}, "stream": False}
        await self._call(self._session, "POST", "/api/create", body, timeout_seconds, dict[str, msgspec.Raw])

    async def delete(self, name: str) -> None:
        """Removes a model and those of its files that no other model uses."""
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
        """Loads a model until it is unloaded. Returns when it can serve.

        `num_gpu`: number of layers on the GPUs, instead of the server's estimate; None: the server decides.
        The call uses its own connection, so that cancelling the call aborts the load.
        """
        sent_options: dict[str, int | bool] = dict(options)
        if num_gpu is not None:
            sent_options["num_gpu"] = num_gpu
        body: dict[str, Any] = {"model": name, "keep_alive": _FOR_EVER}
        if sent_options:
            body["options"] = sent_options
        if embedding:  # `/api/generate` refuses models that cannot generate
            await self._residency("/api/embed", body, timeout_seconds)
        else:
            await self._residency("/api/generate", {**body, "stream": False}, timeout_seconds)

    async def measured_speed(
        self, name: str, options: Mapping[str, int | bool], timeout_seconds: float
    ) -> MeasuredSpeed | None:
        """How fast a loaded model answers one short request; None where the server does not say."""
        body = {"model": name, "prompt": _PROBE, "raw": True, "stream": False, "keep_alive": _FOR_EVER,
                "options": {**options, "num_predict": _PROBE_TOKENS, "temperature": 0}}  # fmt: skip
        found = await self._call(self._session, "POST", "/api/generate", body, timeout_seconds, _Answer)
        if min(found.prompt_eval_count, found.prompt_eval_duration, found.eval_count, found.eval_duration) <= 0:
            return None
        prompt = found.prompt_eval_duration / 1e9 / found.prompt_eval_count
        return MeasuredSpeed(prompt, found.eval_duration / 1e9 / found.eval_count)

    async def unload(self, name: str, timeout_seconds: float | None = None) -> None:
        """Requests that a model be unloaded when its running requests have ended. Does not wait for that.

        Embedding models use `/api/generate` too: it unloads before it checks the model's capabilities
        (server/routes.go, v0.11.4 and v0.24). `/api/embed` would first load a model that is not loaded, or that is
        loaded with other options.
        """
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        await self._residency("/api/generate", {"model": name, "keep_alive": 0, "stream": False}, seconds)

    async def _residency(self, path: str, body: Mapping[str, Any], timeout_seconds: float) -> None:
        connector = aiohttp.TCPConnector(force_close=True, limit=1)
        async with aiohttp.ClientSession(connector=connector, headers=self._session.headers) as session:
            await self._call(session, "POST", path, body, timeout_seconds, dict[str, msgspec.Raw])

    async def _get(self, path: str, kind: type[_T]) -> _T:
        if self._lists is None:
            return await self._call(self._session, "GET", path, None, self._timeout_seconds, kind)
        call = f"GET {self._base_url}{path}"
        try:
            async with asyncio.timeout(self._timeout_seconds):
                status, raw = await self._lists.get(self._base_url, path)
        except TimeoutError as error:
            raise OllamaError(TIMED_OUT, f"{call}: no answer within {self._timeout_seconds:g} s") from error
        except OSError as error:
            raise OllamaError(UNREACHABLE, f"{call}: {error or type(error).__name__}") from error
        return _read(call, status, raw, kind)

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
        call = f"{method} {self._base_url}{path}"
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                session.request(
                    method, self._base_url + path, data=data, headers=headers, timeout=timeout, allow_redirects=False
                ) as reply,
            ):
                raw = await reply.read()
        except TimeoutError as error:
            raise OllamaError(TIMED_OUT, f"{call}: no answer within {timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise OllamaError(UNREACHABLE, f"{call}: {error or type(error).__name__}") from error
        return _read(call, reply.status, raw, kind)


def _read(call: str, status: int, raw: bytes, kind: type[_T]) -> _T:
    """The decoded response.

    Raises:
        OllamaError: the status is not 200, the body has an `error`, or the body is unreadable.
    """
    message = _error_message(raw)
    if status != 200:
        raise OllamaError(status, message or f"{call}: status {status} without an error message")
    if message:
        raise OllamaError(500, message)  # 0.11.4 may answer 200 with an error in the body
    if kind is bytes:  # the content does not matter
        return cast("_T", raw)
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNREADABLE_JSON as error:
        raise OllamaError(UNREACHABLE, f"{call}: unreadable answer: {error}") from error


def _error_message(raw: bytes) -> str:
    try:
        return msgspec.json.decode(raw, type=_Error).error
    except UNREADABLE_JSON:
        return ""
