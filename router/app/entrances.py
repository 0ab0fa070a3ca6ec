"""The ways in: the endpoint, and metrics and status on a listener of their own.

Each is a raw proxy in front of aiohttp, both with the same admission pipeline. All share the keys and what the keys
have used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from aiohttp import web

from router.admission.access import AccessRules
from router.admission.key_budgets import KeyBudgets
from router.admission.key_ring import KeyStore
from router.admission.origin_check import OriginPolicy, Origins, is_loopback, machine_names
from router.admission.pipeline import AdmissionPipeline, admission_pipeline
from router.admission.trusted_proxies import TrustedProxies
from router.api.app import ApiHandlers, ApiServer
from router.api.context import ApiContext
from router.app.access_keys import KeyWatcher, keys_path, wall_seconds
from router.app.lifecycle import AdminListener
from router.app.other_engines import JoinedCatalog, OtherEngines
from router.config.endpoint import TcpAddress, listen_address
from router.config.settings import Settings
from router.domain.model import ModelFacts
from router.domain.residency import ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import serves_elsewhere
from router.http1.parser import HEAD_BYTES_MAX
from router.http1.via import Via
from router.llm_api.routes import Kind, RouteTable
from router.observability.access_log import AccessLog
from router.proxy.context import ProxyContext, Tasks
from router.proxy.head_cache import HeadCache
from router.proxy.server import ProxyServer
from router.proxy.upstream_pool import Pool

_ADMIN = frozenset({Kind.ADMIN, Kind.DASHBOARD})
_NOT_ADMIN = frozenset(Kind) - _ADMIN


class Entrances:
    """Builds them from the same parts."""

    def __init__(
        self,
        settings: Settings,
        context: ApiContext,
        others: OtherEngines,
        handlers: ApiHandlers,
        access_log: AccessLog,
        via: Via,
        record_lag: Callable[[float], None],
        keys: KeyStore,
    ) -> None:
        self._settings = settings
        self._via = via
        self._context = context
        self._others = others
        self._handlers = handlers
        self._access_log = access_log
        self._record_lag = record_lag
        self._admin_address = listen_address(settings.admin.listen)
        self.keys = keys
        self.budgets = KeyBudgets(context.controller.now)

    def endpoint(self) -> tuple[ApiServer, web.Server, ProxyServer]:
        """aiohttp's handler and server, and the raw proxy in front of them."""
        context, controller = self._context, self._context.controller
        server, has_others = self._settings.server, bool(context.attached.all)
        access = AccessRules(
            keys=self.keys,
            allows_anonymous=server.allow_anonymous,
            proxies=TrustedProxies(server.trusted_proxies),
            hidden_kinds=frozenset() if self._admin_address is None else _ADMIN,
            is_exposed=not is_loopback(server.host),
        )
        pipeline = self._pipeline(access, server.host)
        api_server = self._api_server(pipeline)
        library = _library(api_server)
        proxy_context = ProxyContext(
            controller=controller,
            catalog=JoinedCatalog(context.attached, context.catalog) if has_others else context.catalog,
            engines=self._others if has_others else None,
            pool=Pool(context.limits.connect_timeout_seconds, controller.now),
            request_log=self._access_log,
            pipeline=pipeline,
            limits=context.limits,
            rules=context.rules,
            endpoint_support=context.endpoint_support,
            primary=context.primary,
            ready_primary=context.ready_primary,
            find_model=context.find_model,
            has_free_slot=lambda facts: _has_free_slot(controller.snapshot(), facts),
            serves_elsewhere=lambda facts, instance: serves_elsewhere(controller.snapshot(), facts.blob, instance),
            debug_headers=server.debug_headers,
            make_handler=library,
            table=RouteTable(),
            tasks=Tasks(),
            via=self._via,
            record_lag=self._record_lag,
            budgets=self.budgets,
        )
        return api_server, library, ProxyServer(proxy_context)

    def key_watcher(self, on_change: Callable[[], None]) -> KeyWatcher:
        """Keeps the keys as in their file, which is read now for the first time.

        Raises:
            ConfigError: the file cannot be used.
        """
        watcher = KeyWatcher(keys_path(self._settings), self.keys, self.budgets, wall_seconds, on_change)
        watcher.load()
        return watcher

    def admin(self, endpoint: ProxyContext) -> AdminListener:
        """Serves the admin routes only. It needs no key where only this machine reaches it."""
        address = self._admin_address
        host = address.host if isinstance(address, TcpAddress) else "localhost"
        keys = KeyStore() if is_loopback(host) else self.keys
        pipeline = self._pipeline(
            AccessRules(keys=keys, hidden_kinds=_NOT_ADMIN, is_exposed=not is_loopback(host)), host
        )
        library = _library(self._api_server(pipeline))
        context = replace(
            endpoint, pipeline=pipeline, make_handler=library, heads=HeadCache(), tasks=Tasks(), leased_targets={}
        )
        return AdminListener(ProxyServer(context), library)

    def _pipeline(self, access: AccessRules, host: str) -> AdmissionPipeline:
        controller, settings = self._context.controller, self._settings
        names = {*machine_names(), *(name.lower() for name in settings.server.allowed_hosts)}
        origins = OriginPolicy(Origins(settings.server.cors_origins), is_loopback(host), names)
        return admission_pipeline(
            origins, self._context.limits, lambda: controller.snapshot().gpus, RouteTable(), self._via, access
        )

    def _api_server(self, pipeline: AdmissionPipeline) -> ApiServer:
        return ApiServer(
            pipeline,
            self._handlers.by_kind,
            self._access_log,
            self._context.controller.now,
            budgets=self.budgets,
            debug_headers=self._settings.server.debug_headers,
        )


def _library(api_server: ApiServer) -> web.Server:
    """aiohttp, for the requests that the proxy hands over; the proxy itself limits headers and idle connections."""
    return web.Server(
        api_server.handle,
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        keepalive_timeout=7 * 86400.0,
        max_line_size=HEAD_BYTES_MAX,
        max_field_size=HEAD_BYTES_MAX,
    )


def _has_free_slot(snapshot: Snapshot, facts: ModelFacts) -> bool:
    return any(
        replica.blob == facts.blob
        and not replica.options
        and replica.state is ResidencyState.READY
        and replica.in_flight < replica.slots
        for replica in snapshot.residencies.values()
    )
