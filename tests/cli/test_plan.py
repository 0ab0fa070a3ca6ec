"""`llamayard plan` as a user meets it: what it reads, what it prints, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest

from router.app.model_sources import find_source
from router.cli.plan import main
from router.domain.model_names import parse_name
from router.engines.ollama.blob_store import BlobStore
from router.engines.ollama.gguf_show import show_reply
from router.gpu.nvml import NoGpus, open_nvml
from router.lab.emulator.catalogue import catalogue
from tests.support.sparse_model import LLAMA_70B, put_into_store
from tests.support.tiny_model import EMBED, TINY, write_model

Captured = pytest.CaptureFixture[str]

MODEL_KEYS = {
    "name", "origin", "architecture", "architecture_known", "size_bytes", "fits", "gpus", "total_bytes",
    "context_length", "context_length_trained", "context_length_max", "num_parallel", "num_parallel_max",
    "kv_cache_type", "flash_attention", "batch", "ollama_version", "ollama_version_assumed",
    "tokens_per_second_estimate", "load_seconds_estimate", "load_seconds_cached_estimate", "notes",
}  # fmt: skip
PART_KEYS = {
    "weights_bytes", "kv_cache_bytes", "compute_buffer_bytes", "recurrent_state_bytes", "projector_bytes",
    "cuda_context_bytes",
}  # fmt: skip
GPU_KEYS = PART_KEYS | {"gpu", "gpu_name", "layers", "total_bytes", "margin_bytes", "free_bytes", "missing_bytes"}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home"), "PATH": "/nonexistent"}


def _document(capsys: Captured) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def _put_into_store(store: Path, name: str, weights: Path, parameters: dict[str, Any] | None = None) -> None:
    """As a real server lays a model out."""
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    layers: list[dict[str, Any]] = []
    texts = [("model", weights.read_bytes()), ("params", json.dumps(parameters or {}).encode())]
    for kind, data in texts:
        digest = hashlib.sha256(data).hexdigest()
        (store / "blobs" / f"sha256-{digest}").write_bytes(data)
        layer = {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}
        layers.append(layer)
    path = BlobStore(store).manifest(parse_name(name))
    path.parent.mkdir(parents=True)
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": "sha256:0", "size": 7}
    path.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": layers}), encoding="utf-8")


def _saved_reply(name: str) -> dict[str, Any]:
    entry = catalogue()[name]
    reply = show_reply(entry.metadata, entry.tensors)
    assert reply.model_info is not None
    info = {key: json.loads(bytes(value)) for key, value in reply.model_info.items()}
    tensors = [{"name": name, "type": kind, "shape": list(shape)} for name, kind, shape in entry.tensors]
    return {"model_info": info, "tensors": tensors, "capabilities": list(entry.capabilities)}


# --- what it prints ---------------------------------------------------------------------------------------------


def test_a_model_of_the_catalogue_is_shown_part_by_part(home: dict[str, str], capsys: Captured) -> None:
    arguments = ["llama3.3:70b", "--gpus", "2x3090", "--context", "8192", "--parallel", "1"]
    assert main(arguments, home) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    title, head, first, second, verdict, *_ = text.splitlines()
    assert title == "llama3.3:70b  llama, 80 layers, 42.5 GB, from emulated catalogue"
    assert head.split() == [
        "GiB",
        "on",
        "GPU",
        "WEIGHTS",
        "KV",
        "BUFFER",
        "STATE",
        "PROJ",
        "CUDA",
        "TOTAL",
        "MARGIN",
        "FREE",
    ]
    assert first.split()[:4] == ["0", "RTX", "3090", "19.60"]
    assert second.split()[:3] == ["1", "RTX", "3090"]
    assert verdict == "  fits on 2 of 2 GPUs: 0 + 1"
    assert "at most there: 15,104 tokens with 1 slot, or 1 slot of 8,192 tokens" in text
    assert re.search(
        r"estimates: 1\d\.\d tokens/s \(one stream\), load \d+ s from disk, \d+ s from the page cache", text
    )


def test_what_does_not_fit_ends_in_exit_code_1_with_what_is_lacking(home: dict[str, str], capsys: Captured) -> None:
    assert main(["llama3.3:70b", "--gpus", "3090"], home) == 1
    text = capsys.readouterr().out
    assert "does not fit: GPU 0 lacks 2" in text
    assert "at most on these GPUs: nothing, with any context or number of slots" in text


def test_several_models_are_planned_side_by_side(home: dict[str, str], capsys: Captured) -> None:
    models = ["llama3.1:8b", "llama3.3:70b", "qwen2.5:14b"]
    assert main([*models, "--gpus", "3x3090", "--parallel", "1"], home) == 0
    text = capsys.readouterr().out
    assert text.index("llama3.1:8b") < text.index("llama3.3:70b") < text.index("qwen2.5:14b")
    assert text.endswith("together: all 3 models fit at the same time\n")
    assert main([*models, "--gpus", "2x3090", "--parallel", "1"], home) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "together: llama3.1:8b, qwen2.5:14b do not fit beside the others"


def test_json_has_the_documented_keys_and_its_parts_add_up(home: dict[str, str], capsys: Captured) -> None:
    arguments = ["llama3.3:70b", "nomic-embed-text", "--gpus", "4090+3090", "--parallel", "1", "--json"]
    assert main(arguments, home) == 0
    document = _document(capsys)
    assert set(document) == {"models", "fits"}
    assert document["fits"] is True
    large, small = document["models"]
    assert set(large) == set(small) == MODEL_KEYS
    for gpu in (*large["gpus"], *small["gpus"]):
        assert set(gpu) == GPU_KEYS
        assert gpu["total_bytes"] == sum(gpu[part] for part in PART_KEYS)
        assert gpu["total_bytes"] + gpu["margin_bytes"] <= gpu["free_bytes"]
        assert gpu["missing_bytes"] == 0
    assert large["total_bytes"] == sum(gpu["total_bytes"] for gpu in large["gpus"])
    assert (large["context_length"], large["num_parallel"], large["architecture_known"]) == (8192, 1, True)
    assert small["tokens_per_second_estimate"] is None
    assert large["tokens_per_second_estimate"] == pytest.approx(17, abs=2)


def test_every_json_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "footprints.md").read_text(encoding="utf-8")
    _, _, keys = text.partition("### JSON")
    assert [key for key in sorted(MODEL_KEYS | GPU_KEYS) if f"{key}`" not in keys] == []


def test_the_largest_context_is_planned_on_request(home: dict[str, str], capsys: Captured) -> None:
    arguments = ["llama3.3:70b", "--gpus", "2x3090", "--parallel", "1", "--json", "--context"]
    assert main([*arguments, "max"], home) == 0
    (model,) = _document(capsys)["models"]
    assert model["context_length"] == model["context_length_max"]
    assert 8192 < model["context_length"] < 16_384
    assert main([*arguments, str(model["context_length"] + 256)], home) == 1
    capsys.readouterr()
    assert main(["llama3.1:8b", "--gpus", "h100", "--json", "--context", "max"], home) == 0
    assert _document(capsys)["models"][0]["context_length"] == 131_072
    assert main(["llama3.3:70b", "--gpus", "3090", "--context", "max"], home) == 1


def test_the_largest_context_of_several_models_lets_all_of_them_fit(home: dict[str, str], capsys: Captured) -> None:
    assert main(["llama3.1:8b", "qwen2.5:14b", "--gpus", "3090", "--json", "--context", "max"], home) == 0
    first, second = _document(capsys)["models"]
    assert first["context_length"] == second["context_length"] > 8192


def test_options_left_out_are_as_configured(home: dict[str, str], capsys: Captured, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "ollama: {context_length: 4096, num_parallel: 3, kv_cache_type: q8_0, flash_attention: true}\nrig: 2x4090\n",
        encoding="utf-8",
    )
    assert main(["llama3.1:8b", "--config", str(config), "--json"], home) == 0
    (model,) = _document(capsys)["models"]
    assert (model["context_length"], model["num_parallel"], model["kv_cache_type"]) == (4096, 3, "q8_0")
    assert model["gpus"][0]["gpu_name"] == "RTX 4090"


def test_flags_reach_the_estimate(home: dict[str, str], capsys: Captured) -> None:
    arguments = ["llama3.1:8b", "--gpus", "3090", "--parallel", "2", "--context", "32k", "--json"]
    flags = ["--kv-cache-type", "q4_0", "--flash-attention", "on", "--ollama-version", "0.33.0", "--batch", "256"]
    sizes: list[int] = []
    for extra in ([], flags, ["--flash-attention", "off"]):
        assert main([*arguments, *extra], home) == 0
        (model,) = _document(capsys)["models"]
        sizes.append(model["gpus"][0]["kv_cache_bytes"])
        assert model["context_length"] == 32_768
        assert model["ollama_version_assumed"] is (extra != flags)
        assert model["batch"] == {0: 2048, 8: 256, 2: 512}[len(extra)]
        assert model["flash_attention"] is (extra != ["--flash-attention", "off"])
    assert sizes[0] == sizes[2] == pytest.approx(sizes[1] * 32 / 9, rel=0.01)


def test_the_installed_version_is_planned_for(home: dict[str, str], capsys: Captured, tmp_path: Path) -> None:
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\necho Warning: client version is 0.11.4\n", encoding="utf-8")
    program.chmod(0o755)
    config = tmp_path / "c.yaml"
    config.write_text(f"ollama: {{binary: {program}}}\n", encoding="utf-8")
    assert main(["llama3.1:8b", "--gpus", "3090", "--config", str(config), "--json"], home) == 0
    (model,) = _document(capsys)["models"]
    assert (model["ollama_version"], model["ollama_version_assumed"]) == ("0.11.4", False)


def test_a_cache_type_that_takes_no_effect_is_said(home: dict[str, str], capsys: Captured) -> None:
    assert main(["llama3.1:8b", "--gpus", "3090", "--kv-cache-type", "q8_0"], home) == 0
    assert "q8_0 is ignored without --flash-attention on" in " ".join(capsys.readouterr().out.split())


# --- what it reads ----------------------------------------------------------------------------------------------


def test_a_gguf_file_is_read(home: dict[str, str], capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    write_model(path, TINY)
    assert main([str(path), "--gpus", "3060", "--parallel", "1", "--json"], home) == 0
    (model,) = _document(capsys)["models"]
    assert (model["name"], model["architecture"], model["context_length_trained"]) == ("noise.gguf", "llama", 8192)
    assert model["size_bytes"] == path.stat().st_size
    assert model["gpus"][0]["kv_cache_bytes"] == TINY.layers * TINY.kv_heads * 2 * 32 * 2 * 8192


def test_a_gguf_embedding_model_has_one_slot_and_no_cache(
    home: dict[str, str], capsys: Captured, tmp_path: Path
) -> None:
    path = tmp_path / "embed.gguf"
    write_model(path, EMBED)
    assert main([str(path), "--gpus", "3060", "--parallel", "4", "--json"], home) == 0
    (model,) = _document(capsys)["models"]
    assert (model["num_parallel"], model["gpus"][0]["kv_cache_bytes"]) == (1, 0)


def test_a_gguf_file_of_an_unknown_architecture_is_planned_with_a_wider_margin(
    home: dict[str, str], capsys: Captured, tmp_path: Path
) -> None:
    path = tmp_path / "newest.gguf"
    writer = gguf.GGUFWriter(path, "newest")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main([str(path), "--gpus", "3060"], home) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "note: unknown architecture: the general rule, a full cache in each layer, and a margin of 10 %" in text


def test_a_split_gguf_is_read_from_all_its_files(home: dict[str, str], capsys: Captured, tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-{part:05}-of-00002.gguf" for part in (1, 2))
    write_model(first, TINY)
    assert main([str(first), "--gpus", "3060"], home) == 2
    assert f"{second} is missing" in capsys.readouterr().err
    write_model(second, TINY)
    assert main([str(second), "--gpus", "3060", "--json"], home) == 0
    size = _document(capsys)["models"][0]["size_bytes"]
    assert size == first.stat().st_size + second.stat().st_size


def test_a_saved_reply_is_read_with_and_without_its_size(
    home: dict[str, str], capsys: Captured, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    reply = _saved_reply("llama3.1:8b")
    path.write_text(json.dumps({**reply, "size": 4_920_753_328}), encoding="utf-8")
    assert main([str(path), "llama3.1:8b", "--gpus", "h100", "--json"], home) == 0
    saved, catalogued = _document(capsys)["models"]
    assert saved["name"] == "mine"
    assert saved["gpus"][0]["total_bytes"] == catalogued["gpus"][0]["total_bytes"]
    path.write_text(json.dumps(reply), encoding="utf-8")
    assert main([str(path), "--gpus", "h100", "--json"], home) == 0
    (model,) = _document(capsys)["models"]
    assert model["size_bytes"] == pytest.approx(4_920_753_328, rel=0.02)
    assert model["notes"] == ["size: not in the file, taken to be the sum of the tensors"]


def test_a_reply_without_the_values_of_its_arrays_is_noted(
    home: dict[str, str], capsys: Captured, tmp_path: Path
) -> None:
    path = tmp_path / "short.json"
    reply = _saved_reply("llama3.1:8b")
    reply["model_info"]["llama.attention.head_count_kv"] = None
    path.write_text(json.dumps({**reply, "size": 5_000_000_000}), encoding="utf-8")
    assert main([str(path), "--gpus", "h100"], home) == 0
    assert '"verbose": true' in capsys.readouterr().out


def test_a_name_of_the_store_is_read_with_its_parameters(
    home: dict[str, str], capsys: Captured, tmp_path: Path
) -> None:
    weights, store = tmp_path / "noise.gguf", tmp_path / "models"
    write_model(weights, TINY)
    _put_into_store(store, "me/noise:q4", weights, {"num_ctx": 2048})
    environment = {**home, "OLLAMA_MODELS": str(store)}
    assert main(["Me/Noise:Q4", "--gpus", "3060", "--json"], environment) == 0
    (model,) = _document(capsys)["models"]
    assert (model["name"], model["origin"], model["context_length"]) == ("me/noise:q4", "store", 2048)
    assert model["size_bytes"] == weights.stat().st_size + len(json.dumps({"num_ctx": 2048})) + 7
    assert main(["me/noise:q4", "--gpus", "3060", "--context", "4096", "--json"], environment) == 0
    assert _document(capsys)["models"][0]["context_length"] == 4096


def test_the_configured_store_is_used_and_wins_over_the_catalogue(
    home: dict[str, str], capsys: Captured, tmp_path: Path
) -> None:
    weights, store = tmp_path / "noise.gguf", tmp_path / "models"
    write_model(weights, TINY)
    _put_into_store(store, "llama3.1:8b", weights)
    environment = {**home, "LLAMAYARD_OLLAMA__MODELS": str(store)}
    assert main(["llama3.1:8b", "--gpus", "3060", "--json"], environment) == 0
    assert _document(capsys)["models"][0]["origin"] == "store"


def test_a_large_file_of_a_store_is_read_by_its_header_alone(tmp_path: Path) -> None:
    size = put_into_store(tmp_path, "big", LLAMA_70B)
    source = find_source("big", tmp_path)
    assert source.facts.layers == 80
    assert source.facts.weights_bytes > size > 40e9


# --- errors -----------------------------------------------------------------------------------------------------


def _error(capsys: Captured, arguments: list[str], environment: dict[str, str]) -> str:
    assert main(arguments, environment) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llamayard: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_an_unknown_name_is_refused_with_what_was_tried(home: dict[str, str], capsys: Captured) -> None:
    error = _error(capsys, ["llama3:70b", "--gpus", "2x3090"], home)
    assert f"no manifest {home['HOME']}/.ollama/models/manifests/registry.ollama.ai/library/llama3/70b" in error
    assert "nearest there: llama3.3:70b" in error


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.gguf", None, "there is no such file"),
        ("broken.gguf", b"GGUF" + struct.pack("<I", 3) + b"\x01", "its header is broken"),
        ("future.gguf", b"GGUF" + struct.pack("<I", 9), "its header is broken or of an unknown version"),
        ("noise.gguf", b"\x00\x01\x02\x03", "a GGUF file or a saved reply of /api/show"),
        ("list.json", b"[1, 2]", "a GGUF file or a saved reply of /api/show"),
        ("empty.json", b"{}", "has no model_info"),
        ("sizeless.json", b'{"model_info": {"general.architecture": "llama"}}', "has no size"),
        ("nameless.json", b'{"model_info": {"a": 1}, "size": 5}', "names no general.architecture"),
        ("cloud.json", b'{"model_info": {}, "remote_host": "https://ollama.com"}', "is a cloud model"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_words(
    home: dict[str, str], capsys: Captured, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    error = _error(capsys, [str(path), "--gpus", "2x3090"], home)
    assert str(path) in error or path.stem in error
    assert words in error


def test_a_manifest_whose_weights_are_gone_is_refused(home: dict[str, str], capsys: Captured, tmp_path: Path) -> None:
    weights, store = tmp_path / "noise.gguf", tmp_path / "models"
    write_model(weights, TINY)
    _put_into_store(store, "noise", weights)
    for blob in (store / "blobs").iterdir():
        blob.unlink()
    error = _error(capsys, ["noise", "--gpus", "3090"], {**home, "OLLAMA_MODELS": str(store)})
    assert "which is not in" in error
    BlobStore(store).manifest(parse_name("noise")).write_text("{}", encoding="utf-8")
    assert "has no list of layers" in _error(capsys, ["noise", "--gpus", "3090"], {**home, "OLLAMA_MODELS": str(store)})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "2x3091"], "did you mean '3090'?"),
        (["--gpus", "3090", "--context", "many"], "--context many"),
        (["--gpus", "3090", "--context", "0"], "--context 0"),
        (["--gpus", "3090", "--parallel", "0"], "--parallel 0"),
        (["--gpus", "3090", "--batch", "-1"], "--batch -1"),
        (["--gpus", "3090", "--ollama-version", "new"], "--ollama-version new"),
        (["--gpus", "3090", "--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
    ],
)
def test_bad_options_are_refused_in_words(
    home: dict[str, str], capsys: Captured, arguments: list[str], words: str
) -> None:
    assert words in _error(capsys, ["llama3.1:8b", *arguments], home)


def test_options_that_argparse_refuses_end_in_exit_code_2(home: dict[str, str], capsys: Captured) -> None:
    for arguments in ([], ["llama3.1:8b", "--kv-cache-type", "q2_k"], ["llama3.1:8b", "--parallel", "two"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments, home)
    capsys.readouterr()


@pytest.mark.skipif(not isinstance(open_nvml(), NoGpus), reason="this machine has GPUs")
def test_a_machine_without_gpus_is_told_to_name_some(home: dict[str, str], capsys: Captured) -> None:
    error = _error(capsys, ["llama3.1:8b"], home)
    assert "--gpus auto: no NVIDIA driver is installed" in error
    assert "name the GPUs instead, e.g. --gpus 2x3090" in error


@pytest.mark.parametrize(
    "gpus", ["2x3090", "4090+3090", "a6000", "a6000-ada", "6000ada", "a100-40", "a100-80", "h100", "h100-80"]
)
def test_the_gpus_of_the_guide_can_be_named(home: dict[str, str], capsys: Captured, gpus: str) -> None:
    assert main(["llama3.1:8b", "--gpus", gpus], home) == 0
    capsys.readouterr()
