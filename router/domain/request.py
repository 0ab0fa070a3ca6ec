"""A request that wants a slot: the ticket that waits for it, and where it insists on being served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from router.domain.gpu import GpuUuid
from router.domain.model import ModelFacts

TicketId = NewType("TicketId", int)


RunnerOptions = tuple[tuple[str, int | bool], ...]
"""Options of a load that make Ollama start another runner when they differ, sorted by name."""


class LayoutKind(StrEnum):
    SINGLE = "single"
    """One GPU, whichever."""
    SPREAD = "spread"
    """Several GPUs."""
    GPU = "gpu"
    """One GPU, that one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a request insists on being served: sums differ between layouts, and so do answers to the same seed."""

    kind: LayoutKind
    gpu: GpuUuid | None = None

    def allows(self, gpus: tuple[GpuUuid, ...]) -> bool:
        """Whether an instance over these GPUs will do."""
        if self.kind is LayoutKind.SPREAD:
            return len(gpus) > 1
        return len(gpus) == 1 and (self.gpu is None or gpus[0] == self.gpu)


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that wants a slot."""

    id: TicketId
    model: ModelFacts
    options: RunnerOptions
    """What the request says, its Modelfile's parameters included; defaults are left out."""
    context_length: int
    """Tokens of context asked for; 0: what the instance gives by default."""
    keep_alive_seconds: float | None
    """None: the request said nothing; negative: for ever; 0: unload when idle."""
    arrived_at: float
    deadline: float
    client: str = ""
    """Who asks, for fairness: a key, a user or an address."""
    session: str = ""
    """The conversation, whose earlier turns some copy may still hold in its cache."""
    priority: int = 0
    """Larger goes first."""
    prompt_tokens: int = 0
    """A guess from the size of the prompt's text."""
    output_tokens_max: int | None = None
    is_flexible: bool = False
    """A copy with other runner options will do if its context is large enough: the gateway adapts the request."""
    layout: Layout | None = None
    fingerprints: Callable[[], tuple[int, ...]] | None = field(default=None, compare=False, repr=False)
    """Works out those of its prompt where they are wanted (`scheduler/balancing/prefix_affinity.py`); None for a
    prompt without."""
    request_id: str = ""
    """What the client calls its request, to be shown."""
