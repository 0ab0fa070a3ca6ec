"""One loaded model of the EMULATED server: its runner, its users, its slots and how long it stays.

The scheduler decides; this keeps the books of one model. Prompts that begin as the last one of a slot did are evaluated
from where they differ, as in a real runner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from router.domain.model import ModelFacts
from router.lab.emulator.options import RunnerOptions
from router.lab.emulator.prompt_cache import PromptCache, Slot, common_length
from router.lab.emulator.runner_process import RunnerProcess, Sequence
from router.lab.emulator.store import Header, Stored
from router.lab.emulator.text_generation import prompt_tokens

FOR_EVER = timedelta(seconds=2**63 / 1e9)
"""Go's longest duration, 292 years."""


@dataclass(slots=True, eq=False)
class Loaded:
    """A model in memory, or on its way there."""

    stored: Stored
    """As what it was loaded; an alias may use it too."""
    blob: Path
    header: Header
    facts: ModelFacts
    options: RunnerOptions
    """As asked."""
    context_length: int
    """Of one slot, as it came out."""
    process: RunnerProcess
    size_bytes: int
    layers: tuple[int, ...]
    """Units on each visible GPU, the output layer being one; the rest is on the CPU."""
    bytes_by_gpu: Mapping[str, int]
    believed_by_gpu: Mapping[str, int]
    """What its server up to 0.24 takes off what it believes to be free."""
    host_bytes: int
    session_seconds: float
    slot_count: int
    kept_tokens: int
    """How many tokens of evicted prompts its runner keeps."""
    users: int = 1
    expires_at: datetime | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """The load has ended, well or not."""
    unloaded: asyncio.Event = field(default_factory=asyncio.Event)
    guard: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from the check whether the runner will do until it counts as used, so that nobody evicts it in between."""
    is_leaving: bool = False
    timer: asyncio.TimerHandle | None = None
    _prompts: PromptCache | None = None
    _free: asyncio.Semaphore | None = None

    @property
    def key(self) -> str:
        """Residency belongs to the weights."""
        return self.stored.weights.digest

    @property
    def size_vram_bytes(self) -> int:
        return sum(self.bytes_by_gpu.values())

    def begin(self) -> None:
        """The load has succeeded."""
        slots = [Slot() for _ in range(self.slot_count)]
        self._prompts = PromptCache(slots, self.kept_tokens, lambda text: prompt_tokens(self.header, text))
        self._free = asyncio.Semaphore(self.slot_count)

    def expiry(self) -> datetime:
        """When it will leave; while it is used, as if it were left now."""
        return self.expires_at or expiry_after(self.session_seconds)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    @contextlib.asynccontextmanager
    async def slot(self, prompt: str, loses: Callable[[], bool]) -> AsyncGenerator[SlotUse]:
        """Waits for a slot, first come first served. It is free again once the runner has ended the sequence.

        `loses` is asked at the end whether the slot is lost for good (a fault).
        """
        assert self._free is not None
        assert self._prompts is not None
        await self._free.acquire()
        slot = self._prompts.take(prompt)
        use = SlotUse(common_length(slot.text, prompt))
        try:
            yield use
        finally:
            slot.text = prompt + use.said
            if not loses():
                self._release(slot, use.sequence)

    def _release(self, slot: Slot, sequence: Sequence | None) -> None:
        def free(_: object = None) -> None:
            assert self._free is not None
            assert self._prompts is not None
            self._prompts.let_go(slot)
            self._free.release()

        if sequence is None or sequence.over.done():
            free()
        else:
            sequence.cancel()
            sequence.over.add_done_callback(free)


@dataclass(slots=True)
class SlotUse:
    """What one request does with its slot."""

    cached_characters: int
    """So much of the prompt is evaluated already."""
    sequence: Sequence | None = None
    said: str = ""


def expiry_after(seconds: float) -> datetime:
    """So many seconds from now; negative is for ever."""
    return datetime.now(UTC) + (FOR_EVER if seconds < 0 else timedelta(seconds=seconds))
