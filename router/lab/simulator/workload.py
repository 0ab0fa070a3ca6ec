"""Workload generation: user sessions from a request trace, a model mix and a seed.

Rows of the trace are sampled to the requested rate and assigned to users; a user continues a session or starts a new
one with a model drawn from the mix. Prompts of a session share a prefix. Turns within a session are closed-loop (a turn
waits for the previous answer; the player enforces that), sessions are open-loop. The same seed gives the same sessions.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from router.domain.model import ModelFacts

TRACE = Path(__file__).parent / "traces" / "azure-llm-2023-conv.csv.gz"
THINK_TIME_SECONDS = 3.0
"""Minimum time between an answer and the next turn of its session."""
_MINIMUM_NEW_TOKENS = 8
"""Minimum number of new prompt tokens in a turn."""
_MINIMUM_ANSWER_TOKENS = 16


class TraceError(ValueError):
    """The file is not a valid trace; the message says why."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    at_seconds: float
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Models by name, each with its weight in the choice of a session's model."""

    name: str
    models: tuple[tuple[str, float], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.models)


@dataclass(frozen=True, slots=True)
class Turn:
    at_seconds: float
    prompt_tokens: int
    shared_tokens: int
    generated_tokens: int
    hang_up_after_seconds: float | None = None
    """The client disconnects if the whole answer takes longer; None: never."""


@dataclass(frozen=True, slots=True)
class Session:
    id: int
    user: str
    model: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """The load to generate."""

    seconds: float = 480.0
    requests_per_second: float = 0.46
    users: int = 12
    turns: float = 4.0
    """Mean length of a session."""
    context_length: int = 8192

    @property
    def requests(self) -> int:
        """Total number of requests; a shorter trace yields fewer."""
        return round(self.requests_per_second * self.seconds)


def read_trace(path: Path = TRACE) -> tuple[TraceRow, ...]:
    """Reads a CSV file with TIMESTAMP, ContextTokens and GeneratedTokens, plain or gzipped; the first row is at 0 s.

    Raises:
        TraceError: the file cannot be read or parsed.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        rows = [
            (_parse_timestamp(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(io.StringIO(text.decode("utf-8")))
        ]
    except OSError as error:
        raise TraceError(f"trace: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        message = "expected a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens"
        raise TraceError(f"trace: {path}: {message}: {error}") from error
    if not rows:
        raise TraceError(f"trace: {path} has no rows")
    start = rows[0][0]
    return tuple(TraceRow(at - start, max(1, prompt), max(1, made)) for at, prompt, made in sorted(rows))


def _parse_timestamp(text: str) -> float:
    """Parses a timestamp to seconds. Its fraction has seven digits, one more than Python parses."""
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def make_sessions(
    rows: tuple[TraceRow, ...], mix: Mix, facts: dict[str, ModelFacts], demand: Demand, seed: int
) -> tuple[Session, ...]:
    """Returns sessions in the order of their first turns. `facts` gives context lengths and embedding models."""
    rng = random.Random(f"{mix.name} {seed}")
    sampled = _sample_rows(rows, demand, rng)
    deck = _WeightedDeck(mix, rng)
    open_sessions: dict[str, int] = {}
    drafts: list[tuple[str, str, list[Turn]]] = []
    for at, row in sampled:
        user = f"user{rng.randrange(demand.users) + 1}"
        if user not in open_sessions or rng.random() < 1.0 / demand.turns:
            open_sessions[user] = len(drafts)
            drafts.append((user, deck.draw(), []))
        _, model, turns = drafts[open_sessions[user]]
        turns.append(_turn(at, row, turns, facts[model], demand.context_length))
    return tuple(Session(index, user, model, tuple(turns)) for index, (user, model, turns) in enumerate(drafts))


def _sample_rows(rows: tuple[TraceRow, ...], demand: Demand, rng: random.Random) -> list[tuple[float, TraceRow]]:
    """Samples rows from a random window of the trace, as many as the requested rate needs.

    A trace shorter than the run is stretched in time; one with too few rows yields all of them.
    """
    length = rows[-1].at_seconds
    span = min(length, demand.seconds)
    start = rng.uniform(0.0, length - span)
    window = [row for row in rows if start <= row.at_seconds < start + span] or [rows[0]]
    row_count = min(len(window), demand.requests)
    indices = sorted(rng.sample(range(len(window)), row_count))
    stretch = demand.seconds / span if span else 1.0
    return [((window[index].at_seconds - start) * stretch, window[index]) for index in indices]


class _WeightedDeck:
    """Draws models in random order, each exactly in proportion to its weight."""

    def __init__(self, mix: Mix, rng: random.Random) -> None:
        self._mix = mix
        self._rng = rng
        self._fractions = dict.fromkeys(mix.names, 0.0)
        self._remaining: list[str] = []

    def draw(self) -> str:
        while not self._remaining:
            smallest_weight = min(weight for _, weight in self._mix.models if weight > 0)
            for name, weight in self._mix.models:
                self._fractions[name] += weight / smallest_weight
                whole = int(self._fractions[name] + 1e-9)
                self._fractions[name] -= whole
                self._remaining += [name] * whole
            self._rng.shuffle(self._remaining)
        return self._remaining.pop()


def _turn(at: float, row: TraceRow, earlier_turns: list[Turn], model: ModelFacts, context_length: int) -> Turn:
    context = min(context_length, model.context_length or context_length)
    prompt = min(row.prompt_tokens, context - _MINIMUM_ANSWER_TOKENS)
    if model.is_embedding:
        return Turn(at, prompt, 0, 0)
    history_tokens = earlier_turns[-1].prompt_tokens + earlier_turns[-1].generated_tokens if earlier_turns else 0
    shared = max(0, min(history_tokens, prompt - _MINIMUM_NEW_TOKENS))
    return Turn(at, prompt, shared, min(row.generated_tokens, context - prompt))
