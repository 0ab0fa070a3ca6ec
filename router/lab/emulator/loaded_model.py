"""State of one loaded model of the EMULATED server: runner, users, slots and expiry.

The scheduler makes the decisions. A prompt that shares a prefix with the previous one in its slot is evaluated from
where they differ, as in a real runner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from router.domain.model import ModelFacts
from router.engines.ollama.blob_store import StoredModel
from router.lab.emulator.options import RunnerOptions
from router.lab.emulator.prompt_cache import PromptCache, Slot, common_prefix_length
from router.lab.emulator.runner_process import RunnerProcess, Sequence
from router.lab.emulator.store import Header
from router.lab.emulator.text_generation import prompt_tokens
from router.lab.simulator.server_placement import LoadRequest

MAX_DURATION = timedelta(seconds=2**63 / 1e9)
"""Go's maximum duration, 292 years."""


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A model that is loaded or loading."""

    stored: StoredModel
    """The name it was loaded under; requests for an alias use it too."""
    blob: Path
    header: Header
    facts: ModelFacts
    options: RunnerOptions
    """As requested."""
    context_length: int
    """Effective context of one slot."""
    process: RunnerProcess
    load_request: LoadRequest
    size_bytes: int
    """As `/api/ps` shows it."""
    size_vram_bytes: int
    """The part of it on GPUs."""
    layers: tuple[int, ...]
    """Layers on each visible GPU, counting the output layer as one; the rest is on the CPU."""
    bytes_by_gpu: Mapping[str, int]
    believed_by_gpu: Mapping[str, int]
    """What servers up to 0.24 subtract from the total in their own accounting."""
    host_bytes: int
    session_seconds: float
    slot_count: int
    kept_tokens: int
    """Capacity in tokens for evicted prompts that the runner keeps in host memory."""
    users: int = 1
    expires_at: datetime | None = None
    load_ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The load has succeeded or failed."""
    unloaded: asyncio.Event = field(default_factory=asyncio.Event)
    use_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from the reuse check until the user is counted, so that no eviction happens in between."""
    is_unloading: bool = False
    timer: asyncio.TimerHandle | None = None
    _prompts: PromptCache | None = None
    _free_slots: asyncio.Semaphore | None = None

    @property
    def key(self) -> str:
        """Residency is per weights blob, not per name."""
        return self.stored.weights.digest

    def create_slots(self) -> None:
        """Creates the slots once the load has succeeded."""
        slots = [Slot() for _ in range(self.slot_count)]
        self._prompts = PromptCache(slots, self.kept_tokens, lambda text: prompt_tokens(self.header, text))
        self._free_slots = asyncio.Semaphore(self.slot_count)

    def expiry(self) -> datetime:
        """When it expires; while in use, as if the last request ended now."""
        return self.expires_at or expiry_after(self.session_seconds)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    @contextlib.asynccontextmanager
    async def slot(self, prompt: str, leaks: Callable[[], bool]) -> AsyncGenerator[SlotUse]:
        """Waits for a slot, first come first served. It is released once the runner has ended the sequence.

        `leaks` decides at the end whether the slot leaks (an injected fault).
        """
        assert self._free_slots is not None
        assert self._prompts is not None
        await self._free_slots.acquire()
        slot = self._prompts.acquire(prompt)
        use = SlotUse(common_prefix_length(slot.text, prompt))
        try:
            yield use
        finally:
            slot.text = prompt + use.generated_text
            if not leaks():
                self._release(slot, use.sequence)

    def _release(self, slot: Slot, sequence: Sequence | None) -> None:
        def mark_free(_: object = None) -> None:
            assert self._free_slots is not None
            assert self._prompts is not None
            self._prompts.release(slot)
            self._free_slots.release()

        if sequence is None or sequence.ended.done():
            mark_free()
        else:
            sequence.cancel()
            sequence.ended.add_done_callback(mark_free)


@dataclass(slots=True)
class SlotUse:
    """One request's use of a slot."""

    cached_characters: int
    """Length of the prompt's prefix that is already evaluated."""
    sequence: Sequence | None = None
    generated_text: str = ""


def expiry_after(seconds: float) -> datetime:
    """The time `seconds` from now; negative means never."""
    return datetime.now(UTC) + (MAX_DURATION if seconds < 0 else timedelta(seconds=seconds))
