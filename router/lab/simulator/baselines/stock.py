"""Stock baselines: one Ollama server over all GPUs, or one per GPU behind nginx.

Both use the well-tuned defaults of `ServerConfig`.
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
        """A stock server loads nothing before the first request."""

    def submit(self, request: Request, done: OnFinished) -> None:
        self._server.submit(request, done)

    def cancel(self, request: Request) -> None:
        self._server.cancel(request)

    def server_died(self, index: int) -> None:
        """The service manager restarts it at once."""
        del index
        self._server.kill()

    def unloads_fail(self, index: int, *, is_failing: bool) -> None:
        """Its servers decide themselves what they unload."""

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Its runners crash; a lost GPU has no free memory, so the server continues with the others."""
        del uuid
        self._server.kill()

    def drain(self, uuid: GpuUuid, *, is_resumed: bool) -> None:
        """It knows no drain."""

    def restart_all(self) -> None:
        """It knows no rolling restart."""


@dataclass(slots=True)
class _Upstream:
    server: SimServer
    requests: set[Request] = field(default_factory=set[Request])


class NginxOverServers:
    """One server per GPU; nginx balances round robin or by least connections.

    `least_conn` breaks ties round robin, as nginx does among peers of equal weight.
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

    def unloads_fail(self, index: int, *, is_failing: bool) -> None:
        """Its servers decide themselves what they unload."""

    def gpu_lost(self, uuid: GpuUuid) -> None:
        for upstream in self._upstreams:
            if uuid in upstream.server.gpus:
                upstream.server.kill()

    def drain(self, uuid: GpuUuid, *, is_resumed: bool) -> None:
        """It knows no drain."""

    def restart_all(self) -> None:
        """It knows no rolling restart."""

    def _pick(self) -> _Upstream:
        count = len(self._upstreams)
        turns = [(self._turn + step) % count for step in range(count)]
        chosen = turns[0]
        if self._least_conn:
            chosen = min(turns, key=lambda index: len(self._upstreams[index].requests))
        self._turn = (chosen + 1) % count
        return self._upstreams[chosen]
