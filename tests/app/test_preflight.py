"""Which pins `check-config` refuses, with the bytes, and what it reports as not checked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from router.app.preflight import PreflightResult, check_pins
from router.cli.main import main
from router.config.settings import load_settings
from router.domain.gpu import Gpu
from router.engines.ollama.blob_store import PARAMETERS
from router.gpu.nvml import NoGpus
from router.gpu.poller import GpuReader
from router.lab.emulator.store import Store
from tests.scheduler.builders import gpu
from tests.support.sparse_model import LLAMA_8B, LLAMA_70B, put_into_store

NO_DRIVER = NoGpus("no driver is installed")
Captured = pytest.CaptureFixture[str]


class TwoGpus:
    """Two 24 GB GPUs, one of them full."""

    def read(self) -> tuple[Gpu, ...]:
        return (gpu(0, 24_000), gpu(1, 100))

    def close(self) -> None:
        """Nothing to close."""


def _check(folder: Path, reader: GpuReader | NoGpus = NO_DRIVER, **tree: object) -> PreflightResult:
    path = folder / "c.yaml"
    own = {"state_directory": str(folder / "state"), "ollama": {"models": str(folder / "models")}}
    path.write_text(yaml.safe_dump({**own, **tree}), encoding="utf-8")
    return check_pins(load_settings(path, {}), {}, lambda: reader)


def test_a_model_that_its_gpu_cannot_hold_is_refused_with_the_bytes(tmp_path: Path) -> None:
    put_into_store(tmp_path / "models", "seventy", LLAMA_70B)
    found = _check(tmp_path, TwoGpus(), models={"Seventy": {"gpus": [1]}})
    (problem,) = found.problems
    assert problem.startswith("models.Seventy: model 'seventy:latest' fits nowhere: gpu1: GPU 1 needs ")
    assert problem.count(" bytes (") == 2
    assert found.unchecked == ()


def test_a_context_length_in_the_modelfile_counts(tmp_path: Path) -> None:
    put_into_store(tmp_path / "models", "eight", LLAMA_8B)
    entry = tmp_path / "models" / "manifests" / "registry.ollama.ai" / "library" / "eight" / "latest"
    manifest = json.loads(entry.read_text())
    params = Store(tmp_path / "models").put_blob(b'{"num_ctx":131072,"stop":["x"],"temperature":0.5}')
    manifest["layers"].append({"mediaType": PARAMETERS, "digest": params.digest, "size": params.size})
    pinned = {"eight": {"gpus": [1], "num_parallel": 2}}
    assert _check(tmp_path, TwoGpus(), models=pinned) == PreflightResult()
    entry.write_text(json.dumps(manifest))
    (problem,) = _check(tmp_path, TwoGpus(), models=pinned).problems
    assert problem.startswith("models.eight: model 'eight:latest' fits nowhere: gpu1: GPU 1 needs ")


def test_memory_in_use_now_does_not_count(tmp_path: Path) -> None:
    put_into_store(tmp_path / "models", "eight", LLAMA_8B)
    assert _check(tmp_path, TwoGpus(), models={"eight": {"gpus": [1], "keep_warm": True}}) == PreflightResult()


def test_models_that_are_kept_warm_on_one_gpu_must_fit_together(tmp_path: Path) -> None:
    names = [f"eight{number}" for number in range(5)]
    for number, name in enumerate(names):
        put_into_store(tmp_path / "models", name, replace(LLAMA_8B, layers=32 - number))
    warm = {name: {"gpus": [0], "keep_warm": True} for name in names}
    assert _check(tmp_path, TwoGpus(), models=dict(list(warm.items())[:3])) == PreflightResult()
    (problem,) = _check(tmp_path, TwoGpus(), models=warm).problems
    assert "models.eight0 and models.eight1" in problem
    assert "cannot be kept warm together: GPU 0 needs " in problem


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"models": {"m": {"gpus": [7]}}}, "models.m.gpus: '7' is no GPU of this machine"),
        ({"placement": {"exclusive_gpus": {"5": ["m"]}}}, "placement.exclusive_gpus: '5' is no GPU of this machine"),
        ({"instances": [{"name": "a", "gpus": [9]}]}, "instance a: gpus: '9' is no GPU of this machine"),
    ],
)
def test_missing_gpus_are_refused(tmp_path: Path, tree: dict[str, object], message: str) -> None:
    (problem,) = _check(tmp_path, TwoGpus(), **tree).problems
    assert message in problem


def test_what_cannot_be_checked_is_reported(tmp_path: Path) -> None:
    pins = {"m": {"gpus": [7]}}
    assert _check(tmp_path, models=pins).unchecked == ("whether pins to GPUs hold: no driver is installed",)
    (reported,) = _check(tmp_path, TwoGpus(), models={"m": {"gpus": [1]}}).unchecked
    assert reported == f"whether models.m fits: it is not among the models in {tmp_path / 'models'}"


def test_unreadable_weights_are_not_refused(tmp_path: Path) -> None:
    put_into_store(tmp_path / "models", "seventy", LLAMA_70B)
    for blob in (tmp_path / "models" / "blobs").iterdir():
        if blob.stat().st_size > 2**20:
            blob.write_bytes(b"not a model")
    found = _check(tmp_path, TwoGpus(), models={"seventy": {"gpus": [1]}})
    assert (found.problems, len(found.unchecked)) == ((), 1)


def test_a_check_creates_no_directory(tmp_path: Path) -> None:
    for rig in (None, "2x3090"):
        _check(tmp_path, TwoGpus(), rig=rig, models={"m": {"gpus": [1]}})
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_the_driver_is_not_opened_without_rules_about_gpus(tmp_path: Path) -> None:
    def never() -> NoGpus:
        raise AssertionError("the driver was opened")

    path = tmp_path / "c.yaml"
    path.write_text("models: {m: {priority: 1}}", encoding="utf-8")
    assert check_pins(load_settings(path, {}), {}, never) == PreflightResult()


def test_names_of_the_same_weights_count_once(tmp_path: Path) -> None:
    warm = {f"eight{number}": {"gpus": [0], "keep_warm": True} for number in range(5)}
    put_into_store(tmp_path / "models", "eight0", LLAMA_8B)
    library = tmp_path / "models" / "manifests" / "registry.ollama.ai" / "library"
    for name in list(warm)[1:]:
        shutil.copytree(library / "eight0", library / name)
    assert _check(tmp_path, TwoGpus(), models=warm) == PreflightResult()


def _command(tmp_path: Path, text: str) -> int:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    home = {"HOME": str(tmp_path), "PATH": "/nonexistent"}
    return main(["check-config", "--config", str(path), "--rig", "2x3090"], home)


def test_the_command_refuses_over_an_emulated_rig_with_its_catalogue(tmp_path: Path, capsys: Captured) -> None:
    assert _command(tmp_path, "models: {'llama3.3:70b': {gpus: [0]}}") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "llamayard: models.llama3.3:70b: model 'llama3.3:70b' fits nowhere: gpu0: GPU 0 needs"
    )


def test_the_command_prints_rules_of_models_and_what_it_did_not_check(tmp_path: Path, capsys: Captured) -> None:
    text = "models: {'llama3.3:70b': {gpus: [0, 1]}, mine: {gpus: [0]}}\nfallbacks: {a: {to: [b]}}\n"
    assert _command(tmp_path, text) == 0
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert last.startswith("# not checked: whether models.mine fits: ")
    shown = {line.partition(" = ")[0]: line for line in lines}
    assert '{"llama3.3:70b": {"gpus": ["0", "1"]}, "mine": {"gpus": ["0"]}}' in shown["models"]
    assert '{"a": {"to": ["b"]}}' in shown["fallbacks"]


def test_an_invalid_rig_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert main(["check-config", "--rig", "2x3091"], {"HOME": str(tmp_path)}) == 2
    assert "3090" in capsys.readouterr().err
