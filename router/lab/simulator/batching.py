"""Continuous batching in one model runner: slots, batches and the prompt cache of each slot.

A batch takes up to `batch_tokens` of each pending prompt and one token of each running stream, so a long prompt stalls
concurrent streams. Slots are assigned first come, first served; among free slots the one with the longest common prompt
prefix wins. From 0.30 evicted prompts are kept in host memory. While no prompt is pending, many decode steps are
scheduled as one timeline event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from router.lab.simulator.requests import Request
from router.lab.simulator.timeline import Timeline, Timer
from router.lab.simulator.world import Speed

OnFinished = Callable[[Request, str], None]
"""Called once with the request and its error; the error is empty if the request was served."""


@dataclass(slots=True)
class Slot:
    """One sequence slot. Its KV cache keeps the last prompt and answer."""

    index: int
    session: int = -1
    cached_tokens: int = 0
    used_at: float = -1.0
    is_taken: bool = False


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    slot: Slot
    prompt_tokens_left: int
    done: OnFinished
    generated_tokens_sent: int = 0
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class BatchParameters:
    """Parameters of one runner's batching."""

    speed: Speed
    slots: int
    host_cache_tokens: int
    """Capacity of the host-memory cache for evicted prompts; 0: none."""


class Batcher:
    """Assigns slots and runs batches for one loaded model."""

    def __init__(
        self,
        timeline: Timeline,
        facts: BatchParameters,
        on_work: Callable[[bool], None],
        slowdown_factor: Callable[[], float],
    ) -> None:
        """`on_work(True)` is called when computing starts, `on_work(False)` when it stops. `slowdown_factor`
        returns the factor by which steps take longer at the moment."""
        self._timeline = timeline
        self._facts = facts
        self._on_work = on_work
        self._slowness = slowdown_factor
        self._slots = [Slot(index) for index in range(facts.slots)]
        self._waiting: deque[tuple[Request, OnFinished]] = deque()
        self._running: list[_Sequence] = []
        self._batch: list[_Sequence] = []
        self._began_at = 0.0
        self._step_seconds = 0.0
        self._steps = 0
        self._timer: Timer | None = None
        self._host_cache: dict[int, int] = {}

    def submit(self, request: Request, done: OnFinished) -> None:
        """Queues the request; it starts as soon as a slot is free."""
        self._waiting.append((request, done))
        if not self._assign():
            return
        if self._timer is None:
            self._on_work(True)
            self._begin()
        else:
            self._interrupt()

    def cancel(self, request: Request) -> bool:
        """Removes a request whose client disconnected. Returns False if the request is unknown.

        A waiting request is removed at once, a streaming one after the current step, and one in prefill after its whole
        prompt.
        """
        for entry in self._waiting:
            if entry[0] is request:
                self._waiting.remove(entry)
                return True
        for sequence in self._running:
            if sequence.request is request and not sequence.cancelled:
                sequence.cancelled = True
                self._interrupt()
                return True
        return False

    def stop(self) -> list[tuple[Request, OnFinished]]:
        """Stops at once. Returns the unfinished requests, running ones first."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._on_work(False)
        unfinished = [(s.request, s.done) for s in self._running if not s.cancelled] + list(self._waiting)
        self._running, self._batch = [], []
        self._waiting.clear()
        return unfinished

    # --- slots ---

    def _assign(self) -> bool:
        """Assigns free slots to waiting requests. Returns True if any request got one."""
        added = False
        while self._waiting and (free := [slot for slot in self._slots if not slot.is_taken]):
            request, done = self._waiting.popleft()
            slot = min(free, key=lambda s: (-_common_prefix(request, s.session, s.cached_tokens), s.used_at, s.index))
            common_prefix = self._take(request, slot)
            left = max(1, request.prompt_tokens - common_prefix)
            self._running.append(_Sequence(request, slot, left, done))
            added = True
        return added

    def _take(self, request: Request, slot: Slot) -> int:
        """Puts the request into the slot. Returns the number of prompt tokens found in a cache."""
        common_prefix = _common_prefix(request, slot.session, slot.cached_tokens)
        if self._facts.host_cache_tokens:
            common_prefix = max(
                common_prefix, _common_prefix(request, request.session, self._host_cache.pop(request.session, 0))
            )
            if slot.session not in (-1, request.session):
                self._move_to_host_cache(slot)
        slot.is_taken, slot.session, slot.cached_tokens = True, request.session, 0
        return common_prefix

    def _move_to_host_cache(self, slot: Slot) -> None:
        self._host_cache[slot.session] = slot.cached_tokens
        while sum(self._host_cache.values()) > self._facts.host_cache_tokens:
            del self._host_cache[next(iter(self._host_cache))]

    # --- batches ---

    def _begin(self) -> None:
        """Starts the next batch: one step while a prompt is pending, else all steps until the first stream ends."""
        self._batch = list(self._running)
        speed = self._facts.speed
        prompts = sum(min(s.prompt_tokens_left, speed.batch_tokens) for s in self._batch)
        streams = sum(s.prompt_tokens_left == 0 for s in self._batch)
        seconds = prompts * speed.prefill_seconds_per_token + (speed.step(streams) if streams else 0.0)
        self._step_seconds = max(1e-9, seconds * self._slowness())
        self._steps = 1 if prompts else min(s.request.generated_tokens - s.generated_tokens_sent for s in self._batch)
        self._began_at = self._timeline.now
        self._timer = self._timeline.after(self._step_seconds * self._steps, self._end)

    def _interrupt(self) -> None:
        """Cuts a multi-step batch after the current step, because the set of requests changed."""
        if self._timer is None or self._steps == 1:
            return
        finished_steps = min(int((self._timeline.now - self._began_at) / self._step_seconds), self._steps - 1)
        for sequence in self._batch:
            sequence.generated_tokens_sent += finished_steps
        self._began_at += finished_steps * self._step_seconds
        self._steps = 1
        self._timer.cancel()
        self._timer = self._timeline.at(self._began_at + self._step_seconds, self._end)

    def _end(self) -> None:
        self._timer = None
        finished = [sequence for sequence in self._batch if self._advance(sequence)]
        for sequence in finished:
            self._running.remove(sequence)
            self._free(sequence)
        self._assign()
        if self._running:
            self._begin()
        else:
            self._batch = []
            self._on_work(False)
        for sequence in finished:
            if not sequence.cancelled:
                sequence.done(sequence.request, "")

    def _advance(self, sequence: _Sequence) -> bool:
        """Applies the finished steps. Returns True if the sequence has finished."""
        request = sequence.request
        if sequence.prompt_tokens_left > 0:
            sequence.prompt_tokens_left -= min(sequence.prompt_tokens_left, self._facts.speed.batch_tokens)
            if sequence.prompt_tokens_left > 0:
                return False
            sequence.generated_tokens_sent = min(1, request.generated_tokens)
            if not sequence.cancelled:
                request.first_token_at = self._timeline.now
        else:
            sequence.generated_tokens_sent += self._steps
        return sequence.cancelled or sequence.generated_tokens_sent >= request.generated_tokens

    def _free(self, sequence: _Sequence) -> None:
        slot = sequence.slot
        slot.is_taken = False
        slot.used_at = self._timeline.now
        slot.cached_tokens = sequence.request.prompt_tokens + sequence.generated_tokens_sent


def _common_prefix(request: Request, session: int, cached_tokens: int) -> int:
    return min(cached_tokens, request.shared_tokens) if session == request.session else 0
