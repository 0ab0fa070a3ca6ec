"""Pure parts of the emulated server: options, reloads, environment variables, generated text."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.engines.ollama.gguf_header import single
from router.lab.emulator.config import read_config
from router.lab.emulator.options import OptionError, RunnerOptions, needs_reload, read_options
from router.lab.emulator.prompt_cache import common_prefix_length
from router.lab.emulator.store import Header
from router.lab.emulator.text_generation import GenerationRequest, example_of, generate_pieces, prompt_tokens, vector

_NOISE = Header({"general.architecture": "llama"}, (), is_noise=True)
_LANGUAGE = Header({"general.architecture": "llama"}, (), is_noise=False)


def _options(**requested: Any) -> Any:
    return read_options(requested, {}, 4096)


# --- options ----------------------------------------------------------------------------------------------


def test_request_options_override_the_modelfile_which_overrides_the_defaults() -> None:
    options = read_options({"num_batch": 64}, {"num_ctx": 2048, "num_batch": 128, "stop": ["x"]}, 4096)
    assert (options.runner.num_ctx, options.runner.num_batch, options.stop) == (2048, 64, ("x",))
    assert _options().runner == RunnerOptions(4096)
    assert _options(num_ctx=1).runner.num_ctx == 4


@pytest.mark.parametrize(
    ("requested", "kind"),
    [({"num_ctx": "big"}, "integer"), ({"top_p": "x"}, "float32"), ({"use_mmap": 1}, "boolean"),
     ({"stop": "x"}, "array"), ({"seed": True}, "integer")],
)  # fmt: skip
def test_an_option_of_the_wrong_type_is_refused(requested: dict[str, Any], kind: str) -> None:
    with pytest.raises(OptionError, match=f"must be of type {kind}"):
        read_options(requested, {}, 4096)


@pytest.mark.parametrize(("num_predict", "limit"), [(-1, 40_960), (5, 5), (10**9, 40_960)])
def test_an_answer_is_limited_to_ten_contexts(num_predict: int, limit: int) -> None:
    assert _options(num_predict=num_predict).limit(4096) == limit


@pytest.mark.parametrize("is_0_30", [False, True])
def test_a_layer_count_that_the_server_chose_causes_no_reload(is_0_30: bool) -> None:
    loaded = RunnerOptions(4096, num_gpu=81)
    assert not needs_reload(loaded, _options(), 8192, is_0_30)
    assert needs_reload(loaded, _options(num_gpu=80), 8192, is_0_30)
    assert not needs_reload(loaded, _options(num_gpu=81), 8192, is_0_30)


def test_before_0_30_a_context_above_the_trained_one_is_compared_as_requested() -> None:
    loaded = RunnerOptions(9000)
    assert needs_reload(loaded, _options(num_ctx=8192), 8192, is_0_30=False)
    assert not needs_reload(loaded, _options(num_ctx=8192), 8192, is_0_30=True)


def test_from_0_30_unset_options_never_cause_a_reload_where_the_server_chose() -> None:
    loaded = RunnerOptions(2048, num_batch=64, use_mmap=False, is_mmap_automatic=True)
    assert not needs_reload(loaded, _options(), 8192, is_0_30=True)
    assert needs_reload(loaded, _options(), 8192, is_0_30=False)
    assert needs_reload(loaded, _options(num_ctx=1024), 8192, is_0_30=True)
    assert not needs_reload(loaded, _options(use_mmap=False), 8192, is_0_30=True)
    assert needs_reload(loaded, _options(use_mmap=True), 8192, is_0_30=True)
    assert needs_reload(RunnerOptions(2048, use_mmap=True), _options(), 8192, is_0_30=True)


def test_a_spelled_out_main_gpu_differs_from_none_only_from_0_30() -> None:
    loaded = RunnerOptions(2048)
    requested = _options(num_ctx=2048, main_gpu=0)
    assert not needs_reload(loaded, requested, 8192, is_0_30=False)
    assert needs_reload(loaded, requested, 8192, is_0_30=True)


@given(st.builds(RunnerOptions, st.integers(4, 9000), st.integers(1, 512), st.integers(-1, 90), st.integers(0, 2)))
def test_equal_options_never_cause_a_reload(options: RunnerOptions) -> None:
    requested = replace(_options(num_ctx=5), runner=options, is_batch_given=True)
    assert not needs_reload(options, requested, 4096, is_0_30=False)
    assert not needs_reload(options, requested, 4096, is_0_30=True)


# --- the environment --------------------------------------------------------------------------------------


def test_a_server_reads_the_environment_variables_of_real_ollama() -> None:
    config = read_config(
        {"OLLAMA_HOST": "http://127.0.0.1:1234/x", "OLLAMA_MODELS": "/m", "OLLAMA_KEEP_ALIVE": "-1",
         "OLLAMA_NUM_PARALLEL": '"3"', "OLLAMA_MAX_QUEUE": "many", "OLLAMA_SCHED_SPREAD": "maybe",
         "OLLAMA_NOPRUNE": "false"}
    )  # fmt: skip
    assert (config.host, config.port, str(config.models)) == ("127.0.0.1", 1234, "/m")
    assert (config.keep_alive_seconds, config.num_parallel, config.max_queue) == (-1.0, 3, 512)
    assert (config.spread, config.noprune, config.loaded_limit) == (True, False, 3)


@pytest.mark.parametrize(
    ("text", "address"),
    [("", ("127.0.0.1", 11434)), ("0.0.0.0", ("0.0.0.0", 11434)), (":80", ("127.0.0.1", 80)), ("[::1]:5", ("::1", 5)),
     ("h:99999", ("h", 11434))],
)  # fmt: skip
def test_addresses_are_parsed_in_every_form(text: str, address: tuple[str, int]) -> None:
    config = read_config({"OLLAMA_HOST": text})
    assert (config.host, config.port) == address


# --- text -------------------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.text(max_size=60))
def test_texts_are_equal_up_to_their_common_prefix_length(first: str, second: str) -> None:
    length = common_prefix_length(first, second)
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


@given(st.text(min_size=1), st.integers(0, 2**31))
def test_the_same_seed_and_prompt_give_the_same_text(prompt: str, seed: int) -> None:
    generation = GenerationRequest(prompt, seed)
    first, second = (list(itertools.islice(generate_pieces(_NOISE, generation, random.Random(n)), 20)) for n in (1, 2))
    assert first == second
    assert len(first) == 20


def test_without_a_seed_the_text_differs() -> None:
    source = random.Random(7)
    first, second = (
        list(itertools.islice(generate_pieces(_NOISE, GenerationRequest("x"), source), 20)) for _ in range(2)
    )
    assert first != second


def test_catalogue_models_say_that_they_are_emulated_and_stop() -> None:
    text = "".join(piece.text for piece in generate_pieces(_LANGUAGE, GenerationRequest("x", 1), random.Random(1)))
    assert text.startswith(" This answer is emulated")
    assert text.endswith(".")


@pytest.mark.parametrize(("text", "tokens"), [("hello", 9), ("x", 5), ("hi", 6), ("", 1)])
def test_a_noise_model_needs_one_token_per_prompt_byte(text: str, tokens: int) -> None:
    assert prompt_tokens(_NOISE, text) == tokens


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"const": 5}, 5),
        ({"enum": ["a", "b"]}, "a"),
        ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}}, {"a": 7, "b": []}),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"type": ["boolean", "null"]}, True),
        ({"type": "array", "minItems": 1, "items": {"type": "number"}}, [7.5]),
        ({"properties": {"s": {"type": "string"}}}, {"s": "emulated"}),
        ("nonsense", {}),
    ],
)
def test_the_example_value_fits_the_schema(schema: Any, value: Any) -> None:
    assert example_of(schema) == value


@given(st.text(max_size=20), st.integers(1, 200))
def test_an_embedding_has_unit_length_and_is_deterministic(text: str, length: int) -> None:
    embedding = vector(text, length)
    assert embedding == vector(text, length)
    assert sum(value * value for value in embedding) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("text", ["1e-05", "0.1", "1", "-8.3e+20"])
def test_single_precision_values_print_in_their_shortest_form(text: str) -> None:
    assert single(float(text)) == float(text)
