"""What a server's output says of its loads, read from recorded output of real servers and from lines as they print
them."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.domain.footprint import GpuFootprint
from router.engines.ollama.load_log import LoadLogReader, LoadReport

MIB = 1024**2
RECORDINGS = Path(__file__).parent / "recordings"
BLOB = "sha256:cf7b4539f0228c4c037bf17f3c29c687b204885f22baf4546fd1eb22c8615179"


def _read(text: str) -> list[LoadReport]:
    reader = LoadLogReader()
    return [report for line in text.splitlines() if (report := reader.feed(line)) is not None]


def _recorded(version: str, device: str = "CPU") -> LoadReport:
    text = (RECORDINGS / f"load-{version}.log").read_text(encoding="utf-8")
    (report,) = _read(text.replace("       CPU ", f"       {device} "))
    return report


def test_a_recorded_load_of_0_34_gives_slots_context_batch_and_flash_attention() -> None:
    report = _recorded("0.34.0")
    assert (report.blob, report.seconds) == (BLOB, 0.76)
    assert (report.context_length, report.slots, report.batch, report.flash_attention) == (2048, 2, 512, True)
    assert (report.layers_on_gpus, report.layers) == (3, 3)
    assert report.gpus == {}  # it ran on a CPU


def test_a_recorded_load_of_0_11_gives_the_same_facts_in_its_own_format() -> None:
    report = _recorded("0.11.4")
    assert (report.blob, report.seconds) == (BLOB, 0.25)
    assert (report.context_length, report.slots, report.batch, report.flash_attention) == (2048, 1, 512, False)
    assert report.gpus == {}


@pytest.mark.parametrize(("version", "cache", "compute"), [("0.34.0", 0.53, 3.02), ("0.11.4", 0.50, 12.51)])
def test_buffers_on_a_gpu_are_counted_by_part(version: str, cache: float, compute: float) -> None:
    (gpu,) = _recorded(version, "CUDA0").gpus.values()
    assert gpu.weights_bytes == pytest.approx(0.33 * MIB, abs=1)
    assert gpu.kv_cache_bytes == pytest.approx(cache * MIB, abs=1)
    assert gpu.compute_buffer_bytes == pytest.approx(compute * MIB, abs=2)


START = f'time=… msg="starting llama-server" cmd="llama-server --model /models/blobs/{BLOB.replace(":", "-")} --port 1"'
END = 'time=… msg="llama-server started in 4.25 seconds"'


def test_two_gpus_and_the_second_cache_of_sliding_layers_add_up() -> None:
    (report,) = _read(
        f"""{START}
load_tensors:        CUDA0 model buffer size =  1000.00 MiB
load_tensors:        CUDA1 model buffer size =   900.00 MiB
load_tensors:   CPU_Mapped model buffer size =   300.00 MiB
llama_context: constructing llama_context
llama_kv_cache:      CUDA0 KV buffer size =   100.00 MiB
llama_kv_cache:      CUDA1 KV buffer size =    90.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =    20.00 MiB
llama_kv_cache:      CUDA1 KV buffer size =    18.00 MiB
llama_memory_recurrent: CUDA1 RS buffer size =   149.62 MiB
sched_reserve:      CUDA0 compute buffer size =   500.00 MiB
sched_reserve:      CUDA0 compute buffer size =   300.00 MiB
sched_reserve:      CUDA1 compute buffer size =   200.00 MiB
sched_reserve:  CUDA_Host compute buffer size =    30.00 MiB
{END}"""
    )
    assert report.gpus == {
        0: GpuFootprint(weights_bytes=1000 * MIB, kv_cache_bytes=120 * MIB, compute_buffer_bytes=300 * MIB),
        1: GpuFootprint(900 * MIB, 108 * MIB, int(149.62 * MIB), 200 * MIB),
    }


def test_a_draft_context_adds_its_cache_and_buffers() -> None:
    (report,) = _read(
        f"""{START}
load_tensors:        CUDA0 model buffer size =  1000.00 MiB
llama_context: constructing llama_context
llama_kv_cache:      CUDA0 KV buffer size =   100.00 MiB
sched_reserve:      CUDA0 compute buffer size =   300.00 MiB
llama_context: constructing llama_context
llama_kv_cache:      CUDA0 KV buffer size =    16.00 MiB
sched_reserve:      CUDA0 compute buffer size =   130.00 MiB
{END}"""
    )
    assert report.gpus == {0: GpuFootprint(1000 * MIB, 116 * MIB, 0, 430 * MIB)}


def test_what_was_only_tried_to_fit_does_not_count() -> None:
    (report,) = _read(
        f"""{START}
llama_context: constructing llama_context
llama_kv_cache:      CUDA0 KV buffer size =   999.00 MiB
common_fit_params: successfully fit params to free device memory
llama_context: constructing llama_context
llama_kv_cache:      CUDA0 KV buffer size =   100.00 MiB
{END}"""
    )
    assert report.gpus == {0: GpuFootprint(kv_cache_bytes=100 * MIB)}


def test_the_own_engines_lines_are_read_to_a_tenth() -> None:
    (report,) = _read(
        f"""msg="starting runner" cmd="ollama runner --ollama-engine --model /m/blobs/{BLOB.replace(":", "-")} --port 1"
msg="model weights" device=CUDA0 size="9.0 GiB"
msg="model weights" device=CUDA0 size="8.9 GiB"
msg="model weights" device=CPU size="1.1 GiB"
msg="kv cache" device=CUDA0 size="2.2 GiB"
msg="compute graph" device=CUDA0 size="323.9 MiB"
msg="llama runner started in 3.01 seconds\""""
    )
    assert report.gpus == {0: GpuFootprint(int(8.9 * 1024 * MIB), int(2.2 * 1024 * MIB), 0, int(323.9 * MIB))}


def test_a_load_that_fails_reports_nothing_and_the_next_one_counts_alone() -> None:
    failed = f'{START}\nload_tensors: CUDA0 model buffer size = 5.00 MiB\nmsg="Load failed" error="out of memory"'
    (report,) = _read(f"{failed}\n{START}\nload_tensors: CUDA0 model buffer size = 7.00 MiB\n{END}\n{END}")
    assert report.gpus == {0: GpuFootprint(weights_bytes=7 * MIB)}
