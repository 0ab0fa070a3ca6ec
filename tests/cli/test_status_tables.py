"""The status as tables: what is shown, and that it fits a terminal of 100 columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from router.cli.status_tables import WIDTH, render_status, short_reason

STATUS: dict[str, Any] = {
    "emulated": "EMULATED rig 2x3090",
    "gpus": [
        {
            "uuid": "GPU-1",
            "index": 0,
            "name": "RTX 3090",
            "memory_total_bytes": 24 * 1024**3,
            "memory_used_bytes": 1024**3,
            "memory_free_bytes": 23 * 1024**3,
            "temperature_celsius": None,
        }
    ],
    "instances": [
        {"name": "gpu0", "state": "ready", "gpus": ["GPU-1"], "url": "http://127.0.0.1:1", "version": "0.24.0"}
    ],
    "models": [
        {
            "name": "tiny:latest",
            "instance": "gpu0",
            "state": "ready",
            "slots": 2,
            "in_flight": 1,
            "per_gpu_bytes": [2**30],
        }
    ],
    "reservations": [],
    "queue": {"waiting": 3, "limit": 512},
    "waiting": [
        {"position": 1, "expected_wait_seconds": 11.6, "request_id": "r1", "model": "a:latest", "waited_seconds": 2.4},
        {"position": 2, "expected_wait_seconds": None, "request_id": "r2", "model": "a:latest", "reason": "its turn"},
    ],
}


def test_waiting_requests_are_shown_with_their_eta() -> None:
    rows = [line.split() for line in render_status(STATUS).splitlines()[-3:]]
    assert rows[0] == ["MODEL", "POSITION", "WAITED", "ETA", "REQUEST", "REASON"]
    assert rows[1] == ["a:latest", "1", "2", "s", "12", "s", "r1", "-"]
    assert rows[2] == ["a:latest", "2", "-", "-", "r2", "its", "turn"]
    assert "WAITING" not in render_status({**STATUS, "waiting": []})


def test_a_missing_value_is_a_dash() -> None:
    lines = render_status({**STATUS, "waiting": []}).splitlines()
    assert lines[0] == "EMULATED rig 2x3090"
    assert lines[2:5] == [
        "GPUS",
        "  GPU  NAME      TOTAL     USED     EXTERNAL  FREE      LOAD  POWER  °C",
        "  0    RTX 3090  24.0 GiB  1.0 GiB  -         23.0 GiB  -     -      -",
    ]
    assert "  gpu0      ready  0.24.0   http://127.0.0.1:1  0" in lines
    assert "  tiny:latest  gpu0      ready  1/2    1.0 GiB  -" in lines
    assert lines[-5:] == ["RESERVATIONS", "  none", "", "QUEUE", "  waiting 3, limit 512"]


def test_an_empty_status_is_printed() -> None:
    assert render_status({}).count("none") == 4


def _four_gpus() -> dict[str, Any]:
    """As the router answers on four emulated GPUs while it loads a 70B over three of them."""
    return json.loads((Path(__file__).parent / "status-4x3090.json").read_text(encoding="utf-8"))


def test_the_status_of_four_gpus_fits_100_columns_and_has_no_uuid() -> None:
    text = render_status(_four_gpus())
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "GPU-" not in text
    assert "  spread          ready  0.24.0   http://127.0.0.1:31460  0, 1, 2, 3" in text.splitlines()


def test_each_gpu_has_its_load_its_power_and_the_memory_of_other_programs() -> None:
    status = _four_gpus()
    status["gpus"][1] |= {
        "external_bytes": 3 * 1024**3,
        "utilization_ratio": 0.87,
        "power_draw_watts": 312.4,
        "temperature_celsius": 38,
    }
    line = next(line for line in render_status(status).splitlines() if line.startswith("  1 "))
    assert " ".join(line.split()) == "1 RTX 3090 24.0 GiB 16.4 GiB 3.0 GiB 7.3 GiB 87% 312/350 W 38"


def test_a_lost_gpu_has_its_error_below_its_row() -> None:
    status = _four_gpus()
    status["gpus"][0]["error"] = "GPU is lost"
    lines = render_status(status).splitlines()
    assert lines[lines.index("    error: GPU is lost") - 1].startswith("  0 ")


def test_a_model_that_is_not_ready_has_its_reason_below_its_row() -> None:
    lines = render_status(_four_gpus()).splitlines()
    row = next(at for at, line in enumerate(lines) if line.startswith("  llama3.3:70b"))
    assert lines[row + 1].startswith("    gpu1+gpu2+gpu3: GPU 1 needs 16.5 of 23.2 GiB free")
    ready = next(at for at, line in enumerate(lines) if line.startswith("  llama3.1:8b"))
    assert ready + 1 == row


ENVIRONMENT = 'time=2026-11-29T10:00:00.000Z level=INFO source=routes.go:1331 msg="server config" env="map[' + (
    "OLLAMA_DEBUG:INFO " * 80
)
FAILURE = (
    f'exited with code 1; last lines: {ENVIRONMENT}]" | '
    'time=2026-11-29T10:00:00.100Z level=INFO source=images.go:477 msg="total blobs: 5" | '
    "Error: listen tcp 127.0.0.1:31456: bind: address already in use; restart in 2 s"
)


def test_the_reason_of_a_failing_instance_comes_without_its_environment() -> None:
    assert short_reason(FAILURE) == (
        'exited with code 1; last lines: "total blobs: 5" | '
        "Error: listen tcp 127.0.0.1:31456: bind: address already in use; restart in 2 s"
    )
    status = _four_gpus()
    status["instances"][0] |= {"state": "backoff", "reason": FAILURE}
    text = render_status(status)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "OLLAMA_DEBUG" not in text
    assert "address already in use" in text


def test_long_names_are_shortened_in_the_middle() -> None:
    status = _four_gpus()
    name = "hf.co/somebody/A-Model-With-A-Very-Long-Name-Indeed-Instruct-GGUF:Q4_K_M"
    status["models"][1] |= {"name": name, "instance": "gpu0+gpu1+gpu2+gpu3"}
    text = render_status(status)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "  hf.co/" in text
    assert ":Q4_K_M  " in text


def test_pulls_are_shown_with_their_progress() -> None:
    pull = {"model": "tiny:latest", "status": "pulling 1a2b3c", "completed_bytes": 2**29, "total_bytes": 2**30,
            "clients": 2}  # fmt: skip
    lines = render_status({"pulls": [pull]}).splitlines()
    at = lines.index("PULLS")
    assert lines[at + 2] == "  tiny:latest  50% of 1.0 GiB  pulling 1a2b3c  2"
    assert "PULLS" not in render_status({"pulls": []})


def test_warm_models_that_are_missing_are_shown_with_the_reason() -> None:
    missing = {"model": "gemma2:27b", "reason": "fits nowhere: GPU 0 needs 20.1 of 3.2 GiB free"}
    lines = render_status({"warm_missing": [missing]}).splitlines()
    at = lines.index("WARM MODELS THAT ARE MISSING")
    assert lines[at + 2 : at + 4] == ["  gemma2:27b", "    fits nowhere: GPU 0 needs 20.1 of 3.2 GiB free"]
    assert "WARM" not in render_status({"warm_missing": []})


def test_failed_unloads_are_shown_below_their_model() -> None:
    model = {"name": "tiny:latest", "instance": "gpu0", "state": "ready", "unload_failures": 2}
    assert "    its unload failed 2 times in a row" in render_status({"models": [model]}).splitlines()
    failing = {**model, "state": "unloading", "unload_failures": 1, "reason": "cannot be unloaded: refused"}
    assert (
        "    its unload failed once: cannot be unloaded: refused" in render_status({"models": [failing]}).splitlines()
    )


def test_a_model_on_the_cpu_of_an_instance_with_gpus_is_marked() -> None:
    model = {"name": "tiny:latest", "instance": "gpu0", "state": "ready", "cpu_ratio": 0.25}
    assert "    25% on the CPU" in render_status({"models": [model]}).splitlines()
    assert "CPU" not in render_status({"models": [{**model, "cpu_ratio": 0.0}, {**model, "cpu_ratio": None}]})
