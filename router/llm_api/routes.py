"""Every path of the router, with its methods and how it is served.

The table is the only list of paths. Anything else is refused: an Ollama server serves `/debug/pprof` and the like to
anybody, which a router in front of a team must not.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from urllib.parse import quote, unquote

_LOCATION_SAFE = "/%:@!$&'()*+,;=~"


class Kind(Enum):
    """How a route is served."""

    LEASED = "leased"
    """Takes a slot of the model named in the body, and streams that instance's reply."""
    SHOW = "show"
    """About one model, from an instance that has it."""
    MERGED = "merged"
    """Served by the router for the whole fleet."""
    MANAGED = "managed"
    """Changes the shared store: through one instance, one at a time."""
    PASSED = "passed"
    """Passed to one instance unchanged."""
    REFUSED = "refused"
    """Acts on the server's own cloud account: never through a shared endpoint."""
    ADMIN = "admin"
    """The router's own."""
    DASHBOARD = "dashboard"
    """The page that shows the router's state, and what it shows."""


KIND_WORDS: Mapping[Kind, str] = {
    Kind.LEASED: "takes a slot of the model that its body names; that instance's answer is streamed through",
    Kind.SHOW: "asked of an instance that has the model",
    Kind.MERGED: "answered for the whole fleet",
    Kind.MANAGED: "changes the shared store: through one instance, one write at a time, for which a pull waits and "
    "says so, and others at most `queue.timeout_seconds`",
    Kind.PASSED: "passed to one instance as it is",
    Kind.REFUSED: "acts on the server's own ollama.com account: 403, unless `ollama.cloud` is on",
    Kind.ADMIN: "the router's own",
    Kind.DASHBOARD: "[the dashboard](dashboard.md): its page and files, which need no key, and the events that it "
    "shows, which need one of the class `admin`",
}
"""For the documentation."""


@dataclass(frozen=True, slots=True)
class Route:
    path: str
    """The path; a trailing `*` matches one more segment."""
    methods: tuple[str, ...]
    """In the order of a server's `Allow` header."""
    kind: Kind
    streams_body: bool = False
    """Whether the body passes through unread, with no limit on its size."""
    lists_methods: bool = True
    """Whether a wrong method gets 405 with the right ones; otherwise 404, as for an unknown path."""


EVENTS = "/llamayard/events"
"""What the dashboard shows, as server-sent events."""

ROUTES: tuple[Route, ...] = (
    Route("/", ("HEAD", "GET"), Kind.MERGED),
    Route("/api/version", ("HEAD", "GET"), Kind.MERGED),
    Route("/api/tags", ("HEAD", "GET"), Kind.MERGED),
    Route("/api/ps", ("GET",), Kind.MERGED),
    Route("/api/status", ("GET",), Kind.PASSED),
    Route("/api/generate", ("POST",), Kind.LEASED),
    Route("/api/chat", ("POST",), Kind.LEASED),
    Route("/api/embed", ("POST",), Kind.LEASED),
    Route("/api/embeddings", ("POST",), Kind.LEASED),
    Route("/api/show", ("POST",), Kind.SHOW),
    Route("/api/create", ("POST",), Kind.MANAGED),
    Route("/api/copy", ("POST",), Kind.MANAGED),
    Route("/api/delete", ("DELETE",), Kind.MANAGED),
    Route("/api/pull", ("POST",), Kind.MANAGED),
    Route("/api/push", ("POST",), Kind.MANAGED),
    Route("/api/blobs/*", ("HEAD", "POST"), Kind.MANAGED, streams_body=True),
    Route("/api/me", ("POST",), Kind.REFUSED),
    Route("/api/signout", ("POST",), Kind.REFUSED),
    Route("/api/user/keys/*", ("DELETE",), Kind.REFUSED),
    Route("/api/experimental/model-recommendations", ("GET",), Kind.PASSED),
    Route("/api/experimental/web_search", ("POST",), Kind.REFUSED),
    Route("/api/experimental/web_fetch", ("POST",), Kind.REFUSED),
    Route("/v1/chat/completions", ("POST",), Kind.LEASED),
    Route("/v1/completions", ("POST",), Kind.LEASED),
    Route("/v1/embeddings", ("POST",), Kind.LEASED),
    Route("/v1/responses", ("POST",), Kind.LEASED),
    Route("/v1/messages", ("POST",), Kind.LEASED),
    Route("/v1/images/*", ("POST",), Kind.LEASED),
    Route("/v1/audio/*", ("POST",), Kind.LEASED),
    Route("/v1/models", ("GET",), Kind.MERGED),
    Route("/v1/models/*", ("GET",), Kind.SHOW),
    Route("/health", ("HEAD", "GET"), Kind.ADMIN),
    Route("/ready", ("HEAD", "GET"), Kind.ADMIN),
    Route("/metrics", ("GET",), Kind.ADMIN),
    Route("/llamayard/status", ("GET",), Kind.ADMIN),
    Route("/llamayard/drain", ("POST",), Kind.ADMIN),
    Route("/llamayard/resume", ("POST",), Kind.ADMIN),
    Route("/llamayard/restart", ("POST",), Kind.ADMIN),
    Route("/llamayard/reload", ("POST",), Kind.ADMIN),
    Route("/llamayard/pin", ("POST",), Kind.ADMIN),
    Route("/llamayard/unpin", ("POST",), Kind.ADMIN),
    Route("/llamayard/logs", ("GET",), Kind.ADMIN),
    Route("/llamayard/explain", ("GET",), Kind.ADMIN),
    Route("/llamayard/why", ("GET",), Kind.ADMIN),
    Route("/llamayard/load", ("POST",), Kind.ADMIN),
    Route("/llamayard/unload", ("POST",), Kind.ADMIN),
    Route(EVENTS, ("GET",), Kind.DASHBOARD),
    Route("/ui", ("HEAD", "GET"), Kind.DASHBOARD),
    Route("/ui/*", ("HEAD", "GET"), Kind.DASHBOARD),
)


_MODELS = "/v1/models/"


class RouteTable:
    """Looks routes up by path in constant time."""

    __slots__ = ("_exact", "_names", "_prefixes")

    def __init__(self, routes: tuple[Route, ...] = ROUTES) -> None:
        self._exact = {route.path: route for route in routes if not route.path.endswith("*")}
        self._prefixes = {route.path[:-1]: route for route in routes if route.path.endswith("*")}
        self._names = replace(self._prefixes[_MODELS], lists_methods=False)
        """For model names with slashes, which a server does not have here."""

    def find(self, path: str) -> Route | None:
        """The route of a clean path, for any method; None if there is none.

        A path with `.`, `..` or an empty segment is not clean: a server that resolves it may serve another path.
        """
        route = self._exact.get(path)
        if route is None and not {"", ".", ".."} & set(path.split("/")[1:]):
            route = self._prefixes.get(path.rpartition("/")[0] + "/")
            if route is None and path.startswith(_MODELS):
                route = self._names
        return route

    def redirection(self, method: str, target: str) -> tuple[int, str] | None:
        """Status and location for a target without a route, where a server redirects it; target as written.

        Go's ServeMux redirects to the clean path, whether that exists or not; gin then removes a last slash, if the
        path without it has the method.
        """
        path, mark, query = target.partition("?")
        if not path.startswith("/"):
            return None
        cleaned = _clean(path)
        if cleaned != path:
            return 307, quote(cleaned, safe=_LOCATION_SAFE) + mark + query
        decoded = unquote(path, errors="replace").removesuffix("/")
        route = self.find(decoded)
        if route is None or method not in route.methods or not path.endswith(("/", "%2F", "%2f")):
            return None
        return 301 if method == "GET" else 307, quote(decoded, safe=_LOCATION_SAFE) + mark + query


def _clean(path: str) -> str:
    """As Go's `path.Clean`, but a last slash stays."""
    cleaned = posixpath.normpath("/" + path.lstrip("/"))
    return cleaned + "/" if path.endswith("/") and cleaned != "/" else cleaned
