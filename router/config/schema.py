"""The sections of the configuration: each key's type, unit, bounds, default and why it is there.

`router/config/settings.py` puts them together and reads their values. Nothing here decides what a value means for a
request.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from router.config.parsing import keep_alive_seconds, listed, named_by_text, parse_bytes, scalars_as_text

RESERVED_VARIABLES = {
    "OLLAMA_HOST": "the router gives each instance a port of its own",
    "OLLAMA_MODELS": "use ollama.models",
    "OLLAMA_KEEP_ALIVE": "use ollama.keep_alive",
    "OLLAMA_NO_CLOUD": "use ollama.cloud",
    "OLLAMA_NOPRUNE": "pruning by one instance would break a download by another",
    "CUDA_VISIBLE_DEVICES": "use instances with gpus",
    "CUDA_DEVICE_ORDER": "GPUs are named by UUID, which needs no order",
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
FallbackReason = Literal["unknown_model", "too_large", "queue_full"]


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
    head_timeout_seconds: Seconds = Field(
        default=30.0, description="How long a request's head may take from its first byte to its last."
    )
    body_timeout_seconds: Seconds = Field(
        default=60.0, description="Longest silence within a request's body before the client is given up."
    )
    connection_timeout_seconds: Seconds = Field(
        default=3600.0,
        description="How long a connection may be without a request; long, as clients keep theirs for as long.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file with the certificate and its chain; with tls_key, the endpoint is https."
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the certificate's private key.")
    drain_timeout_seconds: Seconds = Field(
        default=30.0, description="How long running streams may finish after SIGTERM before they are cut."
    )
    list_aliases: bool = Field(
        default=False, description="Lists aliases among the models of `/api/tags` and `/v1/models`."
    )
    debug_headers: bool = Field(
        default=False,
        description="Tells in every response's headers which instance served it and why, "
        "which a request can otherwise ask for.",
    )

    @model_validator(mode="after")
    def _a_certificate_has_its_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("give tls_certificate and tls_key together, or neither")
        return self


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
        description="Tokens of context a request; set, because a server over several GPUs would else take 131,072.",
    )
    flash_attention: bool | None = Field(
        default=None, description="Flash attention on or off; unset, the server chooses by model and GPU."
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
        description="Whether the instance over all GPUs spreads each model over all of them (even: by their memory) "
        "or takes the fewest, fastest first (fill_first); auto is even on equal GPUs, fill_first on unequal ones; off "
        "runs none.",
    )
    cloud: bool = Field(
        default=False, description="Lets instances reach ollama.com for cloud models; off, nothing leaves the machine."
    )
    load_timeout_seconds: Seconds = Field(
        default=600.0, description="Longest time that one load may take; a 70B from a slow disk needs minutes."
    )
    start_timeout_seconds: Seconds = Field(
        default=60.0, description="Longest time until an instance answers and reports its GPUs, which can take 30 s."
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
        default=(), description="Its GPUs by UUID or index, in order of preference; none: it runs on the CPU."
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
            raise ValueError("gpus names a GPU twice")
        refuse_reserved(self.env, "env")
        return self


class ModelSettings(_Section):
    """One model's own rules, by its name in any form that Ollama takes."""

    options: Literal["protect", "pass"] = Field(
        default="protect",
        description="What options of a request may do: protect serves it with the copy that is loaded where its "
        "context is large enough; pass forwards all of them, and each other value reloads the model.",
    )
    gpus: Words = Field(
        default=(), description="Its GPUs by UUID or index: exactly these, one or several; none: the router chooses."
    )
    layout: Literal["auto", "spread", "cpu"] = Field(
        default="auto",
        description="auto is the smallest set of GPUs that holds it; spread is several even where one would do.",
    )
    context_length: int | None = Field(
        default=None,
        ge=4,
        le=2**24,
        description="Tokens of context a request that it is loaded with, whatever is asked.",
    )
    num_parallel: int | None = Field(default=None, ge=1, le=1024, description="Its slots, on an instance of its own.")
    kv_cache_type: KvCacheType | None = Field(
        default=None, description="Type of its KV cache, on an instance of its own."
    )
    priority: int = Field(
        default=0, ge=-100, le=100, description="Its requests go before those of models with a lower one."
    )
    replicas_max: int | None = Field(default=None, ge=1, le=64, description="Most copies of it at the same time.")
    keep_warm: bool = Field(
        default=False,
        description="Loaded at start and again when it is lost, and never unloaded to make room for others.",
    )


class FallbackSettings(_Section):
    """What answers in place of a model, and when. The reply's headers name the model that did."""

    to: Words = Field(min_length=1, description="Models to try instead, in this order.")
    reasons: Annotated[tuple[FallbackReason, ...], BeforeValidator(listed)] = Field(
        default=("unknown_model", "too_large", "queue_full"),
        description="When: nobody has the model, it fits nowhere, or too many requests wait.",
    )


class PlacementSettings(_Section):
    """Where models go."""

    vram_margin_bytes: Bytes = Field(
        default=512 * 1024**2,
        description="Kept free on each GPU beside what models are estimated to take, for what no estimate sees.",
    )
    on_demand: bool = Field(
        default=True,
        description="Starts further instances over any set of GPUs, each for one model, and stops them when they have "
        "been empty; off, only the instances that are there from the start are used.",
    )
    instance_idle_seconds: Seconds = Field(
        default=120.0, description="How long an instance that was started on demand may be empty."
    )
    exclusive_gpus: Annotated[dict[str, Words], BeforeValidator(named_by_text)] = Field(
        default_factory=dict, description="GPUs (by UUID or index) that only the models listed for them may use."
    )
    ttft_target_seconds: Seconds = Field(
        default=10.0, description="A first token that takes longer counts as too late; swaps are weighed by it."
    )
    starving_after_seconds: Seconds = Field(
        default=75.0,
        description="A request that has waited so long gets its place whatever that costs others; three quarters of it "
        "for a model that no single GPU holds.",
    )
    concurrent_loads_max: int = Field(
        default=4, ge=1, le=64, description="Loads under way at the same time; more would only share disk and PCIe."
    )


class QueueSettings(_Section):
    """Requests that wait for a slot or a load."""

    limit: int = Field(
        default=512,
        ge=0,
        le=1_000_000,
        description="Most requests that may wait; the next is told 503 to come back. With 0 none waits for a load "
        "either, so that only warm models are served.",
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
    heartbeat_seconds: Seconds | None = Field(
        default=10.0,
        description="After so much silence a stream that waits or loads gets bytes that its protocol ignores, and "
        "again each time, because many clients give up sooner than a model loads; null sends none.",
    )


class PollSettings(_Section):
    """How often the outside is looked at."""

    gpu_seconds: PollSeconds = Field(
        default=1.0, description="Between two readings of the GPUs; a stale one misplaces a model."
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


def refuse_reserved(variables: Mapping[str, str], where: str) -> None:
    """ValueError for a variable that the router sets itself."""
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise ValueError(f"{where}: {name} cannot be set here: {RESERVED_VARIABLES[name]}")
