"""How the replicas of a model ranked for one request, and which one was chosen."""

from __future__ import annotations

from typing import NamedTuple

from router.domain.instance import InstanceName


class Prospect(NamedTuple):
    """How one copy ranks for one request among those with as much to wait for: the least is best."""

    missing_tokens: int
    """Of its prompt, which the copy does not hold in its cache as far as is known."""
    in_flight: int
    is_other: bool
    """Not the one that served this client last."""
    used_at: float
    instance: InstanceName


class Choice(NamedTuple):
    """One copy among others, and what is to be told of it; made into words only where somebody reads them."""

    chosen: int
    """Which of them."""
    prospects: tuple[Prospect, ...]
    seconds: tuple[float, ...]
    """Of waiting, expected of each: `waiting_seconds`."""
    prompt_tokens: int

    def words(self) -> str:
        """Why that one, as the end of a grant's reason; "" where there was no choice."""
        if len(self.prospects) == 1:
            return ""
        held = self.prompt_tokens - self.prospects[self.chosen].missing_tokens
        kept = f", {held} tokens of the prompt in its cache" if held else ""
        both = zip(self.seconds, self.prospects, strict=True)
        least, other = min(each for index, each in enumerate(both) if index != self.chosen)
        expected = f"about {self.seconds[self.chosen]:.2f} s of waiting{kept}"
        return f"; {expected}, and {least:.2f} s on {other.instance}"
