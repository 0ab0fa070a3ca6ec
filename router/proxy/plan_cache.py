"""What came of a request before, for the next one that differs from it in nothing that was looked at.

Most requests name a model and give it something to read, without options: then what they want of the fleet follows from
their head, their model and `stream`, and is worked out once for a client's connection. The body is read each time. What
the operator may change meanwhile is looked at each time as well: the model's facts, and whether it is being deleted.
"""

from __future__ import annotations

from router.admission.client_identity import ClientIdentity
from router.domain.model import ModelFacts
from router.llm_api.body_reader import ParsedBody
from router.llm_api.heartbeat_format import Heartbeat
from router.llm_api.inference_request import InferenceRequest, ModelRules
from router.llm_api.routing_request import RoutingRequest
from router.scheduler.lru import put

KNOWN_MAX = 16
"""So many are remembered for one head, the newest."""

Key = tuple[str | None, bool | None]


class CachedPlan:
    """One request as it was worked out."""

    __slots__ = ("client_identity", "heartbeat", "routing")

    def __init__(self, client_identity: ClientIdentity, heartbeat: Heartbeat | None, routing: RoutingRequest) -> None:
        self.client_identity = client_identity
        self.heartbeat = heartbeat
        self.routing = routing


def remember(
    known: dict[Key, CachedPlan], request: InferenceRequest, routing: RoutingRequest, rules: ModelRules
) -> None:
    """Keeps what came of a request, where the next one like it needs no more."""
    plain = (
        routing.body is request.original
        and not request.notes
        and not routing.dropped
        and request.client_identity.layout is None
    )
    substitutes = rules.substitutes
    if plain and _is_plain(request.seen) and not (substitutes.aliases or substitutes.fallbacks):
        usual = CachedPlan(
            request.client_identity, request.heartbeat, routing.again(b"", request.seen)
        )  # whatever was asked is not kept
        put(known, (request.seen.model, request.seen.stream), usual, KNOWN_MAX)


def recall(known: dict[Key, CachedPlan], seen: ParsedBody) -> CachedPlan | None:
    """What came of the last request that was like the one in whose body this was seen."""
    return known.get((seen.model, seen.stream)) if _is_plain(seen) else None


def again(
    usual: CachedPlan, facts: ModelFacts | None, seen: ParsedBody, body: bytes, rules: ModelRules
) -> RoutingRequest | None:
    """What this request wants; None where it has to be worked out, because something has changed."""
    if facts is None or facts is not usual.routing.facts or facts.name in rules.removing:
        return None
    return usual.routing.again(body, seen)


def _is_plain(seen: ParsedBody) -> bool:
    return not (seen.options or seen.is_load_only or seen.ambiguous or seen.unreadable) and seen.keep_alive is None
