"""Plays sessions over HTTP against anything that speaks Ollama's API, in a clock that may run fast.

Sessions are closed within themselves as in the simulator: a turn comes at its time or 3 s after the answer before it,
in emulated seconds. Prompts are made-up words, four characters a token as the emulated servers count; those of a
session begin alike. It measures; it starts no server and judges nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from router.lab.simulator.workload import THINK_TIME_SECONDS, Session, Turn

CHARACTERS_A_TOKEN = 4
_SEED = 1
"""An emulated model that is given a seed says the same to the same prompt, so all contestants have the same work."""
_WORDS = ("alpha", "bravo", "delta", "golf", "hotel", "kilo", "lima", "oscar", "papa", "tango", "victor", "zulu")


@dataclass(slots=True)
class Answered:
    """One request as its client saw it; times in emulated seconds since the start."""

    session: int
    turn: int
    user: str
    model: str
    prompt_tokens: int
    shared_tokens: int
    arrived_at: float
    first_token_at: float | None = None
    ended_at: float = 0.0
    words: int = 0
    error: str = ""

    @property
    def ttft_seconds(self) -> float:
        return (self.first_token_at if self.first_token_at is not None else self.ended_at) - self.arrived_at


@dataclass(slots=True)
class Player:
    """Plays against `url`; `speed`: emulated seconds in one real second."""

    url: str
    speed: float
    embedding_models: frozenset[str] = frozenset()
    timeout_seconds: float = 600.0
    answers: list[Answered] = field(default_factory=list[Answered])
    _began: float = 0.0

    async def play(self, sessions: Sequence[Session]) -> list[Answered]:
        """All sessions to their ends; answers in the order of arrival."""
        self._began = time.monotonic()
        limits = aiohttp.ClientTimeout(total=self.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=limits, connector=connector) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for session in sessions:
                tasks.create_task(self._session(client, session))
        return sorted(self.answers, key=lambda one: one.arrived_at)

    def now(self) -> float:
        return (time.monotonic() - self._began) * self.speed

    async def _until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, (at - self.now()) / self.speed))

    async def _session(self, client: aiohttp.ClientSession, session: Session) -> None:
        rng = random.Random(session.id)
        said, ready_at = "", 0.0
        for number, turn in enumerate(session.turns):
            await self._until(max(turn.at_seconds, ready_at))
            prompt = _prompt(said, turn, rng)
            common = len(said[: turn.shared_tokens * CHARACTERS_A_TOKEN]) // CHARACTERS_A_TOKEN
            answered = Answered(session.id, number, session.user, session.model, turn.prompt_tokens, common, self.now())
            self.answers.append(answered)
            said = prompt + await self._ask(client, answered, prompt, turn)
            ready_at = self.now() + THINK_TIME_SECONDS

    async def _ask(self, client: aiohttp.ClientSession, answered: Answered, prompt: str, turn: Turn) -> str:
        """The answer's text; an error is noted and has none."""
        try:
            if answered.model in self.embedding_models:
                body: dict[str, Any] = {"model": answered.model, "input": prompt}
                async with client.post(self.url + "/api/embed", json=body) as reply:
                    answered.error = "" if reply.status == 200 else f"{reply.status}: {(await reply.text())[:200]}"
                answered.first_token_at = answered.ended_at = self.now()
                return ""
            body = {"model": answered.model, "prompt": prompt, "raw": True,
                    "options": {"num_predict": turn.generated_tokens, "seed": _SEED}}  # fmt: skip
            headers = {"X-Session-ID": f"{answered.user}-{answered.session}"}
            async with client.post(self.url + "/api/generate", json=body, headers=headers) as reply:
                return await self._read(reply, answered)
        except (aiohttp.ClientError, TimeoutError) as error:
            answered.error = f"{type(error).__name__}: {error}"
            answered.ended_at = self.now()
            return ""

    async def _read(self, reply: aiohttp.ClientResponse, answered: Answered) -> str:
        text: list[str] = []
        if reply.status != 200:
            answered.error = f"{reply.status}: {(await reply.text())[:200]}"
        else:
            async for line in reply.content:
                row = json.loads(line)
                if row.get("response"):
                    answered.first_token_at = answered.first_token_at or self.now()
                    text.append(row["response"])
                answered.words = row.get("eval_count", answered.words)
                answered.error = row.get("error", answered.error)
        answered.ended_at = self.now()
        return "".join(text)


def _prompt(said: str, turn: Turn, rng: random.Random) -> str:
    """As long as the turn says, beginning as its session went on before."""
    size = (turn.prompt_tokens - 1) * CHARACTERS_A_TOKEN
    kept = said[: min(size, turn.shared_tokens * CHARACTERS_A_TOKEN)]
    fresh = f"{rng.random():.8f} " + " ".join(rng.choices(_WORDS, k=size // 4 + 1))
    return (kept + fresh)[:size] or "hi"
