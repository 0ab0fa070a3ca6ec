"""A reload applies everything that can change, names the rest, and changes nothing if anything is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from router.app.reload import Reloader, changes, with_live_keys
from router.app.run_time_pins import RunTimePins
from router.config.settings import BlankFile, ConfigError, Settings, load_settings
from router.errors import BadRequest

HOME = {"HOME": "/nonexistent"}


def _settings(**overrides: object) -> Settings:
    return load_settings(None, HOME, {key.replace("__", "."): value for key, value in overrides.items()})


class _Stage:
    """A reloader whose parts the test decides."""

    def __init__(self, *wanted: Settings, refuses: str = "", warns: Sequence[str] = ()) -> None:
        self.is_blank = False
        self.wanted = list(wanted)
        self.refuses = refuses
        self.warns = warns
        self.applied: list[Settings] = []
        self.reloader = Reloader(_settings(), self._read, self._check, self._apply)

    def _read(self, *, may_be_blank: bool) -> Settings:
        if not self.wanted:
            raise ConfigError(["queue.limit: no number"])
        if self.is_blank and not may_be_blank:
            raise BlankFile(["llamayard.yaml: is empty"])
        return self.wanted.pop(0)

    def _check(self, settings: Settings) -> Sequence[str]:
        return self.warns

    def _apply(self, settings: Settings, pins: RunTimePins) -> RunTimePins:
        if self.refuses:
            raise ConfigError([self.refuses])
        self.applied.append(settings)
        return pins


def _keys(rows: list[Mapping[str, Any]]) -> list[str]:
    return [row["key"] for row in rows]


async def test_what_can_change_is_applied_and_the_rest_is_named() -> None:
    stage = _Stage(_settings(queue__limit="7", server__port="1", ollama__num_parallel="4", ollama__keep_alive="5m"))
    answer = (await stage.reloader.reload()).document()
    assert answer["changed"] == [
        {"key": "ollama.keep_alive", "from": -1.0, "to": 300.0}, {"key": "queue.limit", "from": 512, "to": 7},
    ]  # fmt: skip
    assert _keys(answer["needs_restart"]) == ["server.port", "ollama.num_parallel"]
    (applied,) = stage.applied
    assert (applied.queue.limit, applied.server.port, applied.ollama.num_parallel) == (7, 11434, 2)


async def test_the_next_reload_starts_from_what_runs() -> None:
    stage = _Stage(*(_settings(queue__limit="7", server__port="1") for _ in range(2)))
    await stage.reloader.reload()
    answer = (await stage.reloader.reload()).document()
    assert (answer["changed"], _keys(answer["needs_restart"])) == ([], ["server.port"])


@pytest.mark.parametrize("stage", [_Stage(), _Stage(_settings(queue__limit="7"), refuses="models: no such GPU")])
async def test_a_configuration_that_cannot_be_used_changes_nothing(stage: _Stage) -> None:
    with pytest.raises(BadRequest, match=r"nothing was changed: (queue.limit: no number|models: no such GPU)"):
        await stage.reloader.answer()
    assert stage.applied == []


async def test_a_blank_file_is_taken_for_one_being_written_if_it_would_change_anything() -> None:
    stage = _Stage(_settings(), _settings(queue__limit="7"), _settings(), _settings())
    stage.is_blank = True
    assert (await stage.reloader.answer())["changed"] == []
    stage.is_blank = False
    await stage.reloader.reload()
    stage.is_blank = True
    with pytest.raises(BadRequest, match=r"nothing was changed: llamayard\.yaml: is empty"):
        await stage.reloader.answer()
    assert stage.applied[-1].queue.limit == 7
    stage.is_blank = False
    assert [row["key"] for row in (await stage.reloader.answer())["changed"]] == ["queue.limit"]


async def test_warnings_are_passed_on() -> None:
    stage = _Stage(_settings(), warns=("a warning",))
    assert (await stage.reloader.answer())["warnings"] == ["a warning"]


async def test_a_signal_survives_a_configuration_that_cannot_be_used() -> None:
    stage = _Stage()
    await stage.reloader.reload_on_signal()
    assert stage.applied == []


async def test_values_that_may_be_secrets_are_not_shown() -> None:
    stage = _Stage(_settings(ollama__env={"HTTPS_PROXY": "http://me:secret@proxy"}))
    answer = (await stage.reloader.reload()).document()
    assert answer["needs_restart"] == [{"key": "ollama.env"}]


def test_every_key_either_changes_live_or_keeps_its_value() -> None:
    running, wanted = _settings(), _settings(placement__vram_margin_bytes="1", log__level="debug")
    effective = with_live_keys(running, wanted)
    assert [change.key for change in changes(running, effective)] == ["placement.vram_margin_bytes"]
    assert [change.key for change in changes(effective, wanted)] == ["log.level"]


def test_rules_of_models_with_an_engine_wait_for_a_restart() -> None:
    def settings(gpus: str, priority: int) -> Settings:
        models = {"fast": {"engine": "e", "memory_bytes_per_gpu": 1, "gpus": gpus}, "other": {"priority": priority}}
        return load_settings(None, HOME, {"engines": {"e": {"kind": "vllm"}}, "models": models})

    running, wanted = settings("0", 1), settings("1", 2)
    effective = with_live_keys(running, wanted)
    assert effective.models == {"fast": running.models["fast"], "other": wanted.models["other"]}
    assert [change.key for change in changes(effective, wanted)] == ["models"]
