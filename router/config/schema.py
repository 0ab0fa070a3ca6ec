"""The sections of the configuration: each key's type, unit, bounds, default and purpose.

`router/config/settings.py` combines and loads them. Nothing here decides what a value means for a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from router.config.endpoint import DEFAULT_HOST, DEFAULT_PORT, LOCAL_ORIGINS
from router.config.keys import accepts_null, holds_int
from router.config.parsing import (
    BYTES_PATTERN,
    DURATION_PATTERN,
    INSTANCE_NAME_PATTERN,
    LISTEN_PATTERN,
    URL_PATTERN,
    duration_seconds,
    keep_alive_seconds,
    keys_as_text,
    parse_bytes,
    parse_list,
    scalars_as_text,
)

RESERVED_VARIABLES = {
    "OLLAMA_HOST": "the router assigns each instance its port",
    "OLLAMA_MODELS": "use ollama.models",
    "OLLAMA_KEEP_ALIVE": "use ollama.keep_alive",
    "OLLAMA_NO_CLOUD": "use ollama.cloud",
    "OLLAMA_NOPRUNE": "one instance would delete files that another is downloading",
    "CUDA_VISIBLE_DEVICES": "use instances[].gpus",
    "CUDA_DEVICE_ORDER": "GPUs are selected by UUID, so their order does not matter",
}
"""Variables of a server that the router itself sets, and what to use instead."""

_SCALAR_TYPES = ["string", "number", "boolean"]

Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": BYTES_PATTERN}]}),
]
_DURATION_SCHEMA = {"type": "string", "pattern": DURATION_PATTERN}
Seconds = Annotated[
    float,
    BeforeValidator(duration_seconds),
    Field(gt=0, le=7 * 86400, allow_inf_nan=False),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 7 * 86400}, _DURATION_SCHEMA]}),
]
PollSeconds = Annotated[
    float,
    BeforeValidator(duration_seconds),
    Field(gt=0, le=3600, allow_inf_nan=False),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 3600}, _DURATION_SCHEMA]}),
]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
KeepAlive = Annotated[
    float,
    BeforeValidator(keep_alive_seconds),
    Field(allow_inf_nan=False),
    WithJsonSchema({"type": ["number", "string"]}),
]
TextList = Annotated[
    tuple[str, ...],
    BeforeValidator(parse_list),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": ["string", "integer"]}}, {"type": "string"}]}),
]
Variables = Annotated[
    dict[str, str],
    BeforeValidator(scalars_as_text),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": _SCALAR_TYPES}}),
]
KvCacheType = Literal["f16", "q8_0", "q4_0"]
KV_CACHE_TYPES: tuple[str, ...] = get_args(KvCacheType)
Capability = Literal["completion", "tools", "vision", "thinking", "embedding", "insert"]
FallbackReason = Literal["unknown_model", "too_large", "queue_full"]


def without_unset(model: type[BaseModel], data: object) -> object:
    """The input of a model without null values, except where null is a value of the field."""
    if not isinstance(data, Mapping):
        return data
    fields = model.model_fields
    return {
        key: value
        for key, value in cast("Mapping[Any, object]", data).items()
        if value is not None or key not in fields or accepts_null(fields[key].annotation)
    }


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_unsets_a_key(cls, data: Any) -> Any:
        return without_unset(cls, data)

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts True as 1."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and holds_int(field.annotation):
            raise ValueError("must be a number, not true or false")
        return value


class ServerSettings(_Section):
    """The endpoint that clients use."""

    host: str = Field(
        default=DEFAULT_HOST,
        min_length=1,
        description="Address to listen on; by default this machine only. Others need access keys, see allow_anonymous.",
    )
    port: int = Field(
        default=DEFAULT_PORT,
        ge=0,
        le=65535,
        description="Port to listen on; Ollama's default, so that clients need no change.",
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Lets everybody who reaches the port use models without an access key. Without keys it is needed "
        "to listen on other addresses than loopback; where there are keys, management and admin still need one.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="File of the access keys, which `llamayard keys` changes; unset: keys.json in state_directory. If "
        "it exists, requests need a key; changes apply within two seconds.",
    )
    trusted_proxies: TextList = Field(
        default=(),
        description="Addresses and networks of reverse proxies whose X-Forwarded-For and -Host headers are believed.",
    )
    cors_origins: TextList = Field(
        default=LOCAL_ORIGINS,
        description="Browser origins that may call the API, with `*` as wildcard; by default those that Ollama allows.",
    )
    allowed_hosts: TextList = Field(
        default=(),
        description="Additional names accepted in the Host header on a loopback listener; "
        "all others are refused, against DNS rebinding.",
    )
    max_body_bytes: Bytes = Field(
        default=256 * 1024**2,
        description="Largest request body, images included; it is held in memory. Blob uploads are streamed and "
        "not limited.",
    )
    max_connections: int = Field(
        default=8192,
        ge=1,
        le=1_000_000,
        description="Most connections of clients at a time; further ones get 503 and are closed.",
    )
    head_timeout_seconds: Seconds = Field(default=30.0, description="Longest time to receive a request's headers.")
    body_timeout_seconds: Seconds = Field(
        default=60.0, description="Longest pause while receiving a request's body; then the connection is closed."
    )
    body_total_timeout_seconds: Seconds = Field(
        default=3600.0, description="Longest time to receive a whole request body; blob uploads are not limited."
    )
    body_bytes_per_second_min: int = Field(
        default=500,
        ge=1,
        le=1_000_000_000,
        description="Lowest average rate of a request's body, blob uploads included, measured after "
        "body_timeout_seconds; a slower sender is cut off.",
    )
    connection_timeout_seconds: Seconds = Field(
        default=3600.0,
        description="How long an idle client connection stays open; long, because clients reuse old connections.",
    )
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file with the certificate chain; together with tls_key it makes the endpoint https.",
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the certificate's private key.")
    drain_timeout_seconds: Seconds = Field(
        default=30.0, description="How long running responses may continue after SIGTERM before they are cut off."
    )
    list_aliases: bool = Field(
        default=False, description="Includes aliases in the model lists of `/api/tags` and `/v1/models`."
    )
    debug_headers: bool = Field(
        default=False,
        description="Adds headers to every response that say which instance served it and why; "
        "otherwise only if the request asks for them.",
    )

    @model_validator(mode="after")
    def _has_certificate_and_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("set both tls_certificate and tls_key, or neither")
        return self

    @field_validator("trusted_proxies")
    @classmethod
    def _names_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for text in proxies:
            try:
                ip_network(text.strip(), strict=False)
            except ValueError as error:
                raise ValueError(f"{text!r} is no address or network; write 10.0.0.7 or 10.0.0.0/8") from error
        return proxies


class AdminSettings(_Section):
    """Metrics and status: `/metrics` and `/llamayard/...`."""

    listen: str | None = Field(
        default=None,
        pattern=LISTEN_PATTERN,
        description="A listener of their own: HOST:PORT, or unix: and the path of a socket; the endpoint then has them "
        "no longer. On loopback and on a socket they need no access key.",
    )


class ManagementSettings(_Section):
    """What clients may do to the model store."""

    pull: TextList = Field(
        default=("registry.ollama.ai/*", "hf.co/*", "huggingface.co/*"),
        description="Models that may be pulled, by whole name with `*` as wildcard. Servers connect to the registry "
        "that a name names, so a wider list lets clients make them connect to any address.",
    )
    pull_max_bytes: Bytes | None = Field(
        default=None, description="Largest model that may be pulled; a larger one is broken off when its size is known."
    )
    disk_free_min_bytes: Bytes = Field(
        default=1024**3,
        description="Space that pulls and uploads leave free on the disk of the model store; they are refused or "
        "broken off before.",
    )
    push: bool = Field(default=False, description="Allows models to be pushed to a registry.")


class OllamaSettings(_Section):
    """The Ollama servers that the router starts."""

    binary: str = Field(default="ollama", min_length=1, description="The ollama executable: a name on PATH, or a path.")
    models: Path = Field(
        default=Path("~/.ollama/models"),
        description="Model directory that all instances share, so that each model is downloaded once.",
    )
    num_parallel: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="Concurrent requests per loaded model; each needs KV cache for a whole context.",
    )
    context_length: int = Field(
        default=8192,
        ge=4,
        le=2**24,
        description="Context tokens per request. Always set, because a server over several GPUs would otherwise "
        "use 131,072.",
    )
    context_length_max: int | None = Field(
        default=None,
        ge=4,
        le=2**24,
        description="Largest context that a long prompt may raise a model's context to; unset: the trained context. "
        "The value of context_length turns it off.",
    )
    flash_attention: bool | None = Field(
        default=None, description="Flash attention on or off; unset: Ollama chooses by model and GPU."
    )
    kv_cache_type: KvCacheType = Field(
        default="f16",
        description="KV cache type; q8_0 halves its size and requires flash_attention: true.",
    )
    keep_alive: KeepAlive = Field(
        default=-1.0,
        description="How long an idle model stays loaded: seconds or a duration such as 5m; "
        "negative: until its VRAM is needed.",
    )
    spread: Literal["auto", "even", "fill_first", "off"] = Field(
        default="auto",
        description="How the instance over all GPUs places a model: `even` spreads it over all GPUs by their memory, "
        "`fill_first` uses as few as possible, fastest first; `auto` is even on equal GPUs and fill_first on unequal "
        "ones; `off` starts no such instance.",
    )
    cloud: bool = Field(
        default=False,
        description="Allows cloud models, which instances run on ollama.com; off: nothing leaves the machine.",
    )
    load_timeout_seconds: Seconds = Field(
        default=600.0, description="Longest time for one model load; a 70B from a slow disk needs minutes."
    )
    start_timeout_seconds: Seconds = Field(
        default=60.0, description="Longest time for an instance to start and report its GPUs, which can take 30 s."
    )
    adopt: bool = Field(
        default=False,
        description="Servers outlive a router that SIGTERM ended or that was killed, with what they have loaded, and "
        "the next router takes them over if they are configured alike; off: they end with their router. Linux only.",
    )
    adopt_timeout_seconds: Seconds = Field(
        default=60.0, description="How long servers without a router wait for the next one before they end."
    )
    env: Variables = Field(
        default_factory=dict, description="Environment variables for every instance, such as OLLAMA_DEBUG."
    )
    instance_env: dict[str, Variables] = Field(
        default_factory=dict,
        description="Environment variables for one instance by its name (gpu0, spread, …); they override env.",
    )

    @model_validator(mode="after")
    def _sets_no_reserved_variable(self) -> Self:
        refuse_reserved(self.env, "env")
        for name, variables in self.instance_env.items():
            refuse_reserved(variables, f"instance_env.{name}")
        return self

    @model_validator(mode="after")
    def _has_flash_attention_for_kv_cache_type(self) -> Self:
        if self.kv_cache_type != "f16" and not self.flash_attention and "OLLAMA_FLASH_ATTENTION" not in self.env:
            raise ValueError(
                f"kv_cache_type {self.kv_cache_type} is ignored by Ollama without flash attention: "
                "set ollama.flash_attention: true as well"
            )
        return self


class InstanceSettings(_Section):
    """An instance declared by hand: started by the router unless it has a url. Unset keys are as in `ollama`."""

    name: str | None = Field(
        default=None,
        pattern=INSTANCE_NAME_PATTERN,
        description="Its name in logs, metrics and instance_env; required unless url is given.",
    )
    url: str | None = Field(
        default=None,
        pattern=URL_PATTERN,
        description="URL, without a path, of a server that the router uses but does not start or stop.",
    )
    gpus: TextList = Field(
        default=(), description="Its GPUs by UUID or index, in order of preference; empty: it runs on the CPU."
    )
    num_parallel: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Concurrent requests per model; for a server with a url, the value that it was started with.",
    )
    context_length: int | None = Field(default=None, ge=4, le=2**24, description="Context tokens per request.")
    flash_attention: bool | None = Field(default=None, description="Flash attention on or off.")
    kv_cache_type: KvCacheType | None = Field(default=None, description="KV cache type.")
    env: Variables = Field(
        default_factory=dict,
        description="Environment variables; only for instances that the router starts.",
    )
    kind: Literal["ollama", "openai", "vllm", "sglang", "llama-server"] = Field(
        default="ollama",
        description="What runs at the url: Ollama, or a server with OpenAI's API. `openai` is any such one; the others "
        "also take `top_k`, `min_p` and `repeat_penalty`, by their own names.",
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Models of a server with OpenAI's API: the name that clients use, and the server's own name.",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="File with the key that a server with OpenAI's API wants as bearer token; read at the start.",
    )
    capabilities: Annotated[tuple[Capability, ...], BeforeValidator(parse_list)] = Field(
        default=("completion", "tools"),
        description="What the models of a server with OpenAI's API can do, as `/api/show` tells clients.",
    )

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        if self.kind == "ollama":
            for field in ("models", "api_key_file"):
                if getattr(self, field):
                    raise ValueError(f"{field} is only for servers with OpenAI's API: set kind: openai, or remove it")
            return self
        if self.url is None:
            raise ValueError(f"kind {self.kind} needs the url of a server that runs already")
        if not self.models:
            raise ValueError(f"kind {self.kind} needs models: {{NAME: the server's own name}}")
        for field in ("gpus", "flash_attention", "kv_cache_type"):
            if getattr(self, field):
                raise ValueError(f"{field} has no effect on a server with OpenAI's API: set it where that is started")
        return self

    @field_validator("url")
    @classmethod
    def _has_host_and_port(cls, url: str | None) -> str | None:
        try:
            _ = urlsplit(url or "").port
        except ValueError as error:
            raise ValueError(f"has no valid host and port: {error}") from error
        return url

    @model_validator(mode="after")
    def _is_started_or_attached(self) -> Self:
        if self.url is None and self.name is None:
            raise ValueError("set a name (the router starts it) or a url (it already runs)")
        if self.url is not None and self.env:
            raise ValueError("env has no effect on an attached server: set the variables where that server is started")
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError("gpus lists a GPU twice")
        refuse_reserved(self.env, "env")
        return self


class EngineSettings(_Section):
    """A server that the router starts for single models, in place of Ollama."""

    kind: Literal["llama-server", "vllm", "sglang"] = Field(description="What the server is.")
    command: TextList = Field(
        default=(),
        description="Program and arguments. {path}, {name}, {port}, {gpus} (how many), {share} (of each GPU's memory), "
        "{context}, {slots} and {context_total} are replaced; unset: those usual for the kind.",
    )
    start_timeout_seconds: Seconds = Field(
        default=900.0, description="Longest time for a start, until the server has answered a request."
    )
    env: Variables = Field(default_factory=dict, description="Environment variables of the server.")

    @model_validator(mode="after")
    def _sets_no_reserved_variable(self) -> Self:
        refuse_reserved(self.env, "env")
        return self


class ModelSettings(_Section):
    """Rules for one model, by its name in any form that Ollama accepts."""

    options: Literal["protect", "pass"] = Field(
        default="protect",
        description="What a request's options may change: `protect` serves it from the loaded replica if its "
        "context is large enough; `pass` forwards all options, and every new value reloads the model.",
    )
    gpus: TextList = Field(
        default=(), description="Its GPUs by UUID or index, exactly these; empty: the router chooses."
    )
    layout: Literal["auto", "spread", "cpu"] = Field(
        default="auto",
        description="`auto`: the smallest set of GPUs that holds it; `spread`: several GPUs even if one is "
        "enough; `cpu`: no GPU.",
    )
    context_length: int | None = Field(
        default=None,
        ge=4,
        le=2**24,
        description="Context tokens per request, whatever the request asks for.",
    )
    num_parallel: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Concurrent requests; it then gets its own instance.",
    )
    kv_cache_type: KvCacheType | None = Field(default=None, description="KV cache type; it then gets its own instance.")
    priority: int = Field(
        default=0, ge=-100, le=100, description="Its requests are served before those of models with lower priority."
    )
    replicas_max: int | None = Field(default=None, ge=1, le=64, description="Most replicas of it at the same time.")
    keep_warm: bool = Field(
        default=False,
        description="Loaded at startup, reloaded if it is lost, and never evicted for other models.",
    )
    engine: str | None = Field(
        default=None,
        description="Name of an entry of `engines`: the model gets a server of that engine instead of Ollama.",
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="With engine: its weights, a file or folder, or what the engine takes for them; unset: the GGUF "
        "file of the model in Ollama's store.",
    )
    memory_bytes_per_gpu: Bytes | None = Field(
        default=None,
        description="With engine: VRAM that its server takes on each GPU; unset: estimated from its GGUF file.",
    )
    flags: TextList = Field(default=(), description="With engine: further arguments of its server.")
    capabilities: Annotated[tuple[Capability, ...], BeforeValidator(parse_list)] = Field(
        default=("completion", "tools"),
        description="With engine: what the model can do, as `/api/show` tells clients.",
    )

    @model_validator(mode="after")
    def _has_an_engine_for_its_keys(self) -> Self:
        if self.engine is None:
            for field in ("path", "memory_bytes_per_gpu", "flags"):
                if getattr(self, field):
                    raise ValueError(f"{field} is only for models with an engine: set engine, or remove it")
            return self
        for field in ("kv_cache_type",):
            if getattr(self, field):
                raise ValueError(f"{field} is Ollama's: give the engine's own argument in flags")
        if self.layout == "spread" and not self.gpus:
            raise ValueError("layout: spread of a model with an engine needs its gpus")
        return self

    @model_validator(mode="after")
    def _names_each_gpu_once(self) -> Self:
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError("gpus lists a GPU twice")
        return self


class FallbackSettings(_Section):
    """Which models answer in place of another one, and when. The response headers name the model that answered."""

    to: TextList = Field(min_length=1, description="Models to try instead, in this order.")
    reasons: Annotated[tuple[FallbackReason, ...], BeforeValidator(parse_list)] = Field(
        default=("unknown_model", "too_large", "queue_full"),
        description="When to use them: the model is not installed, it fits on no GPU, or the queue is full.",
    )


class PlacementSettings(_Section):
    """On which GPUs models are loaded."""

    vram_margin_bytes: Bytes = Field(
        default=512 * 1024**2,
        description="VRAM kept free on each GPU beyond the estimates, for memory that no estimate covers.",
    )
    on_demand: bool = Field(
        default=True,
        description="Starts additional instances over any set of GPUs, one model each, and stops them when idle; "
        "off: only the instances started at startup are used.",
    )
    instance_idle_seconds: Seconds = Field(
        default=120.0, description="How long an on-demand instance without a model keeps running."
    )
    exclusive_gpus: Annotated[dict[str, TextList], BeforeValidator(keys_as_text)] = Field(
        default_factory=dict, description="GPUs by UUID or index, each with the only models that may use it."
    )
    ttft_target_seconds: Seconds = Field(
        default=10.0, description="Target for the time to first token; loads and evictions are chosen to meet it."
    )
    starving_after_seconds: Seconds = Field(
        default=75.0,
        description="After this wait a request's model is loaded whatever it costs other requests; for a model that "
        "needs several GPUs, after three quarters of it.",
    )
    concurrent_loads_max: int = Field(
        default=4,
        ge=1,
        le=64,
        description="Model loads in progress at the same time; more would only compete for disk and PCIe.",
    )
    cpu: Literal["never", "overflow"] = Field(
        default="never",
        description="overflow: a model that fits on one GPU is also loaded on the CPU while host memory is free, and "
        "serves there, at reading speed or faster, a request for which the GPUs would be later than "
        "`ttft_target_seconds` and the CPU would not. Its speed is measured first. Turning it on needs a restart.",
    )
    cpu_memory_margin_bytes: Bytes = Field(
        default=4 * 1024**3,
        description="With `cpu: overflow`: host memory that stays free, besides what the files of the requested models "
        "need in the page cache.",
    )
    rest: Literal["off", "auto"] = Field(
        default="off",
        description="auto: while nothing is requested, a model whose load takes longer than `ttft_target_seconds` is "
        "loaded in place of idle smaller ones, if it is requested often; the load gives way to any request.",
    )
    rest_bytes_per_hour: Bytes = Field(
        default=1000 * 10**9,
        description="With `rest: auto`: weights that may be loaded an hour although nobody waits for them. What is not "
        "in the page cache is read from the disk.",
    )
    rest_weight: int = Field(
        default=4,
        ge=1,
        le=100,
        description="With `rest: auto`: how many times more clients must be expected to lose while the large model is "
        "not loaded than while those are not that leave for it. Lower: the large model is faster, small ones slower.",
    )


class QueueSettings(_Section):
    """Requests that wait for a slot or a load."""

    limit: int = Field(
        default=512,
        ge=0,
        le=1_000_000,
        description="Most requests that may wait; further ones get 503 with Retry-After. 0: none waits for a load "
        "either, so that only loaded models are served.",
    )
    timeout_seconds: Seconds = Field(
        default=300.0, description="Longest wait for a slot or a load; then the request gets 504."
    )


class StreamSettings(_Section):
    """Timeouts of running responses: a hung runner sends neither data nor an error."""

    first_byte_timeout_seconds: Seconds = Field(
        default=600.0, description="Longest time to a response's first byte; long prompts need minutes."
    )
    idle_timeout_seconds: Seconds = Field(default=300.0, description="Longest pause within a response.")
    heartbeat_seconds: Seconds | None = Field(
        default=10.0,
        description="Interval of the keep-alive bytes that a waiting stream gets; its protocol ignores them. Many "
        "clients time out before a large model is loaded; null sends none.",
    )


class PollSettings(_Section):
    """How often the state of GPUs and servers is read."""

    gpu_seconds: PollSeconds = Field(
        default=1.0, description="Interval of reading the GPUs; old readings lead to wrong placement."
    )
    residency_seconds: PollSeconds = Field(
        default=1.0,
        description="Interval of reading each instance's loaded models; at rest, every fifth time or when the memory "
        "of its GPUs has changed.",
    )
    catalog_seconds: PollSeconds = Field(default=5.0, description="Interval of reading the list of installed models.")


class LogSettings(_Section):
    """Logging to standard error."""

    format: Literal["auto", "human", "json"] = Field(
        default="auto", description="`auto` is human on a terminal and JSON elsewhere."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged; `debug` includes every line that the instances log."
    )
    slow_request_seconds: Seconds | None = Field(
        default=None,
        description="Requests that take at least this long are also logged as `slow_request`, with the time that they "
        "spent in the queue, on the load of their model, on the prompt and on the stream; unset: none.",
    )


class DashboardSettings(_Section):
    """The page at `/ui`."""

    enabled: bool = Field(
        default=True,
        description="Serves the dashboard where other machines do not reach it, or access keys are on.",
    )


class UsageSettings(_Section):
    """What each client used of each model, by day, in `usage.sqlite` in the state directory."""

    enabled: bool = Field(
        default=False,
        description="Records requests, tokens, GPU time and an estimate of the energy; shown by `llamayard usage`.",
    )
    keep_days: int = Field(default=400, ge=1, le=3660, description="Days that are kept.")
    prices: dict[str, dict[str, NotNegative]] = Field(
        default_factory=dict,
        description="Prices of a million tokens by model, `prompt` and `output`, in any currency, for the costs that "
        "`llamayard usage` shows; `*` applies to models without an entry.",
    )

    @field_validator("prices")
    @classmethod
    def _has_known_prices(cls, prices: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for model, entry in prices.items():
            for name in entry.keys() - {"prompt", "output"}:
                raise ValueError(f"{model}: {name} is no price: write prompt or output")
        return prices


def refuse_reserved(variables: Mapping[str, str], where: str) -> None:
    """Raises ValueError for a variable that the router itself sets."""
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise ValueError(f"{where}: {name} cannot be set here: {RESERVED_VARIABLES[name]}")
