"""The emulated server's store: the real one's layout, shared, with the catalogue's models in it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from router.domain.model_names import parse_name
from router.engines.ollama.client import ShowReply, TagRow, TensorRow
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.model_metadata import read_facts
from router.lab.emulator.catalogue import catalogue
from router.lab.emulator.model_facts import active_share, capabilities, facts_of
from router.lab.emulator.store import (
    MODEL,
    TEMPLATE,
    Layer,
    Store,
    parameter_label,
    weights_digest,
    write_whole,
)

_8B = "llama3.1:8b"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def _put(store: Store, name: str, weights: bytes, template: bytes = b"{{ .Prompt }}") -> None:
    layers = [store.put_blob(weights), store.put_blob(template)]
    kinds = (MODEL, TEMPLATE)
    store.put(
        parse_name(name), {}, [Layer(kind, one.digest, one.size) for kind, one in zip(kinds, layers, strict=True)]
    )


def test_a_model_is_found_under_every_form_of_its_name(store: Store) -> None:
    _put(store, "tiny", b"weights")
    for name in ("tiny", "TINY:latest", "registry.ollama.ai/library/tiny"):
        stored = store.get(parse_name(name))
        assert stored is not None
        assert stored.name.shortest == "tiny:latest"
    assert store.get(parse_name("other/tiny")) is None


def test_deleting_keeps_blobs_that_another_name_uses(store: Store) -> None:
    _put(store, "one", b"shared", b"first")
    _put(store, "two", b"shared", b"second")
    one, two = store.get(parse_name("one")), store.get(parse_name("two"))
    assert one is not None
    assert two is not None
    store.delete(one)
    assert store.get(parse_name("one")) is None
    assert store.blob(one.weights.digest).exists()
    assert not store.blob(one.layers[1].digest).exists()
    store.delete(two)
    assert not store.blob(one.weights.digest).exists()


def test_a_copy_has_the_same_digest(store: Store) -> None:
    _put(store, "one", b"weights")
    one = store.get(parse_name("one"))
    assert one is not None
    store.copy(one, parse_name("twin:v2"))
    twin = store.get(parse_name("twin:v2"))
    assert twin is not None
    assert (twin.digest, twin.weights) == (one.digest, one.weights)


def test_a_broken_manifest_is_no_model(store: Store) -> None:
    path = store.manifest(parse_name("broken"))
    path.parent.mkdir(parents=True)
    path.write_text('{"layers": [', encoding="utf-8")
    assert store.get(parse_name("broken")) is None
    assert store.all() == []


def test_models_are_listed_newest_first(store: Store) -> None:
    for age, name in enumerate(("young", "middle", "old")):
        _put(store, name, name.encode())
        path = store.manifest(parse_name(name))
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    assert [one.name.model for one in store.all()] == ["young", "middle", "old"]


@pytest.mark.parametrize(("spares_young", "gone"), [(True, 1), (False, 2)])
def test_pruning_takes_what_no_manifest_names(store: Store, spares_young: bool, gone: int) -> None:
    _put(store, "kept", b"kept")
    young, old = store.put_blob(b"young"), store.put_blob(b"old")
    os.utime(store.blob(young.digest), (10_000, 10_000))
    os.utime(store.blob(old.digest), (1_000, 1_000))
    assert store.prune(10_100, spares_young) == gone
    assert store.blob(young.digest).exists() == spares_young
    assert not store.blob(old.digest).exists()
    assert store.get(parse_name("kept")) is not None


def test_a_write_leaves_no_trace_of_itself(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b", b"data")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("count", "label"),
    [(70_553_706_496, "70.6B"), (8_030_261_312, "8.0B"), (51_530_000, "51.53M"), (136_727_040, "137M"),
     (172_736, "173K"), (999, "999")],
)  # fmt: skip
def test_parameters_are_counted_in_ollamas_words(count: int, label: str) -> None:
    assert parameter_label(count) == label


# --- the catalogue ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_a_model_of_the_catalogue_is_installed_with_its_true_size_and_facts(store: Store, name: str) -> None:
    entry = catalogue()[name]
    store.install(entry)
    stored = store.get(parse_name(name))
    assert stored is not None
    assert (stored.size, stored.weights.digest) == (entry.size_bytes, weights_digest(entry))
    header = store.header(stored.weights.digest)
    assert not header.is_noise
    assert set(capabilities(stored, header)) == set(entry.capabilities)


@pytest.mark.parametrize("name", sorted(set(catalogue()) - {"mixtral:8x22b", "gemma2:27b"}))
def test_the_tensors_of_a_model_make_up_its_size(name: str) -> None:
    entry = catalogue()[name]
    size = sum(tensor_bytes(kind, shape) or 0 for _, kind, shape in entry.tensors)
    assert size == pytest.approx(entry.size_bytes, rel=0.035)


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_the_router_reads_the_same_facts_over_the_api(store: Store, name: str) -> None:
    entry = catalogue()[name]
    store.install(entry)
    stored = store.get(parse_name(name))
    assert stored is not None
    header = store.header(stored.weights.digest)
    reply = ShowReply(
        modelfile=f"FROM {store.blob(stored.weights.digest)}\n",
        model_info={key: msgspec.Raw(msgspec.json.encode(value)) for key, value in header.metadata.items()},
        tensors=tuple(TensorRow(n, kind, shape) for n, kind, shape in header.tensors),
        capabilities=capabilities(stored, header),
    )
    read = read_facts(TagRow(name, stored.digest, stored.size), reply)
    own = facts_of(stored, header)
    assert read is not None
    keys = ("layers", "embedding_length", "head_count", "head_count_kv", "key_length", "value_length", "blob",
            "vocabulary_size", "context_length", "sliding_window", "architecture", "is_embedding", "input_bytes",
            "output_bytes")  # fmt: skip
    assert {key: getattr(own, key) for key in keys} == {key: getattr(read, key) for key in keys}


def test_a_mixture_of_experts_uses_part_of_its_weights(store: Store) -> None:
    shares: dict[str, float] = {}
    for name in ("mixtral:8x22b", _8B):
        store.install(catalogue()[name])
        stored = store.get(parse_name(name))
        assert stored is not None
        shares[name] = active_share(store.header(stored.weights.digest))
    assert shares[_8B] == 1.0
    assert pytest.approx(shares["mixtral:8x22b"], rel=0.1) == 39 / 141  # 39B of 141B, as its makers say
