"""Sessions generated from a trace."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from router.lab.emulator.spec import parse_spec
from router.lab.scenarios import model_facts, parse_mix
from router.lab.simulator.workload import Demand, Session, TraceError, TraceRow, make_sessions, read_trace

ROWS = read_trace()
TEAM = parse_mix("team", parse_spec("4x3090"))
FACTS = {name: model_facts(name) for name in TEAM.names}


def sessions(seed: int, demand: Demand | None = None) -> tuple[Session, ...]:
    return make_sessions(ROWS, TEAM, FACTS, demand or Demand(), seed)


def test_the_built_in_trace_covers_an_hour() -> None:
    assert len(ROWS) == 19_366
    assert 3400 < ROWS[-1].at_seconds < 3700
    assert ROWS[0] == TraceRow(0.0, 374, 44)


def test_a_trace_is_read_plain_and_gzipped(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47,5,6\n"
    plain, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_trace(plain) == read_trace(packed)
    assert read_trace(plain)[1].at_seconds == pytest.approx(0.31941)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n"])
def test_an_invalid_trace_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match="bad"):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / "missing.csv")


def test_sessions_depend_only_on_the_seed() -> None:
    assert sessions(1) == sessions(1)
    assert sessions(1) != sessions(2)


def test_the_number_of_requests_and_users_matches_the_demand() -> None:
    made = sessions(3, Demand(seconds=600.0, requests_per_second=0.5, users=12))
    turns = [turn for session in made for turn in session.turns]
    assert len(turns) == 300
    assert len({session.user for session in made}) == 12
    assert all(0 <= turn.at_seconds < 600 for turn in turns)


def test_each_model_gets_its_share_of_the_sessions() -> None:
    made = sessions(1, Demand(seconds=3600.0))
    counts = {name: sum(session.model == name for session in made) for name in TEAM.names}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_turns_of_a_session_are_in_order_and_share_a_prefix() -> None:
    shared = 0
    for session in sessions(1):
        assert [turn.at_seconds for turn in session.turns] == sorted(turn.at_seconds for turn in session.turns)
        assert session.turns[0].shared_tokens == 0
        for before, turn in zip(session.turns, session.turns[1:], strict=False):
            assert turn.shared_tokens < turn.prompt_tokens
            assert turn.shared_tokens <= before.prompt_tokens + before.generated_tokens
            shared += turn.shared_tokens
    assert shared > 0


def test_no_turn_needs_more_than_the_context() -> None:
    for session in sessions(1):
        room = min(8192, FACTS[session.model].context_length)
        for turn in session.turns:
            assert turn.prompt_tokens + turn.generated_tokens <= room


def test_a_trace_shorter_than_the_run_is_stretched() -> None:
    rows = tuple(TraceRow(float(at), 100, 10) for at in range(50))
    made = make_sessions(rows, TEAM, FACTS, Demand(seconds=500.0, requests_per_second=0.1), 1)
    turns = [turn for session in made for turn in session.turns]
    assert max(turn.at_seconds for turn in turns) > 100
