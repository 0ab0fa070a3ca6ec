"""The ranking of a model's replicas for one request, and the chosen one."""

from __future__ import annotations

from typing import NamedTuple

from router.domain.instance import InstanceName


class Prospect(NamedTuple):
    """Rank of one replica among those with about the same expected wait; the smallest tuple is the best."""

    missing_tokens: int
    """Tokens of the prompt that the replica probably has not cached."""
    in_flight: int
    is_other: bool
    """True if another replica served this client last."""
    used_at: float
    instance: InstanceName


class Choice(NamedTuple):
    """The chosen replica and its alternatives; turned into text only when it is read."""

    chosen: int
    """Index into `prospects`."""
    prospects: tuple[Prospect, ...]
    seconds: tuple[float, ...]
    """Expected wait of each (`replica_scorer.waiting_seconds`)."""
    prompt_tokens: int

    def explain(self) -> str:
        """Why this replica was chosen, to be appended to the reason of a grant; "" if there was only one."""
        if len(self.prospects) == 1:
            return ""
        cached_tokens = self.prompt_tokens - self.prospects[self.chosen].missing_tokens
        cached = f", {cached_tokens} tokens of the prompt in its cache" if cached_tokens else ""
        scored = zip(self.seconds, self.prospects, strict=True)
        least, other = min(each for index, each in enumerate(scored) if index != self.chosen)
        expected = f"about {self.seconds[self.chosen]:.2f} s of waiting{cached}"
        return f"; {expected}, and {least:.2f} s on {other.instance}"
