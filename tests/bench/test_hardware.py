"""What `make gpu-bundle` packs: models of random weights, and the examination, here over an EMULATED GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from bench.hardware.random_model import SHAPES, write_head, write_model
from tests.support.ollama_server import ROOT, free_port


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_is_whole_and_of_its_shape(name: str, tmp_path: Path) -> None:
    shape = dataclasses.replace(
        SHAPES[name], layers=2, width=256, feed_forward=128, heads=4, kv_heads=2, vocabulary=400
    )
    write_head(tmp_path, name, shape)
    digest = write_model(tmp_path, name, tmp_path / "model.gguf")
    assert digest.removeprefix("sha256:").isalnum() and len(digest) == 71

    read = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert list(tensors["output.weight"].shape) == [256, 400]
    assert tensors["token_embd.weight"].tensor_type.name == shape.weights
    end = tensors["output.weight"].data_offset + tensors["output.weight"].n_bytes
    assert (tmp_path / "model.gguf").stat().st_size == end + -end % 32
    rows = gguf.dequantize(tensors["output.weight"].data, tensors["output.weight"].tensor_type)
    assert 0.01 < rows.std() < 0.03, "weights as large as a trained model's"
    assert (rows[0] != rows[1]).any()


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_is_as_large_as_its_name_says(name: str, tmp_path: Path) -> None:
    write_head(tmp_path, name, SHAPES[name])
    size = sum(size for _, size in json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")))
    assert size == pytest.approx(float(name.split("-")[1].removesuffix("g")) * 1e9, rel=0.2)


@pytest.mark.rig
def test_an_emulated_card_is_examined_and_said_to_be_emulated(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.hardware.examine_gpu", "--rig", "3090", "--stages", "driver,start,killed"]
    subprocess.run([*command, "--out", str(out), "--port", str(free_port())], cwd=ROOT, check=True, timeout=120)
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["emulated"].startswith("EMULATED")
    assert results["stages"]["start"]["gpus"] == [results["stages"]["driver"]["nvml"]["uuid"]]
    assert results["stages"]["killed"]["killed"] == 1
    assert results["stages"]["killed"]["status"] == 200
