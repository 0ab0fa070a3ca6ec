"""Who asks what, when: users' sessions made of a request trace, a mix of models and a seed.

Rows of the trace are thinned to the wanted rate and dealt to users; a user goes on with his session or begins another,
with a model drawn from the mix. Prompts of a session share their beginning. Sessions are closed within themselves (the
next turn waits for the answer before it; whoever plays them sees to that) and open between each other. Reads files,
nothing else from outside; the same seed gives the same sessions.
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
"""A turn comes no sooner than so long after the answer before it."""
_FRESH_TOKENS = 8
"""The least that a turn adds to what its session said before."""
_LEAST_ANSWER_TOKENS = 16


class TraceError(ValueError):
    """The file is no trace; says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    at_seconds: float
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Models by name, each with its weight among the sessions."""

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
    """Its client hangs up after so long without the whole answer."""


@dataclass(frozen=True, slots=True)
class Session:
    id: int
    user: str
    model: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """How much is asked for."""

    seconds: float = 480.0
    requests_per_second: float = 0.46
    users: int = 12
    turns: float = 4.0
    """Mean length of a session."""
    context_length: int = 8192

    @property
    def requests(self) -> int:
        """In all; a trace with fewer rows gives those that it has."""
        return round(self.requests_per_second * self.seconds)


def read_trace(path: Path = TRACE) -> tuple[TraceRow, ...]:
    """Rows of a CSV file with TIMESTAMP, ContextTokens, GeneratedTokens, plain or gzipped; times from its first row.

    Raises:
        TraceError: the file cannot be read as one.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        rows = [
            (_moment(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(io.StringIO(text.decode("utf-8")))
        ]
    except OSError as error:
        raise TraceError(f"trace: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        words = "a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens is wanted"
        raise TraceError(f"trace: {path}: {words}: {error}") from error
    if not rows:
        raise TraceError(f"trace: {path} has no rows")
    start = rows[0][0]
    return tuple(TraceRow(at - start, max(1, prompt), max(1, made)) for at, prompt, made in sorted(rows))


def _moment(text: str) -> float:
    """Seconds; fractions have seven digits there, one more than Python reads."""
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def make_sessions(
    rows: tuple[TraceRow, ...], mix: Mix, facts: dict[str, ModelFacts], demand: Demand, seed: int
) -> tuple[Session, ...]:
    """Sessions in the order of their first turns. `facts` tells contexts, and which models embed."""
    rng = random.Random(f"{mix.name} {seed}")
    picked = _thinned(rows, demand, rng)
    deck = _WeightedDeck(mix, rng)
    open_sessions: dict[str, int] = {}
    drafts: list[tuple[str, str, list[Turn]]] = []
    for at, row in picked:
        user = f"user{rng.randrange(demand.users) + 1}"
        if user not in open_sessions or rng.random() < 1.0 / demand.turns:
            open_sessions[user] = len(drafts)
            drafts.append((user, deck.draw(), []))
        _, model, turns = drafts[open_sessions[user]]
        turns.append(_turn(at, row, turns, facts[model], demand.context_length))
    return tuple(Session(index, user, model, tuple(turns)) for index, (user, model, turns) in enumerate(drafts))


def _thinned(rows: tuple[TraceRow, ...], demand: Demand, rng: random.Random) -> list[tuple[float, TraceRow]]:
    """A stretch of the trace from a random place, with as many of its rows as the wanted rate asks for; a trace that is
    shorter is stretched, one that has too few rows gives all it has."""
    length = rows[-1].at_seconds
    span = min(length, demand.seconds)
    start = rng.uniform(0.0, length - span)
    inside = [row for row in rows if start <= row.at_seconds < start + span] or [rows[0]]
    wanted = min(len(inside), demand.requests)
    kept = sorted(rng.sample(range(len(inside)), wanted))
    stretch = demand.seconds / span if span else 1.0
    return [((inside[index].at_seconds - start) * stretch, inside[index]) for index in kept]


class _WeightedDeck:
    """Deals models so that each comes as often as its weight says, in an order that chance decides."""

    def __init__(self, mix: Mix, rng: random.Random) -> None:
        self._mix = mix
        self._rng = rng
        self._owed = dict.fromkeys(mix.names, 0.0)
        self._left: list[str] = []

    def draw(self) -> str:
        while not self._left:
            least = min(weight for _, weight in self._mix.models if weight > 0)
            for name, weight in self._mix.models:
                self._owed[name] += weight / least
                whole = int(self._owed[name] + 1e-9)
                self._owed[name] -= whole
                self._left += [name] * whole
            self._rng.shuffle(self._left)
        return self._left.pop()


def _turn(at: float, row: TraceRow, before: list[Turn], model: ModelFacts, context_length: int) -> Turn:
    context = min(context_length, model.context_length or context_length)
    prompt = min(row.prompt_tokens, context - _LEAST_ANSWER_TOKENS)
    if model.is_embedding:
        return Turn(at, prompt, 0, 0)
    said = before[-1].prompt_tokens + before[-1].generated_tokens if before else 0
    shared = max(0, min(said, prompt - _FRESH_TOKENS))
    return Turn(at, prompt, shared, min(row.generated_tokens, context - prompt))
