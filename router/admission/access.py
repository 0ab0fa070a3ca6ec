"""Who may use which route: the steps of admission that find a request's access key and hold it to its route classes.

Keys are on as soon as there is a file of them. Then every request needs one, except for what a monitor asks
(`/`, `/health`, `/ready`) and, if the operator allows it, anonymous inference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from router.admission.client_identity import client_of, session_of
from router.admission.key_budgets import Charge, KeyBudgets
from router.admission.key_ring import KEY_PREFIX, KeyStore, presented
from router.admission.trusted_proxies import TrustedProxies
from router.domain.access_key import RouteClass
from router.domain.client_identity import ClientIdentity
from router.errors import Forbidden, Unauthorized
from router.http1.headers import HeaderLookup
from router.llm_api.routes import EVENTS, Kind, Route

_PUBLIC = frozenset({"/", "/health", "/ready"})
"""Say that the router runs, and nothing else."""
_CHALLENGES = {"WWW-Authenticate": 'Bearer realm="llamayard"'}
_BROWSER_CHALLENGES = {"WWW-Authenticate": 'Basic realm="llamayard", charset="UTF-8"'}
"""For the pages that people open: the browser asks for a password, which is the key."""
_ACCEPTED_BY_SCRIPTS = frozenset({"application/json", "text/event-stream"})
"""What the dashboard's own requests accept: the page asks for the key itself."""
_HOW = "send one as `Authorization: Bearer KEY`, as `X-Api-Key`, or as the password of Basic authentication"


@dataclass(frozen=True, slots=True)
class AccessRules:
    """What admission knows of keys."""

    keys: KeyStore = field(default_factory=KeyStore)
    allows_anonymous: bool = False
    """Whether inference needs no key even though there are keys."""
    proxies: TrustedProxies = field(default_factory=TrustedProxies)
    hidden_kinds: frozenset[Kind] = frozenset()
    """Kinds of routes that this listener does not have."""
    is_exposed: bool = False
    """Whether other machines reach this listener."""


def is_public(route: Route) -> bool:
    """Whether every listener has the route, for everybody."""
    return route.path in _PUBLIC


def class_of(route: Route) -> RouteClass | None:
    """The class that a key needs for the route; None if it needs no key."""
    if is_public(route) or (route.kind is Kind.DASHBOARD and route.path != EVENTS):
        return None
    if route.kind in (Kind.MANAGED, Kind.REFUSED):
        return RouteClass.MANAGEMENT
    return RouteClass.ADMIN if route.kind in (Kind.ADMIN, Kind.DASHBOARD) else RouteClass.INFERENCE


def identify(rules: AccessRules, header: HeaderLookup, address: str) -> ClientIdentity:
    """Who the request is from. Refuses nobody."""
    ring = rules.keys.ring
    key = None if ring is None else ring.find(header)
    return ClientIdentity(client_of(header, address, key), session_of(header), key=key)


def authorize(rules: AccessRules, route: Route, identity: ClientIdentity, header: HeaderLookup) -> None:
    """For a router with keys.

    Raises:
        Unauthorized: the route needs a key, and the request presents no valid one.
        Forbidden: its key is not for this class of routes.
    """
    needed, key = class_of(route), identity.key
    if needed is None:
        return
    if key is not None:
        if needed not in key.classes:
            raise Forbidden(
                f"key '{key.name}' may not use {route.path}: it has no class '{needed}' (llamayard keys create --class)"
            )
        return
    given = list(presented(header))
    if rules.allows_anonymous and needed is RouteClass.INFERENCE and not any(map(_looks_like_a_key, given)):
        return
    is_opened = needed is RouteClass.ADMIN and header("accept") not in _ACCEPTED_BY_SCRIPTS
    challenges = _BROWSER_CHALLENGES if is_opened else _CHALLENGES
    what = "the access key is not valid (unknown, revoked or expired)" if given else "an access key is required"
    raise Unauthorized(f"{what}: {_HOW}", headers=challenges)


def refuse_open_dashboard(rules: AccessRules, route: Route) -> None:
    """The dashboard shows everybody's work and its buttons change it: it is not for everybody in a network.

    Raises:
        Forbidden: other machines reach the listener, and there are no keys.
    """
    if rules.is_exposed and rules.keys.ring is None and route.kind is Kind.DASHBOARD:
        raise Forbidden(
            "the dashboard is off: other machines reach this listener, and there are no access keys; create one with "
            "`llamayard keys create NAME --class admin` and restart, or set admin.listen to a loopback address"
        )


def begin_charge(budgets: KeyBudgets, identity: ClientIdentity, route: Route) -> Charge | None:
    """Counts an admitted request against its key; None where nothing is counted.

    Raises:
        RateLimited: the key has used up a limit.
    """
    key = identity.key
    return None if key is None else budgets.begin(key, takes_slot=route.kind is Kind.LEASED)


def _looks_like_a_key(text: str) -> bool:
    return text.startswith(KEY_PREFIX)


HeaderValues = Callable[[str], list[str]]
"""All values of a request's header by its name in lower case."""


def forwarded(rules: AccessRules, peer: str, values: HeaderValues) -> tuple[str, str | None]:
    """The client's address, and the host that a trusted proxy was asked for; None without one."""
    if not rules.proxies or not rules.proxies.trusts(peer):
        return peer, None
    hosts = values("x-forwarded-host")
    host = hosts[-1].rpartition(",")[2].strip() if hosts else None
    return rules.proxies.client_address(peer, values("x-forwarded-for")), host or None
