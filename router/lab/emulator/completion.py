"""One answer of the EMULATED server, from the slot to the last token: what all three APIs' streams are made of."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from router.lab.emulator.http_server import ClientLeftError, Request
from router.lab.emulator.loaded_model import Loaded, SlotUse
from router.lab.emulator.runner_process import RunnerLostError
from router.lab.emulator.text_generation import Piece, Wish, prompt_tokens, say

REPEAT_LIMIT = 30
"""More equal tokens in a row end an answer without a last line."""


class RunnerFailedError(Exception):
    """The runner is gone; the text is the server's."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of a loaded model."""

    wish: Wish
    limit: int
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """How it went; complete once the stream has ended."""

    done_reason: str | None = None
    """None: cut off without a last line."""
    prompt_tokens: int = 0
    tokens: int = 0
    prompt_seconds: float = 0.0
    eval_seconds: float = 0.0
    said: list[str] = field(default_factory=list[str])

    @property
    def is_complete(self) -> bool:
        return self.done_reason is not None


async def complete(
    loaded: Loaded,
    request: Request,
    ask: Ask,
    outcome: Outcome,
    chance: random.Random,
    words: Words,
    loses_slot: Callable[[], bool],
) -> AsyncGenerator[Piece]:
    """Waits for a slot, then the pieces as they come; `outcome` is filled as it goes.

    Raises:
        RunnerFailedError: the runner died.
        ClientLeftError: the client has left.
    """
    has_left = False
    with request.watched():
        async with loaded.slot(ask.wish.prompt, lambda: has_left and loses_slot()) as use:
            try:
                async for piece in _stream(loaded, ask, outcome, chance, words, use):
                    yield piece
            except BaseException as error:
                has_left = outcome.tokens > 0 and not isinstance(error, RunnerFailedError)
                raise


@dataclass(frozen=True, slots=True)
class Words:
    """The server's words for a runner that died."""

    before: str
    within: str


async def _stream(
    loaded: Loaded, ask: Ask, outcome: Outcome, chance: random.Random, words: Words, use: SlotUse
) -> AsyncGenerator[Piece]:
    prompt = ask.wish.prompt
    count = min(prompt_tokens(loaded.header, prompt), loaded.context_length)
    outcome.prompt_tokens = count
    cached = count * use.cached_characters // max(1, len(prompt))
    began = time.monotonic()
    cutter = _StopWords(ask.stop)
    repeats, last = 0, None
    try:
        use.sequence = sequence = loaded.process.run(max(1, count - cached), max(1, ask.limit))
        for piece in say(loaded.header, ask.wish, chance):
            if outcome.tokens >= max(1, ask.limit) or not await sequence.token():
                outcome.done_reason = "length"
                break
            _count(outcome, began)
            use.said += piece.text
            repeats = repeats + 1 if piece.kind != "call" and piece.text and piece.text.strip() == last else 0
            last = piece.text.strip()
            if repeats > REPEAT_LIMIT:
                return
            text = cutter.add(piece.text) if piece.kind == "content" else piece.text
            if text or piece.kind == "call":
                yield Piece(piece.kind, text)
            if cutter.has_met:
                outcome.done_reason = "stop"
                break
        else:
            outcome.done_reason = "stop"
    except RunnerLostError as error:
        raise RunnerFailedError(words.within if outcome.tokens else words.before) from error
    rest = cutter.rest()
    if rest:
        yield Piece("content", rest)


def _count(outcome: Outcome, began: float) -> None:
    elapsed = time.monotonic() - began
    outcome.tokens += 1
    if outcome.tokens == 1:
        outcome.prompt_seconds = elapsed
    outcome.eval_seconds = max(1e-6, elapsed - outcome.prompt_seconds)


class _StopWords:
    """Cuts a text at the first stop word, and holds back what may become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.has_met = False
        self._stop = tuple(word for word in stop if word)
        self._held = ""

    def add(self, text: str) -> str:
        """What may be said now."""
        if not self._stop:
            return text
        self._held += text
        places = [at for word in self._stop if (at := self._held.find(word)) >= 0]
        if places:
            self.has_met = True
            said, self._held = self._held[: min(places)], ""
            return said
        kept = max(_overlap(self._held, word) for word in self._stop)
        said = self._held[: len(self._held) - kept]
        self._held = self._held[len(said) :]
        return said

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """How long an end of the text is a beginning of the word."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)


__all__ = ["Ask", "ClientLeftError", "Outcome", "RunnerFailedError", "Words", "complete"]
