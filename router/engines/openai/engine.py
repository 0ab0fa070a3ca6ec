"""Servers that have OpenAI's API, run by somebody else (vLLM, SGLang, TGI, LiteLLM, LM Studio), as one engine.

Their models are declared, always loaded, and take nothing of this machine. So there is nothing to start, load or
unload: slots and health are all that is managed.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from router.domain.actions import Load, Unload
from router.domain.events import LoadedModel, LoadFailed, LoadFinished, LoadMeasured, UnloadFinished
from router.domain.instance import InstanceSpec, InstanceView
from router.domain.model import ModelFacts
from router.engines.base import ProbeFailed
from router.engines.openai.client import has_path, listed_models
from router.engines.openai.rules import AttachedRules
from router.engines.openai.servers import OPTIONAL_PATHS, AttachedModels, AttachedServer
from router.errors import InstanceLost


class Silent:
    """Of a server whose output nobody reads. Satisfies `GpuReport` and `LoadReader`."""

    problem: str | None = None
    is_final = False
    has_devices = False
    unexpected: tuple[str, ...] = ()

    def read_line(self, line: str) -> bool:
        del line
        return False


class NoLoads:
    """The same for loads."""

    def read_line(self, line: str) -> LoadMeasured | None:
        del line
        return None


class AttachedEndpoints:
    """Satisfies `EndpointRules`: finds out once which of the optional paths a server has."""

    def __init__(self, headers: Mapping[str, Mapping[str, str]]) -> None:
        """`headers`: of each server's requests, by its URL."""
        self._headers = headers
        self._known: dict[tuple[str, str], bool] = {}

    def known(self, view: InstanceView, path: str) -> bool | None:
        return self._known.get((view.spec.url, path)) if path in OPTIONAL_PATHS else True

    async def has(self, view: InstanceView, path: str) -> bool:
        known = self.known(view, path)
        if known is None:
            url = view.spec.url
            try:
                known = self._known[url, path] = await has_path(url, path, self._headers.get(url, {}))
            except ProbeFailed as error:
                raise InstanceLost(f"{view.spec.name} cannot be asked whether it has {path}: {error}") from error
        return known


class OpenAiEngine(AttachedRules):
    """What every engine with OpenAI's API is alike in: its models are declared, and its output tells nothing."""

    def __init__(self, endpoints: AttachedEndpoints) -> None:
        self._endpoints = endpoints

    @property
    def endpoint_support(self) -> AttachedEndpoints:
        return self._endpoints

    def load_reader(self, spec: InstanceSpec) -> NoLoads:
        del spec
        return NoLoads()

    def gpu_report(self, spec: InstanceSpec) -> Silent:
        del spec
        return Silent()

    def on_demand_instance(self, spec: InstanceSpec, port: int) -> InstanceSpec:
        """Never called: the scheduler starts none."""
        del port
        return spec

    async def refresh(self) -> None:
        """The models are declared."""

    async def tidy(self) -> bool:
        """What an earlier run left is ended by its marks."""
        return True


class AttachedEngine(OpenAiEngine):
    """Satisfies `Engine`."""

    def __init__(self, models: AttachedModels, urls: Mapping[str, AttachedServer], via: Mapping[str, str]) -> None:
        """`urls`: the servers by URL. `via`: headers of each request of the router's own."""
        self.models = models
        self._headers = {url: {**via, **_key_header(server)} for url, server in urls.items()}
        self._names = {url: frozenset(server.models.values()) for url, server in urls.items()}
        self._missing: dict[str, frozenset[str]] = {}
        """Names that a server's list lacked when it was last read, by URL."""
        super().__init__(AttachedEndpoints(self._headers))
        self._log = structlog.get_logger("router.catalog")

    # --- instances -----------------------------------------------------------------------------------------

    def command(self, spec: InstanceSpec) -> tuple[str, ...]:
        """Never run: all are attached."""
        del spec
        return ()

    async def probe(self, url: str, timeout_seconds: float) -> str:
        """The version is unknown: the API has none."""
        listed = await listed_models(url, self._headers.get(url, {}), timeout_seconds)
        missing = self._names.get(url, frozenset()) - frozenset(listed)
        if missing and missing != self._missing.get(url):
            names = ", ".join(sorted(missing))
            self._log.warning("model_not_listed", url=url, models=names, listed=", ".join(listed))
        self._missing[url] = missing
        return ""

    # --- loads ---------------------------------------------------------------------------------------------

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        return LoadFinished(load.load_id, 0, 0)

    async def unload(self, unload: Unload) -> UnloadFinished:
        return UnloadFinished(unload.instance, unload.blob)

    # --- models --------------------------------------------------------------------------------------------

    async def loaded(self, spec: InstanceSpec) -> tuple[LoadedModel, ...]:
        """All of them, as long as the server answers."""
        return tuple(LoadedModel(m.name, m.digest, 0, 0, None, m) for m in self.models.on(spec.name))

    async def facts(self, name: str) -> ModelFacts | None:
        return self.models.known(name)


def _key_header(server: AttachedServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
