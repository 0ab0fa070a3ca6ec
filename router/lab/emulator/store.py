"""Model store of the EMULATED server: the on-disk layout of real Ollama, shared by all servers on the same folder.

`manifests/HOST/NAMESPACE/MODEL/TAG` are JSON files that name blobs; `blobs/sha256-…` are the layers. Every query reads
the disk, so that sibling servers see changes at once. Any bytes are accepted as weights: facts come from a GGUF header,
from a catalogue placeholder, or are defaults. Loads nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.domain.model_names import Name, parse_name
from router.engines.ollama.blob_store import DEFAULT_TEMPLATE, MODEL, TEMPLATE, BlobStore, Layer, StoredModel
from router.engines.ollama.gguf_facts import WeightsHeader, architecture, read_weights_header
from router.engines.ollama.gguf_header import FILE_TYPES
from router.lab.emulator.catalogue import MAGIC, CatalogueModel, weights_text

CONFIG = "application/vnd.docker.container.image.v1+json"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

CHAT_TEMPLATE = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}assistant: "
TOOLS_TEMPLATE = "{{ if .Tools }}{{ .Tools }}\n{{ end }}" + CHAT_TEMPLATE
INSERT_TEMPLATE = "{{ if .Suffix }}{{ .Prompt }}{{ .Suffix }}{{ end }}"
_THINKING = "{{ if .Think }}<think>{{ end }}"

PRUNE_AGE_SECONDS = 3600
_MIN_REAL_VOCABULARY = 4096
"""Models with a smaller vocabulary count as the tests' noise models."""


@dataclass(frozen=True, slots=True)
class Header(WeightsHeader):
    """Header of a weights file, or what stands in for one."""

    is_noise: bool
    """True for small models with random weights, which never end an answer by themselves."""


class Store(BlobStore):
    """Model store in a folder."""

    def __init__(self, folder: Path, *, is_written: bool = True) -> None:
        """`is_written`: create missing folders now rather than on the first write."""
        super().__init__(folder)
        self._headers: dict[str, Header] = {}
        if not is_written:
            return
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / "manifests").mkdir(parents=True, exist_ok=True)

    def parameters(self, digest: str) -> dict[str, Any]:
        """Reads a parameters layer."""
        return json.loads(self.text(digest) or "{}")

    def header(self, digest: str) -> Header:
        """Header of the weights, with defaults if it cannot be read. Cached per blob."""
        if digest not in self._headers:
            self._headers[digest] = _read_model_header(self.blob(digest))
        return self._headers[digest]

    # --- changes ---

    def put_blob(self, data: bytes) -> Layer:
        """Writes a blob under its own digest; the layer has no media type yet."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        path = self.blob(digest)
        if not path.exists():
            write_atomically(path, data)
        return Layer("", digest, len(data))

    def put(self, name: Name, config: Mapping[str, Any], layers: Iterable[Layer]) -> None:
        """Writes config and manifest; all servers see the model at once."""
        config_layer = self.put_blob(json.dumps(config).encode())
        manifest_layers = [
            {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
            | ({"from": layer.from_} if layer.from_ else {})
            for layer in layers
        ]
        manifest_config = {"mediaType": CONFIG, "digest": config_layer.digest, "size": config_layer.size}
        manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": manifest_config, "layers": manifest_layers}
        write_atomically(self.manifest(name), json.dumps(manifest).encode())

    def copy(self, source: StoredModel, destination: Name) -> None:
        write_atomically(self.manifest(destination), self.manifest(source.name).read_bytes())

    def delete(self, stored: StoredModel) -> None:
        """Removes the name, and blobs not referenced by another manifest."""
        self.manifest(stored.name).unlink(missing_ok=True)
        referenced = self._referenced_digests()
        for layer in stored.layers:
            if layer.digest not in referenced:
                self.blob(layer.digest).unlink(missing_ok=True)

    def prune(self, now: float, spares_recent: bool) -> int:
        """Removes unreferenced blobs (from 0.21 only if unmodified for an hour); returns how many."""
        referenced = {digest.replace(":", "-") for digest in self._referenced_digests()}
        removed_count = 0
        for path in (self.folder / "blobs").iterdir():
            is_recent = spares_recent and now - path.stat().st_mtime < PRUNE_AGE_SECONDS
            if path.name not in referenced and not is_recent:
                path.unlink(missing_ok=True)
                removed_count += 1
        return removed_count

    def _referenced_digests(self) -> set[str]:
        found: set[str] = set()
        for path in (self.folder / "manifests").glob("*/*/*/*"):
            found |= set(re.findall(r"sha256:[0-9a-f]{64}", path.read_text(encoding="utf-8", errors="replace")))
        return found

    def install(self, entry: CatalogueModel) -> None:
        """Installs a catalogue model."""
        weights = self.put_blob(weights_text(entry).encode())
        template = TOOLS_TEMPLATE if "tools" in entry.capabilities else CHAT_TEMPLATE
        template += _THINKING if "thinking" in entry.capabilities else ""
        template = INSERT_TEMPLATE + template if "insert" in entry.capabilities else template
        template_layer = self.put_blob((DEFAULT_TEMPLATE if "embedding" in entry.capabilities else template).encode())
        architecture = entry.metadata["general.architecture"]
        config = {
            "model_format": "gguf",
            "model_family": architecture,
            "model_families": [architecture],
            "model_type": entry.label,
            "file_type": entry.quantisation,
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [weights.digest, template_layer.digest]},
        }
        other_bytes = template_layer.size + len(json.dumps(config))
        layers = [
            Layer(MODEL, weights.digest, entry.size_bytes - other_bytes),
            Layer(TEMPLATE, template_layer.digest, template_layer.size),
        ]
        self.put(parse_name(entry.name), config, layers)


def weights_digest(entry: CatalogueModel) -> str:
    """Digest of the weights placeholder of a catalogue model."""
    return "sha256:" + hashlib.sha256(weights_text(entry).encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes the file atomically for readers in other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_bytes(data)
    staging.replace(path)


def parameter_label(count: int) -> str:
    """Formats like Ollama's `format.HumanNumber`: 70.6B, 51.53M, 173K."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.1f}B"
    if count >= 1_000_000:
        return f"{count / 1e6:.2f}M" if count < 100_000_000 else f"{count / 1e6:.0f}M"
    return f"{count / 1e3:.0f}K" if count >= 1000 else str(count)


def config_for(header: Header, digests: list[str]) -> dict[str, Any]:
    """Config blob of a created model."""
    family = architecture(header)
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": parameter_label(int(header.metadata.get("general.parameter_count", 0))),
        "file_type": FILE_TYPES.get(int(header.metadata.get("general.file_type", 1)), "unknown"),
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": digests},
    }


_DEFAULTS: Mapping[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 1,
    "general.parameter_count": 172_736,
    "llama.block_count": 2,
    "llama.context_length": 8192,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 32,
    "llama.attention.value_length": 32,
    "llama.vocab_size": 771,
}
"""Metadata for weights without a readable header: a very small model."""


def _read_model_header(path: Path) -> Header:
    header = read_weights_header(path)
    if header is not None:
        vocabulary_size = header.metadata.get(f"{architecture(header)}.vocab_size", 0)
        return Header(header.metadata, header.tensors, is_noise=vocabulary_size < _MIN_REAL_VOCABULARY)
    try:
        if path.stat().st_size < 1 << 22:
            data = json.loads(path.read_bytes())
            if data["format"] == MAGIC:
                tensors = tuple((name, kind, tuple(shape)) for name, kind, shape in data["tensors"])
                return Header(data["metadata"], tensors, is_noise=False)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Header(_DEFAULTS, (), is_noise=True)
