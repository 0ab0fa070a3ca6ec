"""Rules that the GPUs and instances of a machine cannot satisfy, or that are probably not meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.app.fleet_checks import FleetCheck, check_fleet
from router.app.hardware import instance_plan
from router.config.settings import load_settings
from router.domain.gpu import Gpu
from tests.scheduler.builders import gpu

TWO = (gpu(0, 24_000), replace(gpu(1, 12_000), memory_total_bytes=12 * 1024**3))


def _check(folder: Path, gpus: tuple[Gpu, ...] = TWO, **tree: Any) -> FleetCheck:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    settings = load_settings(path, {})
    return check_fleet(settings, gpus, instance_plan(settings, "/models"))


def test_a_model_for_the_cpu_needs_an_instance_on_the_cpu(tmp_path: Path) -> None:
    models = {"m": {"layout": "cpu"}}
    (problem,) = _check(tmp_path, models=models).problems
    assert problem.startswith(
        "models.m: layout: cpu needs an instance on the CPU, and there is none: declare one with "
    )
    assert _check(tmp_path, models=models, instances=[{"name": "cpu"}], discover=True).problems == ()
    assert _check(tmp_path, (), models=models).problems == ()


def test_variables_for_an_instance_that_cannot_exist_are_refused(tmp_path: Path) -> None:
    env = {"gpu0": {"A": "b"}, "spread": {"A": "b"}, "gpu-0": {"A": "b"}}
    assert _check(tmp_path, ollama={"instance_env": env}).problems == (
        "ollama.instance_env.gpu-0: no instance has this name; names are: gpu0, gpu1, …, spread, cpu",
    )
    declared = [{"name": "a"}]
    assert _check(tmp_path, ollama={"instance_env": {"a": {"A": "b"}}}, instances=declared).problems == ()
    (problem,) = _check(tmp_path, ollama={"instance_env": {"gpu0": {"A": "b"}}}, instances=declared).problems
    assert problem == "ollama.instance_env.gpu0: no instance has this name; names are: a"


def test_variables_for_an_instance_that_this_machine_does_not_have_are_a_warning(tmp_path: Path) -> None:
    found = _check(tmp_path, ollama={"instance_env": {"gpu7": {"A": "b"}}})
    assert (found.problems, found.warnings) == (
        (), ("ollama.instance_env.gpu7: this machine has no such instance; it has: gpu0, gpu1, spread",),
    )  # fmt: skip


def test_a_margin_that_leaves_no_memory_is_refused_and_one_that_disables_a_gpu_is_a_warning(tmp_path: Path) -> None:
    (problem,) = _check(tmp_path, placement={"vram_margin_bytes": "100GiB"}).problems
    assert problem.startswith("placement.vram_margin_bytes: 100.0 GiB leave no memory for models: ")
    found = _check(tmp_path, placement={"vram_margin_bytes": TWO[1].memory_total_bytes})
    assert found.problems == ()
    (warning,) = found.warnings
    assert "is all the memory of GPU 1" in warning


def test_models_without_a_gpu_are_reported_if_every_gpu_is_exclusive(tmp_path: Path) -> None:
    assert _check(tmp_path, placement={"exclusive_gpus": {"0": ["a"]}}).warnings == ()
    found = _check(tmp_path, placement={"exclusive_gpus": {"0": ["a"], "1": ["b", "c:7b"]}})
    assert (found.problems, found.warnings) == (
        (),
        (
            "placement.exclusive_gpus: every GPU is exclusive: models other than a:latest, b:latest, c:7b cannot be "
            "loaded",
        ),
    )


@pytest.mark.parametrize(
    ("rules", "exclusive", "reported"),
    [
        (
            {"gpus": [0]},
            {"0": ["a"]},
            "models.m.gpus: GPU 0 is reserved for a:latest by placement.exclusive_gpus: add m",
        ),
        ({"gpus": [0, 1]}, {"1": ["a"]}, "models.m.gpus: GPU 1 is reserved for a:latest by placement.exclusive_gpus"),
        (
            {"layout": "spread"},
            {"1": ["a"]},
            "models.m: layout: spread cannot be met: placement.exclusive_gpus reserves",
        ),
        ({"keep_warm": True}, {"0": ["a"], "1": ["a"]}, "models.m: keep_warm cannot be met: placement.exclusive_gpus"),
    ],
)
def test_a_pin_against_an_exclusive_gpu_names_the_key(
    tmp_path: Path, rules: object, exclusive: object, reported: str
) -> None:
    (problem,) = _check(tmp_path, models={"m": rules}, placement={"exclusive_gpus": exclusive}).problems
    assert problem.startswith(reported)


@pytest.mark.parametrize(
    ("tree", "reported"),
    [
        ({"models": {"m": {"gpus": ["0", "GPU-0"]}}}, "models.m.gpus: 0, GPU-0 name one GPU twice"),
        (
            {"placement": {"exclusive_gpus": {"0": ["a"], "GPU-0": ["b"]}}},
            "placement.exclusive_gpus: '0' and 'GPU-0' are the same GPU: keep one entry",
        ),
    ],
)
def test_one_gpu_under_two_names_is_refused(tmp_path: Path, tree: dict[str, Any], reported: str) -> None:
    assert _check(tmp_path, **tree).problems == (reported,)
