"""Hypothesis strategies for request bodies as bytes: ordinary, odd, and broken in ways that parsers disagree about."""

from __future__ import annotations

from hypothesis import strategies as st

BLANKS = st.text(alphabet=" \t\n\r", max_size=2).map(str.encode)

NAMES = (
    "model", "name", "source", "stream", "keep_alive", "options", "prompt", "messages", "input", "max_tokens",
    "max_output_tokens", "suffix", "temperature",
)  # fmt: skip
OPTION_NAMES = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "num_predict", "seed")

STRINGS = st.sampled_from(
    (
        b'""', b'"a"', b'"b"', b'"llama3:8b"', b'"\\u0061"', b'"\\ud800"', b'"\\udc00x"', b'"\\ud83d\\ude00"',
        b'"\\ud800\\ud83d\\ude00"', b'"\\ud800\\u0041"', b'"\xff"', b'"\xe2\x82"', b'"\xed\xa0\x80"',
        b'"\xf0\x9f\x98\x80"',
        b'"\xc0\x80"', b'"a\\"b"', b'"\\\\"', b'"\\/\\b\\f\\n\\r\\t"', b'" a "', b'"5m"', b'"}"', b'"]{"', b'"\x7f"',
        b'"\xef\xbb\xbf"', b'"true"', b'"\\u0000"', b'"\\u2028"',
        b'"\x01"', b'"\\x"', b'"\\u12"', b'"\\\'"', b'"open',
    )
)  # fmt: skip
NUMBERS = st.sampled_from(
    (
        b"0", b"-0", b"1", b"-1", b"8192", b"1.5", b"1e2", b"1E+2", b"1e-400", b"9007199254740993", b"1e308",
        b"1" * 309, b"1e309", b"-1e400", b"0." + b"0" * 400 + b"1", b"1" * 4400,
        b"01", b"1.", b".5", b"+1", b"-", b"1e", b"0x1", b"NaN", b"Infinity", b"-Infinity", b"1_0", b"\xd9\xa1",
    )
)  # fmt: skip
WORDS = st.sampled_from((b"null", b"true", b"false", b"nul", b"True", b"None", b"nullx", b""))
SCALARS = st.one_of(STRINGS, NUMBERS, WORDS)


@st.composite
def spellings(draw: st.DrawFn, names: tuple[str, ...]) -> bytes:
    """A key, quoted: as it is, in other case, with letters that fold to ASCII, escaped, or with a byte too many."""
    name = draw(st.sampled_from(names))
    if draw(st.integers(0, 2)):
        return b'"' + name.encode() + b'"'
    pieces: list[str] = []
    for letter in name:
        ways = [letter, letter, letter.upper(), f"\\u{ord(letter):04x}", f"\\u{ord(letter.upper()):04X}"]
        ways += {"s": ["\u017f", "\\u017F"], "k": ["\u212a", "\\u212a"], "i": ["\u0130", "\u0131"]}.get(letter, [])
        pieces.append(draw(st.sampled_from(ways)))
    tail = draw(st.sampled_from((b"", b"", b"", b"\xff", b"\\ud800", b" ", b"\xcc\x87")))
    return b'"' + "".join(pieces).encode() + tail + b'"'


@st.composite
def objects(draw: st.DrawFn, keys: st.SearchStrategy[bytes], values: st.SearchStrategy[bytes]) -> bytes:
    members: list[bytes] = []
    for _ in range(draw(st.integers(0, 6))):
        key, value = draw(keys), draw(values)
        members.append(draw(BLANKS) + key + draw(BLANKS) + b":" + draw(BLANKS) + value + draw(BLANKS))
    return b"{" + b",".join(members) + (b"" if members else draw(BLANKS)) + b"}"


def lists(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(lambda blank, items: b"[" + blank + b",".join(items) + b"]", BLANKS, st.lists(values, max_size=3))


GOOD_SCALARS = st.sampled_from(
    (b"null", b"true", b"false", b"0", b"-1", b"1.5", b"1e3", b'""', b'"a"', b'"\\ud800"', b'"\xff"')
)
OPTIONS = objects(spellings(OPTION_NAMES), st.one_of(GOOD_SCALARS, GOOD_SCALARS, SCALARS, lists(GOOD_SCALARS)))
VALUES = st.one_of(
    GOOD_SCALARS, GOOD_SCALARS, SCALARS, OPTIONS, lists(SCALARS), lists(st.just(b"{}")),
    objects(spellings(NAMES), SCALARS),
)  # fmt: skip


@st.composite
def fitting(draw: st.DrawFn) -> bytes:
    """A member whose value has a type that its field takes, so that bodies Go accepts are not rare."""
    key = draw(spellings(NAMES))
    lower = key.lower()
    if b"opt" in lower:
        return key + b":" + draw(st.one_of(st.just(b"null"), objects(spellings(OPTION_NAMES), GOOD_SCALARS)))
    if b"tream" in lower:
        return key + b":" + draw(st.sampled_from((b"true", b"false", b"null")))
    if b"token" in lower:
        return key + b":" + draw(st.sampled_from((b"1", b"-1", b"null", b"300")))
    if b"message" in lower:
        return key + b":" + draw(st.sampled_from((b"null", b"[]", b"[ ]", b"[{}]", b'[{"model":"x"},{}]')))
    if b"alive" in lower:
        return key + b":" + draw(st.sampled_from((b"null", b"5", b'"5m"', b"-1", b"0.5", b"0")))
    return (
        key + b":" + draw(st.sampled_from((b'""', b'"a"', b'"b"', b'"\\ud800c"', b'"\xffd"', b"null", b'"\\u0061b"')))
    )


FITTING = st.lists(fitting(), max_size=7).map(lambda members: b"{" + b",".join(members) + b"}")


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A body with something before or after it, or with a byte changed, lost or put in."""
    body = draw(whole)
    kind = draw(st.integers(0, 6))
    at = draw(st.integers(0, max(len(body) - 1, 0)))
    junk = draw(
        st.sampled_from((b" ", b"\n", b"x", b"{}", b'{"model":"z"}', b"\x00", b"\xef\xbb\xbf", b",", b'"', b"}", b"\\"))
    )
    if kind <= 1:
        return body
    if kind == 2:
        return body + junk
    if kind == 3:
        return junk + body
    if kind == 4:
        return body[:at] + junk + body[at:]
    return body[:at] + body[at + 1 :] if kind == 5 else body[:at]


BODIES = damaged(st.one_of(FITTING, FITTING, objects(spellings(NAMES), VALUES), VALUES))
