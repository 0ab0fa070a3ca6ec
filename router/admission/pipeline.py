"""Admission: the checks that every request passes before its body is read, whichever way it came in.

The raw proxy and aiohttp each build an `AdmissionRequest` from their own form of a request head and run the same
`AdmissionPipeline`: an ordered tuple of small pure steps. A step takes the request and what earlier steps decided, and
returns it with its own decision added; it may end the request with a response, or by raising a `RouterError`, which
becomes an error in the shape of the API that was called. Each check exists here and nowhere else.

To add a check, write one more `Step` and put it into `admission_pipeline`. A step whose decision can differ for the
next request with the same head must return `is_reusable=False`. An access key is found once for a head: whoever changes
the keys makes the proxy forget its heads. What a key has used of its limits differs from request to request, and is
checked after admission (`admission/key_budgets.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html import escape
from typing import Final

from router.admission.access import (
    AccessRules,
    HeaderValues,
    authorize,
    forwarded,
    identify,
    is_public,
    refuse_open_dashboard,
)
from router.admission.client_identity import LAYOUT_HEADER, GpuLookup, layout_of, priority_of
from router.admission.origin_check import OriginPolicy, method_not_allowed, not_found
from router.domain.client_identity import ClientIdentity
from router.errors import Forbidden, LoopDetected, RouterError
from router.http1.headers import HeaderLookup
from router.http1.response_writer import HeaderPairs, LocalResponse
from router.http1.via import Via
from router.llm_api.errors import CODE_HEADER
from router.llm_api.limits import RequestLimits
from router.llm_api.routes import Kind, Route, RouteTable

_REDIRECT_REASONS: Final = {301: "Moved Permanently", 307: "Temporary Redirect"}


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A request's head in terms of no HTTP library."""

    method: str
    path: str
    """Decoded, without the query."""
    route: Route | None
    """Found by `RouteTable.find`; None for an unknown path."""
    header: HeaderLookup
    client_address: str
    body_bytes: int | None
    """The declared Content-Length; None where there is none."""
    target: str = ""
    """As written, with the query, in origin form."""
    via: str = ""
    """Its `Via`, all lines joined."""
    header_values: HeaderValues = field(default=lambda _: [], compare=False)
    """All values of a header, for those that may come more than once."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What was decided. Where neither `response` nor `error` is set, the request is admitted."""

    client_identity: ClientIdentity
    cors_headers: HeaderPairs = ()
    """For whatever response the request gets, so that a browser lets its page read it."""
    response: LocalResponse | None = None
    """Ends the request as it is."""
    refusal: str = ""
    """For the log, where `response` refuses the request (403): the offending header with its value."""
    error: RouterError | None = None
    """Ends the request, in the shape of the API that was called."""
    hides_details: bool = False
    """Whether keys are on and the request has none."""
    is_reusable: bool = True
    """Whether the same head from the same address is admitted again, unless its body is too long."""

    @property
    def is_admitted(self) -> bool:
        return self.response is None and self.error is None


Step = Callable[[AdmissionRequest, Admission], Admission]
"""Raises `RouterError` to refuse the request."""


class AdmissionPipeline:
    """Runs its steps in order, up to the first that ends the request."""

    __slots__ = ("_steps",)

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self._steps = steps

    def admit(self, request: AdmissionRequest) -> Admission:
        admission = Admission(ClientIdentity(client=request.client_address))
        for step in self._steps:
            try:
                admission = step(request, admission)
            except RouterError as error:
                return replace(admission, error=error)
            if admission.response is not None:
                break
        return admission


NO_KEYS_NEEDED: Final = AccessRules()
"""Keys are off."""


def admission_pipeline(
    origins: OriginPolicy,
    limits: RequestLimits,
    gpus: GpuLookup,
    table: RouteTable,
    via: Via,
    access: AccessRules = NO_KEYS_NEEDED,
) -> AdmissionPipeline:
    """The checks of this router, in order."""
    return AdmissionPipeline(
        (
            identify_client(access),
            check_origin(origins, access),
            refuse_loops(via),
            check_route(table, access),
            check_key(access),
            check_body(limits),
            read_terms(gpus),
        )
    )


def identify_client(access: AccessRules) -> Step:
    """Who the request is from. Refuses nobody."""

    def step(request: AdmissionRequest, admission: Admission) -> Admission:
        address, _ = forwarded(access, request.client_address, request.header_values)
        return replace(admission, client_identity=identify(access, request.header, address))

    return step


def check_key(access: AccessRules) -> Step:
    """Refuses requests without the key that their route needs."""

    def step(request: AdmissionRequest, admission: Admission) -> Admission:
        if request.route is not None:
            refuse_open_dashboard(access, request.route)
        if access.keys.ring is None or request.route is None:
            return admission
        authorize(access, request.route, admission.client_identity, request.header)
        return admission if admission.client_identity.key is not None else replace(admission, hides_details=True)

    return step


def check_origin(policy: OriginPolicy, access: AccessRules) -> Step:
    """Host and Origin, as an Ollama server checks them; answers preflights."""

    def step(request: AdmissionRequest, admission: Admission) -> Admission:
        header, route = request.header, request.route
        allow = route.methods if route is not None and route.lists_methods else ()
        _, forwarded_host = forwarded(access, request.client_address, request.header_values)
        verdict = policy.judge(request.method, forwarded_host or header("host"), header("origin"), allow)
        response = verdict.response
        if verdict.refusal and response is not None:
            response = replace(response, headers=(*response.headers, (CODE_HEADER, Forbidden.code)))
        return replace(admission, cors_headers=verdict.headers, response=response, refusal=verdict.refusal)

    return step


def refuse_loops(via: Via) -> Step:
    """Refuses requests that this router has forwarded itself."""

    def step(request: AdmissionRequest, admission: Admission) -> Admission:
        if request.via and via.is_in(request.via):
            raise LoopDetected(
                "this request has already passed through this router: the server that it was forwarded to (an attached "
                "instance, or a proxy behind it) leads back to the router; correct its address in `instances`"
            )
        return admission

    return step


def check_route(table: RouteTable, access: AccessRules) -> Step:
    """Refuses unknown paths and methods; redirects unclean paths, as Ollama's router does."""

    def step(request: AdmissionRequest, admission: Admission) -> Admission:
        route = request.route
        if route is not None:
            if route.kind in access.hidden_kinds and not is_public(route):
                return replace(admission, response=not_found())
            if request.method in route.methods:
                return admission
            return replace(
                admission, response=method_not_allowed(route.methods) if route.lists_methods else not_found()
            )
        redirection = table.redirection(request.method, request.target or request.path)
        response = not_found() if redirection is None else _redirect(request.method, *redirection)
        return replace(admission, response=response)

    return step


def check_body(limits: RequestLimits) -> Step:
    """Refuses bodies that are too long by their Content-Length."""

    def step(request: AdmissionRequest, admission: Admission) -> Admission:
        if request.body_bytes is not None and request.route is not None and not request.route.streams_body:
            limits.check_body_size(request.body_bytes)
        return admission

    return step


def read_terms(gpus: GpuLookup) -> Step:
    """Priority and layout of requests that take a slot."""

    def step(request: AdmissionRequest, admission: Admission) -> Admission:
        if request.route is None or request.route.kind is not Kind.LEASED:
            return admission
        asked, layout, key = priority_of(request.header), layout_of(request.header, gpus), admission.client_identity.key
        priority = asked or 0 if key is None else key.bounded_priority(asked)
        if layout is not None and key is not None and layout.kind not in key.layouts:
            raise Forbidden(f"{LAYOUT_HEADER}: key '{key.name}' may not choose the layout '{layout.kind}'")
        if not priority and layout is None:
            return admission
        identity = replace(admission.client_identity, priority=priority, layout=layout)
        # GPUs come and go: the same layout may be refused later.
        return replace(admission, client_identity=identity, is_reusable=admission.is_reusable and layout is None)

    return step


def _redirect(method: str, status: int, url: str) -> LocalResponse:
    location = ("Location", url)
    if method not in ("GET", "HEAD"):
        return LocalResponse(status, (location,))
    body = f'<a href="{escape(url)}">{_REDIRECT_REASONS[status]}</a>.\n\n'
    return LocalResponse(status, (("Content-Type", "text/html; charset=utf-8"), location), body.encode())
