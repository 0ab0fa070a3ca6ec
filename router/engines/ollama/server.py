"""How an Ollama server is started, probed, and what its output says of its GPUs."""

from __future__ import annotations

from collections.abc import Mapping

from router.domain.events import LoadMeasured
from router.domain.footprint import GpuFootprint
from router.domain.instance import InstanceSpec
from router.engines.ollama.health_probe import probe_version
from router.engines.ollama.load_log import LoadLogReader
from router.engines.ollama.log_parser import ComputeReport


class OllamaLoadReader:
    """Satisfies `LoadReader`: a load's report in terms of the instance's GPUs."""

    __slots__ = ("_log", "_spec")

    def __init__(self, spec: InstanceSpec) -> None:
        self._spec = spec
        self._log = LoadLogReader()

    def read_line(self, line: str) -> LoadMeasured | None:
        report = self._log.feed(line)
        if report is None or not report.gpus or max(report.gpus) >= len(self._spec.gpus):
            return None
        gpus = tuple(report.gpus.get(index, GpuFootprint()) for index in range(len(self._spec.gpus)))
        return LoadMeasured(self._spec.name, report.blob, gpus)


class OllamaServer:
    """Satisfies `ServerRules`; the protocol documents the methods."""

    def __init__(self, command: tuple[str, ...], headers: Mapping[str, str] | None = None) -> None:
        """`command`: the program and its arguments, e.g. `("/usr/bin/ollama", "serve")`; the same for all instances.

        `headers`: those of each probe.
        """
        self._command = command
        self._headers = headers or {}

    def command(self, spec: InstanceSpec) -> tuple[str, ...]:  # noqa: ARG002 (the same for all instances)
        return self._command

    async def probe(self, url: str, timeout_seconds: float) -> str:
        return await probe_version(url, timeout_seconds, self._headers)

    def load_reader(self, spec: InstanceSpec) -> OllamaLoadReader:
        return OllamaLoadReader(spec)

    def gpu_report(self, spec: InstanceSpec) -> ComputeReport:
        return ComputeReport(spec.gpus)
