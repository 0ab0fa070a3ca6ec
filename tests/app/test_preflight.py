"""Which pins `check-config` refuses, with the bytes, and what it reports as not checked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from router.app.preflight import PreflightResult, check_machine
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


class TwoEmptyGpus(TwoGpus):
    """Two empty 24 GB GPUs."""

    def read(self) -> tuple[Gpu, ...]:
        return (gpu(0, 24_000), gpu(1, 24_000))


def _check(folder: Path, reader: GpuReader | NoGpus = NO_DRIVER, **tree: object) -> PreflightResult:
    path = folder / "c.yaml"
    own = {"state_directory": str(folder / "state"), "ollama": {"models": str(folder / "models")}}
    path.write_text(yaml.safe_dump({**own, **tree}), encoding="utf-8")
    return check_machine(load_settings(path, {}), {}, lambda: reader)


def test_a_model_that_its_gpu_cannot_hold_is_refused_with_the_bytes(tmp_path: Path) -> None:
    put_into_store(tmp_path / "models", "seventy", LLAMA_70B)
    found = _check(tmp_path, TwoGpus(), models={"Seventy": {"gpus": [1]}})
    (problem,) = found.problems
    assert problem.startswith("models.Seventy: model 'seventy:latest' fits nowhere: gpu1: GPU 1 needs ")
    assert problem.count(" GiB") == 2
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
    assert check_machine(load_settings(path, {}), {}, never) == PreflightResult()


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
    assert captured.out == "1 error\n"
    assert captured.err.startswith(
        "llamayard: models.llama3.3:70b: model 'llama3.3:70b' fits nowhere: gpu0: GPU 0 needs"
    )


def test_the_command_prints_rules_of_models_and_what_it_did_not_check(tmp_path: Path, capsys: Captured) -> None:
    text = "models: {'llama3.3:70b': {gpus: [0, 1]}, mine: {gpus: [0]}}\nfallbacks: {a: {to: [b]}}\n"
    assert _command(tmp_path, text) == 0
    captured = capsys.readouterr()
    *_, last, verdict = lines = captured.out.splitlines()
    assert last.startswith("# not checked: whether models.mine fits: ")
    assert verdict == "configuration is valid, 1 warning"
    (warning,) = captured.err.splitlines()
    assert warning.startswith("llamayard: warning: fallbacks.a.to: b is not among the models in ")
    shown = {line.partition(" = ")[0]: line for line in lines}
    assert '{"llama3.3:70b": {"gpus": ["0", "1"]}, "mine": {"gpus": ["0"]}}' in shown["models"]
    assert '{"a": {"to": ["b"]}}' in shown["fallbacks"]


def test_an_invalid_rig_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert main(["check-config", "--rig", "2x3091"], {"HOME": str(tmp_path)}) == 2
    assert "3090" in capsys.readouterr().err


THREE = {f"eight{number}": replace(LLAMA_8B, layers=100 - number) for number in range(3)}
"""Each takes so much of a 24 GB GPU that two and half of another one fit nowhere."""


def test_warm_models_that_the_gpus_cannot_all_hold_are_a_warning_with_the_bytes(tmp_path: Path) -> None:
    for name, spec in THREE.items():
        put_into_store(tmp_path / "models", name, spec)
    warm: dict[str, dict[str, object]] = {name: {"keep_warm": True} for name in THREE}
    two = dict(list(warm.items())[:2])
    assert _check(tmp_path, TwoEmptyGpus(), models=two) == PreflightResult()
    found = _check(tmp_path, TwoEmptyGpus(), models=warm)
    assert (found.problems, found.unchecked) == ((), ())
    (warning,) = found.warnings
    assert warning.startswith("the models with keep_warm cannot all be held at the same time: they need models.eight0 ")
    assert warning.count(" GiB") == 5
    assert "the GPUs can give: GPU 0 " in warning


def test_a_pinned_warm_model_leaves_its_gpu_to_the_others(tmp_path: Path) -> None:
    for name, spec in THREE.items():
        put_into_store(tmp_path / "models", name, spec)
    models = {"eight0": {"keep_warm": True}, "eight1": {"keep_warm": True, "gpus": [0]}}
    assert _check(tmp_path, TwoEmptyGpus(), models=models) == PreflightResult()
    both = {"eight0": {"keep_warm": True, "gpus": [0]}, "eight1": {"keep_warm": True, "gpus": [0]}}
    (problem,) = _check(tmp_path, TwoEmptyGpus(), models=both).problems
    assert "models.eight0 and models.eight1 cannot be kept warm together: GPU 0 needs " in problem


def test_aliases_and_fallbacks_to_absent_models_are_warnings(tmp_path: Path) -> None:
    put_into_store(tmp_path / "models", "eight", LLAMA_8B)
    found = _check(
        tmp_path,
        aliases={"gpt-4o": "eight", "gpt-4": "gone"},
        fallbacks={"eight": {"to": ["gpt-4o", "lost:7b"]}},
    )
    folder = tmp_path / "models"
    assert found.warnings == (
        f"aliases.gpt-4: gone is not among the models in {folder}",
        f"fallbacks.eight.to: lost:7b is not among the models in {folder}",
    )
    attached = {"instances": [{"url": "http://127.0.0.1:11999"}], "aliases": {"a": "gone"}}
    assert _check(tmp_path, **attached) == PreflightResult()


def test_a_context_above_the_trained_one_is_a_warning(tmp_path: Path) -> None:
    put_into_store(tmp_path / "models", "eight", LLAMA_8B)
    assert _check(tmp_path, models={"eight": {"context_length": LLAMA_8B.context}}) == PreflightResult()
    found = _check(tmp_path, models={"eight": {"context_length": 262_144}})
    assert found.warnings == (
        "models.eight.context_length: 262144 tokens are more than the 131072 that the model was trained for: "
        "it gets 131072",
    )
