"""Facts of models out of what real servers say of them, and out of what some servers leave out."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.model import ModelFacts
from router.engines.ollama.client import ShowReply, TagRow
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.model_metadata import needs_verbose, read_facts
from tests.engines.ollama.test_client import recorded

BLOB = "a" * 64
FROM = f"# FROM other\n\nFROM /models/blobs/sha256-{BLOB}\nTEMPLATE x\n"
TAG = TagRow("m:latest", "digest", 5000)


def _reply(info: dict[str, Any] | None = None, **fields: Any) -> ShowReply:
    said = {"modelfile": FROM, "model_info": info or {}, **fields}
    return msgspec.json.decode(json.dumps(said), type=ShowReply)


def _facts(info: dict[str, Any] | None = None, **fields: Any) -> ModelFacts:
    found = read_facts(TAG, _reply(info, **fields))
    assert found is not None
    return found


def _real(name: str) -> ModelFacts:
    found = read_facts(TAG, msgspec.json.decode(json.dumps(recorded(name)), type=ShowReply))
    assert found is not None
    return found


def test_a_real_llama_is_read_whole() -> None:
    assert _real("show") == ModelFacts(
        name="m:latest",
        digest="digest",
        blob="sha256:cf7b4539f0228c4c037bf17f3c29c687b204885f22baf4546fd1eb22c8615179",  # type: ignore[arg-type]
        weights_bytes=5000,
        architecture="llama",
        layers=2,
        embedding_length=64,
        head_count=2,
        head_count_kv=(1, 1),
        key_length=32,
        value_length=32,
        vocabulary_size=771,
        context_length=8192,
        feed_forward_length=128,
        parameters=(("num_thread", "1"),),
        input_bytes=64 * 771 * 2,
        output_bytes=64 * 771 * 2 + 64 * 4,
    )
    assert _real("show-verbose") == _real("show")


def test_a_real_bert_is_an_embedder_without_a_word_of_its_kv_heads() -> None:
    bert = _real("show-embed")
    assert bert.is_embedding
    assert (bert.head_count_kv, bert.key_length, bert.value_length) == ((2, 2), 32, 32)
    assert (bert.context_length, bert.vocabulary_size) == (512, 193)
    inputs = 64 * 193 * 2 + 64 * 2 * 4 + 64 * 512 * 4
    assert bert.input_bytes in (inputs, inputs + 2 * 64 * 4)
    assert bert.output_bytes == 0


def test_a_derived_model_has_the_blob_of_its_weights() -> None:
    assert _real("show-tools-thinking").blob == _real("show").blob


@pytest.mark.parametrize(
    "line",
    [
        f"FROM /root of models/blobs/sha256-{BLOB}",
        f"FROM C:\\models\\blobs\\sha256-{BLOB}",
        f'FROM "/with blanks/blobs/sha256-{BLOB}"',
        f"FROM @sha256:{BLOB}",
        f"FROM /models/blobs/sha256-{BLOB}\r",
    ],
)
def test_the_weights_are_named_by_the_modelfile_wherever_the_store_is(line: str) -> None:
    assert _facts(modelfile=f"# FROM tiny\n{line}\nPARAMETER a 1\n").blob == f"sha256:{BLOB}"


@pytest.mark.parametrize("modelfile", ["", "FROM gpt-oss:120b-cloud\n", f"# FROM /blobs/sha256-{BLOB}\n"])
def test_what_has_no_weights_here_has_no_facts(modelfile: str) -> None:
    assert read_facts(TAG, _reply(modelfile=modelfile)) is None


def test_a_cloud_models_stub_has_no_facts() -> None:
    remote = TagRow("m", remote_host="https://ollama.com")
    assert read_facts(remote, _reply()) is None


def test_kv_heads_of_each_layer_are_taken_as_they_are_told() -> None:
    info = {"general.architecture": "x", "x.block_count": 4, "x.attention.head_count": 8}
    each = _facts({**info, "x.attention.head_count_kv": [0, 2, 4]})
    assert each.head_count_kv == (0, 2, 4, 4)
    assert _facts({**info, "x.attention.head_count_kv": 2}).head_count_kv == (2,) * 4
    assert _facts(info).head_count_kv == (8,) * 4
    several = _facts({**info, "x.attention.head_count": [8, 16, 16, 8], "x.embedding_length": 1024})
    assert (several.head_count, several.head_count_kv, several.key_length) == (16, (8, 16, 16, 8), 64)


@pytest.mark.parametrize(
    ("info", "needed"),
    [
        ({"general.architecture": "x", "x.attention.head_count_kv": None}, True),
        ({"general.architecture": "x", "x.attention.head_count": None}, True),
        ({"general.architecture": "x", "x.attention.head_count_kv": 2}, False),
        ({"general.architecture": "x", "x.attention.head_count_kv": [2, 4]}, False),
        ({"general.architecture": "x", "tokenizer.ggml.tokens": None}, False),
        ({}, False),
    ],
)
def test_arrays_without_their_values_are_asked_for_once_more(info: dict[str, Any], needed: bool) -> None:
    assert needs_verbose(_reply(info)) is needed


def test_what_the_facts_do_not_count_the_tensors_do() -> None:
    tensors = [{"name": "token_embd.weight", "type": "Q4_K", "shape": [256, 1000]},
               {"name": "blk.0.attn_q.weight", "type": "Q4_K", "shape": [256, 256]},
               {"name": "blk.11.attn_q.weight", "type": "Q4_K", "shape": [256, 256]}]  # fmt: skip
    found = _facts({"general.architecture": "qwen2"}, tensors=tensors)
    assert (found.layers, found.vocabulary_size, found.embedding_length) == (12, 1000, 256)


def test_a_table_that_is_input_and_output_at_once_is_on_the_gpus_a_second_time() -> None:
    table = {"name": "token_embd.weight", "type": "Q6_K", "shape": [256, 1000]}
    norm = {"name": "output_norm.weight", "type": "F32", "shape": [256]}
    own = {"name": "output.weight", "type": "F16", "shape": [256, 1000]}
    table_bytes = tensor_bytes("Q6_K", (256, 1000))
    assert table_bytes is not None
    tied, apart = _facts(tensors=[table, norm]), _facts(tensors=[table, norm, own])
    assert (tied.input_bytes, tied.output_bytes) == (0, table_bytes + 1024)
    assert (apart.input_bytes, apart.output_bytes) == (table_bytes, 512_000 + 1024)


def test_a_tensor_of_a_type_that_nobody_knows_makes_the_ends_unknown() -> None:
    table = {"name": "token_embd.weight", "type": "unknown", "shape": [256, 1000]}
    own = {"name": "output.weight", "type": "F16", "shape": [256, 1000]}
    assert (_facts(tensors=[table, own]).input_bytes, _facts(tensors=[table, own]).output_bytes) == (None, 512_000)
    assert (_facts(tensors=[table]).input_bytes, _facts(tensors=[table]).output_bytes) == (0, None)
    assert (_facts().input_bytes, _facts().output_bytes) == (None, None)


@pytest.mark.parametrize(
    ("capabilities", "info", "embeds"),
    [
        (["embedding"], {}, True),
        (["completion", "embedding"], {}, False),
        (["completion"], {"general.architecture": "x", "x.pooling_type": 1}, False),
        (None, {"general.architecture": "x", "x.pooling_type": 1}, True),
        ([], {"general.architecture": "x", "x.pooling_type": 1}, True),
        (None, {"general.architecture": "llama"}, False),
    ],
)
def test_an_embedder_is_told_by_its_capabilities_else_by_its_pooling(
    capabilities: list[str] | None, info: dict[str, Any], embeds: bool
) -> None:
    assert _facts(info, capabilities=capabilities).is_embedding is embeds


def test_parameters_that_matter_to_a_runner_are_kept_with_plain_numbers() -> None:
    lines = ("num_ctx                        1.048576e+06", 'stop  "<|end|>"', "use_mmap  false", "num_gpu 3",
             "temperature 0.7", "num_batch 0.5")  # fmt: skip
    text = "\n".join(lines)
    kept = (("num_batch", "0.5"), ("num_ctx", "1048576"), ("num_gpu", "3"), ("use_mmap", "false"))
    assert _facts(parameters=text).parameters == kept


def test_a_sliding_window_is_kept_and_none_is_none() -> None:
    info = {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 1024}
    assert _facts(info).sliding_window == 1024
    assert _facts({**info, "gemma3.attention.sliding_window": 0}).sliding_window is None


SCALARS = st.none() | st.booleans() | st.integers(-5, 5000) | st.floats(-1e9, 1e9) | st.text(max_size=4)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
KEYS = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "context_length", "vocab_size", "attention.sliding_window", "pooling_type")  # fmt: skip


@given(st.dictionaries(st.sampled_from([f"x.{name}" for name in KEYS]), JSON))
def test_no_answer_of_whatever_types_breaks_the_reading(info: dict[str, Any]) -> None:
    found = _facts({"general.architecture": "x", **info})
    assert found.layers >= 0
    assert len(found.head_count_kv) in (0, found.layers)
    assert all(heads >= 0 for heads in found.head_count_kv)


_TABLE = {"name": "token_embd.weight", "type": "F16", "shape": [10, 100]}


def test_per_layer_embeddings_are_told_apart_within_the_output_layer() -> None:
    found = _facts(tensors=[_TABLE, {"name": "per_layer_token_embd.weight", "type": "F16", "shape": [20, 50]}])
    assert (found.per_layer_input_bytes, found.output_bytes) == (2000, 4000)


def test_a_projector_in_a_file_of_its_own_is_what_the_model_has_beyond_its_tensors() -> None:
    found = _facts(tensors=[_TABLE], projector_info={"general.architecture": "clip"})
    assert (found.projector_bytes, found.output_bytes) == (3000, 2000 + 3000)
    assert _facts(tensors=[_TABLE]).projector_bytes == 0
    assert _facts(projector_info={"general.architecture": "clip"}).projector_bytes == 0
