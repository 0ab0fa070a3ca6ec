"""Servers that are not Ollama, from the settings: their names, how each is asked, and the engine that has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from router.config.schema import InstanceSettings
from router.config.settings import ConfigError, Settings
from router.domain.instance import InstanceName, InstanceState
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.base import Engine, EngineTarget
from router.engines.ollama.instance_plan import declared_name
from router.engines.ollama.rules import KIND as OLLAMA
from router.engines.openai.engine import AttachedEngine
from router.engines.openai.servers import AttachedModels, AttachedServer
from router.errors import BadRequest
from router.proxy.interfaces import ModelCatalog


class OtherEngines:
    """Satisfies the proxy's `EngineModels`. `snapshot`: the facts of now."""

    def __init__(
        self, servers: Mapping[str, AttachedServer], snapshot: Callable[[], Snapshot], via: Mapping[str, str]
    ) -> None:
        """`servers`: by URL. `via`: headers of each request of the router's own."""
        self.models = AttachedModels(servers.values())
        self.attached = AttachedEngine(self.models, servers, via)
        self._snapshot = snapshot

    @property
    def engines(self) -> dict[str, Engine]:
        """Those in use, by kind."""
        return {self.attached.kind: self.attached} if self.models.all else {}

    def known(self, name: str) -> ModelFacts | None:
        return self.models.known(name)

    def target(self, instance: InstanceName, model: ModelFacts) -> EngineTarget:
        return self.models.target(instance, model)

    async def refuse_missing(self, model: ModelFacts, path: str) -> None:
        views = self._snapshot().instances.values()
        for view in [v for v in views if v.state is InstanceState.READY and model.is_on(v.spec)]:
            if not await self.attached.endpoint_support.has(view, path):
                raise BadRequest(
                    f"model '{model.name}' is served by {view.spec.name}, which does not have {path}: use "
                    "/v1/chat/completions or /api/chat"
                )


class JoinedCatalog:
    """Satisfies the proxy's `ModelCatalog`: the names of other servers' models come before those of Ollama's."""

    def __init__(self, others: AttachedModels, ollama: ModelCatalog) -> None:
        self._others = others
        self._ollama = ollama

    def known(self, name: str) -> ModelFacts | None:
        return self._others.known(name) or self._ollama.known(name)

    async def facts(self, name: str) -> ModelFacts | None:
        return self._others.known(name) or await self._ollama.facts(name)


def attached_servers(settings: Settings) -> dict[str, AttachedServer]:
    """The configured servers with OpenAI's API, by URL. Reads their keys: blocking.

    Raises:
        ConfigError: a key file cannot be read.
    """
    return {(entry.url or "").rstrip("/"): _server(entry) for entry in _declared(settings)}


def _declared(settings: Settings) -> Iterator[InstanceSettings]:
    return (entry for entry in settings.instances if entry.kind != OLLAMA)


def _server(entry: InstanceSettings) -> AttachedServer:
    name = declared_name(entry.name, entry.url)
    return AttachedServer(
        name, entry.kind, entry.models, entry.context_length or 0, _api_key(entry, name), entry.capabilities
    )


def _api_key(entry: InstanceSettings, name: str) -> str:
    path = entry.api_key_file
    if path is None:
        return ""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"instances: {name}: api_key_file: {path} cannot be read: {error}"]) from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError([f"instances: {name}: api_key_file: {path} must hold one key and nothing else"])
    return key
