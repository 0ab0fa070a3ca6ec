"""Shared context of the EMULATED server's handlers: store, scheduler, request parsing, error messages."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from router.domain.keep_alive import parse_keep_alive
from router.domain.model_names import Name, is_cloud, parse_name
from router.engines.ollama.blob_store import StoredModel
from router.lab.emulator.completion import RunnerLostMessages
from router.lab.emulator.config import Config
from router.lab.emulator.faults import Behaviour
from router.lab.emulator.go_json import BodyError, EmptyBodyError, Fields, read_struct
from router.lab.emulator.http_server import Request
from router.lab.emulator.loaded_model import LoadedModel
from router.lab.emulator.loader import Loader, LoadError
from router.lab.emulator.model_facts import capabilities
from router.lab.emulator.options import OptionError, Options, read_options
from router.lab.emulator.response_writer import ApiError
from router.lab.emulator.scheduler import BusyError, PendingRequest, Scheduler
from router.lab.emulator.store import Header, Store

BUSY_MESSAGE = "server busy, please try again.  maximum pending requests exceeded"
_CALL_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
CLOUD_DISABLED = "ollama cloud is disabled: remote model is unavailable"


@dataclass(frozen=True, slots=True)
class Service:
    """Parts of one server. `rng` is the random source for everything without a seed."""

    config: Config
    store: Store
    loader: Loader
    scheduler: Scheduler
    behaviour: Callable[[str], Behaviour]
    rng: random.Random

    # --- reading ---

    async def read(self, request: Request, type_name: str, fields: Fields) -> dict[str, Any]:
        """Parses the body of a native request. Raises ApiError."""
        try:
            return read_struct(await request.body(), type_name, fields)
        except EmptyBodyError:
            raise ApiError(400, "missing request body") from None
        except BodyError as error:
            raise ApiError(400, str(error)) from error

    def keep_alive(self, value: Any) -> float | None:
        """Parses a keep-alive into seconds; negative means forever. Raises ApiError."""
        try:
            return parse_keep_alive(value, plain_seconds=False)
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def unloads(self, keep_alive: float | None) -> bool:
        """Whether a request with this keep-alive and nothing to generate unloads; up to 0.24 by whole seconds."""
        return keep_alive is not None and (keep_alive if self.config.is_0_30 else int(keep_alive)) == 0

    def shown_name(self, text: str) -> str:
        """How an error of `/api/show` or `/v1/models/NAME` names a model: from 0.30 with its tag."""
        name = self.name(text) if self.config.is_0_30 else None
        return text if name is None else name.shortest

    def name(self, text: str) -> Name | None:
        """Parses a model name; None if it is invalid. Raises ApiError for a cloud model."""
        if self.config.is_pre_0_12:
            return _name_0_11(text)
        if is_cloud(text):
            raise ApiError(403, CLOUD_DISABLED) if self.config.no_cloud else ApiError(502, "ollama.com is not emulated")
        try:
            return parse_name(text)
        except ValueError:
            return None

    def find(self, text: str) -> StoredModel | None:
        """The model with that name, or None."""
        name = self.name(text)
        return None if name is None else self.store.get(name)

    def header(self, stored: StoredModel) -> Header:
        return self.store.header(stored.weights.digest)

    def capabilities(self, stored: StoredModel) -> tuple[str, ...]:
        return capabilities(stored, self.header(stored))

    # --- using ---

    def options(self, stored: StoredModel, requested_options: Mapping[str, Any]) -> Options:
        """Parses the options of a request. Raises ApiError for an option of the wrong type."""
        try:
            return read_options(requested_options, stored.parameters, self.loader.default_context())
        except OptionError as error:
            raise ApiError(500, str(error)) from error

    @contextlib.asynccontextmanager
    async def loaded_model(
        self, request: Request, stored: StoredModel, options: Options, session_seconds: float | None
    ) -> AsyncGenerator[LoadedModel]:
        """The loaded model, in use for the length of the block. Raises ApiError, ClientDisconnectedError."""
        try:
            loaded = await self.scheduler.acquire(PendingRequest(request, stored, options, session_seconds))
        except BusyError:
            raise ApiError(503, BUSY_MESSAGE) from None
        except LoadError as error:
            raise ApiError(500, str(error)) from error
        try:
            yield loaded
        finally:
            self.scheduler.release(loaded)

    @property
    def runner_lost_messages(self) -> RunnerLostMessages:
        """Error messages for a runner that died."""
        runner_name = "llama-server" if self.config.is_0_30 else "llama runner"
        return RunnerLostMessages(
            before_first_token=f"{runner_name} process no longer running: -1 ",
            mid_stream="an error was encountered while running the model: unexpected EOF",
        )

    def call_id(self) -> str:
        """A new random id for a tool call."""
        return "call_" + "".join(self.rng.choice(_CALL_LETTERS) for _ in range(8))

    def leaks_slot(self, loaded: LoadedModel) -> bool:
        return self.behaviour(loaded.stored.name.shortest).lose_slot


def _name_0_11(text: str) -> Name | None:
    """Parses a name as 0.11.4 does: without source suffixes and without trimming whitespace."""
    if text != text.strip():
        return None
    base, colon, tag = text.rpartition(":")
    has_source_suffix = bool(colon) and (tag.lower() in ("cloud", "local") or tag.lower().endswith("-cloud"))
    try:
        name = parse_name(base if has_source_suffix else text)
    except ValueError:
        return None
    return Name(name.host, name.namespace, name.model, tag.lower()) if has_source_suffix else name
