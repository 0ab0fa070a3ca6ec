"""Every configuration key, once: its type, unit, bounds, default and why it is there.

YAML file < environment (`LLAMAYARD_SERVER__PORT`) < flags. Unknown keys are refused with the nearest right name.
Nothing else in the package reads the environment, and nothing here decides what a value means for a request.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from router.config_tree import (
    ConfigError,
    Layer,
    Tree,
    environment_layer,
    file_layer,
    flag_layer,
    merge,
    origin_of,
    unknown_keys,
)
from router.config_values import keep_alive_seconds, listed, parse_bytes, problem_text, scalars_as_text

__all__ = ["ConfigError", "Settings", "find_config", "load_layers", "load_settings", "process_environment"]

ENVIRONMENT_PREFIX = "LLAMAYARD_"
NOT_SETTINGS = frozenset(
    f"{ENVIRONMENT_PREFIX}{name}"
    for name in ("INSTANCE", "STATE", "RIG_DIR", "RIG_VERSION", "RIG_SPEED", "TEST_OLLAMA")
)
"""Variables that the router sets for its children, those of the emulated rig, and the tests' own."""

RESERVED_VARIABLES = {
    "OLLAMA_HOST": "the router gives each instance a port of its own",
    "OLLAMA_MODELS": "use ollama.models",
    "OLLAMA_KEEP_ALIVE": "use ollama.keep_alive",
    "OLLAMA_NO_CLOUD": "use ollama.cloud",
    "OLLAMA_NOPRUNE": "pruning by one instance would break a download by another",
    "CUDA_VISIBLE_DEVICES": "use instances with gpus",
    "CUDA_DEVICE_ORDER": "cards are named by UUID, which needs no order",
}
"""Variables of a server on which the router's own books stand."""

LOCAL_ORIGINS = (
    *(f"{scheme}://{host}{port}" for host in ("localhost", "127.0.0.1", "0.0.0.0")
      for port in ("", ":*") for scheme in ("http", "https")),
    "app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*",
)  # fmt: skip
"""Origins that Ollama itself lets in (`envconfig.AllowedOrigins`, v0.24)."""

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]
PollSeconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
KeepAlive = Annotated[float, BeforeValidator(keep_alive_seconds), Field(allow_inf_nan=False)]
Words = Annotated[tuple[str, ...], BeforeValidator(listed)]
Variables = Annotated[dict[str, str], BeforeValidator(scalars_as_text)]
KvCacheType = Literal["f16", "q8_0", "q4_0"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    """The endpoint that clients use."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; this machine only, because Ollama's API has no authentication.",
    )
    port: int = Field(
        default=11434, ge=0, le=65535, description="Port to listen on; Ollama's own, so that clients need no change."
    )
    cors_origins: Words = Field(
        default=LOCAL_ORIGINS,
        description="Browser origins that may call the API, `*` as wildcard; by default those that Ollama lets in.",
    )
    allowed_hosts: Words = Field(
        default=(),
        description="Further names that a Host header may carry on a loopback listener, "
        "where foreign names are refused against DNS rebinding.",
    )
    max_body_bytes: Bytes = Field(
        default=256 * 1024**2,
        description="Largest request body that is held in memory, images included; uploads of weights are streamed.",
    )
    drain_timeout_seconds: Seconds = Field(
        default=30.0, description="How long running streams may finish after SIGTERM before they are cut."
    )
    debug_headers: bool = Field(
        default=False,
        description="Tells in every response's headers which instance served it and why, "
        "which a request can otherwise ask for.",
    )


class OllamaSettings(_Section):
    """The servers that the router runs."""

    binary: str = Field(
        default="ollama", min_length=1, description="The ollama executable: a name on PATH, or a path to pin a version."
    )
    models: Path = Field(
        default=Path("~/.ollama/models"),
        description="The store of models that all instances share, so that each model is downloaded once.",
    )
    num_parallel: int = Field(
        default=2, ge=1, le=1024, description="Requests that a loaded model serves at once; each costs a context of KV."
    )
    context_length: int = Field(
        default=8192,
        ge=4,
        le=2**24,
        description="Tokens of context a request; set, because a server over several cards would else take 131,072.",
    )
    flash_attention: bool | None = Field(
        default=None, description="Flash attention on or off; unset, the server chooses by model and card."
    )
    kv_cache_type: KvCacheType = Field(
        default="f16",
        description="Type of the KV cache; q8_0 halves it and needs flash_attention: true to take effect.",
    )
    keep_alive: KeepAlive = Field(
        default=-1.0,
        description="How long an idle model stays loaded, in seconds or as 5m; "
        "negative: until its room is wanted, which costs nothing.",
    )
    spread: Literal["auto", "even", "fill_first", "off"] = Field(
        default="auto",
        description="How the instance over all cards splits a model: auto is even on equal cards, "
        "fill_first (fastest card first) on unequal ones; off runs none.",
    )
    cloud: bool = Field(
        default=False, description="Lets instances reach ollama.com for cloud models; off, nothing leaves the machine."
    )
    load_timeout_seconds: Seconds = Field(
        default=600.0, description="Longest time that one load may take; a 70B from a slow disk needs minutes."
    )
    start_timeout_seconds: Seconds = Field(
        default=60.0, description="Longest time until an instance answers and reports its cards, which can take 30 s."
    )
    env: Variables = Field(
        default_factory=dict, description="Variables that every instance is given as they are, such as OLLAMA_DEBUG."
    )
    instance_env: dict[str, Variables] = Field(
        default_factory=dict, description="Variables for one instance by its name (gpu0, spread, …); they win over env."
    )

    @model_validator(mode="after")
    def _variables_leave_the_books_true(self) -> Self:
        refuse_reserved(self.env, "env")
        for name, variables in self.instance_env.items():
            refuse_reserved(variables, f"instance_env.{name}")
        return self

    @model_validator(mode="after")
    def _a_small_cache_has_flash_attention(self) -> Self:
        if self.kv_cache_type != "f16" and not self.flash_attention and "OLLAMA_FLASH_ATTENTION" not in self.env:
            raise ValueError(
                f"kv_cache_type {self.kv_cache_type} is ignored by Ollama without flash attention: "
                "set ollama.flash_attention: true as well"
            )
        return self


class InstanceSettings(_Section):
    """One instance declared by hand: attached where it has a url, else spawned. What is unset is as in `ollama`."""

    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$",
        description="Its name in logs, metrics and instance_env; a spawned one must have one.",
    )
    url: str | None = Field(
        default=None,
        pattern=r"^https?://[^/\s]+$",
        description="A server that something else runs, without a path; it is used, never started or stopped.",
    )
    gpus: Words = Field(
        default=(), description="Its cards by UUID or index, in order of preference; none: it runs on the CPU."
    )
    num_parallel: int | None = Field(
        default=None, ge=1, le=1024, description="Its slots a model; of an attached server, what it was started with."
    )
    context_length: int | None = Field(default=None, ge=4, le=2**24, description="Its tokens of context a request.")
    flash_attention: bool | None = Field(default=None, description="Its flash attention.")
    kv_cache_type: KvCacheType | None = Field(default=None, description="Its type of KV cache.")
    env: Variables = Field(default_factory=dict, description="Variables that it is given as they are; spawned only.")

    @model_validator(mode="after")
    def _is_spawned_or_attached(self) -> Self:
        if self.url is None and self.name is None:
            raise ValueError("give it a name (the router starts it) or a url (something else runs it)")
        if self.url is not None and self.env:
            raise ValueError("env has no effect on an attached server: set it where that server is started")
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError("gpus names a card twice")
        refuse_reserved(self.env, "env")
        return self


class PlacementSettings(_Section):
    """Where models go."""

    vram_margin_bytes: Bytes = Field(
        default=512 * 1024**2,
        description="Kept free on each card beside what models are estimated to take, for what no estimate sees.",
    )


class QueueSettings(_Section):
    """Requests that wait for a slot or a load."""

    limit: int = Field(
        default=512, ge=0, le=1_000_000, description="Most requests that may wait; the next is told 503 to come back."
    )
    timeout_seconds: Seconds = Field(
        default=300.0, description="Longest wait for a slot or a load; then 504, because nothing waits for ever."
    )


class StreamSettings(_Section):
    """Deadlines on a running answer: a hung runner gives neither an answer nor an error."""

    first_byte_timeout_seconds: Seconds = Field(
        default=600.0, description="Longest silence before an answer's first byte; long prompts are silent for minutes."
    )
    idle_timeout_seconds: Seconds = Field(
        default=300.0, description="Longest silence between two pieces of an answer that has begun."
    )


class PollSettings(_Section):
    """How often the outside is looked at."""

    gpu_seconds: PollSeconds = Field(
        default=1.0, description="Between two readings of the cards; a stale one misplaces a model."
    )
    residency_seconds: PollSeconds = Field(
        default=1.0, description="Between two readings of each instance's loaded models."
    )
    catalog_seconds: PollSeconds = Field(default=5.0, description="Between two readings of the store's list of models.")


class LogSettings(_Section):
    """What is written to standard error."""

    format: Literal["auto", "human", "json"] = Field(
        default="auto", description="auto is human on a terminal and JSON otherwise, where machines read it."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is written; debug has each line of each instance."
    )


class Settings(BaseSettings):
    """The whole configuration, frozen. `Settings()` is the defaults: it reads nothing by itself."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    server: ServerSettings = Field(default_factory=ServerSettings)
    ollama: OllamaSettings = Field(default_factory=OllamaSettings)
    instances: tuple[InstanceSettings, ...] = Field(
        default=(), description="Instances by hand, for two or more servers without cards or ones that run already."
    )
    discover: bool | None = Field(
        default=None, description="Makes one instance a card and a spread one; unset: only if none is declared by hand."
    )
    placement: PlacementSettings = Field(default_factory=PlacementSettings)
    queue: QueueSettings = Field(default_factory=QueueSettings)
    stream: StreamSettings = Field(default_factory=StreamSettings)
    poll: PollSettings = Field(default_factory=PollSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    state_directory: Path = Field(
        default=Path("~/.local/state/llamayard"),
        description="Where the router notes its children, to find those that a killed router left; "
        "under $XDG_STATE_HOME where that is set.",
    )
    rig: str | None = Field(
        default=None,
        min_length=1,
        description="EMULATED cards and servers instead of real ones (2x3090, 4090+3090, h100, a file).",
    )

    @property
    def discovers(self) -> bool:
        """Whether instances are made from the cards that are found."""
        return self.discover if self.discover is not None else not self.instances

    @model_validator(mode="after")
    def _there_are_instances(self) -> Self:
        if not self.discovers and not self.instances:
            raise ValueError("discover is false and instances is empty: declare an instance or set discover: true")
        for what in ("name", "url"):
            given = [value for instance in self.instances if (value := getattr(instance, what)) is not None]
            twice = next((value for at, value in enumerate(given) if value in given[:at]), None)
            if twice is not None:
                raise ValueError(f"two instances have the {what} {twice!r}: give each its own")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load_settings` merged: the library's own sources ignore unknown variables and name no origin."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def refuse_reserved(variables: Mapping[str, str], where: str) -> None:
    """ValueError for a variable that the router sets itself."""
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise ValueError(f"{where}: {name} cannot be set here: {RESERVED_VARIABLES[name]}")


def find_config(given: Path | None, directory: Path) -> Path | None:
    """The file given, else `llamayard.yaml` in the directory, else `/etc/llamayard/config.yaml`, else none."""
    usual = (directory / "llamayard.yaml", Path("/etc/llamayard/config.yaml"))
    return given or next((path for path in usual if path.is_file()), None)


def load_layers(
    config: Path | None, environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Layer:
    """File, environment and flags as one tree with the origin of each key; ConfigError where one cannot be read."""
    layers = [
        file_layer(config) if config is not None else Layer(),
        environment_layer(environment, ENVIRONMENT_PREFIX, NOT_SETTINGS),
        flag_layer(overrides or {}),
    ]
    return merge(layers)


def load_settings(
    config: Path | None, environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Settings:
    """Reads and checks the whole configuration.

    `overrides` are flags by dotted key (`server.port`); a None there counts as not given.

    Raises:
        ConfigError: one sentence for each problem, naming the key, the value, where it was given and what would do.
    """
    merged = load_layers(config, environment, overrides)
    problems = list(unknown_keys(merged.tree, Settings))
    try:
        settings = Settings(**_with_home_paths(merged.tree, environment))
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] != "extra_forbidden":
                dotted = ".".join(str(part) for part in detail["loc"])
                problems.append(problem_text(dotted, detail, origin_of(dotted, merged.origins)))
        raise ConfigError(problems) from error
    if problems:
        raise ConfigError(problems)
    return settings


def process_environment() -> dict[str, str]:
    """The environment of this process: what children inherit and where `LLAMAYARD_*` keys come from."""
    return dict(os.environ)  # noqa: TID251 - the one place


def _with_home_paths(tree: Tree, environment: Mapping[str, str]) -> dict[str, Any]:
    """The tree with `~` resolved by the given environment, so that nothing later asks the process for its home."""
    home = environment.get("HOME") or str(Path.home())
    state_home = environment.get("XDG_STATE_HOME") or f"{home}/.local/state"
    result: dict[str, Any] = {"state_directory": f"{state_home}/llamayard", **tree}
    result["state_directory"] = _expanded(result["state_directory"], home)
    ollama = result.get("ollama", {})
    if isinstance(ollama, Mapping):
        defaults: dict[str, Any] = {"models": "~/.ollama/models", **ollama}
        result["ollama"] = {
            key: _expanded(value, home) if key in ("models", "binary") else value for key, value in defaults.items()
        }
    return result


def _expanded(value: object, home: str) -> object:
    return home + value[1:] if isinstance(value, str) and (value == "~" or value.startswith("~/")) else value
