"""A loaded model at work: its slots, its batches, and the prompt caches that slots keep.

One batch takes up to `batch_tokens` of each waiting prompt and one token of each running stream, so a long prompt
stalls the streams beside it. Slots are given first come, first served; of the free ones that with the longest common
beginning is taken, and from 0.30 evicted prompts are kept in host memory. While no prompt waits, many steps are one
event of the timeline. It knows no server and no GPU but by the three callbacks that it is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from router.lab.simulator.requests import Request
from router.lab.simulator.timeline import Timeline, Timer
from router.lab.simulator.world import Speed

OnFinished = Callable[[Request, str], None]
"""Called with the request and why it failed; empty where it was served."""


@dataclass(slots=True)
class Slot:
    """One place; the prompt that it evaluated last, with its answer, stays in its cache."""

    index: int
    session: int = -1
    cached_tokens: int = 0
    used_at: float = -1.0
    taken: bool = False


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    slot: Slot
    prompt_left: int
    done: OnFinished
    sent: int = 0
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """What decides how a loaded model works."""

    speed: Speed
    slots: int
    kept_tokens: int
    """How many tokens of evicted prompts host memory keeps."""


class Batcher:
    """The slots of one loaded model."""

    def __init__(
        self,
        timeline: Timeline,
        facts: BatchFacts,
        on_work: Callable[[bool], None],
        slowdown_factor: Callable[[], float],
    ) -> None:
        """`on_work` is told when it begins and ends to compute; `slowness` says by how much its GPUs are slower."""
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
        self._kept: dict[int, int] = {}

    @property
    def in_use(self) -> int:
        return len(self._running)

    def submit(self, request: Request, done: OnFinished) -> None:
        """Takes a slot now or in its turn."""
        self._waiting.append((request, done))
        if not self._assign():
            return
        if self._timer is None:
            self._on_work(True)
            self._begin()
        else:
            self._interrupt()

    def cancel(self, request: Request) -> bool:
        """The client left: at once where it waits, after the step where it streams, after the prompt before that.

        True where the request was here.
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
        """The runner is gone: what it had, running first."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._on_work(False)
        had = [(s.request, s.done) for s in self._running if not s.cancelled] + list(self._waiting)
        self._running, self._batch = [], []
        self._waiting.clear()
        return had

    # --- slots ---

    def _assign(self) -> bool:
        """Gives free slots to those who wait; True where somebody got one."""
        added = False
        while self._waiting and (free := [slot for slot in self._slots if not slot.taken]):
            request, done = self._waiting.popleft()
            slot = min(free, key=lambda s: (-_common(request, s.session, s.cached_tokens), s.used_at, s.index))
            common = self._take(request, slot)
            left = max(1, request.prompt_tokens - common)
            self._running.append(_Sequence(request, slot, left, done))
            added = True
        return added

    def _take(self, request: Request, slot: Slot) -> int:
        """Puts the request into the slot; how many tokens of its prompt need no evaluation."""
        common = _common(request, slot.session, slot.cached_tokens)
        if self._facts.kept_tokens:
            common = max(common, _common(request, request.session, self._kept.pop(request.session, 0)))
            if slot.session not in (-1, request.session):
                self._keep(slot)
        slot.taken, slot.session, slot.cached_tokens = True, request.session, 0
        return common

    def _keep(self, slot: Slot) -> None:
        self._kept[slot.session] = slot.cached_tokens
        while sum(self._kept.values()) > self._facts.kept_tokens:
            del self._kept[next(iter(self._kept))]

    # --- batches ---

    def _begin(self) -> None:
        """Starts the next batch: one step while a prompt waits, else all steps until a stream ends."""
        self._batch = list(self._running)
        speed = self._facts.speed
        prompts = sum(min(s.prompt_left, speed.batch_tokens) for s in self._batch)
        streams = sum(s.prompt_left == 0 for s in self._batch)
        seconds = prompts * speed.prefill_seconds_per_token + (speed.step(streams) if streams else 0.0)
        self._step_seconds = max(1e-9, seconds * self._slowness())
        self._steps = 1 if prompts else min(s.request.generated_tokens - s.sent for s in self._batch)
        self._began_at = self._timeline.now
        self._timer = self._timeline.after(self._step_seconds * self._steps, self._end)

    def _interrupt(self) -> None:
        """Somebody came or went: what was to be many steps ends with the one under way."""
        if self._timer is None or self._steps == 1:
            return
        whole = min(int((self._timeline.now - self._began_at) / self._step_seconds), self._steps - 1)
        for sequence in self._batch:
            sequence.sent += whole
        self._began_at += whole * self._step_seconds
        self._steps = 1
        self._timer.cancel()
        self._timer = self._timeline.at(self._began_at + self._step_seconds, self._end)

    def _end(self) -> None:
        self._timer = None
        ended = [sequence for sequence in self._batch if self._advance(sequence)]
        for sequence in ended:
            self._running.remove(sequence)
            self._free(sequence)
        self._assign()
        if self._running:
            self._begin()
        else:
            self._batch = []
            self._on_work(False)
        for sequence in ended:
            if not sequence.cancelled:
                sequence.done(sequence.request, "")

    def _advance(self, sequence: _Sequence) -> bool:
        """Applies the steps that ended; True where the sequence has."""
        request = sequence.request
        if sequence.prompt_left > 0:
            sequence.prompt_left -= min(sequence.prompt_left, self._facts.speed.batch_tokens)
            if sequence.prompt_left > 0:
                return False
            sequence.sent = min(1, request.generated_tokens)
            if not sequence.cancelled:
                request.first_token_at = self._timeline.now
        else:
            sequence.sent += self._steps
        return sequence.cancelled or sequence.sent >= request.generated_tokens

    def _free(self, sequence: _Sequence) -> None:
        slot = sequence.slot
        slot.taken = False
        slot.used_at = self._timeline.now
        slot.cached_tokens = sequence.request.prompt_tokens + sequence.sent


def _common(request: Request, session: int, cached_tokens: int) -> int:
    return min(cached_tokens, request.shared_tokens) if session == request.session else 0
