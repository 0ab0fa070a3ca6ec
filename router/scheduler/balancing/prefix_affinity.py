"""Which replicas may still have the beginning of a prompt in their caches, because they have served it before.

Three bounded LRU tables: conversations, by the id that the client sends; beginnings of prompts, by fingerprints after
growing lengths; and clients. They record what was served, not what a server's cache still has. So they are a reason to
prefer a replica by the time of evaluating the prompt elsewhere, never to wait for it. A common beginning (a system
prompt) is soon cached by all replicas and then prefers none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from router.domain.instance import InstanceName
from router.domain.model import BlobDigest
from router.domain.request import Ticket
from router.domain.residency import Residency
from router.scheduler.lru import put

LENGTHS: Final = (*(128 * 2**power * part for power in range(8) for part in (2, 3)), 65_536)
"""Bytes of a prompt after which a fingerprint is taken: 256, 384, 512, 768, … 65,536. Up to the last length, the
longest match covers at least two thirds of a common beginning."""
BYTES_PER_TOKEN = 4
"""Approximation for English text; only used to compare requests with each other."""

_SESSIONS_MAX = 10_000
_CLIENTS_MAX = 10_000
_BEGINNINGS_MAX = 20_000
"""A prompt has up to 17 of them."""

Held = Mapping[InstanceName, tuple[float, int]]
"""By replica: when it was loaded, and how many tokens of the prompt it may have cached."""


@dataclass(slots=True)
class Turn:
    """The last turn of a conversation. Mutable: its answer is added when it has ended."""

    instance: InstanceName
    loaded_at: float
    """Load time of the replica; one loaded later on the same instance has nothing cached."""
    tokens: int
    """Tokens of its prompt and, once it has ended, of its answer."""

    def held_by(self, replica: Residency) -> int:
        """Tokens that the replica may have cached: all or 0."""
        return self.tokens if (self.instance, self.loaded_at) == (replica.instance, replica.loaded_at) else 0


class PrefixAffinity:
    """What the replicas have served. Mutable, owned by `FleetState`."""

    __slots__ = ("_beginnings", "_clients", "_sessions")

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, BlobDigest], Turn] = {}
        self._beginnings: dict[tuple[int, BlobDigest], dict[InstanceName, float]] = {}
        """By fingerprint: the replicas that have served it, with their load times."""
        self._clients: dict[tuple[str, BlobDigest], InstanceName] = {}

    def turn_of(self, ticket: Ticket) -> Turn | None:
        """The previous turn of the conversation; None if the client sends no id of it."""
        return self._sessions.get((ticket.session, ticket.model.blob)) if ticket.session else None

    def holders(self, blob: BlobDigest, prints: tuple[int, ...]) -> Held:
        """Replicas that have served the beginning of a prompt with these fingerprints, with the longest match each."""
        held: dict[InstanceName, tuple[float, int]] = {}
        for index in range(len(prints) - 1, -1, -1):
            for instance, loaded_at in self._beginnings.get((prints[index], blob), {}).items():
                if instance not in held:
                    held[instance] = (loaded_at, LENGTHS[index] // BYTES_PER_TOKEN)
        return held

    def last_of(self, ticket: Ticket) -> InstanceName | None:
        """The instance that served this client last with this model, while there were several replicas."""
        return self._clients.get((ticket.client, ticket.model.blob)) if ticket.client else None

    def served(self, ticket: Ticket, replica: Residency) -> Turn:
        """Records that the replica serves the ticket, which has a session. Returns its turn, to add the answer to."""
        key = (ticket.session, replica.blob)
        turn = Turn(replica.instance, replica.loaded_at, ticket.prompt_tokens)
        put(self._sessions, key, turn, _SESSIONS_MAX)
        return turn

    def chosen(self, ticket: Ticket, replica: Residency, prints: tuple[int, ...]) -> None:
        """Records that the replica serves the ticket and was chosen among several."""
        blob, instance = replica.blob, replica.instance
        if ticket.client:
            put(self._clients, (ticket.client, blob), instance, _CLIENTS_MAX)
        for fingerprint in prints:
            key = (fingerprint, blob)
            holders = self._beginnings.get(key)
            if holders is None:
                holders = {}
            holders[instance] = replica.loaded_at
            put(self._beginnings, key, holders, _BEGINNINGS_MAX)
