"""HTTP load generator: runs sessions against any server with Ollama's API, optionally with a scaled clock.

Sessions are closed-loop as in the simulator: a turn is sent at its time or 3 s after the previous answer, in emulated
seconds. Prompts are synthetic words, four characters per token as the emulated servers count; prompts of a session
share a prefix.
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
"""With a seed, an emulated model gives the same answer to the same prompt, so every policy has the same work."""
_WORDS = ("alpha", "bravo", "delta", "golf", "hotel", "kilo", "lima", "oscar", "papa", "tango", "victor", "zulu")


@dataclass(slots=True)
class MeasuredRequest:
    """Client-side measurements of one request; times in emulated seconds since the start."""

    session: int
    turn: int
    user: str
    model: str
    prompt_tokens: int
    shared_tokens: int
    arrived_at: float
    first_token_at: float | None = None
    ended_at: float = 0.0
    generated_tokens: int = 0
    error: str = ""

    @property
    def ttft_seconds(self) -> float:
        return (self.first_token_at if self.first_token_at is not None else self.ended_at) - self.arrived_at


@dataclass(slots=True)
class Player:
    """Runs sessions against `url`; `speed`: emulated seconds per real second."""

    url: str
    speed: float
    embedding_models: frozenset[str] = frozenset()
    timeout_seconds: float = 600.0
    answers: list[MeasuredRequest] = field(default_factory=list[MeasuredRequest])
    _began: float = 0.0

    async def play(self, sessions: Sequence[Session]) -> list[MeasuredRequest]:
        """Runs all sessions to the end. Returns measurements in order of arrival."""
        self._began = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=self.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as client,
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
        history, ready_at = "", 0.0
        for number, turn in enumerate(session.turns):
            await self._until(max(turn.at_seconds, ready_at))
            prompt = _prompt(history, turn, rng)
            common = len(history[: turn.shared_tokens * CHARACTERS_A_TOKEN]) // CHARACTERS_A_TOKEN
            measured = MeasuredRequest(
                session.id, number, session.user, session.model, turn.prompt_tokens, common, self.now()
            )
            self.answers.append(measured)
            history = prompt + await self._send(client, measured, prompt, turn)
            ready_at = self.now() + THINK_TIME_SECONDS

    async def _send(self, client: aiohttp.ClientSession, measured: MeasuredRequest, prompt: str, turn: Turn) -> str:
        """Sends one request. Returns the answer text; empty on error, which is recorded."""
        try:
            if measured.model in self.embedding_models:
                body: dict[str, Any] = {"model": measured.model, "input": prompt}
                async with client.post(self.url + "/api/embed", json=body) as reply:
                    measured.error = "" if reply.status == 200 else f"{reply.status}: {(await reply.text())[:200]}"
                measured.first_token_at = measured.ended_at = self.now()
                return ""
            body = {"model": measured.model, "prompt": prompt, "raw": True,
                    "options": {"num_predict": turn.generated_tokens, "seed": _SEED}}  # fmt: skip
            headers = {"X-Session-ID": f"{measured.user}-{measured.session}"}
            async with client.post(self.url + "/api/generate", json=body, headers=headers) as reply:
                return await self._read(reply, measured)
        except (aiohttp.ClientError, TimeoutError) as error:
            measured.error = f"{type(error).__name__}: {error}"
            measured.ended_at = self.now()
            return ""

    async def _read(self, reply: aiohttp.ClientResponse, measured: MeasuredRequest) -> str:
        text: list[str] = []
        if reply.status != 200:
            measured.error = f"{reply.status}: {(await reply.text())[:200]}"
        else:
            async for line in reply.content:
                row = json.loads(line)
                if row.get("response"):
                    measured.first_token_at = measured.first_token_at or self.now()
                    text.append(row["response"])
                measured.generated_tokens = row.get("eval_count", measured.generated_tokens)
                measured.error = row.get("error", measured.error)
        measured.ended_at = self.now()
        return "".join(text)


def _prompt(history: str, turn: Turn, rng: random.Random) -> str:
    """A prompt of the turn's length that starts with the session's history."""
    size = (turn.prompt_tokens - 1) * CHARACTERS_A_TOKEN
    shared_prefix = history[: min(size, turn.shared_tokens * CHARACTERS_A_TOKEN)]
    new_text = f"{rng.random():.8f} " + " ".join(rng.choices(_WORDS, k=size // 4 + 1))
    return (shared_prefix + new_text)[:size] or "hi"
