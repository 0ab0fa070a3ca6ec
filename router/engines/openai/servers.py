"""Servers that have OpenAI's API and run elsewhere, as configured: their models by name, and how each is asked.

A name means the same model on every server that has it, so that their slots serve it together. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from router.domain.instance import InstanceName
from router.domain.model import NO_MODEL, BlobDigest, ModelFacts
from router.domain.model_names import canonical, shortest
from router.engines.base import EngineTarget, RepeatPenalty

KIND = "openai"
"""Of the engine, whatever the server is."""
OPTIONAL_PATHS = frozenset(("/v1/responses", "/v1/messages"))
"""Which a server with OpenAI's API may lack."""

DIALECTS: Mapping[str, RepeatPenalty] = {
    "openai": None,
    "vllm": "repetition_penalty",
    "sglang": "repetition_penalty",
    "llama-server": "repeat_penalty",
}
"""What a server calls Ollama's `repeat_penalty`, by the configured kind; the API itself has no such option. Servers
with a name for it also have `top_k` and `min_p`."""

_WRITTEN_NAMES_MAX = 1024


@dataclass(frozen=True, slots=True)
class AttachedServer:
    """One server of the configuration."""

    name: InstanceName
    kind: str
    """As configured; a key of `DIALECTS`."""
    models: Mapping[str, str]
    """The name that clients use -> the server's own name of the model."""
    context_length: int = 0
    """Tokens that the server was started with; 0: unknown."""
    api_key: str = ""
    """What the server wants as its bearer token; "": nothing."""
    capabilities: tuple[str, ...] = ()
    """As `/api/show` lists them."""
    engine: str = KIND
    """Kind of the engine; another one than `KIND` where the router starts the server itself."""


class AttachedModels:
    """All models of the servers. Lookups take a name in any form."""

    def __init__(self, servers: Iterable[AttachedServer]) -> None:
        self.servers = {server.name: server for server in servers}
        self._known = _facts(self.servers.values())
        self._targets = {
            (server.name, shortest(name)): _target(server, own_name)
            for server in self.servers.values()
            for name, own_name in server.models.items()
        }
        self._by_written_name: dict[str, ModelFacts] = {}

    @property
    def all(self) -> tuple[ModelFacts, ...]:
        return tuple(self._known.values())

    def known(self, name: str) -> ModelFacts | None:
        facts = self._by_written_name.get(name)
        if facts is not None:
            return facts
        try:
            facts = self._known.get(canonical(name))
        except ValueError:
            return None
        if facts is not None and len(self._by_written_name) < _WRITTEN_NAMES_MAX:
            self._by_written_name[name] = facts
        return facts

    def on(self, instance: InstanceName) -> tuple[ModelFacts, ...]:
        """The models of one server."""
        return tuple(facts for facts in self._known.values() if instance in (facts.attached_on or ()))

    def target(self, instance: InstanceName, model: ModelFacts) -> EngineTarget:
        """How that server is asked for the model.

        Raises:
            KeyError: it does not have the model.
        """
        return self._targets[instance, model.name]

    def servers_of(self, model: ModelFacts) -> tuple[AttachedServer, ...]:
        """The servers that have the model, by name."""
        return tuple(self.servers[name] for name in sorted(model.attached_on or ()))


def _facts(servers: Iterable[AttachedServer]) -> dict[str, ModelFacts]:
    """By canonical name. Of servers with different contexts the smallest counts: any of them may serve a request."""
    found: dict[str, ModelFacts] = {}
    for server in servers:
        for name in server.models:
            key, own = canonical(name), frozenset((server.name,))
            before = found.get(key)
            if before is None:
                text = shortest(name)
                found[key] = replace(
                    NO_MODEL, name=text, digest=f"{KIND}:{text}", blob=BlobDigest(f"{KIND}:{text}"),
                    engine=server.engine,
                    context_length=server.context_length, is_shared=server.engine != KIND, attached_on=own,
                )  # fmt: skip
            else:
                contexts = [each for each in (before.context_length, server.context_length) if each]
                held = (before.attached_on or frozenset()) | own
                found[key] = replace(before, context_length=min(contexts, default=0), attached_on=held)
    return found


def _target(server: AttachedServer, own_name: str) -> EngineTarget:
    headers = ((b"Authorization", b"Bearer " + server.api_key.encode()),) if server.api_key else ()
    return EngineTarget(own_name, headers, DIALECTS[server.kind])
