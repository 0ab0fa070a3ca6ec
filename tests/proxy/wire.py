"""The relay without sockets: bytes go in on either side as the test cuts them, and come out whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.llm_api.inference_request import ModelRules
from router.proxy.client_connection import ClientConnection
from router.proxy.server import ProxyServer
from router.proxy.upstream_pool import Pool, UpstreamConnection
from tests.proxy.stage import ScriptedBooks, ScriptedCatalog, ScriptedEngine, make_context

URL = "http://127.0.0.1:9"


class Wire(asyncio.Transport):
    """Keeps what is written; its peer is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.out = bytearray()
        self.closed = False
        self.aborted = False

    def write(self, data: Any) -> None:
        self.out += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _EveryPath:
    """The servers have every path."""

    def known(self, view: InstanceView, path: str) -> bool | None:
        return True

    async def has(self, view: InstanceView, path: str) -> bool:
        return True


def _primary() -> InstanceView:
    return InstanceView(InstanceSpec(InstanceName("gpu0"), (), URL), InstanceState.READY)


class Bench:
    """One client's connection and one server's, with all of the relay between them. Needs a running loop."""

    def __init__(self, rules: ModelRules | None = None) -> None:
        self.controller, self.request_log, self.catalog = ScriptedEngine([URL]), ScriptedBooks(), ScriptedCatalog()
        self.pool = Pool(5.0, self.controller.now)
        context = replace(
            make_context(self.controller, self.catalog, self.request_log, self.pool),
            endpoint_support=_EveryPath(),
            primary=_primary,
        )
        self.proxy = ProxyServer(context if rules is None else replace(context, rules=rules))
        self.server = UpstreamConnection(self.pool, URL)
        self.to_server = Wire()
        self.server.connection_made(self.to_server)
        self.pool.release(self.server)
        self.client = ClientConnection(self.proxy.context, self.proxy)
        self.to_client = Wire()
        self.client.connection_made(self.to_client)

    def ask(self, pieces: Iterable[bytes]) -> bytes:
        """What the server gets of a request that comes in these pieces."""
        for piece in pieces:
            self.client.data_received(piece)
        return bytes(self.to_server.out)

    def answer(self, pieces: Iterable[bytes], *, then_close: bool = False) -> bytes:
        """What the client gets of a reply that comes in these pieces."""
        for piece in pieces:
            if not self.to_server.closed:
                self.server.data_received(piece)
        if then_close:
            self.server.connection_lost(None)
        return bytes(self.to_client.out)
