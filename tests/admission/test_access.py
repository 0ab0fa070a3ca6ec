"""Which key a route needs, what an unknown client may do, and whom a trusted proxy forwards for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.admission.access import AccessRules, class_of
from router.admission.key_ring import KeyRing, KeyStore, digest_of, new_key
from router.admission.origin_check import OriginPolicy, Origins
from router.admission.pipeline import Admission, AdmissionRequest, admission_pipeline
from router.admission.trusted_proxies import TrustedProxies
from router.domain.access_key import AccessKey, RouteClass
from router.errors import Forbidden, Unauthorized
from router.http1.via import Via
from router.llm_api.limits import RequestLimits
from router.llm_api.routes import ROUTES, Kind, RouteTable

SECRET = new_key()
KEY = AccessKey("laptop", digest_of(SECRET), "anna", 0.0, priority=1)


def admitted(rules: AccessRules, line: str = "POST /api/chat", peer: str = "192.0.2.7", **headers: str) -> Admission:
    method, _, path = line.partition(" ")
    named = {"host": "localhost"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = AdmissionRequest(
        method, path, RouteTable().find(path), named.get, peer, 0,
        header_values=lambda name: [named[name]] if name in named else [],
    )  # fmt: skip
    policy = OriginPolicy(Origins(()), True, frozenset({"llm.example"}))
    return admission_pipeline(policy, RequestLimits(1000, 1.0, 1.0, 1.0), dict, RouteTable(), Via("t"), rules).admit(
        request
    )


def rules(*keys: AccessKey, **others: object) -> AccessRules:
    return replace(AccessRules(KeyStore(KeyRing(keys or (KEY,), 0.0))), **others)  # type: ignore[arg-type]


def test_every_route_has_its_class() -> None:
    classes = {route.path: class_of(route) for route in ROUTES}
    assert {path for path, needed in classes.items() if needed is None} == {"/", "/health", "/ready", "/ui", "/ui/*"}
    admin = {path for path, needed in classes.items() if needed is RouteClass.ADMIN}
    assert admin == {"/metrics", *(path for path in classes if path.startswith("/llamayard/"))}
    assert all((route.kind in (Kind.MANAGED, Kind.REFUSED)) == (classes[route.path] is RouteClass.MANAGEMENT)
               for route in ROUTES)  # fmt: skip


def test_the_client_is_the_keys_user_whatever_the_request_claims() -> None:
    claims = {"authorization": f"Bearer {SECRET}", "x_openwebui_user_id": "somebody"}
    assert admitted(rules(), **claims).client_identity.client == "key:anna"
    trusting = rules(replace(KEY, forwards_users=True))
    assert admitted(trusting, **claims).client_identity.client == "key:anna/user:somebody"


def test_two_keys_of_a_user_have_one_fair_share() -> None:
    other = new_key()
    ring = rules(KEY, AccessKey("ci", digest_of(other), "anna", 0.0))
    clients = {admitted(ring, x_api_key=secret).client_identity.client for secret in (SECRET, other)}
    assert clients == {"key:anna"}


def test_a_key_has_its_priority_unless_a_request_asks_for_less() -> None:
    asked = [admitted(rules(), x_api_key=SECRET, **headers).client_identity.priority
             for headers in ({}, {"x_llamayard_priority": "low"}, {"x_llamayard_priority": "high"})]  # fmt: skip
    assert asked == [1, -1, 1]
    plain = rules(replace(KEY, priority=0))
    assert admitted(plain, x_api_key=SECRET, x_llamayard_priority="high").client_identity.priority == 0


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_a_refusal_names_the_ways_to_send_a_key_and_challenges(scheme: str) -> None:
    line = "GET /metrics" if scheme == "Basic" else "POST /api/chat"
    error = admitted(rules(), line).error
    assert isinstance(error, Unauthorized)
    assert error.headers["WWW-Authenticate"].startswith(f'{scheme} realm="llamayard"')
    assert all(way in error.message for way in ("Authorization: Bearer KEY", "X-Api-Key", "Basic"))


def test_an_empty_ring_lets_nobody_in() -> None:
    assert isinstance(admitted(AccessRules(KeyStore(KeyRing((), 0.0))), x_api_key=SECRET).error, Unauthorized)


def test_anonymous_inference_is_allowed_where_the_operator_allows_it() -> None:
    open_rules = rules(allows_anonymous=True)
    assert admitted(open_rules).is_admitted
    assert admitted(open_rules, authorization="Bearer ollama").is_admitted
    assert isinstance(admitted(open_rules, authorization=f"Bearer {SECRET}x").error, Unauthorized)
    for line in ("POST /api/pull", "GET /metrics"):
        assert isinstance(admitted(open_rules, line).error, Unauthorized)


def test_details_are_hidden_from_those_without_a_key() -> None:
    assert admitted(rules(), "GET /ready").hides_details
    assert not admitted(rules(), "GET /ready", x_api_key=SECRET).hides_details
    assert not admitted(AccessRules(), "GET /ready").hides_details


def test_a_listener_does_not_have_the_routes_of_another() -> None:
    endpoint = AccessRules(hidden_kinds=frozenset({Kind.ADMIN}))
    admin = AccessRules(hidden_kinds=frozenset(Kind) - {Kind.ADMIN})
    statuses = [
        [found.response.status if (found := admitted(each, line)).response is not None else 200
         for line in ("GET /metrics", "GET /llamayard/status", "GET /health", "POST /api/chat", "GET /api/tags")]
        for each in (endpoint, admin)
    ]  # fmt: skip
    assert statuses == [[404, 404, 200, 200, 200], [200, 200, 200, 404, 404]]


def test_only_a_trusted_proxy_is_believed_about_client_and_host() -> None:
    proxied = AccessRules(proxies=TrustedProxies(("10.0.0.1",)))
    forwarded = {"x_forwarded_for": "203.0.113.9", "x_forwarded_host": "llm.example"}
    assert admitted(proxied, peer="10.0.0.1", **forwarded).client_identity.client == "203.0.113.9"
    assert admitted(proxied, peer="10.0.0.2", **forwarded).client_identity.client == "10.0.0.2"
    evil = {**forwarded, "x_forwarded_host": "evil.example"}
    assert not admitted(proxied, peer="10.0.0.1", **evil).is_admitted
    assert admitted(proxied, peer="10.0.0.2", **evil).is_admitted  # Host itself is fine
    behind = {**forwarded, "host": "upstream.example"}
    assert admitted(proxied, peer="10.0.0.1", **behind).is_admitted
    assert not admitted(proxied, peer="10.0.0.2", **behind).is_admitted


@pytest.mark.parametrize("path", ["/ui", "/ui/app.js", "/llamayard/events"])
def test_the_dashboard_is_off_where_other_machines_reach_it_and_there_are_no_keys(path: str) -> None:
    error = admitted(AccessRules(is_exposed=True), f"GET {path}").error
    assert isinstance(error, Forbidden)
    assert "llamayard keys create" in error.message
    assert admitted(AccessRules(), f"GET {path}").is_admitted
    assert admitted(AccessRules(is_exposed=True), "GET /llamayard/status").is_admitted


def test_the_dashboards_page_needs_no_key_and_what_it_shows_needs_an_admins() -> None:
    secret = new_key()
    ring = rules(KEY, AccessKey("ops", digest_of(secret), "olga", 0.0, classes=frozenset({RouteClass.ADMIN})))
    exposed = replace(ring, is_exposed=True)
    assert admitted(exposed, "GET /ui").is_admitted
    assert isinstance(admitted(exposed, "GET /llamayard/events").error, Unauthorized)
    assert isinstance(admitted(exposed, "GET /llamayard/events", x_api_key=SECRET).error, Forbidden)
    assert admitted(exposed, "GET /llamayard/events", x_api_key=secret).is_admitted


def test_a_listener_without_the_dashboard_does_not_say_that_there_is_one() -> None:
    hidden = AccessRules(hidden_kinds=frozenset({Kind.ADMIN, Kind.DASHBOARD}), is_exposed=True)
    for path in ("/ui", "/ui/app.js", "/llamayard/events", "/llamayard/unload"):
        response = admitted(hidden, f"GET {path}").response
        assert response is not None and response.status == 404


@pytest.mark.parametrize("accepts", ["application/json", "text/event-stream"])
def test_a_browser_does_not_ask_for_a_password_where_the_dashboard_asks_for_the_key(accepts: str) -> None:
    challenges = [
        error.headers["WWW-Authenticate"].partition(" ")[0]
        for headers in ({"accept": "text/html,*/*"}, {}, {"accept": accepts})
        if (error := admitted(rules(), "GET /llamayard/events", **headers).error) is not None
    ]
    assert challenges == ["Basic", "Basic", "Bearer"]
