"""What the handlers of the EMULATED server share: its models, its loaded ones, its words."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from router.domain.keep_alive import parse_keep_alive
from router.domain.model_names import Name, is_cloud, parse_name
from router.lab.emulator.completion import Words
from router.lab.emulator.config import Config
from router.lab.emulator.faults import Behaviour
from router.lab.emulator.go_json import BodyError, EmptyBodyError, Fields, read_struct
from router.lab.emulator.http_server import Request
from router.lab.emulator.loaded_model import Loaded
from router.lab.emulator.loader import Loader, LoadError
from router.lab.emulator.model_facts import capabilities
from router.lab.emulator.options import OptionError, Options, read_options
from router.lab.emulator.response_writer import ApiError
from router.lab.emulator.scheduler import BusyError, Pending, Scheduler
from router.lab.emulator.store import Header, Store, Stored

BUSY = "server busy, please try again.  maximum pending requests exceeded"
_CALL_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
CLOUD_OFF = "ollama cloud is disabled: remote model is unavailable"


@dataclass(frozen=True, slots=True)
class Service:
    """One server's parts. `chance` is the source of what no seed decides."""

    config: Config
    store: Store
    loader: Loader
    scheduler: Scheduler
    behaviour: Callable[[str], Behaviour]
    chance: random.Random

    # --- reading ---

    async def read(self, request: Request, type_name: str, fields: Fields) -> dict[str, Any]:
        """The body of a native request. Raises ApiError."""
        try:
            return read_struct(await request.body(), type_name, fields)
        except EmptyBodyError:
            raise ApiError(400, "missing request body") from None
        except BodyError as error:
            raise ApiError(400, str(error)) from error

    def keep_alive(self, value: Any) -> float | None:
        """Seconds; negative for ever. Raises ApiError."""
        try:
            return parse_keep_alive(value, plain_seconds=False)
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def name(self, text: str) -> Name | None:
        """The name that is meant; None where it cannot be read. Raises ApiError for a model of the cloud."""
        if self.config.is_old:
            return _old_name(text)
        if is_cloud(text):
            raise ApiError(403, CLOUD_OFF) if self.config.no_cloud else ApiError(502, "ollama.com is not emulated")
        try:
            return parse_name(text)
        except ValueError:
            return None

    def find(self, text: str) -> Stored | None:
        """The model of that name, or None."""
        name = self.name(text)
        return None if name is None else self.store.get(name)

    def header(self, stored: Stored) -> Header:
        return self.store.header(stored.weights.digest)

    def capabilities(self, stored: Stored) -> tuple[str, ...]:
        return capabilities(stored, self.header(stored))

    # --- using ---

    def options(self, stored: Stored, asked: Mapping[str, Any]) -> Options:
        """Raises ApiError for an option of a wrong type."""
        try:
            return read_options(asked, stored.parameters, self.loader.default_context())
        except OptionError as error:
            raise ApiError(500, str(error)) from error

    @contextlib.asynccontextmanager
    async def leased(
        self, request: Request, stored: Stored, options: Options, session_seconds: float | None
    ) -> AsyncGenerator[Loaded]:
        """The loaded model, for the length of the block. Raises ApiError, ClientLeftError."""
        try:
            loaded = await self.scheduler.acquire(Pending(request, stored, options, session_seconds))
        except BusyError:
            raise ApiError(503, BUSY) from None
        except LoadError as error:
            raise ApiError(500, str(error)) from error
        try:
            yield loaded
        finally:
            self.scheduler.release(loaded)

    @property
    def words(self) -> Words:
        """What clients are told of a runner that died."""
        engine = "llama-server" if self.config.is_0_30 else "llama runner"
        return Words(
            before=f"{engine} process no longer running: -1 ",
            within="an error was encountered while running the model: unexpected EOF",
        )

    def call_id(self) -> str:
        """A new name for a tool call."""
        return "call_" + "".join(self.chance.choice(_CALL_LETTERS) for _ in range(8))

    def loses_slot(self, loaded: Loaded) -> bool:
        return self.behaviour(loaded.stored.name.shortest).lose_slot


def _old_name(text: str) -> Name | None:
    """0.11.4 knows no source suffixes and cuts no blanks."""
    if text != text.strip():
        return None
    base, colon, tag = text.rpartition(":")
    is_source = bool(colon) and (tag.lower() in ("cloud", "local") or tag.lower().endswith("-cloud"))
    try:
        name = parse_name(base if is_source else text)
    except ValueError:
        return None
    return Name(name.host, name.namespace, name.model, tag.lower()) if is_source else name
