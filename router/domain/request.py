"""A request that wants a slot: its ticket and the layout that it requires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName
from router.domain.model import ModelFacts

TicketId = NewType("TicketId", int)


RunnerOptions = tuple[tuple[str, int | bool], ...]
"""Options that require a reload when they change, sorted by name."""


class LayoutKind(StrEnum):
    SINGLE = "single"
    """Any single GPU."""
    SPREAD = "spread"
    """Several GPUs."""
    GPU = "gpu"
    """One given GPU."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout that a request requires: floating-point sums, and so answers to the same seed, differ by layout."""

    kind: LayoutKind
    gpu: GpuUuid | None = None

    def allows(self, gpus: tuple[GpuUuid, ...]) -> bool:
        """Returns True if an instance over these GPUs matches."""
        if self.kind is LayoutKind.SPREAD:
            return len(gpus) > 1
        return len(gpus) == 1 and (self.gpu is None or gpus[0] == self.gpu)


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that wants a slot."""

    id: TicketId
    model: ModelFacts
    options: RunnerOptions
    """Options of the request and of its Modelfile, without those that equal the default."""
    context_length: int
    """Requested context in tokens; 0: the default of the instance."""
    keep_alive_seconds: float | None
    """None: not set by the request; negative: for ever; 0: unload when idle."""
    arrived_at: float
    deadline: float
    client: str = ""
    """Client identity for fairness: a key, a user or an address."""
    session: str = ""
    """Id of the conversation, whose earlier turns a replica may still have cached; "" if unknown."""
    priority: int = 0
    """Larger values are served first."""
    prompt_tokens: int = 0
    """Estimated from the size of the prompt's text."""
    output_tokens_max: int | None = None
    is_flexible: bool = False
    """True if a replica with other runner options can serve it when its context is large enough: the router then adapts
    the request."""
    takes_default_context: bool = False
    """True if its body cannot name a context: its server gives it the default context of the instance."""
    layout: Layout | None = None
    fingerprints: Callable[[], tuple[int, ...]] | None = field(default=None, compare=False, repr=False)
    """Computes the fingerprints of its prompt (`scheduler/balancing/prefix_affinity.py`); None if it has none."""
    avoid: InstanceName | None = None
    """An instance that has failed the request: another one is preferred."""
    request_id: str = ""
    """The client's id of the request; only displayed."""
