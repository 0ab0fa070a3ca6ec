"""Canonical names. The cases were verified on running servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.model_names import canonical, is_cloud, parse_name, shortest


@pytest.mark.parametrize(
    "written",
    [
        "tiny",
        "tiny:latest",
        "TINY",
        "Tiny:Latest",
        "library/tiny",
        "registry.ollama.ai/library/tiny",
        "registry.ollama.ai/library/tiny:latest",
        "Registry.Ollama.AI/LIBRARY/tiny:LATEST",
        "https://registry.ollama.ai/library/tiny",
        "http://registry.ollama.ai/library/tiny:latest",
        "foo://registry.ollama.ai/library/tiny",
        " tiny",
        "tiny ",
        "tiny:local",
        "tiny:latest:local",
        "tiny:LOCAL",
    ],
)
def test_every_form_of_one_name_has_one_key(written: str) -> None:
    assert canonical(written) == "registry.ollama.ai/library/tiny:latest"
    assert shortest(written) == "tiny:latest"


@pytest.mark.parametrize(
    ("written", "brief"),
    [
        ("other/tiny", "other/tiny:latest"),
        ("hf.co/X/Tiny:Q4_K_M", "hf.co/x/tiny:q4_k_m"),
        ("ollama.com/library/tiny", "ollama.com/library/tiny:latest"),
        ("tiny-cloud", "tiny-cloud:latest"),
        ("tiny:1b", "tiny:1b"),
        ("host:5000/ns/model", "host:5000/ns/model:latest"),
        ("llama3.3:70b-instruct-q4_K_M", "llama3.3:70b-instruct-q4_k_m"),
        ("x" * 80, "x" * 80 + ":latest"),
    ],
)
def test_other_names_are_other_models(written: str, brief: str) -> None:
    assert shortest(written) == brief


INVALID = [
    "",
    "  ",
    "tiny:",
    ":tiny",
    "tiny@sha256:0",
    "./tiny",
    "a b/c::d",
    "a/b/c/d",
    "a/b/c/d/e",
    "-tiny",
    "x" * 81,
    "http://tiny",
    "https://library/tiny",
    "/tiny",
    "tiny/",
    "library//tiny",
    "ti.ny/x",
    "tiny:lat/est",
    "tïny",
    "tiny\n:latest",
    "foo:cloud:local",
    "../../etc/passwd",
]


@pytest.mark.parametrize("written", INVALID)
def test_names_that_a_server_cannot_parse_are_invalid(written: str) -> None:
    with pytest.raises(ValueError, match="invalid model name"):
        parse_name(written)


@pytest.mark.parametrize(
    ("written", "cloud"),
    [
        ("gpt-oss:20b:cloud", True),
        ("gpt-oss:20b-cloud", True),
        ("GPT-OSS:20B-CLOUD ", True),
        ("qwen3:cloud", True),
        ("localhost:11434/library/foo:cloud", True),
        ("tiny-cloud", False),
        ("my-cloud-model", False),
        ("foo:bar-cloud/baz", False),
        ("tiny", False),
        ("", False),
        ("tiny:", False),
    ],
)
def test_cloud_models_are_recognised_by_their_source_suffix(written: str, cloud: bool) -> None:
    assert is_cloud(written) is cloud


def test_both_spellings_of_a_cloud_model_are_one_name() -> None:
    assert shortest("gpt-oss:20b:cloud") == shortest("gpt-oss:20b-cloud") == "gpt-oss:20b-cloud"
    assert shortest("qwen3:cloud") == "qwen3:cloud"


@given(st.text(max_size=40))
def test_the_canonical_form_of_a_canonical_form_is_itself(written: str) -> None:
    try:
        key = canonical(written)
    except ValueError:
        return
    assert canonical(key) == key
    assert canonical(shortest(written)) == key
    assert key == key.lower()
