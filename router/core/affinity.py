"""Which copy may still hold the beginning of a prompt in its cache, because it served that conversation before.

A bounded memory that forgets what was used longest ago. It knows what was served, not what a server's cache has kept:
what it says is a reason to prefer a copy by the time that a cold prompt would take, never one to wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.core.entities import BlobDigest, InstanceName, Residency, Ticket

_SESSIONS_MAX = 10_000


@dataclass(slots=True)
class Turn:
    """Where a conversation was served last; mutable: its answer makes it longer."""

    instance: InstanceName
    loaded_at: float
    """Of the copy: one that came to the same place after it holds nothing."""
    tokens: int
    """Of its prompt, and of its answer once that has ended."""

    def held_by(self, copy: Residency) -> int:
        return self.tokens if (self.instance, self.loaded_at) == (copy.instance, copy.loaded_at) else 0


class Homes:
    """Mutable, single owner."""

    __slots__ = ("_sessions",)

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, BlobDigest], Turn] = {}

    def turn_of(self, ticket: Ticket) -> Turn | None:
        """The turn before this one, where the client names its conversation."""
        return self._sessions.get((ticket.session, ticket.model.blob)) if ticket.session else None

    def served(self, ticket: Ticket, copy: Residency) -> Turn | None:
        """The copy serves the ticket; the turn, to which its answer is to be added."""
        if not ticket.session:
            return None
        key = (ticket.session, copy.blob)
        self._sessions.pop(key, None)
        turn = self._sessions[key] = Turn(copy.instance, copy.loaded_at, ticket.prompt_tokens)
        if len(self._sessions) > _SESSIONS_MAX:
            del self._sessions[next(iter(self._sessions))]
        return turn
