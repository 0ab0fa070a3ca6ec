"""What all connections of the proxy share: a plain value for each connection's constructor."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from router.admission.key_budgets import KeyBudgets
from router.admission.pipeline import Admission, AdmissionPipeline, AdmissionRequest
from router.domain.access_key import AccessKey
from router.domain.instance import InstanceName, InstanceView
from router.domain.model import ModelFacts
from router.errors import RouterError
from router.http1.parser import RequestHead
from router.http1.via import Via, passed
from router.llm_api.inference_request import ModelRules
from router.llm_api.limits import RequestLimits
from router.llm_api.routes import Kind, Route, RouteTable
from router.observability.request_record import RequestRecord
from router.proxy.head_cache import HeadCache, HeadFacts
from router.proxy.interfaces import EndpointSupport, EngineModels, ModelCatalog, RequestLog, SlotQueue
from router.proxy.retry_budget import RetryBudget
from router.proxy.upstream_pool import Pool

_TARGETS_MAX = 256
_TARGET_BYTES_MAX = 256


class Tasks:
    """Owns the proxy's few tasks, such as looking up models that are not in the catalog yet."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def new_request_ids() -> Callable[[], str]:
    """Makes request ids: a random prefix for this process, then a counter."""
    return map((secrets.token_hex(10) + "%012x").__mod__, itertools.count(1)).__next__


@dataclass(frozen=True, slots=True)
class ProxyContext:
    controller: SlotQueue
    catalog: ModelCatalog
    pool: Pool
    request_log: RequestLog
    pipeline: AdmissionPipeline
    limits: RequestLimits
    rules: ModelRules
    endpoint_support: EndpointSupport
    primary: Callable[[], InstanceView]
    """The instance for requests that cannot be routed. Raises NoInstance or ShuttingDown if there is none."""
    ready_primary: Callable[[], Awaitable[InstanceView]]
    """The same, after waiting for servers that are starting or being restarted."""
    find_model: Callable[[str], Awaitable[ModelFacts | None]]
    """Facts of a model; None only where no server has it. Raises NoInstance while one that may have it is down."""
    has_free_slot: Callable[[ModelFacts], bool]
    """Whether a replica of the model, without options of its own, could serve a request now. A hint."""
    debug_headers: bool
    make_handler: Callable[[], asyncio.Protocol]
    """Makes an aiohttp protocol, for requests that are not served here."""
    table: RouteTable
    tasks: Tasks
    via: Via
    engines: EngineModels | None = None
    """Models of servers that are not Ollama; None where there are none."""
    budgets: KeyBudgets = field(default_factory=lambda: KeyBudgets(time.monotonic))
    """What access keys have used of their limits."""
    serves_elsewhere: Callable[[ModelFacts, InstanceName], bool] = lambda _model, _instance: False
    """Whether a replica of the model on another instance serves."""
    retry_budget: RetryBudget = field(default_factory=RetryBudget)
    record_lag: Callable[[float], None] = lambda _: None
    """Gets the lateness of a periodic timer, in seconds."""
    new_request_id: Callable[[], str] = field(default_factory=new_request_ids)
    heads: HeadCache = field(default_factory=HeadCache)
    progress_at: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    """When a response of an instance and a model last made progress, to about a second."""
    leased_targets: dict[bytes, tuple[Route, str]] = field(default_factory=dict[bytes, tuple[Route, str]])
    """Targets of routes that take a slot, with their decoded paths."""

    def leased_head(self, head: RequestHead) -> HeadFacts | None:
        """What is derived from a parsed head; None if the request is not one that takes a slot."""
        if head.method != b"POST":
            return None
        found = self.leased_targets.get(head.target) or self._find_leased(head)
        if found is None:
            return None
        head.derived = facts = HeadFacts(*found, head, debug_headers=self.debug_headers)
        return facts

    def _find_leased(self, head: RequestHead) -> tuple[Route, str] | None:
        target = head.target
        path = unquote(target.partition(b"?")[0], errors="replace")
        route = self.table.find(path)
        if route is None or route.kind is not Kind.LEASED:
            return None
        if len(self.leased_targets) < _TARGETS_MAX and len(target) < _TARGET_BYTES_MAX:
            self.leased_targets[target] = (route, path)
        return route, path

    def admit(self, head: RequestHead, facts: HeadFacts, client_address: str) -> Admission:
        """Runs the admission pipeline; keeps an admission that holds for the next request with this head."""
        admission = self.pipeline.admit(admission_request(head, facts, client_address))
        if admission.is_admitted and admission.is_reusable:
            facts.admission = admission
        return admission

    def charge(self, record: RequestRecord, key: AccessKey) -> RouterError | None:
        """Counts a request that takes a slot against the limits of its access key. Returns why it is refused."""
        try:
            record.charge = self.budgets.begin(key, takes_slot=True)
        except RouterError as error:
            return error
        return None


def admission_request(head: RequestHead, facts: HeadFacts, client_address: str) -> AdmissionRequest:
    """The request's head as admission sees it."""
    return AdmissionRequest(
        method=head.method.decode("latin-1"),
        path=facts.path,
        route=facts.route,
        header=head.text,
        client_address=client_address,
        body_bytes=head.length,
        target=head.target.decode("latin-1"),
        via="" if head.text("via") is None else passed(head.headers),
        header_values=head.texts,
    )
