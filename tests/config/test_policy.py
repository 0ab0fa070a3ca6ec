"""Conversion of configured pins into the scheduler's policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from router.config.policy import policy_of, warm_models
from router.config.settings import ConfigError, load_settings
from router.domain.policy import Policy
from tests.scheduler.builders import gpu, gpu_id, instance

GPU_MODELS = (gpu(0, 24_000), gpu(1, 24_000))


def _policy(folder: Path, **tree: object) -> Policy:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return policy_of(load_settings(path, {}), GPU_MODELS, instance("like"))


def test_pins_are_found_by_every_form_of_a_name_and_name_gpus_by_index_or_uuid(tmp_path: Path) -> None:
    models = {"Library/Small": {"gpus": [1]}, "large:70b": {"gpus": ["GPU-0", "GPU-1"], "keep_warm": True}}
    policy = _policy(tmp_path, models=models, placement={"exclusive_gpus": {1: ["small"]}})
    assert policy.pins["small:latest"].gpus == (gpu_id(1),)
    assert policy.pins["large:70b"].gpus == (gpu_id(0), gpu_id(1))
    assert warm_models(policy) == ("large:70b",)
    assert policy.exclusive_gpus == {gpu_id(1): frozenset({"small:latest"})}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"gpus": [7]}, "models.m.gpus: '7' is no GPU of this machine; there are: 0: GPU-0"),
        ({"gpus": ["GPU"]}, "fits several GPUs"),
        ({"gpus": [0], "layout": "cpu"}, "exclude each other"),
        ({"gpus": [0], "layout": "spread"}, "needs several gpus"),
    ],
)
def test_an_impossible_pin_is_refused_with_its_key(tmp_path: Path, model: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\\(")) as error:
        _policy(tmp_path, models={"m": model})
    assert message in str(error.value)


def test_without_gpus_nothing_is_started_on_demand(tmp_path: Path) -> None:
    assert _policy(tmp_path).instances_on_demand
    assert not policy_of(load_settings(None, {}), (), instance("like")).instances_on_demand
    assert not _policy(tmp_path, placement={"on_demand": False}).instances_on_demand
