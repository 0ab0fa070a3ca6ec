"""The emulated server on emulated GPUs: placement, eviction, and what clients and sibling servers see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from router.lab.emulator import vram
from router.lab.emulator.faults import write_faults
from tests.lab.emulator.conftest import Box, ask, loaded, make_box
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually, eventually_sync

_8B, _70B, _3B = "llama3.1:8b", "llama3.3:70b", "llama3.2:3b"
_ALL_LAYERS = {"num_gpu": 999}


def test_a_model_uses_memory_on_the_gpu_visible_to_its_server(box: Box) -> None:
    with box.start(1) as server:
        assert ask(server, _8B)[0] == 200
        entry = loaded(server)[_8B]
        assert entry["size_vram"] == entry["size"]
        assert box.used_gb() == [0.0, round(entry["size"] / 1e9, 1)]
        assert server.call("POST", "/api/generate", {"model": _8B, "keep_alive": 0})[0] == 200
        eventually_sync(lambda: box.used_gb() == [0.0, 0.0])
        assert loaded(server) == {}


def test_a_70b_model_is_split_over_both_gpus_as_measured_on_hardware(box: Box) -> None:
    with box.start(0, 1, OLLAMA_SCHED_SPREAD="1") as server:
        assert ask(server, _70B)[0] == 200
        assert box.used_gb() == pytest.approx([23.8, 22.4], rel=0.05)
        entry = loaded(server)[_70B]
        assert entry["size_vram"] == entry["size"]


def test_a_model_too_large_for_its_gpu_spills_to_the_cpu_silently(box: Box) -> None:
    with box.start(0) as server:
        status, answer = ask(server, _70B)
        assert (status, answer["done"]) == (200, True)
        entry = loaded(server)[_70B]
        assert 0.3 < entry["size_vram"] / entry["size"] < 0.6


def test_an_unknown_gpu_falls_back_to_the_cpu_and_is_logged(box: Box) -> None:
    with box.start(CUDA_VISIBLE_DEVICES="GPU-00000000-nowhere") as server:
        text = eventually_sync(lambda: _line(server.log, "inference compute"))
        assert "library=cpu" in text
        assert ask(server, _3B)[0] == 200
        assert loaded(server)[_3B]["size_vram"] == 0


def _line(path: Path, text: str) -> str:
    return next((line for line in path.read_text(errors="replace").splitlines() if text in line), "")


def test_every_log_line_is_marked_as_emulated(box: Box) -> None:
    with box.start(0) as server:
        ask(server, _3B)
        eventually_sync(lambda: _line(server.log, "inference compute"))
        lines = server.log.read_text(errors="replace").splitlines()
    assert lines
    assert [line for line in lines if "emulated" not in line] == []


def test_an_idle_model_is_evicted_for_one_that_does_not_fit_next_to_it(box: Box) -> None:
    with box.start(0) as server:
        ask(server, "qwen2.5-coder:32b")
        ask(server, _8B)
        assert list(loaded(server)) == [_8B]


def test_models_that_fit_together_stay_loaded(box: Box) -> None:
    with box.start(0) as server:
        ask(server, _8B)
        ask(server, _3B)
        assert set(loaded(server)) == {_8B, _3B}


def test_sibling_servers_see_each_others_memory_but_not_their_models(box: Box) -> None:
    with box.start(0) as first, box.start(0) as second:
        ask(first, "qwen2.5-coder:32b")
        ask(second, _8B)
        entry = loaded(second)[_8B]
        assert entry["size_vram"] < entry["size"]
        assert list(loaded(first)) == ["qwen2.5-coder:32b"]


def test_requesting_all_layers_without_room_is_an_error_that_leaves_nothing(box: Box) -> None:
    vram.set_external(box.directory, box.uuids[0], 10 * 1024**3)
    with box.start(0, 1) as server:
        status, answer = ask(server, _70B, options=_ALL_LAYERS)
        assert status == 500
        assert "out of memory" in answer["error"]
        assert loaded(server) == {}
        assert not server.runners()
        assert ask(server, _8B)[0] == 200


def test_0_33_does_not_see_what_a_sibling_took_on_a_gpu_where_it_has_a_runner(tmp_path: Path) -> None:
    box = make_box(tmp_path, "3090", "0.33.0")
    with box.start(0) as server:
        ask(server, _3B)
        vram.set_external(box.directory, box.uuids[0], 18 * 1024**3)
        assert ask(server, _8B)[0] == 200  # planned next to the other, failed, and loaded after evicting it
        assert list(loaded(server)) == [_8B]
        assert "out of memory" in server.log.read_text(errors="replace")


def test_0_33_lists_capabilities_and_context_length_of_its_models(tmp_path: Path) -> None:
    box = make_box(tmp_path, "3090", "0.33.0")
    with box.start(0) as server:
        (entry,) = [entry for entry in server.call("GET", "/api/tags")[1]["models"] if entry["name"] == _8B]
        assert entry["capabilities"] == ["completion", "tools"]
        assert entry["details"]["context_length"] == 131_072


async def test_0_33_sends_the_role_once_and_does_not_reload_for_unset_options(tmp_path: Path) -> None:
    box = make_box(tmp_path, "3090", "0.33.0")
    body = {"model": _8B, "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 3}
    with box.start(0) as server:
        ask(server, _8B, options={"num_ctx": 4096})
        runners = set(server.runners())
        reply = await call(server.address, "POST", "/v1/chat/completions", body)
        assert set(server.runners()) == runners
    deltas = [event["choices"][0]["delta"] for event in reply.events() if event != "[DONE]"]
    assert ["role" in delta for delta in deltas] == [True] + [False] * (len(deltas) - 1)


def test_an_orphaned_runner_keeps_its_memory_until_it_is_killed(box: Box) -> None:
    with box.start(0) as server:
        ask(server, _8B)
        (runner,) = server.runners()
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert box.used_gb()[0] > 5
        os.kill(runner, signal.SIGKILL)
        eventually_sync(lambda: box.used_gb() == [0.0, 0.0])


async def test_a_client_that_disconnects_during_its_load_aborts_it(box: Box) -> None:
    with box.start(0, LLAMAYARD_RIG_SPEED="1") as server:
        async with connect(server.address) as disconnecting:
            await disconnecting.send(request_bytes("POST", "/api/generate", {"model": _8B}))
            await eventually(lambda: box.used_gb()[0] > 5)
            disconnecting.abort()
        await eventually(lambda: not loaded(server) and not server.runners() and box.used_gb() == [0.0, 0.0])


async def test_a_client_that_disconnects_while_queued_is_never_answered_nor_loaded(box: Box) -> None:
    with box.start(0, LLAMAYARD_RIG_SPEED="2") as server:
        async with asyncio.TaskGroup() as tasks, connect(server.address) as disconnecting:
            first = tasks.create_task(call(server.address, "POST", "/api/generate", {"model": _8B}))
            await eventually(lambda: box.used_gb()[0] > 5)
            await disconnecting.send(request_bytes("POST", "/api/generate", {"model": _3B}))
            assert (
                await call(server.address, "GET", "/api/version")
            ).status == 200  # sent later, so the first is queued now
            disconnecting.half_close()
            assert (await first).status == 200
            reply = await call(server.address, "POST", "/api/generate", {"model": _8B, "prompt": "x", "stream": False})
            assert reply.status == 200
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await disconnecting.at_eof()
        assert list(loaded(server)) == [_8B]


async def test_a_request_that_waits_for_a_busy_model_blocks_others_that_would_fit(box: Box) -> None:
    write_faults(box.directory, [{"model": _8B, "hang": True}])
    requests = [
        {"model": _8B, "prompt": "x"},  # hangs
        {"model": _8B, "options": {"num_ctx": 4096}},  # needs a reload
        {"model": _3B},  # would fit next to it
    ]
    with box.start(0) as server:
        assert server.call("POST", "/api/generate", {"model": _8B})[0] == 200
        async with contextlib.AsyncExitStack() as stack:
            hung, reload, small = [await stack.enter_async_context(connect(server.address)) for _ in requests]
            await hung.send(request_bytes("POST", "/api/generate", requests[0]))
            assert (await call(server.address, "GET", "/api/version")).status == 200  # so the first has arrived
            await reload.send(request_bytes("POST", "/api/generate", requests[1]))
            await eventually(lambda: _line(server.log, "waiting for pending requests"))
            await small.send(request_bytes("POST", "/api/generate", requests[2]))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await small.head()
            hung.abort()
            assert [(await client.reply()).status for client in (reload, small)] == [200, 200]


def test_answers_say_that_they_are_emulated_and_stop(box: Box) -> None:
    with box.start(0) as server:
        status, answer = ask(server, _8B, options={"num_predict": -1, "seed": 3})
        assert (status, answer["done_reason"]) == (200, "stop")
        assert "emulated" in answer["response"]
        again = ask(server, _8B, options={"num_predict": -1, "seed": 3})[1]
        assert again["response"] == answer["response"]


def test_a_prompt_with_a_cached_prefix_is_evaluated_faster(box: Box) -> None:
    prompt = "word " * 8000
    with box.start(0, OLLAMA_CONTEXT_LENGTH="16384", LLAMAYARD_RIG_SPEED="2") as server:
        ask(server, _8B)
        first = ask(server, _8B, prompt=prompt)[1]
        second = ask(server, _8B, prompt=prompt + "more")[1]
    assert second["prompt_eval_count"] == first["prompt_eval_count"] + 1
    assert second["prompt_eval_duration"] < first["prompt_eval_duration"] / 3


@pytest.mark.parametrize(("version", "comes_back"), [("0.24.0", False), ("0.33.0", True)])
def test_from_0_30_a_prompt_evicted_from_the_only_slot_is_restored(
    tmp_path: Path, version: str, comes_back: bool
) -> None:
    box = make_box(tmp_path, "3090", version)
    prompt = "word " * 8000
    with box.start(0, OLLAMA_CONTEXT_LENGTH="16384", LLAMAYARD_RIG_SPEED="1") as server:
        ask(server, _8B)
        first, _, again = (ask(server, _8B, prompt=text)[1] for text in (prompt, "other", prompt + "more"))
    assert (again["prompt_eval_duration"] < first["prompt_eval_duration"] / 3) == comes_back


def test_a_thinking_model_thinks_first_unless_disabled(box: Box) -> None:
    with box.start(0) as server:
        body = {"model": "deepseek-r1:32b", "messages": [{"role": "user", "content": "hi"}], "stream": False}
        message = server.call("POST", "/api/chat", body)[1]["message"]
        assert message["thinking"]
        assert message["content"]
        assert "thinking" not in server.call("POST", "/api/chat", {**body, "think": False})[1]["message"]


def test_a_tool_is_called_when_the_user_message_names_it(box: Box) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    with box.start(0) as server:
        body = {"model": _8B, "tools": [tool], "stream": False}
        conversations = [{"role": "user", "content": "use get_weather for me"}], [{"role": "user", "content": "hello"}]
        called, plain = (
            server.call("POST", "/api/chat", {**body, "messages": messages})[1]["message"] for messages in conversations
        )
    (call_,) = called["tool_calls"]
    assert call_["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "emulated", "days": 7}}
    assert "tool_calls" not in plain


async def test_a_catalogue_model_is_pulled_with_progress(tmp_path: Path) -> None:
    spec_file = tmp_path / "rig.yaml"
    spec_file.write_text("{gpus: 3090, models: []}", encoding="utf-8")
    box = make_box(tmp_path, str(spec_file))
    with box.start(0) as server:
        assert server.call("GET", "/api/tags")[1] == {"models": []}
        reply = await call(server.address, "POST", "/api/pull", {"model": _3B})
        lines = reply.lines()
        assert (lines[0], lines[-1]) == ({"status": "pulling manifest"}, {"status": "success"})
        steps = [line["completed"] for line in lines if "completed" in line]
        assert steps == sorted(steps)
        assert steps[-1] == lines[1]["total"]
        assert ask(server, _3B)[0] == 200


async def test_pruning_by_a_sibling_server_breaks_a_pull_only_in_the_old_version(tmp_path: Path) -> None:
    spec_file = tmp_path / "rig.yaml"
    spec_file.write_text("{gpus: 3090, models: []}", encoding="utf-8")
    for version, breaks in (("0.11.4", True), ("0.24.0", False)):
        (tmp_path / version).mkdir()
        box = make_box(tmp_path / version, str(spec_file), version)
        with box.start(0, LLAMAYARD_RIG_SPEED="10") as server:
            async with connect(server.address) as pulling:
                await pulling.send(request_bytes("POST", "/api/pull", {"model": _3B}))
                head = await pulling.head()
                first_chunks = [await pulling.chunk(), await pulling.chunk()]
                with box.start(0, OLLAMA_NOPRUNE="0"):
                    pass
                reply = await pulling.rest(head, *(chunk for chunk in first_chunks if chunk))
        assert ("error" in reply.lines()[-1]) == breaks


def test_loads_deviate_from_the_usual_size_and_from_each_other(tmp_path: Path) -> None:
    def sizes(folder: str, deviation: str) -> list[int]:
        (tmp_path / folder).mkdir()
        box = make_box(tmp_path / folder, "3090", deviation=deviation)
        found: list[int] = []
        with box.start(0) as server:
            for _ in range(2):
                assert ask(server, "llama3.2:3b")[0] == 200
                found += vram.used_bytes(box.directory).values()
                assert server.call("POST", "/api/generate", {"model": "llama3.2:3b", "keep_alive": 0})[0] == 200
                eventually_sync(lambda: not any(box.used_gb()))
        return found

    usual, again = sizes("exact", "off")
    assert usual == again
    first, second = sizes("deviating", "0.04")
    assert len({usual, first, second}) == 3
    assert abs(second - first) <= 0.02 * usual
