"""Servers that are not Ollama, from the settings: their names, how each is asked, and the engine that has them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from router.app.supervised_models import SupervisedModel
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
from router.engines.openai.supervised import Spawn, SupervisedEngine
from router.errors import BadRequest
from router.proxy.interfaces import ModelCatalog


class OtherEngines:
    """Satisfies the proxy's `EngineModels`. `snapshot`: the facts of now."""

    def __init__(
        self,
        attached: Mapping[str, AttachedServer],
        supervised: Sequence[SupervisedModel],
        spawn: Spawn,
        snapshot: Callable[[], Snapshot],
        via: Mapping[str, str],
    ) -> None:
        """`attached`: by URL. `spawn` starts a server. `via`: headers of each request of the router's own."""
        self.models = AttachedModels([*attached.values(), *(each for model in supervised for each in model.servers)])
        self.instances = tuple(spec for model in supervised for spec in model.instances)
        """Places of the models with a server of their own."""
        self._attached = AttachedEngine(self.models, attached, via)
        self._supervised = [self._engine(model, spawn) for model in supervised]
        self._snapshot = snapshot
        self.engines: dict[str, Engine] = {each.kind: each for each in self._supervised}
        """Those in use, by kind."""
        if attached:
            self.engines[self._attached.kind] = self._attached

    def _engine(self, model: SupervisedModel, spawn: Spawn) -> SupervisedEngine:
        facts = self.models.known(model.served.name)
        assert facts is not None
        return SupervisedEngine(model.served, facts, model.instances, spawn, time.monotonic)

    async def close(self) -> None:
        """Ends all servers that were started for models."""
        await asyncio.gather(*(each.close() for each in self._supervised))

    def known(self, name: str) -> ModelFacts | None:
        return self.models.known(name)

    def has(self, name: str) -> bool:
        return self.models.known(name) is not None

    def target(self, instance: InstanceName, model: ModelFacts) -> EngineTarget:
        return self.models.target(instance, model)

    async def refuse_missing(self, model: ModelFacts, path: str) -> None:
        views = self._snapshot().instances.values()
        for view in [v for v in views if v.state is InstanceState.READY and model.is_on(v.spec)]:
            if not await self.engines[model.engine].endpoint_support.has(view, path):
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
