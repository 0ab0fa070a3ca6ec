"""One request of a simulated client, from its arrival to its end, and the record of how it went."""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.model import ModelFacts

SERVED = "served"
HUNG_UP = "hung up"


@dataclass(slots=True, eq=False)
class Request:
    """Mutable: whoever serves it writes its times (seconds of the run) and its outcome."""

    id: int
    user: str
    session: int
    turn: int
    model: ModelFacts
    prompt_tokens: int
    shared_tokens: int
    """How many of them are the beginning that the session's earlier turns left, answers included."""
    generated_tokens: int
    """Words of the answer; 0 for an embedding."""
    hang_up_after_seconds: float | None = None
    """The client hangs up when its answer is not complete by then; None: never."""
    arrived_at: float = 0.0
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str = ""
    """Empty while it runs; SERVED, HUNG_UP, or the error's code."""
    where: str = ""
    """Which server answered it."""

    @property
    def ttft_seconds(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def tokens_per_second(self) -> float | None:
        """Of the words after the first; None where there are none."""
        if self.first_token_at is None or self.ended_at is None or self.generated_tokens < 2:
            return None
        return (self.generated_tokens - 1) / max(1e-9, self.ended_at - self.first_token_at)
