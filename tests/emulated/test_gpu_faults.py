"""GPUs that fail or are too hot, played by the emulated ones: told everywhere, and other GPUs serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router.lab.emulator.faults import write_faults
from tests.emulated.test_operator_commands import _FAST, _QUICK_POLLS, _ask, _command, _status
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig


def _gpu(product: Product, index: int) -> dict[str, Any]:
    return _status(product)["gpus"][index]


async def test_a_gpu_with_an_xid_of_its_own_serves_nothing_until_an_operator_resumes_it(tmp_path: Path) -> None:
    rig = tmp_path / "state" / "rig"
    with running(prepare(tmp_path, _QUICK_POLLS, _FAST, ("--rig", "2x3090"))) as product:
        assert (await _ask(product)).status == 200
        write_faults(rig, [{"gpu": _gpu(product, 0)["uuid"], "xid": 48}])
        await eventually(lambda: _gpu(product, 0)["unfit"], what="the fault")
        assert _gpu(product, 0)["unfit"] == "GPU 0 reported XID 48 (double bit ECC error)"
        assert (await _ask(product)).status == 200
        await eventually(lambda: {m["instance"] for m in _status(product)["models"]} == {"gpu1"}, what="the move")
        refused = await _ask(product, "llama3.3:70b")
        assert (refused.status, "XID 48" in refused.json()["error"]) == (503, True)
        assert "out of service: GPU 0 reported XID 48" in _command(product, "status").stdout
        metrics = (await call(product.address, "GET", "/metrics")).body.decode()
        assert 'xid="48"} 1.0' in metrics
        assert 'llamayard_gpu_unfit{gpu="' in metrics
        _command(product, "resume", "gpu", "0")
        assert (await _ask(product, "llama3.3:70b")).status == 200
        assert "gpu_fit_again" in product.log_text()


async def test_a_hot_gpu_is_avoided(tmp_path: Path) -> None:
    with running(prepare(tmp_path, _QUICK_POLLS, _FAST, ("--rig", "2x3090"))) as product:
        write_faults(tmp_path / "state" / "rig", [{"gpu": _gpu(product, 0)["uuid"], "temperature_celsius": 88}])
        await eventually(lambda: _gpu(product, 0)["hot"], what="the heat")
        assert (await _ask(product)).status == 200
        assert {model["instance"] for model in _status(product)["models"]} == {"gpu1"}
        write_faults(tmp_path / "state" / "rig", [])
        await eventually(lambda: not _gpu(product, 0)["hot"], what="the end of the heat")
