"""The emulated server's model store: real Ollama's layout, sharing, and the catalogue's models."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from router.domain.model_names import parse_name
from router.engines.ollama.blob_store import MODEL, TEMPLATE, Layer
from router.engines.ollama.client import ShowReply, TagRow, TensorRow
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.gguf_facts import facts_of
from router.engines.ollama.model_metadata import read_facts
from router.lab.emulator.catalogue import catalogue
from router.lab.emulator.model_facts import active_share, capabilities
from router.lab.emulator.store import Store, parameter_label, weights_digest, write_atomically

_8B = "llama3.1:8b"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def _put(store: Store, name: str, weights: bytes, template: bytes = b"{{ .Prompt }}") -> None:
    layers = [store.put_blob(weights), store.put_blob(template)]
    kinds = (MODEL, TEMPLATE)
    store.put(
        parse_name(name), {}, [Layer(kind, layer.digest, layer.size) for kind, layer in zip(kinds, layers, strict=True)]
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
    first, second = store.get(parse_name("one")), store.get(parse_name("two"))
    assert first is not None
    assert second is not None
    store.delete(first)
    assert store.get(parse_name("one")) is None
    assert store.blob(first.weights.digest).exists()
    assert not store.blob(first.layers[1].digest).exists()
    store.delete(second)
    assert not store.blob(first.weights.digest).exists()


def test_a_copy_has_the_same_digest(store: Store) -> None:
    _put(store, "one", b"weights")
    original = store.get(parse_name("one"))
    assert original is not None
    store.copy(original, parse_name("twin:v2"))
    duplicate = store.get(parse_name("twin:v2"))
    assert duplicate is not None
    assert (duplicate.digest, duplicate.weights) == (original.digest, original.weights)


def test_a_broken_manifest_counts_as_no_model(store: Store) -> None:
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
    assert [stored.name.model for stored in store.all()] == ["young", "middle", "old"]


@pytest.mark.parametrize(("spares_recent", "removed_count"), [(True, 1), (False, 2)])
def test_pruning_removes_unreferenced_blobs(store: Store, spares_recent: bool, removed_count: int) -> None:
    _put(store, "kept", b"kept")
    recent, old = store.put_blob(b"young"), store.put_blob(b"old")
    os.utime(store.blob(recent.digest), (10_000, 10_000))
    os.utime(store.blob(old.digest), (1_000, 1_000))
    assert store.prune(10_100, spares_recent) == removed_count
    assert store.blob(recent.digest).exists() == spares_recent
    assert not store.blob(old.digest).exists()
    assert store.get(parse_name("kept")) is not None


def test_an_atomic_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b", b"data")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("count", "label"),
    [(70_553_706_496, "70.6B"), (8_030_261_312, "8.0B"), (51_530_000, "51.53M"), (136_727_040, "137M"),
     (172_736, "173K"), (999, "999")],
)  # fmt: skip
def test_parameter_counts_are_formatted_as_ollama_does(count: int, label: str) -> None:
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


@pytest.mark.parametrize("name", sorted(set(catalogue()) - {"mixtral:8x22b", "gemma2:27b", "gemma4:e4b"}))
def test_the_tensors_of_a_model_add_up_to_its_size(name: str) -> None:
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
    router_facts = read_facts(TagRow(name, stored.digest, stored.size), reply)
    emulated_facts = facts_of(stored, header)
    assert router_facts is not None
    keys = ("layers", "embedding_length", "head_count", "head_count_kv", "key_length", "value_length", "blob",
            "vocabulary_size", "context_length", "sliding_window", "architecture", "is_embedding", "input_bytes",
            "output_bytes", "key_length_swa", "shared_kv_layers", "full_attention_interval", "recurrent_state_elements",
            "feed_forward_length", "expert_used_count", "has_vision", "projector_bytes")  # fmt: skip
    assert {key: getattr(emulated_facts, key) for key in keys} == {key: getattr(router_facts, key) for key in keys}


def test_a_mixture_of_experts_uses_part_of_its_weights(store: Store) -> None:
    shares: dict[str, float] = {}
    for name in ("mixtral:8x22b", _8B):
        store.install(catalogue()[name])
        stored = store.get(parse_name(name))
        assert stored is not None
        shares[name] = active_share(store.header(stored.weights.digest))
    assert shares[_8B] == 1.0
    assert pytest.approx(shares["mixtral:8x22b"], rel=0.1) == 39 / 141  # 39B of 141B, according to its authors
