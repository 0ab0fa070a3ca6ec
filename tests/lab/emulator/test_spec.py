"""A rig's text or file becomes cards; what is wrong is said with the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lab.emulator.spec import CARDS, GIB, MIB, MOST_CARDS, SpecError, parse_cards, parse_spec

_PARTS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(sorted(CARDS))), min_size=1, max_size=4)


@given(_PARTS)
def test_a_text_has_the_cards_that_it_names_in_its_order(parts: list[tuple[int, str]]) -> None:
    names = [name for count, name in parts for _ in range(count)]
    assert parse_cards("+".join(f"{count}x{name}" for count, name in parts)) == tuple(CARDS[name] for name in names)


@given(_PARTS)
def test_each_card_has_a_uuid_of_its_own_that_stays(parts: list[tuple[int, str]]) -> None:
    text = "+".join(f"{count}x{name}" for count, name in parts)
    uuids = parse_spec(text).uuids
    assert len(set(uuids)) == len(uuids) == len(parse_spec(text).cards)
    assert parse_spec(text).uuids == uuids


@pytest.mark.parametrize("text", ["2xRTX3090", "2 x 3090", "2xGeForceRTX3090", "2xNVIDIAGeForceRTX3090"])
def test_makers_words_and_blanks_do_not_matter(text: str) -> None:
    assert parse_cards(text) == (CARDS["3090"],) * 2


def test_bandwidths_are_those_of_the_data_sheets() -> None:
    known = {"3090": 936, "4090": 1008, "5090": 1792, "a6000": 768, "h100": 3352, "6000ada": 960, "l40s": 864}
    for name, gigabytes in known.items():
        assert CARDS[name].bandwidth_bytes_per_second / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_every_card_says_that_it_is_emulated() -> None:
    assert all("emulated" in card.name for card in CARDS.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3x309O", "did you mean '3090'"),
        ("9999", "known: "),
        ("", "is not a card"),
        ("2*3090", "is not a card"),
        ("0x3090", "has 0 cards"),
        (f"{MOST_CARDS + 1}x3090", f"1 to {MOST_CARDS}"),
        ("/nowhere/rig.yaml", "cannot read"),
    ],
)
def test_a_text_that_names_no_rig_is_refused(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words.replace("*", r"\*")):
        parse_spec(text)


def _file(folder: Path, text: str) -> str:
    path = folder / "rig.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_may_change_single_figures(tmp_path: Path) -> None:
    text = """
        cards:
          - 2x3090
          - {card: 4090, name: My card, memory_total_bytes: 1073741824, compute_capability: [9, 0]}
        models: [llama3.1:8b]
        version: 0.33.0
        speed: 4
        ram_bytes: 1000
    """
    spec = parse_spec(_file(tmp_path, text))
    assert [card.name for card in spec.cards][2] == "My card (emulated)"
    assert (spec.cards[2].memory_total_bytes, spec.cards[2].compute_capability) == (GIB, (9, 0))
    assert spec.cards[2].memory_reserved_bytes == 478 * MIB
    assert (spec.models, spec.version, spec.speed, spec.ram_bytes) == (("llama3.1:8b",), "0.33.0", 4.0, 1000)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("card: 3090", "did you mean 'cards'"),
        ("speed: 2", "`cards` is missing"),
        ("cards: []", "list of cards"),
        ("{cards: 3090, speed: 0}", "above 0"),
        ("{cards: 3090, speed: .inf}", "above 0"),
        ("{cards: 3090, speed: true}", "above 0"),
        ("{cards: 3090, version: 0.24.1}", "did you mean '0.24.0'"),
        ("{cards: 3090, models: llama3.1}", "a list of names"),
        ("cards: [{card: 3090, memory_totl_bytes: 1}]", "did you mean 'memory_total_bytes'"),
        ("[3090]", "keys and values"),
        ("{cards: [", "is not YAML"),
    ],
)
def test_a_file_that_describes_no_rig_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_spec(_file(tmp_path, text))
