"""Models with a server of their own, from the settings: places, commands and sizes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from router.app.preflight import empty_snapshot
from router.app.supervised_models import SupervisedModel, supervised_models
from router.config.policy import policy_of
from router.config.settings import ConfigError, load_settings
from tests.scheduler.builders import gpu, instance
from tests.support.tiny_model import TINY, write_model

_GPUS = (gpu(0, 24_000), gpu(1, 24_000))
_MIB = 2**20


def _models(rules: Any, store: Path, **engine: Any) -> tuple[SupervisedModel, ...]:
    tree = {"engines": {"e": {"kind": "llama-server", **engine}}, "models": {"Big:1b": {"engine": "e", **rules}}}
    settings = load_settings(None, {"HOME": str(store)}, tree)
    policy = policy_of(settings, _GPUS, instance("like"))
    return supervised_models(settings, store, _GPUS, policy, itertools.count(40_000).__next__)


def _sizes(model: SupervisedModel) -> list[tuple[int, ...]]:
    tree = load_settings(None, {"HOME": "/"}, {})
    snapshot = empty_snapshot(policy_of(tree, _GPUS, instance("like")), _GPUS, model.instances, None)
    return [model.served.estimate(spec, snapshot) for spec in model.instances]


def test_without_gpus_of_its_own_it_has_a_place_on_each_and_its_size_is_that_of_its_file(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", TINY)
    (model,) = _models({"path": str(tmp_path / "tiny.gguf"), "context_length": 4096}, tmp_path)
    assert [spec.name for spec in model.instances] == ["big-1b.gpu0", "big-1b.gpu1"]
    assert len({spec.url for spec in model.instances}) == 2
    small = _sizes(model)
    assert all(len(sizes) == 1 and 100 * _MIB < sizes[0] < 2048 * _MIB for sizes in small)
    (larger,) = _models({"path": str(tmp_path / "tiny.gguf"), "context_length": 8192, "num_parallel": 64}, tmp_path)
    assert _sizes(larger)[0][0] > small[0][0]


def test_the_command_has_what_the_model_needs(tmp_path: Path) -> None:
    rules = {"path": "Org/Model", "gpus": "1,0", "memory_bytes_per_gpu": "6GiB", "flags": ["--x", '{"a": 1}']}
    rules |= {"num_parallel": 4, "context_length": 1000}
    command = ["run", "{path}", "{name}", "{gpus}", "{share}", "{context}", "{slots}", "{context_total}", "{other}"]
    (model,) = _models(rules, tmp_path, command=command, env={"A": "b"})
    (spec,) = model.instances
    share = f"{6 * 2**30 / _GPUS[0].memory_total_bytes:.3f}"
    assert model.served.commands[spec.name] == (
        "run", "Org/Model", "big:1b", "2", share, "1000", "4", "4000", "{other}", "--x", '{"a": 1}',
    )  # fmt: skip
    assert spec.gpus == (_GPUS[1].uuid, _GPUS[0].uuid)
    assert model.served.environments[spec.name] == {
        "A": "b", "CUDA_VISIBLE_DEVICES": f"{_GPUS[1].uuid},{_GPUS[0].uuid}", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # fmt: skip
    assert _sizes(model) == [(6 * 2**30,) * 2]
    (other,) = _models({**rules, "flags": []}, tmp_path, command=command)
    assert other.served.signature != model.served.signature


@pytest.mark.parametrize(
    ("rules", "reported"),
    [
        ({"path": "Org/Model"}, "models.Big:1b: set memory_bytes_per_gpu"),
        ({}, "models.Big:1b: it is not in"),
    ],
)
def test_what_is_not_known_is_asked_for(rules: Any, reported: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        _models(rules, tmp_path)
    assert refused.value.problems[0].startswith(reported)
