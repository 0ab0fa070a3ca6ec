"""What `peek` sees of a body is what Go sees: judged by Go itself, and by cases that have a name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from router.errors import BadRequest, UnsupportedEncoding
from router.gateway.peek import RUNNER_OPTION_NAMES, Peek, peek, refuse_encoded
from tests.gateway.bodies import BODIES
from tests.gateway.go_oracle import GoOracle, compile_oracle

PATHS = (
    "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/api/pull", "/api/copy",
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
)  # fmt: skip

ODD_BODIES = (
    b'{"model":"a","MODEL":"b"}',
    b'{"MODEL":"a","model":"b"}',
    b'{"model":"a","model":null}',
    b'{"\\u006dodel":"a"}',
    b'{"\\u004DODE\\u004c":"a"}',
    b'{"model":"a"}{"model":"b"}',
    b'{"model":"a"} trailing',
    b'\n\t {"model" : "a" }\r',
    b'{"model":"\xff\xfe"}',
    b'{"model":"\xe2\x82"}',
    b'{"model\xff":"a","model":"b"}',
    b'{"model":"\\ud800\\ud83d\\ude00"}',
    b'{"model":"x","mode\\u006c":5}',
    b'{"model":["a"]}',
    b"null",
    b"nullnull",
    b" null }",
    b"[]",
    b'"model"',
    b"5",
    b"",
    b"  ",
    b"\xef\xbb\xbf{}",
    b"{}",
    b'{"":{}}',
    b'{"a":' + b"[" * 9_000 + b"]" * 9_000 + b',"model":"deep"}',
    b'{"a":' + b"[" * 9_999 + b"]" * 9_999 + b',"model":"deepest"}',
    b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b',"model":"too deep"}',
    b'{"model":"a","x":{"model":"b"}}',
    b'{"model":"a","x":"\\"model\\":\\"b\\""}',
    b'{"model":"a","model":"aa","model":"a"}',
    '{"options":{"num_ctx":1},"option\u017f":{"num_ctx":null,"num_batch":2}}'.encode(),
    '{"\u212aeep_alive":5,"keep_alive":"1m"}'.encode(),
    b'{"options":{"num_ctx":1},"options":null,"options":{"NUM_CTX":2}}',
    b'{"stream":false,"stream":null}',
    b'{"messages":[{}],"messages":null}',
    b'{"prompt":"a","prompt":null}',
    b'{"prompt":"a","Prompt":""}',
    b'{"input":["a"],"input":[ ]}',
    b'{"name":"a"}',
    b'{"model":"","name":"a"}',
    b'{"model":"m","name":"a","source":"s"}',
    b'{"options":{"num_ctx":' + b"9" * 308 + b"}}",
    b'{"options":{"num_ctx":1e999}}',
    b'{"x":' + b"9" * 5000 + b',"model":"a"}',
)


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoOracle]:
    with GoOracle(compile_oracle(tmp_path_factory.mktemp("oracle"))) as oracle:
        yield oracle


def agree(go: GoOracle, path: str, body: bytes) -> str:
    """Asserts that `peek` and Go see the same, and says what Go thought of the body."""
    truth = go.decode(path, body)
    seen = peek(body, path)
    if not truth["ok"]:
        return "refused"
    assert not seen.unreadable, f"Go reads {body!r}"
    assert (seen.model or "") == truth["model"]
    assert _same_stream(path, seen.stream, truth["stream"])
    assert seen.is_load_only == truth["load_only"]
    if path.startswith("/api/"):
        _same_runner(seen, truth)
    else:
        assert seen.options == {} and seen.keep_alive is None
        assert path == "/v1/embeddings" or seen.output_tokens_max == truth["max_tokens"]
    return "read"


def _same_stream(path: str, seen: bool | None, truth: bool | None) -> bool:
    """Where the field is no pointer, absent is false."""
    is_value = path in ("/v1/chat/completions", "/v1/completions", "/v1/messages")
    return bool(seen) == truth if is_value else seen == truth


def _same_runner(seen: Peek, truth: dict[str, Any]) -> None:
    assert seen.keep_alive == truth["keep_alive"]
    options = truth["options"] or {}
    wanted = {name: value for name, value in options.items() if name in RUNNER_OPTION_NAMES and value is not None}
    assert set(seen.options) == set(wanted)
    for name, value in wanted.items():
        got = seen.options[name]
        assert isinstance(got, bytes) if isinstance(value, list | dict) else (got == value and type(got) is not bytes)
