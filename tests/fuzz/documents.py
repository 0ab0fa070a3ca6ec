"""Generates configuration files and files of keys: valid ones, and such as a hand or a broken disk may leave."""

from __future__ import annotations

import json
import random
from typing import Any

import yaml

from router.config.keys import dotted_keys
from router.config.settings import Settings
from router.config.values import json_value
from tests.fuzz.mutator import NUMBERS, Mutator

_KEYS = tuple(dotted_keys(Settings))
_DEFAULTS = Settings()
_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 4.5, 10**30, -(10**30), float("inf"), float("nan"), 1e-300, "", "x", "5m", "-1"),
    *("127.0.0.1", "0.0.0.0:80", "::1", "http://localhost:11434", "unix:/x", "8GiB", "1.5 GB", "gpu0", "q8_0", "auto"),
    *("low", "*", "a\x00b", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "~/x", "/", "../..", "yes"),
    *("2001-01-01", "1_000", "0o17", "0x1F", "=", "llama3:8b", "hf.co/x/y:z", "a" * 5000),
)
_YAML_WORDS = (
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object:os.system ",
        b"!!binary aGk=",
        b"!!int x",
        b"? ",
        b"- ",
        b": ",
        b"|\n",
    ),
    *(b"---\n", b"...\n", b"%YAML 9.9\n", b"{", b"}", b"[", b"]", b"#", b"\t", b"\n  ", b"'", b'"', b"2001-13-45"),
    *(
        b"!!timestamp x",
        b"!!set {a}",
        b"[" * 300,
        b"{a: " * 200,
        b"\n\n",
        b"null",
        b".inf",
        b".nan",
        b"\xff\xfe",
        *NUMBERS,
    ),
)


def odd_configuration(rng: random.Random) -> bytes:
    """A configuration file of some keys, with right and wrong values, perhaps damaged."""
    tree: dict[Any, Any] = {}
    for _ in range(rng.randint(0, 6)):
        *parents, last = rng.choice(_KEYS).split(".")
        at = tree
        for parent in parents:
            inner = at.setdefault(parent, {})
            at = inner if isinstance(inner, dict) else tree
        at[last if rng.random() < 0.9 else rng.choice(_SCALARS)] = _value_for(rng, ".".join((*parents, last)))
    if rng.random() < 0.3:
        tree["models"] = {rng.choice(("a", "*", "a:b", "A", "x/y", "")): _rules(rng) for _ in range(2)}
    if rng.random() < 0.2:
        tree["instances"] = [_instance(rng) for _ in range(rng.randint(0, 3))]
    try:
        raw = yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeEncodeError, TypeError):
        raw = b"{}\n"
    return Mutator(rng, _YAML_WORDS).mutate(raw) if rng.random() < 0.4 else raw


def _value_for(rng: random.Random, key: str) -> Any:
    return json_value(_DEFAULTS, key) if rng.random() < 0.6 else _value(rng, 0)


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8)
    if kind == 0 and depth < 3:
        return [_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 1 and depth < 3:
        return {rng.choice(("a", "b", 1, None, True)): _value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return rng.choice(_SCALARS)


def _rules(rng: random.Random) -> Any:
    keys = ("gpus", "spread", "keep_warm", "context_length", "num_parallel", "keep_alive", "priority", "cpu", "x")
    return (
        {rng.choice(keys): _value(rng, 1) for _ in range(rng.randint(0, 3))} if rng.random() < 0.9 else _value(rng, 0)
    )


def _instance(rng: random.Random) -> Any:
    good = {"name": rng.choice(("a", "b")), "url": f"http://127.0.0.1:{rng.choice((1, 2, 99999))}", "gpus": []}
    return {key: value if rng.random() < 0.8 else _value(rng, 1) for key, value in good.items() if rng.random() < 0.8}


_KEY_WORDS = (
    *NUMBERS,
    b'"keys"',
    b'"name"',
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'"*"',
    b"[" * 300,
    b"\\ud800",
    b'"admin"',
)


def key_document(rng: random.Random) -> bytes:
    """A file of keys, perhaps damaged."""
    document = {"version": 1, "keys": [_key(rng, number) for number in range(rng.randint(0, 4))]}
    raw = json.dumps(document).encode()
    return Mutator(rng, _KEY_WORDS).mutate(raw, 6) if rng.random() < 0.7 else raw


def _key(rng: random.Random, number: int) -> dict[str, Any]:
    key: dict[str, Any] = {"name": f"k{rng.choice((number, number, 0))}", "sha256": f"{number:064x}", "user": "u"}
    key["created_at"] = rng.choice((0, 1.5, -1, 1e300))
    optional = {
        "expires_at": (None, 0, 5e9, "x"),
        "classes": (["inference"], ["admin", "management"], [], ["root"]),
        "models": (["*"], ["a*", "b?"], [], ["[", "(", "\\", "a" * 3000], [1]),
        "limits": ({"requests_per_minute": 1}, {"tokens_per_day": -1}, {"x": 1}, None, {"concurrent_requests": 2**70}),
        "priority": (0, 1, 9, -5, "high"),
        "context_length_max": (None, 0, -1, 4096, 1.5),
        "keep_alive_seconds_min": (None, 0, -1, 1e400, 5),
        "keep_alive_seconds_max": (None, 0, -1, 5),
        "layouts": (["single"], ["spread", "single"], ["x"]),
        "forwards_users": (True, 0),
    }
    return key | {name: rng.choice(values) for name, values in optional.items() if rng.random() < 0.3}
