"""Puts a server into the state that a test needs. State is set, never assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.ollama_server import ModelFile, OllamaServer, create_from_file
from tests.support.waiting import eventually_sync

_CALLS = """\
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "parameters": {{ .Function.Arguments }}}{{ end }}
{{ end }}assistant: """
_TOOLS = "{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}{{ .Role }}: {{ .Content }}"
_THINKING = "{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}"
DERIVED = {"tooly": _TOOLS + _THINKING + _CALLS + "{{ if .Think }}<think>{{ end }}", "toolish": _TOOLS + _CALLS}
"""Templates of models derived from `tiny`: `tooly` can call tools and think, `toolish` can call tools."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A running server and the weights files of its models."""

    server: OllamaServer
    files: Mapping[str, ModelFile]

    def post(self, path: str, body: Any) -> Any:
        """Sends a request that must succeed; returns its JSON."""
        status, answer = self.server.call("POST", path, body)
        assert status == 200, (path, body, status, answer)
        return answer

    def loaded(self) -> dict[str, dict[str, Any]]:
        """Entries of `/api/ps` by model name."""
        status, answer = self.server.call("GET", "/api/ps")
        assert status == 200, answer
        return {entry["name"]: entry for entry in answer["models"]}

    def unload_all(self) -> None:
        """Unloads all models and waits until they are gone."""
        for name in self.loaded():
            self.unload(name)
        try:
            eventually_sync(lambda: not self.loaded(), what="an empty /api/ps")
        except AssertionError as error:
            raise AssertionError(f"{error}; still loaded: {self.loaded()}") from error

    def unload(self, name: str) -> None:
        path = "/api/embed" if name.startswith("embed") else "/api/generate"
        self.post(path, {"model": name, "keep_alive": 0})

    def load(self, name: str, **fields: Any) -> None:
        path = "/api/embed" if name.startswith("embed") else "/api/generate"
        self.post(path, {"model": name, **fields})

    def ensure_absent(self, name: str) -> None:
        """Makes sure that no model has this name."""
        status, answer = self.server.call("DELETE", "/api/delete", {"model": name})
        assert status in (200, 404), answer

    def copy(self, source: str, destination: str) -> None:
        self.post("/api/copy", {"source": source, "destination": destination})

    def remove_blob(self, digest: str) -> None:
        """Removes a blob from the store on disk, without the server."""
        (self.server.models_dir / "blobs" / digest.replace(":", "-")).unlink(missing_ok=True)


def create_models(server: OllamaServer, files: Mapping[str, ModelFile]) -> Stage:
    """Creates the models that the suite talks to and returns the stage."""
    stage = Stage(server, files)
    for name, file in files.items():
        create_from_file(server, name, file.path, file.digest)
    for name, template in DERIVED.items() if "tiny" in files else ():
        stage.post("/api/create", {"model": name, "from": "tiny", "template": template, "stream": False})
    return stage
