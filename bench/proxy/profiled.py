"""Shows where the router's own time goes, without sockets: `make profile`.

The real connection, exchange, controller, dispatcher, metrics and access log run over transports that only count bytes.
Prints microseconds per request of each shape (`shapes.py`), per small request after idling, and per token, then the
most expensive functions of one shape.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import itertools
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import uvloop

from bench.proxy.shapes import SHAPES
from router.admission.origin_check import OriginPolicy, Origins
from router.admission.pipeline import admission_pipeline
from router.control.controller import Controller
from router.domain.events import InstanceChanged, LoadedModel, ResidencyRead
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.model import NO_MODEL, BlobDigest, ModelFacts
from router.domain.policy import Policy
from router.engines.ollama.rules import KIND, OllamaRules
from router.llm_api.inference_request import ModelRules
from router.llm_api.limits import RequestLimits
from router.llm_api.routes import RouteTable
from router.observability.access_log import AccessLog
from router.observability.decision_log import DecisionLog
from router.observability.logging import RequestLines, configure_logs
from router.observability.metrics import Metrics
from router.proxy.client_connection import ClientConnection
from router.proxy.context import ProxyContext, Tasks
from router.proxy.server import ProxyServer
from router.proxy.upstream_pool import Opening, Pool, UpstreamConnection
from router.scheduler.dispatcher import Dispatcher

_CONTEXT = 32_768
_FACTS = ModelFacts(
    **{
        **{field: getattr(NO_MODEL, field) for field in NO_MODEL.__slots__},
        "name": "bench:latest",
        "blob": BlobDigest("b"),
        "context_length": _CONTEXT,
    }
)
_SMALL = b'{"model":"bench:latest","message":{"role":"assistant","content":"Hi."},"done":true,"eval_count":4}'
_REPLY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
    b"Content-Length: %d\r\n\r\n" % len(_SMALL) + _SMALL
)
_PIECE_BYTES = 1 << 18
"""What one read of a socket gives at most."""
_LARGE_BYTES = 8_000_000
_LARGE_SHAPES = ("bare", "open-webui", "langchain")
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_LINES = tuple(
    b'{"model":"bench:latest","message":{"role":"assistant","content":"%s"},"done":false}\n' % text
    for text in (b"some", b" of", b" them", b" are", b" longer", b".")
)
_TOKENS = tuple(b"%x\r\n%s\r\n" % (len(line), line) for line in _LINES)
_END = b'22\r\n{"done":true,"eval_count":1000000}\r\n0\r\n\r\n'


_IDLE_SECONDS = (0.001, 0.005, 0.02)
_IDLE_TIMES = 50
_BATCH = 200


class _Transport(asyncio.Transport):
    """Counts the written bytes and discards them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.write = self._count  # type: ignore[method-assign]

    def _count(self, data: Any) -> None:
        self.bytes += len(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def is_closing(self) -> bool:
        return False

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self._count(data)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class _Pool(Pool):
    """Connects to nothing, and at once."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(5.0, now)
        self.connections: list[UpstreamConnection] = []

    def open(
        self, url: str, opened: Callable[[UpstreamConnection], None], failed: Callable[[Exception], None]
    ) -> Opening:
        connection = UpstreamConnection(self, url)
        connection.connection_made(_Transport())
        self.connections.append(connection)
        opened(connection)
        return Opening(opened, failed)


class _Catalog:
    def known(self, name: str) -> ModelFacts | None:
        return _FACTS

    async def facts(self, name: str) -> ModelFacts | None:
        return _FACTS


class _Abilities:
    def known(self, view: InstanceView, path: str) -> bool | None:
        return True

    async def has(self, view: InstanceView, path: str) -> bool:
        return True


class _NoDriver:
    async def load(self, load: Any) -> Any: ...

    async def unload(self, unload: Any) -> Any: ...


def _context(controller: Controller, metrics: Metrics, pool: Pool) -> ProxyContext:
    def no_instance() -> InstanceView:
        raise AssertionError("every request of this profile can be routed")

    async def never() -> InstanceView:
        return no_instance()

    catalog = _Catalog()
    origins = OriginPolicy(Origins(("http://localhost",)), True, frozenset())
    limits, table = RequestLimits(2**28, 300.0, 600.0, 300.0), RouteTable()

    return ProxyContext(
        controller=controller,
        catalog=catalog,
        pool=pool,
        request_log=AccessLog(metrics, controller.now, RequestLines("info", len)),  # formatted, then discarded
        pipeline=admission_pipeline(origins, limits, dict, table),
        limits=limits,
        rules=ModelRules(_CONTEXT, heartbeat_seconds=15.0),
        endpoint_support=_Abilities(),
        primary=no_instance,
        ready_primary=never,
        find_model=catalog.facts,
        has_free_slot=lambda _: True,
        debug_headers=False,
        make_handler=asyncio.Protocol,
        table=table,
        tasks=Tasks(),
    )


def _fleet(dispatcher: Dispatcher, instances: int) -> None:
    for number in range(instances):
        name, url = InstanceName(f"u{number}"), f"http://127.0.0.1:{20000 + number}"
        dispatcher.handle(
            InstanceChanged(
                InstanceSpec(name, (), url, num_parallel=1024, context_length=_CONTEXT), InstanceState.READY
            ),
            0.0,
        )
        row = LoadedModel("bench:latest", "d", 1, 1, _CONTEXT, _FACTS)
        dispatcher.handle(ResidencyRead(name, (row,), 0.0), 0.0)


async def _measure(args: argparse.Namespace, note: Callable[[str], None], profile: cProfile.Profile | None) -> None:
    metrics = Metrics()
    dispatcher = Dispatcher(Policy(), {KIND: OllamaRules()})
    async with Controller(dispatcher, cast("Any", _NoDriver()), time.monotonic, (DecisionLog(metrics),)) as controller:
        _fleet(dispatcher, args.instances)
        pool = _Pool(controller.now)
        context = _context(controller, metrics, pool)
        client = ClientConnection(context, ProxyServer(context))
        client.connection_made(_Transport())

        def one(request: list[bytes], *pieces: bytes) -> None:
            for part in request:
                client.data_received(part)
            upstream = next(c for c in pool.connections if c.receiver is not None)
            for piece in pieces:
                upstream.data_received(piece)

        if profile is not None:
            requests = itertools.cycle(_requests(args.shape, args.bytes))
            _best(lambda: one(next(requests), _REPLY), 200)
            profile.enable()
            _best(lambda: one(next(requests), _REPLY), args.requests // (1 + args.bytes // 10_000))
            profile.disable()
            return
        for shape, more in [*((name, 0) for name in SHAPES), *((name, _LARGE_BYTES) for name in _LARGE_SHAPES)]:
            requests = itertools.cycle(_requests(shape, more))
            is_long = more or len(next(requests)) > 1
            batch, times = (5, 100) if is_long else (_BATCH, args.requests)
            _best(lambda requests=requests: one(next(requests), _REPLY), batch, batch)
            cost = _best(lambda requests=requests: one(next(requests), _REPLY), times, batch)
            size = " of 8 MB" if more else ""
            note(f"{cost:.1f} us per request{size}, {shape}, {args.instances} instances")
        small = itertools.cycle(_requests("bare"))
        for idle in _IDLE_SECONDS:
            note(f"{_after(idle, lambda: one(next(small), _REPLY)):.0f} us after {1e3 * idle:g} ms of idling, bare")
        pieces = _BATCH * 10
        stream = [*itertools.islice(itertools.cycle(_TOKENS), pieces)]
        cost = _best(lambda: one(next(small), _STREAM_HEAD, *stream, _END), args.tokens // pieces, 1) / pieces
        note(f"{cost:.3f} us per token, one chunk per read")
        bursts = [b"".join(stream[at : at + 100]) for at in range(0, pieces, 100)]
        cost = _best(lambda: one(next(small), _STREAM_HEAD, *bursts, _END), args.tokens // pieces, 1) / pieces
        note(f"{cost:.3f} us per token, a hundred chunks per read")


def _requests(shape: str, more: int = 0) -> list[list[bytes]]:
    """Requests of different lengths, like those of real clients, each in the pieces that a socket gives."""
    whole = [SHAPES[shape].request(more + 7 * number, stream=False) for number in range(1 if more else 16)]
    return [[raw[at : at + _PIECE_BYTES] for at in range(0, len(raw), _PIECE_BYTES)] for raw in whole]


def _best(work: Callable[[], None], times: int, batch: int = _BATCH) -> float:
    """CPU microseconds per call in the best batch, because other processes only make it slower."""
    best = float("inf")
    for _ in range(max(1, times // batch)):
        began = time.process_time()
        for _ in range(batch):
            work()
        best = min(best, (time.process_time() - began) / batch)
    return 1e6 * best


def _after(idle_seconds: float, work: Callable[[], None]) -> float:
    """Median CPU microseconds per call, each after a sleep, when other processes have used the CPU caches."""
    taken: list[float] = []
    for _ in range(_IDLE_TIMES):
        time.sleep(idle_seconds)
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return 1e6 * statistics.median(taken)


_PARTS = {
    "deciding (scheduler, controller)": ("router/scheduler/", "router/domain/", "router/control/"),
    "reading the request (llm_api, admission)": ("router/llm_api/", "router/admission/"),
    "counting and logging": ("router/observability/",),
    "relaying (proxy, http1)": ("router/proxy/", "router/http1/", "router/api/"),
}  # fmt: skip


def _shares(stats: pstats.Stats) -> list[str]:
    """Share of each part in the time of a small request, including what it calls outside the router."""
    times = dict.fromkeys(_PARTS, 0.0)
    rows = cast("Any", stats).stats
    for (file, _, name), (_, _, own, _, callers) in rows.items():
        for (caller, _, _), (_, _, caller_own, _) in callers.items() or {(file, 0, name): (0, 0, own, 0)}.items():
            part = _part_of(file) or _part_of(caller)
            if part is not None:
                times[part] += caller_own
    whole = sum(times.values()) or 1.0
    return [f"  {100 * seconds / whole:3.0f} %  {part}" for part, seconds in times.items()]


def _part_of(file: str) -> str | None:
    return next((part for part, paths in _PARTS.items() if any(path in file for path in paths)), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument(
        "--shape", choices=SHAPES, default="langchain", help="of the requests whose functions are shown"
    )
    parser.add_argument("--bytes", type=int, default=0, help="added to the bodies of these requests")
    parser.add_argument("--functions", type=int, default=40, help="number of most expensive functions to show; 0: none")
    given = parser.parse_args()
    configure_logs("json", "info")
    lines: list[str] = []
    if not given.bytes:
        uvloop.run(_measure(given, lines.append, None))
        print("\n".join(lines))
    if given.functions:
        profile = cProfile.Profile()
        uvloop.run(_measure(given, lambda _: None, profile))
        print(f"of a request of {given.shape}:", *_shares(pstats.Stats(profile)), sep="\n")
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(given.functions)
        print(text.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
