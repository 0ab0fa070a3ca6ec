"""Which copies may still hold the beginning of a prompt in their caches, because they have served it before.

Three bounded memories, each of which forgets what was used longest ago: of conversations that name themselves; of
beginnings of prompts, by fingerprints of their first bytes at growing lengths, for clients that name none; and of
clients, the weakest. They know what was served, not what a server's cache has kept: what they say is a reason to prefer
a copy by the time that a cold prompt would take, never one to wait for it. A beginning that everybody shares is soon
held by every copy, and then it prefers none.
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
"""Bytes of a prompt after which a fingerprint is taken: 256, 384, 512, 768, … 65,536. The longest covers two thirds of
what was said before, or more."""
BYTES_PER_TOKEN = 4
"""Of English text, about; a guess that only weighs requests against each other."""

_SESSIONS_MAX = 10_000
_CLIENTS_MAX = 10_000
_BEGINNINGS_MAX = 20_000
"""A prompt has up to 17."""

Held = Mapping[InstanceName, tuple[float, int]]
"""When each copy was loaded, and how many tokens of a prompt it may hold."""


@dataclass(slots=True)
class Turn:
    """Where a conversation was served last; mutable: its answer makes it longer."""

    instance: InstanceName
    loaded_at: float
    """Of the copy: one that came to the same place after it holds nothing."""
    tokens: int
    """Of its prompt, and of its answer once that has ended."""

    def held_by(self, replica: Residency) -> int:
        return self.tokens if (self.instance, self.loaded_at) == (replica.instance, replica.loaded_at) else 0


class PrefixAffinity:
    """Mutable, single owner."""

    __slots__ = ("_beginnings", "_clients", "_sessions")

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, BlobDigest], Turn] = {}
        self._beginnings: dict[tuple[int, BlobDigest], dict[InstanceName, float]] = {}
        """When the copies were loaded that have served it."""
        self._clients: dict[tuple[str, BlobDigest], InstanceName] = {}

    def turn_of(self, ticket: Ticket) -> Turn | None:
        """The turn before this one, where the client names its conversation."""
        return self._sessions.get((ticket.session, ticket.model.blob)) if ticket.session else None

    def holders(self, blob: BlobDigest, prints: tuple[int, ...]) -> Held:
        """Copies that have served the beginning of a prompt with these fingerprints, the longest that each has."""
        held: dict[InstanceName, tuple[float, int]] = {}
        for index in range(len(prints) - 1, -1, -1):
            for instance, loaded_at in self._beginnings.get((prints[index], blob), {}).items():
                if instance not in held:
                    held[instance] = (loaded_at, LENGTHS[index] // BYTES_PER_TOKEN)
        return held

    def last_of(self, ticket: Ticket) -> InstanceName | None:
        """Where its client was served last with this model, among several copies."""
        return self._clients.get((ticket.client, ticket.model.blob)) if ticket.client else None

    def served(self, ticket: Ticket, replica: Residency) -> Turn | None:
        """The copy serves the ticket; the turn, to which its answer is to be added."""
        if not ticket.session:
            return None
        key = (ticket.session, replica.blob)
        turn = Turn(replica.instance, replica.loaded_at, ticket.prompt_tokens)
        put(self._sessions, key, turn, _SESSIONS_MAX)
        return turn

    def chosen(self, ticket: Ticket, replica: Residency, prints: tuple[int, ...]) -> None:
        """The copy serves the ticket, and was one of several."""
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
