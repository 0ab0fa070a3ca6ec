"""How an Ollama server is started, probed, and what its output says of its GPUs."""

from __future__ import annotations

from router.domain.instance import InstanceSpec
from router.engines.ollama.health_probe import probe_version
from router.engines.ollama.log_parser import ComputeReport


class OllamaServer:
    """Satisfies `ServerRules`; the protocol documents the methods."""

    def __init__(self, command: tuple[str, ...]) -> None:
        """`command`: the program and its arguments, e.g. `("/usr/bin/ollama", "serve")`; the same for all instances."""
        self._command = command

    def command(self, spec: InstanceSpec) -> tuple[str, ...]:  # noqa: ARG002 (the same for all instances)
        return self._command

    async def probe(self, url: str, timeout_seconds: float) -> str:
        return await probe_version(url, timeout_seconds)

    def gpu_report(self, spec: InstanceSpec) -> ComputeReport:
        return ComputeReport(spec.gpus)
