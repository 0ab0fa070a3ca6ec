"""Generates one answer of the EMULATED server, from acquiring a slot to the last token; used by all APIs."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from router.lab.emulator.http_server import Request
from router.lab.emulator.loaded_model import LoadedModel, SlotUse
from router.lab.emulator.runner_process import RunnerLostError
from router.lab.emulator.text_generation import GenerationRequest, Piece, generate_pieces, prompt_tokens

REPEAT_LIMIT = 30
"""More identical tokens in a row end an answer without a final line."""


class RunnerFailedError(Exception):
    """The runner has died; the message is the server's."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One completion request to a loaded model."""

    generation: GenerationRequest
    limit: int
    stop: tuple[str, ...] = ()
    has_repeat_limit: bool = True
    """Whether more than `REPEAT_LIMIT` identical tokens in a row end the answer."""


@dataclass(slots=True)
class CompletionOutcome:
    """Result of a completion; final once the stream has ended."""

    done_reason: str | None = None
    """None: cut off without a final line."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were already evaluated; at least one never is."""
    tokens: int = 0
    prompt_seconds: float = 0.0
    eval_seconds: float = 0.0
    texts: list[str] = field(default_factory=list[str])

    @property
    def is_complete(self) -> bool:
        return self.done_reason is not None


async def complete(
    loaded: LoadedModel,
    request: Request,
    completion: CompletionRequest,
    outcome: CompletionOutcome,
    rng: random.Random,
    lost_messages: RunnerLostMessages,
    leaks_slot: Callable[[], bool],
) -> AsyncGenerator[Piece]:
    """Waits for a slot, then yields pieces as they are generated; updates `outcome` on the way.

    Raises:
        RunnerFailedError: the runner died.
        ClientDisconnectedError: the client disconnected.
    """
    has_disconnected = False
    with request.cancel_on_disconnect():
        async with loaded.slot(completion.generation.prompt, lambda: has_disconnected and leaks_slot()) as use:
            try:
                async for piece in _stream(loaded, completion, outcome, rng, lost_messages, use):
                    yield piece
            except BaseException as error:
                has_disconnected = outcome.tokens > 0 and not isinstance(error, RunnerFailedError)
                raise


@dataclass(frozen=True, slots=True)
class RunnerLostMessages:
    """The server's error messages for a runner that died."""

    before_first_token: str
    mid_stream: str


async def _stream(
    loaded: LoadedModel,
    completion: CompletionRequest,
    outcome: CompletionOutcome,
    rng: random.Random,
    lost_messages: RunnerLostMessages,
    use: SlotUse,
) -> AsyncGenerator[Piece]:
    prompt = completion.generation.prompt
    prompt_token_count = min(prompt_tokens(loaded.header, prompt), loaded.context_length)
    outcome.prompt_tokens = prompt_token_count
    cached_tokens = prompt_token_count * use.cached_characters // max(1, len(prompt))
    outcome.cached_tokens = max(0, min(cached_tokens, prompt_token_count - 1))
    started_at = time.monotonic()
    stop_filter = _StopFilter(completion.stop)
    repeat_count, last_text = 0, None
    try:
        use.sequence = sequence = loaded.process.run(
            max(1, prompt_token_count - cached_tokens), max(1, completion.limit)
        )
        for piece in generate_pieces(loaded.header, completion.generation, rng):
            if outcome.tokens >= max(1, completion.limit) or not await sequence.token():
                outcome.done_reason = "length"
                break
            _count_token(outcome, started_at)
            use.generated_text += piece.text
            repeat_count = (
                repeat_count + 1 if piece.kind != "call" and piece.text and piece.text.strip() == last_text else 0
            )
            last_text = piece.text.strip()
            if completion.has_repeat_limit and repeat_count > REPEAT_LIMIT:
                return
            text = stop_filter.add(piece.text) if piece.kind == "content" else piece.text
            if text or piece.kind == "call":
                yield Piece(piece.kind, text)
            if stop_filter.has_matched:
                outcome.done_reason = "stop"
                break
        else:
            outcome.done_reason = "stop"
    except RunnerLostError as error:
        raise RunnerFailedError(
            lost_messages.mid_stream if outcome.tokens else lost_messages.before_first_token
        ) from error
    flush = stop_filter.flush()
    if flush:
        yield Piece("content", flush)


def _count_token(outcome: CompletionOutcome, started_at: float) -> None:
    elapsed = time.monotonic() - started_at
    outcome.tokens += 1
    if outcome.tokens == 1:
        outcome.prompt_seconds = elapsed
    outcome.eval_seconds = max(1e-6, elapsed - outcome.prompt_seconds)


class _StopFilter:
    """Cuts the text at the first stop sequence and holds back a possible beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.has_matched = False
        self._stop = tuple(sequence for sequence in stop if sequence)
        self._held_back = ""

    def add(self, text: str) -> str:
        """Adds text; returns what can be sent now."""
        if not self._stop:
            return text
        self._held_back += text
        positions = [position for stop in self._stop if (position := self._held_back.find(stop)) >= 0]
        if positions:
            self.has_matched = True
            emitted, self._held_back = self._held_back[: min(positions)], ""
            return emitted
        held_length = max(_overlap(self._held_back, stop) for stop in self._stop)
        emitted = self._held_back[: len(self._held_back) - held_length]
        self._held_back = self._held_back[len(emitted) :]
        return emitted

    def flush(self) -> str:
        held_back, self._held_back = self._held_back, ""
        return held_back


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
