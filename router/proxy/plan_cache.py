"""What came of a request before, for the next one that differs from it in nothing that was looked at.

Most requests name a model and give it something to read, without options: then what they want of the fleet follows from
their head, their model and `stream`, and is worked out once for a client's connection. The body is read each time. What
the operator may change meanwhile is looked at each time as well: the model's facts, and whether it is being deleted.
"""

from __future__ import annotations

from router.admission.client_identity import Asker
from router.domain.model import ModelFacts
from router.llm_api.body_reader import Peek
from router.llm_api.heartbeat_format import Heartbeat
from router.llm_api.inference_request import Asked, Rules
from router.llm_api.routing_request import Wanted
from router.scheduler.lru import renew

KNOWN_MAX = 16
"""So many are remembered for one head, the newest."""

Key = tuple[str | None, bool | None]


class Usual:
    """One request as it was worked out."""

    __slots__ = ("asker", "heartbeat", "want")

    def __init__(self, asker: Asker, heartbeat: Heartbeat | None, want: Wanted) -> None:
        self.asker = asker
        self.heartbeat = heartbeat
        self.want = want


def remember(known: dict[Key, Usual], asked: Asked, want: Wanted, rules: Rules) -> None:
    """Keeps what came of a request, where the next one like it needs no more."""
    plain = want.body is asked.original and not asked.notes and not want.dropped and asked.asker.layout is None
    substitutes = rules.substitutes
    if plain and _is_plain(asked.seen) and not (substitutes.aliases or substitutes.fallbacks):
        usual = Usual(asked.asker, asked.heartbeat, want.again(b"", asked.seen))  # whatever was asked is not kept
        renew(known, (asked.seen.model, asked.seen.stream), usual, KNOWN_MAX)


def recall(known: dict[Key, Usual], seen: Peek) -> Usual | None:
    """What came of the last request that was like the one in whose body this was seen."""
    return known.get((seen.model, seen.stream)) if _is_plain(seen) else None


def again(usual: Usual, facts: ModelFacts | None, seen: Peek, body: bytes, rules: Rules) -> Wanted | None:
    """What this request wants; None where it has to be worked out, because something has changed."""
    if facts is None or facts is not usual.want.facts or facts.name in rules.removing:
        return None
    return usual.want.again(body, seen)


def _is_plain(seen: Peek) -> bool:
    return not (seen.options or seen.is_load_only or seen.ambiguous or seen.unreadable) and seen.keep_alive is None
