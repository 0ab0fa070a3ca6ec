"""Stock servers: one over all GPUs, or one a GPU behind nginx as most guides set it up.

They get what a good admin gives them (`ServerConfig`'s defaults) and behave as `router.lab.simulator.server` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from router.domain.gpu import GpuUuid
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.server import SimServer


class StockServer:
    """One server that sees all GPUs."""

    def __init__(self, machine: Machine, config: ServerConfig) -> None:
        self._server = SimServer(machine, "ollama", tuple(gpu.uuid for gpu in machine.ledger.gpus), config)

    def start(self) -> None:
        """A stock server loads nothing before it is asked."""

    def submit(self, request: Request, done: OnFinished) -> None:
        self._server.submit(request, done)

    def cancel(self, request: Request) -> None:
        self._server.cancel(request)

    def server_died(self, index: int) -> None:
        """Its service manager starts it again at once."""
        del index
        self._server.kill()

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Its runners die; a GPU that is lost has no free memory, so it goes on with the others."""
        del uuid
        self._server.kill()


@dataclass(slots=True)
class _Upstream:
    server: SimServer
    requests: set[Request] = field(default_factory=set[Request])


class NginxOverServers:
    """One server a GPU; nginx passes each request to the next one, or to the one with the fewest connections.

    `least_conn` breaks ties by turns, as nginx does among peers of equal weight.
    """

    def __init__(self, machine: Machine, config: ServerConfig, least_conn: bool) -> None:
        self._least_conn = least_conn
        self._turn = 0
        self._upstreams = [
            _Upstream(SimServer(machine, f"gpu{gpu.index}", (gpu.uuid,), config)) for gpu in machine.ledger.gpus
        ]

    def start(self) -> None:
        """Nothing to do."""

    def submit(self, request: Request, done: OnFinished) -> None:
        upstream = self._pick()
        upstream.requests.add(request)

        def ended(served: Request, error: str) -> None:
            upstream.requests.discard(served)
            done(served, error)

        upstream.server.submit(request, ended)

    def cancel(self, request: Request) -> None:
        for upstream in self._upstreams:
            if request in upstream.requests:
                upstream.requests.discard(request)
                upstream.server.cancel(request)

    def server_died(self, index: int) -> None:
        self._upstreams[index % len(self._upstreams)].server.kill()

    def gpu_lost(self, uuid: GpuUuid) -> None:
        for upstream in self._upstreams:
            if uuid in upstream.server.gpus:
                upstream.server.kill()

    def _pick(self) -> _Upstream:
        count = len(self._upstreams)
        turns = [(self._turn + step) % count for step in range(count)]
        chosen = turns[0]
        if self._least_conn:
            chosen = min(turns, key=lambda index: len(self._upstreams[index].requests))
        self._turn = (chosen + 1) % count
        return self._upstreams[chosen]
