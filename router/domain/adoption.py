"""Which servers of an earlier router are adopted, and why others are not. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.domain.instance import InstanceName, InstanceSpec

_RELEVANT_NAMES = frozenset(
    (
        "HOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR", "XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR",
        "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
        "GODEBUG", "GOGC", "GOMEMLIMIT", "GOMAXPROCS", "OMP_NUM_THREADS",
    )
)  # fmt: skip
_RELEVANT_PREFIXES = ("CUDA", "NVIDIA_", "NCCL_", "GGML_", "LLAMA_", "HIP_", "HSA_", "ROC", "VK_", "LLAMAYARD_RIG_")
"""A shell, a terminal and a service manager set others, which differ between two starts and change no server."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """How a server was started, or would be."""

    spec: InstanceSpec
    command: tuple[str, ...]
    program: str
    """Identifies the executable file: another one at the same path is another program."""
    inherited: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables that it got from the router's own environment, as far as they are relevant."""


@dataclass(frozen=True, slots=True)
class KeptServer:
    """A server that an earlier router left running, as found now."""

    name: InstanceName
    pid: int
    record: ServerRecord | None
    """None if it cannot be read, because another version of the router wrote it."""
    version: str
    """What the server had answered to the earlier router; empty if it had not been ready."""
    answers: str
    """What it answers now: its version; empty if it does not answer."""
    owns_port: bool
    """Whether it is this process that listens on its port."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a server is adopted."""

    server: KeptServer
    reason: str
    """Why it is not adopted; empty if it is."""

    @property
    def is_adopted(self) -> bool:
        return not self.reason


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an inherited environment that change how a server runs."""
    return {
        name: value
        for name, value in environment.items()
        if name in _RELEVANT_NAMES or name.startswith(_RELEVANT_PREFIXES)
    }


def decide(found: Sequence[tuple[KeptServer, ServerRecord | None]]) -> tuple[Verdict, ...]:
    """A verdict for each server, in order. With each comes how this router would start it, at the same address; None if
    it would not. Of several servers of one name the first that fits is adopted."""
    taken: set[InstanceName] = set()
    verdicts: list[Verdict] = []
    for server, wanted in found:
        reason = _why_not(server, wanted)
        if not reason and server.name in taken:
            reason = f"another server is adopted as {server.name}"
        if not reason:
            taken.add(server.name)
        verdicts.append(Verdict(server, reason))
    return tuple(verdicts)


def _why_not(server: KeptServer, wanted: ServerRecord | None) -> str:
    if server.record is None:
        return "another version of the router started it"
    if not server.version:
        return "it was not ready"
    if wanted is None:
        return "no such instance is configured"
    differences = differences_between(server.record, wanted)
    if differences:
        return f"configured differently: {', '.join(differences)}"
    if not server.owns_port:
        return "it does not listen on its port"
    if not server.answers:
        return "it does not answer"
    if server.answers != server.version:
        return f"its version was {server.version} and is {server.answers}"
    return ""


def differences_between(record: ServerRecord, wanted: ServerRecord) -> tuple[str, ...]:
    """What differs, in words; variables by name, because their values may be secrets."""
    was, now = record.spec, wanted.spec
    facts = (
        ("engine", was.engine, now.engine),
        ("GPUs", was.gpus, now.gpus),
        ("address", was.url, now.url),
        ("command", record.command, wanted.command),
        ("the executable file", record.program, wanted.program),
        ("num_parallel", was.num_parallel, now.num_parallel),
        ("context_length", was.context_length, now.context_length),
        ("kv_cache_type", was.kv_cache_type, now.kv_cache_type),
        ("flash_attention", was.flash_attention, now.flash_attention),
        ("whether it runs on demand", was.on_demand, now.on_demand),
    )
    before = {**record.inherited, **was.environment}
    after = {**wanted.inherited, **now.environment}
    variables = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return (*(words for words, old, new in facts if old != new), *variables)
