"""The lines about a load that the router reads: their buffers are what a runner allocates, CUDA contexts aside."""

from __future__ import annotations

import pytest

from router.engines.ollama.load_log import LoadLogReader, LoadReport
from router.lab.emulator.load_output import buffer_bytes, buffer_lines
from router.lab.scenarios import model_facts
from router.lab.simulator.server_placement import LoadRequest
from router.lab.simulator.true_footprint import LoadShape, true_gpu_bytes

BLOB = "a" * 64
SHAPE = LoadShape(8192, slots=2, batch_tokens=1024, version=(0, 34, 0), size_ratio=1.03)


def _report(request: LoadRequest, layers: tuple[int, ...]) -> LoadReport:
    reader = LoadLogReader()
    assert reader.feed(f'msg="starting llama-server" cmd="llama-server --model /m/sha256-{BLOB} --port 1"') is None
    for line in buffer_lines(request, layers):
        assert reader.feed(f"{line} (emulated)") is None
    report = reader.feed('msg="llama-server started in 4.25 seconds"')
    assert report is not None
    return report


@pytest.mark.parametrize("name", ["llama3.1:8b", "gemma3:12b", "gpt-oss:20b"])
@pytest.mark.parametrize("is_split", [False, True])
def test_the_printed_buffers_are_what_a_load_allocates_but_for_the_cuda_context(name: str, is_split: bool) -> None:
    model = model_facts(name)
    total = model.layers + 1
    layers = (total // 2, total - total // 2) if is_split else (total, 0)
    request = LoadRequest(model, SHAPE, version=SHAPE.version)
    report = _report(request, layers)
    context = SHAPE.cuda_context_bytes * SHAPE.size_ratio
    for index, size in enumerate(true_gpu_bytes(model, SHAPE, layers)):
        if size:
            gpu = report.gpus[index]
            printed = gpu.weights_bytes + gpu.kv_cache_bytes + gpu.compute_buffer_bytes
            assert printed == pytest.approx(size - context, abs=100_000)  # printed to a hundredth of a MiB
    assert sorted(report.gpus) == [index for index, count in enumerate(layers) if count]
    assert (report.context_length, report.slots, report.batch) == (8192, 2, 1024)
    assert (report.layers_on_gpus, report.layers) == (total, total)
    assert buffer_bytes(request, layers) == pytest.approx(sum(true_gpu_bytes(model, SHAPE, layers)) - context * len(
        report.gpus), abs=10)  # fmt: skip


def test_without_a_gpu_all_layers_count_as_offloaded_and_no_gpu_has_a_buffer() -> None:
    model = model_facts("llama3.2:3b")
    report = _report(LoadRequest(model, SHAPE, version=SHAPE.version), ())
    assert report.gpus == {}
    assert report.layers_on_gpus == model.layers + 1


def test_a_part_on_the_cpu_is_not_counted_as_offloaded() -> None:
    model = model_facts("llama3.1:8b")
    report = _report(LoadRequest(model, SHAPE, version=SHAPE.version), (20,))
    assert (report.layers_on_gpus, report.layers) == (20, model.layers + 1)
