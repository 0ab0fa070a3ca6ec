"""One simulated request: what the client sends and how it was served."""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.model import ModelFacts

SERVED = "served"
HUNG_UP = "hung up"


@dataclass(slots=True, eq=False)
class Request:
    """Mutable: the serving side writes the times (seconds of the run) and the outcome."""

    id: int
    user: str
    session: int
    turn: int
    model: ModelFacts
    prompt_tokens: int
    shared_tokens: int
    """Prompt prefix shared with the session's earlier turns, answers included."""
    generated_tokens: int
    """Length of the answer; 0 for an embedding."""
    hang_up_after_seconds: float | None = None
    """The client disconnects if the answer is incomplete by then; None: never."""
    arrived_at: float = 0.0
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str = ""
    """Empty while it runs, then SERVED, HUNG_UP or an error code."""
    where: str = ""
    """Name of the server that answered it."""

    @property
    def ttft_seconds(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def tokens_per_second(self) -> float | None:
        """Decode rate after the first token; None for fewer than two tokens."""
        if self.first_token_at is None or self.ended_at is None or self.generated_tokens < 2:
            return None
        return (self.generated_tokens - 1) / max(1e-9, self.ended_at - self.first_token_at)
