"""What `peek` sees of a body is what Go sees: judged by Go itself, and by cases that have a name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from router.engines.ollama.runner_options import RUNNER_OPTION_NAMES
from router.errors import BadRequest
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.json_members import MEMBERS_MAX, TOKENS_MAX
from tests.llm_api.bodies import BODIES
from tests.llm_api.go_oracle import GoOracle

PATHS = (
    "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/api/pull", "/api/copy", "/api/push", "/api/create",
    "/api/show", "/api/delete",
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


def agree(go: GoOracle, path: str, body: bytes) -> str:
    """Asserts that `peek` and Go see the same, and says what Go thought of the body."""
    truth = go.decode(path, body)
    seen = parse_body(body, path)
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
        assert path == "/v1/embeddings" or truth["hinted"] or seen.output_tokens_max == truth["max_tokens"]
    return "read"


def _same_stream(path: str, seen: bool | None, truth: bool | None) -> bool:
    """Where the field is no pointer, absent is false."""
    is_value = path in ("/v1/chat/completions", "/v1/completions", "/v1/messages")
    return bool(seen) == truth if is_value else seen == truth


def _same_runner(seen: ParsedBody, truth: dict[str, Any]) -> None:
    assert _same(seen.keep_alive, truth["keep_alive"])
    options = truth["options"] or {}
    wanted = {name: value for name, value in options.items() if name in RUNNER_OPTION_NAMES and value is not None}
    assert set(seen.options) == set(wanted)
    for name, value in wanted.items():
        assert _same(seen.options[name], value)


def _same(seen: object, truth: object) -> bool:
    """Go has made numbers 64-bit floats; lists and objects are kept here as they are written."""
    if isinstance(truth, list | dict):
        return isinstance(seen, bytes)
    if isinstance(truth, int | float) and not isinstance(truth, bool):
        return isinstance(seen, int | float) and not isinstance(seen, bool) and float(seen) == float(truth)
    return seen == truth and type(seen) is type(truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", ODD_BODIES, ids=lambda body: repr(body[:40]))
def test_odd_bodies_are_seen_as_go_sees_them(go: GoOracle, path: str, body: bytes) -> None:
    agree(go, path, body)


def test_the_judge_reads_some_odd_bodies_and_refuses_others(go: GoOracle) -> None:
    """Else the tests that ask it could not fail."""
    verdicts = [agree(go, "/api/generate", body) for body in ODD_BODIES]
    assert verdicts.count("read") > 20
    assert verdicts.count("refused") > 5


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(BODIES, st.sampled_from(PATHS))
@example(b'{"model":"a","model":"b"}', "/api/chat")
def test_what_go_reads_of_any_body_peek_reads_too(go: GoOracle, body: bytes, path: str) -> None:
    agree(go, path, body)


@pytest.mark.parametrize(
    "body",
    [b"", b"  ", b"[]", b'"model"', b"5", b'{"model":["a"]}', b'{"model":5}', b'{"stream":"yes","model":"a"}', b'{"a":',
     b'{"model":"a"', b"{model:1}", b'{"model":"a",}'],
)  # fmt: skip
def test_a_body_that_go_refuses_is_called_unreadable_and_says_nothing(body: bytes) -> None:
    assert parse_body(body, "/api/chat") == ParsedBody(unreadable=True)


def test_options_keep_their_type_and_only_those_that_decide_a_runner_are_kept() -> None:
    body = (
        b'{"model":"m","options":{"num_ctx":4096,"use_mmap":false,"num_thread":2.0,"seed":1,"NUM_GPU":9,"num_gpu":3}}'
    )
    assert parse_body(body, "/api/generate").options == {
        "num_ctx": 4096,
        "use_mmap": False,
        "num_thread": 2.0,
        "num_gpu": 3,
    }


@pytest.mark.parametrize(
    ("path", "body", "limit"),
    [
        ("/api/generate", b'{"options":{"num_predict":7}}', 7),
        ("/api/chat", b'{"options":{"num_predict":-1}}', -1),
        ("/api/chat", b'{"options":{"num_predict":true}}', None),
        ("/v1/chat/completions", b'{"max_tokens":5}', 5),
        ("/v1/chat/completions", b'{"max_tokens":5,"max_completion_tokens":9}', 9),
        ("/v1/responses", b'{"max_output_tokens":12,"max_tokens":1}', 12),
        ("/v1/messages", b'{"max_tokens":"5"}', None),
    ],
)
def test_the_limit_of_the_answer_is_read_where_each_api_has_it(path: str, body: bytes, limit: int | None) -> None:
    assert parse_body(body, path).output_tokens_max == limit


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"model":"a"}', ()),
        (b'{"model":"a","model":"a"}', ("model",)),
        (b'{"Model":"a"}', ("model",)),
        (b'{"stream":true,"STREAM":false,"model":"a","model":"b"}', ("stream", "model")),
        (b'{"seed":1,"seed":2}', ()),
    ],
)
def test_members_that_other_readers_may_see_differently_are_named(body: bytes, names: tuple[str, ...]) -> None:
    assert parse_body(body, "/api/chat").ambiguous == names


def test_the_size_of_a_prompt_leaves_its_images_out() -> None:
    image = b"A" * 100_000
    ollama = b'{"model":"m","messages":[{"role":"user","content":"hello","images":["' + image + b'"]}]}'
    openai = (
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"hello"},'
        b'{"type":"image_url","image_url":{"url":"' + image + b'"}}]}]}'
    )
    assert 0 < parse_body(ollama, "/api/chat").prompt_bytes < 1_000
    assert 0 < parse_body(openai, "/v1/chat/completions").prompt_bytes < 1_000
    text = b'{"model":"m","messages":[{"role":"user","content":"' + image + b'"}]}'
    assert parse_body(text, "/api/chat").prompt_bytes > len(image)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/no/such/path"])
def test_a_path_without_a_reading_of_its_own_is_read_for_its_model_alone(path: str) -> None:
    seen = parse_body(b'{"model":"m","stream":"nonsense","options":5,"keep_alive":{}}', path)
    assert seen == ParsedBody(model="m")


def test_a_body_of_too_many_members_is_refused_and_not_worked_through() -> None:
    many = b"{" + b",".join(b'"k%d":0' % number for number in range(MEMBERS_MAX + 1)) + b"}"
    with pytest.raises(BadRequest, match="more than 10000 members"):
        parse_body(many, "/api/chat")


def test_a_body_of_too_many_brackets_is_refused_and_not_worked_through() -> None:
    # The repeated key sends it the slow way.
    many = b'{"model":"a","model":"b","x":[' + b",".join([b"[]"] * (TOKENS_MAX // 2 + 1)) + b"]}"
    with pytest.raises(BadRequest, match="members and brackets"):
        parse_body(many, "/api/chat")
