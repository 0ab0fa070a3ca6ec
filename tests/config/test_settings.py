"""Where values come from, which take precedence, and how wrong ones are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from router.config.instance_options import tuning
from router.config.keys import RENAMED_KEYS, dotted_keys
from router.config.parsing import bytes_text, parse_bytes
from router.config.problems import environment_variable
from router.config.settings import RESERVED_VARIABLES, ConfigError, Settings, find_config, load_settings

HOME = {"HOME": "/home/someone"}


def problems_of(
    config: Path | None = None, environment: dict[str, str] | None = None, overrides: dict[str, Any] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(config, environment or {}, overrides)
    return caught.value.problems


def written(folder: Path, tree: object) -> Path:
    path = folder / "llamayard.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_the_fixed_keys_have_their_fixed_defaults() -> None:
    settings = load_settings(None, HOME)
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 11434)
    assert (settings.ollama.binary, str(settings.ollama.models)) == ("ollama", "/home/someone/.ollama/models")
    assert (settings.ollama.num_parallel, settings.ollama.context_length) == (2, 8192)
    assert (settings.ollama.env, settings.instances, settings.discover) == ({}, (), None)
    assert settings.ollama.keep_alive == -1
    assert settings.placement.vram_margin_bytes == 512 * 1024**2


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    config = written(tmp_path, {"server": {"host": "file", "port": 1}, "queue": {"limit": 1, "timeout_seconds": 1}})
    environment = {"LLAMAYARD_SERVER__PORT": "2", "LLAMAYARD_QUEUE__LIMIT": "2"}
    settings = load_settings(config, environment, {"queue.limit": "3", "server.host": None})
    assert (settings.server.host, settings.server.port) == ("file", 2)
    assert (settings.queue.limit, settings.queue.timeout_seconds) == (3, 1)


def test_one_entry_of_a_mapping_is_merged_with_the_file_and_keeps_its_case(tmp_path: Path) -> None:
    config = written(tmp_path, {"ollama": {"env": {"OLLAMA_DEBUG": 1, "A": "x"}}})
    settings = load_settings(config, {"LLAMAYARD_OLLAMA__ENV__OLLAMA_NEW_ENGINE": "1", "LLAMAYARD_OLLAMA__ENV__A": "y"})
    assert settings.ollama.env == {"OLLAMA_DEBUG": "1", "A": "y", "OLLAMA_NEW_ENGINE": "1"}


def test_instances_can_be_given_in_the_environment() -> None:
    settings = load_settings(None, {"LLAMAYARD_INSTANCES": "[{name: a, gpus: [0, GPU-1]}, {url: 'http://h:1'}]"})
    first, second = settings.instances
    assert (first.name, first.gpus, first.url) == ("a", ("0", "GPU-1"), None)
    assert (second.name, second.gpus, second.url) == (None, (), "http://h:1")


@pytest.mark.parametrize(
    ("discover", "instances", "expected"),
    [(None, [], True), (None, [{"name": "a"}], False), (True, [{"name": "a"}], True), (True, [], True)],
)
def test_declared_instances_turn_off_discovery_unless_it_is_set(
    discover: bool | None, instances: list[Any], expected: bool
) -> None:
    assert Settings(discover=discover, instances=instances).discovers is expected  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        ({"server.prot": "1"}, "server.prot: unknown key; did you mean `server.port`?"),
        ({"port": "1"}, "port: unknown key; did you mean `server.port`?"),
        ({"ollama.OLLAMA_HOST": "x"}, "ollama.OLLAMA_HOST: unknown key;"),
        ({"instances": [{"name": "a", "gpu": []}]}, "instances.0.gpu: unknown key; did you mean `instances.0.gpus`?"),
        (
            {"models": {"a:1b": {"option": "pass"}}},
            "models.a:1b.option: unknown key; did you mean `models.a:1b.options`?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(overrides: dict[str, Any], reported: str) -> None:
    (problem,) = problems_of(overrides=overrides)
    assert problem.startswith(reported)


def test_an_unknown_variable_is_refused_too() -> None:
    (problem,) = problems_of(environment={"LLAMAYARD_OLAMA__BINARY": "x", "PATH": "/bin"})
    assert problem == "olama: unknown key; did you mean `ollama`?"


RENAMED = list(RENAMED_KEYS.items())


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_a_renamed_key_of_a_file_is_refused_with_its_new_name(old: str, new: str, tmp_path: Path) -> None:
    section, _, name = old.partition(".")
    config = written(tmp_path, {section: {name: 1}})
    (problem,) = problems_of(config)
    assert problem == f"{old} ({config}): renamed; use `{new}` (environment: {environment_variable(new)})"


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_a_renamed_variable_is_refused_with_its_new_name(old: str, new: str) -> None:
    (problem,) = problems_of(environment={environment_variable(old): "1"})
    assert problem.startswith(f"{old} (environment {environment_variable(old)}): renamed; use `{new}`")
    assert environment_variable(new) in problem


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_a_renamed_flag_is_refused_with_its_new_name(old: str, new: str) -> None:
    (problem,) = problems_of(overrides={old: "1"})
    assert problem.startswith(f"{old} (flag): renamed; use `{new}`")


def test_the_new_names_of_renamed_keys_exist_and_the_old_ones_do_not() -> None:
    keys = set(dotted_keys(Settings))
    assert set(RENAMED_KEYS.values()) <= keys
    assert not keys & set(RENAMED_KEYS)


@pytest.mark.parametrize(
    ("environment", "reported"),
    [
        ({"SERVER__PORT": "1", "SERVER__PORT__X": "1"}, "SERVER__PORT__X: server.port is already given as a whole"),
        ({"OLLAMA__ENV": "null", "OLLAMA__ENV__A": "1"}, "OLLAMA__ENV: unsets ollama.env, but parts of it"),
        ({"RIG__X": "1"}, "rig: {'x': '1'} (environment LLAMAYARD_RIG__X) cannot be used"),
        ({"SERVER__ALLOWED_HOSTS": "[a"}, "SERVER__ALLOWED_HOSTS: is not a YAML list or mapping"),
    ],
)
def test_no_variable_is_ignored_silently(environment: dict[str, str], reported: str) -> None:
    (problem,) = problems_of(environment={f"LLAMAYARD_{name}": value for name, value in environment.items()})
    assert reported in problem


def test_a_whole_section_and_single_keys_of_it_join_in_the_environment() -> None:
    environment = {"LLAMAYARD_QUEUE": "{limit: 3, timeout_seconds: 4}", "LLAMAYARD_QUEUE__LIMIT": "5"}
    queue = load_settings(None, {**HOME, **environment}).queue
    assert (queue.limit, queue.timeout_seconds) == (5, 4)


def test_variables_for_child_processes_are_no_settings() -> None:
    assert load_settings(None, {**HOME, "LLAMAYARD_INSTANCE": "gpu0"}) == load_settings(None, HOME)


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        ({"server.port": "99999"}, ["server.port", "'99999'", "flag", "65535"]),
        ({"queue.limit": -1}, ["queue.limit", "-1", "0"]),
        ({"poll.gpu_seconds": ".nan"}, ["poll.gpu_seconds", "number"]),
        ({"stream.idle_timeout_seconds": float("inf")}, ["stream.idle_timeout_seconds", "inf", "number"]),
        ({"placement.vram_margin_bytes": "many"}, ["placement.vram_margin_bytes", "'many'", "512MiB"]),
        ({"ollama.kv_cache_type": "q5"}, ["ollama.kv_cache_type", "'q5'", "q8_0"]),
        ({"ollama.keep_alive": "soon"}, ["ollama.keep_alive", "'soon'", "5m"]),
        ({"ollama.spread": "wide"}, ["ollama.spread", "'wide'", "fill_first"]),
        ({"server": "x"}, ["server", "'x'", "mapping"]),
        ({"discover": "false"}, ["instances", "discover"]),
        ({"instances": [{"url": "http://h/api"}]}, ["instances.0.url", "http://h/api", "without a path"]),
        ({"instances": [{"url": "http://h:99999"}]}, ["instances.0.url", "http://h:99999", "host and port"]),
        ({"instances": [{"gpus": []}]}, ["instances.0", "name", "url"]),
        ({"instances": [{"name": "a", "gpus": ["0", "0"]}]}, ["instances.0", "twice"]),
        ({"instances": [{"name": "a"}, {"name": "a"}]}, ["two instances", "'a'"]),
        ({"instances": [{"url": "http://h:1", "env": {"A": "b"}}]}, ["instances.0", "env", "attached"]),
        ({"ollama.kv_cache_type": "q8_0"}, ["kv_cache_type", "flash_attention: true"]),
        ({"models": {"a": {"options": "keep"}}}, ["models.a.options", "'keep'", "pass"]),
        ({"models": {"a": {"gpus": 0}}}, ["models.a.gpus", "0", "a list"]),
        ({"models": {"a b": {}}}, ["models: invalid model name", "a b", "ollama list"]),
        ({"aliases": {"a": "b c"}}, ["aliases: invalid model name", "b c"]),
        ({"fallbacks": {"a": {"to": ["b c"]}}}, ["fallbacks: invalid model name", "b c"]),
        ({"aliases": {"gpt-4o": "big", "GPT-4": "gpt-4o:latest"}}, ["aliases", "GPT-4", "another alias"]),
        ({"fallbacks": {"a": {"to": []}}}, ["fallbacks.a.to", "1 or more entries"]),
        ({"fallbacks": {"a": {"to": ["b"], "reasons": ["slow"]}}}, ["fallbacks.a.reasons", "queue_full"]),
    ],
)
def test_a_wrong_value_is_reported_with_its_key_and_what_would_be_right(
    overrides: dict[str, Any], reported: list[str]
) -> None:
    (problem,) = problems_of(overrides=overrides)
    assert not [part for part in reported if part not in problem], problem


@pytest.mark.parametrize("key", ["server", "server.port", "queue.limit", "models", "instances", "ollama.env", "rig"])
def test_null_unsets_a_key_or_a_section(key: str, tmp_path: Path) -> None:
    tree = {"server": {"port": 5}, "queue": {"limit": 5}, "models": {"a": {}}, "instances": [{"name": "a"}]}
    config = written(tmp_path, {**tree, "ollama": {"env": {"A": "b"}}, "rig": "h100"})
    before, unset = load_settings(config, HOME), load_settings(config, HOME, {key: "null"})
    section, _, own = key.partition(".")

    def value_in(settings: Settings) -> object:
        return getattr(getattr(settings, section), own) if own else getattr(settings, section)

    assert value_in(unset) == value_in(load_settings(None, HOME)) != value_in(before)


def test_a_section_with_all_keys_commented_out_is_empty(tmp_path: Path) -> None:
    config = written(tmp_path, "server:\n  # port: 1\nmodels:\nstream: {heartbeat_seconds: null}\n")
    settings = load_settings(config, HOME)
    assert (settings.server, settings.models) == (load_settings(None, HOME).server, {})
    assert settings.stream.heartbeat_seconds is None  # null is a value of this key


def test_all_problems_are_reported_at_once() -> None:
    environment = {"LLAMAYARD_SERVER__PORT": "x", "LLAMAYARD_QUEU__LIMIT": "1"}
    reported = problems_of(environment=environment, overrides={"log.level": "loud"})
    assert [problem.partition(":")[0] for problem in reported] == ["queu", "server.port", "log.level"]
    assert "environment LLAMAYARD_SERVER__PORT" in reported[1]


@pytest.mark.parametrize("name", sorted(RESERVED_VARIABLES))
@pytest.mark.parametrize("key", ["ollama.env", "ollama.instance_env"])
def test_a_variable_that_the_router_sets_itself_is_refused(name: str, key: str) -> None:
    value: dict[str, Any] = {name: "x"} if key == "ollama.env" else {"gpu0": {name: "x"}}
    (problem,) = problems_of(overrides={key: value})
    assert f"{name} cannot be set here" in problem


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("server: {port: 1", "not valid YAML"),
        ("- a\n", "must be a mapping"),
        ("queue: {limit: 1, limit: 2}", "'limit' is given twice"),
        ("a: &a [*a]\nb: !!python/name:os.system", "not valid YAML"),
        ("rig: !!int x", "line 1, column 6: not a value of"),
        ("rig: !!timestamp x", "line 1, column 6: not a value of"),
        ('state_directory: "a\\0b"', "line 1, column 18: a text with a NUL character"),
    ],
)
def test_an_unusable_file_is_reported_with_its_path(tmp_path: Path, text: str, reported: str) -> None:
    config = written(tmp_path, text)
    (problem,) = problems_of(config)
    assert problem.startswith(str(config))
    assert reported in problem


def test_a_missing_file_and_one_that_is_not_text_are_reported(tmp_path: Path) -> None:
    assert "No such file" in problems_of(tmp_path / "none.yaml")[0]
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problems_of(tmp_path / "bytes.yaml")[0]


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, ""), HOME) == load_settings(None, HOME)


def test_the_state_directory_is_in_the_users_state_directory() -> None:
    assert str(load_settings(None, HOME).state_directory) == "/home/someone/.local/state/llamayard"
    assert str(load_settings(None, {**HOME, "XDG_STATE_HOME": "/s"}).state_directory) == "/s/llamayard"
    assert str(load_settings(None, {**HOME, "XDG_STATE_HOME": "/s"}, {"state_directory": "~/x"}).state_directory) == (
        "/home/someone/x"
    )


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.rig = "h100"


def test_the_given_file_takes_precedence_over_the_default_ones(tmp_path: Path) -> None:
    default = written(tmp_path, "")
    assert find_config(None, tmp_path) == default
    assert find_config(tmp_path / "other.yaml", tmp_path) == tmp_path / "other.yaml"
    assert find_config(None, tmp_path / "nowhere") in (None, Path("/etc/llamayard/config.yaml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MiB", 512 * 1024**2), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("100", 100), ("7k", 7000), (12, 12)],
)
def test_bytes_may_have_a_unit(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected


@given(st.integers(min_value=0, max_value=2**50))
def test_formatted_bytes_parse_to_the_same_value(value: int) -> None:
    assert parse_bytes(bytes_text(value)) == value


@pytest.mark.parametrize(
    ("text", "expected"), [("5m", 300), ("-1", -1), ("-5m", -1), (0, 0), (90, 90), ("1h30m", 5400)]
)
def test_keep_alive_is_read_as_ollama_reads_it(text: object, expected: float) -> None:
    assert load_settings(None, HOME, {"ollama.keep_alive": text}).ollama.keep_alive == expected


@pytest.mark.parametrize("key", list(dotted_keys(Settings)))
def test_every_key_can_be_set_in_the_environment_to_its_default(key: str) -> None:
    defaults = load_settings(None, HOME)
    value: Any = defaults
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, tuple):
        value = list(value)
    flow = yaml.safe_dump(value, default_flow_style=True) if isinstance(value, list | dict) else str(value)
    text = "null" if value is None else flow
    variable = "LLAMAYARD_" + key.upper().replace(".", "__")
    assert load_settings(None, {**HOME, variable: text}) == defaults


def test_keys_of_an_instance_override_its_variables_which_override_the_keys_for_all() -> None:
    settings = load_settings(
        None,
        HOME,
        {
            "ollama.num_parallel": 1,
            "ollama.context_length": 1000,
            "ollama.env": {"OLLAMA_CONTEXT_LENGTH": "2000", "OLLAMA_FLASH_ATTENTION": "1"},
            "ollama.instance_env": {"gpu0": {"OLLAMA_CONTEXT_LENGTH": "3000", "OLLAMA_KV_CACHE_TYPE": "q8_0"}},
            "instances": [{"name": "a", "num_parallel": 7}, {"url": "http://h:1"}],
        },
    )
    first = tuning(settings, "gpu0")
    assert (first.num_parallel, first.context_length, first.kv_cache_type, first.flash_attention) == (
        1, 3000, "q8_0", True,
    )  # fmt: skip
    by_hand = tuning(settings, "a", settings.instances[0])
    assert (by_hand.num_parallel, by_hand.context_length, by_hand.kv_cache_type) == (7, 2000, "f16")
    assert by_hand.environment == {"OLLAMA_CONTEXT_LENGTH": "2000", "OLLAMA_FLASH_ATTENTION": "1"}
    attached = tuning(settings, "b", settings.instances[1])
    assert (attached.num_parallel, attached.context_length, attached.flash_attention) == (1, 1000, None)
    assert attached.environment == {}


@pytest.mark.parametrize(
    ("variables", "reported"),
    [
        ({"OLLAMA_NUM_PARALLEL": "0"}, "at least 1"),
        ({"OLLAMA_CONTEXT_LENGTH": "8k"}, "whole number"),
        ({"OLLAMA_KV_CACHE_TYPE": "q5"}, "one of f16, q8_0, q4_0"),
        ({"OLLAMA_KV_CACHE_TYPE": "q8_0"}, "flash_attention: true"),
        ({"OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "0"}, "flash_attention: true"),
    ],
)
def test_a_variable_that_ollama_would_ignore_is_refused(variables: dict[str, str], reported: str) -> None:
    settings = load_settings(None, HOME, {"ollama.instance_env": {"gpu1": variables}})
    with pytest.raises(ConfigError, match=reported):
        tuning(settings, "gpu1")
    assert tuning(settings, "gpu0").kv_cache_type == "f16"


@pytest.mark.parametrize("key", [key for key in dotted_keys(Settings) if key.endswith("_seconds")])
def test_every_key_in_seconds_accepts_a_duration_as_keep_alive_does(key: str) -> None:
    section, _, name = key.partition(".")
    for text, seconds in (("90s", 90.0), ("1m30s", 90.0), (" 90 ", 90.0), (90, 90.0)):
        assert getattr(getattr(load_settings(None, HOME, {key: text}), section), name) == seconds


def test_a_wrong_duration_is_reported_with_an_example() -> None:
    (problem,) = problems_of(overrides={"queue.timeout_seconds": "5 minutes"})
    assert problem == (
        "queue.timeout_seconds: '5 minutes' (flag) cannot be used: "
        "write a number of seconds or a duration such as 90s, 5m or 1h30m"
    )
    (problem,) = problems_of(overrides={"queue.timeout_seconds": "-5m"})
    assert problem.endswith("must be a number of more than 0 and at most 604800 seconds")


NUMBERS = ("queue.limit", "queue.timeout_seconds", "server.max_body_bytes", "ollama.keep_alive", "poll.gpu_seconds")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers(key: str, value: bool) -> None:
    (problem,) = problems_of(overrides={key: value})
    assert problem.startswith(f"{key}: {str(value).lower()} (flag) cannot be used: ")


WRONG_VALUES: tuple[object, ...] = (
    "",
    "x",
    "-1",
    "1e99",
    -1,
    1.5,
    1e99,
    float("nan"),
    True,
    [],
    [[1]],
    {},
    {"x": {}},
    {1: 2},
)
PYDANTIC_TEXTS = (
    "Input", "valid integer", "valid number", "valid string", "valid boolean", "unable to", "Field required",
    "String should", "should be", "should have", "pathlib", "unicode string", "[key]", "Value error",
)  # fmt: skip


@pytest.mark.parametrize("key", list(dotted_keys(Settings)))
def test_no_text_of_a_library_reaches_the_user(key: str) -> None:
    for value in WRONG_VALUES:
        try:
            load_settings(None, HOME, {key: value})
        except ConfigError as error:
            for problem in error.problems:
                assert not [text for text in PYDANTIC_TEXTS if text in problem], problem
                assert problem.startswith((key, key.partition(".")[0], "configuration"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"queue.limit": "x"}, "queue.limit: 'x' (flag) cannot be used: must be a whole number from 0 to 1000000"),
        ({"queue.limit": 1.5}, "queue.limit: 1.5 (flag) cannot be used: must be a whole number from 0 to 1000000"),
        (
            {"placement.vram_margin_bytes": -1},
            "placement.vram_margin_bytes: -1 (flag) cannot be used: must be a whole number of at least 0 bytes",
        ),
        ({"server.debug_headers": "x"}, "server.debug_headers: 'x' (flag) cannot be used: must be true or false"),
        ({"server.host": ""}, "server.host: '' (flag) cannot be used: must not be empty"),
        ({"server.host": 3}, 'server.host: 3 (flag) cannot be used: must be text: write "3" in quotes'),
        ({"server.tls_key": 3}, "server.tls_key: 3 (flag) cannot be used: must be a path"),
        ({"models": {1: {}}}, 'models.1: 1 (flag) cannot be used: must be text: write "1" in quotes'),
        ({"fallbacks": {"a": {}}}, "fallbacks.a.to (flag): is missing and has no default"),
        (
            {"models": {"a": {"num_parallel": 0}}},
            "models.a.num_parallel: 0 (flag) cannot be used: must be a whole number from 1 to 1024",
        ),
        ({"ollama.env": {"A": [1]}}, "ollama.env.A: [1] (flag) cannot be used: must be text"),
        (
            {"ollama.env": "[a"},
            "flag ollama.env: is not a YAML list or mapping: '[a': "
            "line 1, column 3: expected ',' or ']', but got 'the end of the text'",
        ),
    ],
)
def test_a_wrong_value_is_explained_in_one_sentence(overrides: dict[str, Any], problem: str) -> None:
    assert problems_of(overrides=overrides) == [problem]


def test_a_file_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    config = written(tmp_path, "a: " + "[" * 3000 + "]" * 3000)
    assert problems_of(config) == [f"{config}: is nested too deeply"]


def test_a_yaml_error_names_the_file_the_line_and_the_column_once(tmp_path: Path) -> None:
    config = written(tmp_path, "queue:\n  limit: [1\n")
    (problem,) = problems_of(config)
    assert (
        problem == f"{config}: is not valid YAML: line 3, column 1: expected ',' or ']', but got 'the end of the text'"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"models": {"llama3": {"gpus": ["0"]}, "library/Llama3:latest": {"gpus": ["1"]}}},
        {"fallbacks": {"llama3": {"to": ["a"]}, "library/Llama3:latest": {"to": ["b"]}}},
        {"aliases": {"llama3": "a", "library/Llama3:latest": "b"}},
    ],
)
def test_two_spellings_of_one_model_with_different_values_are_refused(overrides: dict[str, Any]) -> None:
    (key,) = overrides
    assert problems_of(overrides=overrides) == [
        f"configuration: {key}: 'llama3' and 'library/Llama3:latest' are two spellings of one model with different "
        "values: keep one entry"
    ]
    first, _ = overrides[key].values()
    load_settings(None, HOME, {key: dict.fromkeys(overrides[key], first)})


def test_a_model_is_pinned_to_each_gpu_once() -> None:
    (problem,) = problems_of(overrides={"models": {"a": {"gpus": [0, 0]}}})
    assert problem == "models.a (flag): gpus lists a GPU twice"


@pytest.mark.parametrize(
    ("entry", "reported"),
    [
        ({"kind": "vllm", "models": {"a": "b"}}, "needs the url of a server that runs already"),
        ({"kind": "openai", "url": "http://x:1"}, "needs models"),
        ({"kind": "openai", "url": "http://x:1", "models": {"a": "b"}, "gpus": ["0"]}, "gpus has no effect"),
        ({"url": "http://x:1", "models": {"a": "b"}}, "models is only for servers with OpenAI's API"),
        ({"kind": "openai", "url": "http://x:1", "models": {"a b": "c"}}, "invalid model name"),
    ],
)
def test_servers_with_openais_api_need_an_address_and_names(entry: Any, reported: str, tmp_path: Path) -> None:
    (problem,) = problems_of(written(tmp_path, {"instances": [{"name": "box2", **entry}]}))
    assert reported in problem


def test_a_server_with_openais_api_leaves_discovery_on_and_has_slots_of_its_own(tmp_path: Path) -> None:
    entry = {"name": "box2", "kind": "vllm", "url": "http://x:1", "models": {"a": "b"}}
    settings = load_settings(written(tmp_path, {"instances": [entry]}), HOME)
    assert settings.discovers
    assert tuning(settings, "box2", settings.instances[0]).num_parallel == 32


@pytest.mark.parametrize(
    ("rules", "reported"),
    [
        ({"engine": "other"}, "'other' is not in engines; there are: fast"),
        ({"path": "/x"}, "path is only for models with an engine"),
        ({"engine": "fast", "kv_cache_type": "q8_0"}, "kv_cache_type is Ollama's"),
        ({"engine": "fast", "layout": "spread"}, "needs its gpus"),
    ],
)
def test_models_with_an_engine_are_checked(rules: Any, reported: str, tmp_path: Path) -> None:
    tree = {"engines": {"fast": {"kind": "vllm"}}, "models": {"m": rules}}
    (problem,) = problems_of(written(tmp_path, tree))
    assert reported in problem
