"""The model store of the EMULATED server: the real one's layout on disk, shared by all servers on the same folder.

`manifests/HOST/NAMESPACE/MODEL/TAG` are JSON texts that name blobs; `blobs/sha256-…` are the layers. Every question
reads the disk, so that siblings see each other's changes at once. It accepts any bytes as weights: facts come from a
GGUF header, from the catalogue's own texts, or are defaults. It loads nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from router.domain.model_names import Name, parse_name
from router.engines.ollama.gguf_header import FILE_TYPES, read_header
from router.lab.emulator.catalogue import MAGIC, CatalogueModel, weights_text

MODEL = "application/vnd.ollama.image.model"
TEMPLATE = "application/vnd.ollama.image.template"
SYSTEM = "application/vnd.ollama.image.system"
PARAMETERS = "application/vnd.ollama.image.params"
MESSAGES = "application/vnd.ollama.image.messages"
LICENSE = "application/vnd.ollama.image.license"
CONFIG = "application/vnd.docker.container.image.v1+json"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

DEFAULT_TEMPLATE = "{{ .Prompt }}"
CHAT_TEMPLATE = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}assistant: "
TOOLS_TEMPLATE = "{{ if .Tools }}{{ .Tools }}\n{{ end }}" + CHAT_TEMPLATE
INSERT_TEMPLATE = "{{ if .Suffix }}{{ .Prompt }}{{ .Suffix }}{{ end }}"
THINKING_TEMPLATE = CHAT_TEMPLATE + "{{ if .Think }}<think>{{ end }}"

PRUNE_AGE_SECONDS = 3600
_SPOKEN_VOCABULARY = 4096
"""Models with fewer words are taken for the tests' noise."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a weights file says of itself."""

    metadata: Mapping[str, Any]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    is_noise: bool
    """True for small models of random weights, which never end an answer by themselves."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One blob of a model."""

    media_type: str
    digest: str
    size: int
    from_: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """One model as the store has it."""

    name: Name
    digest: str
    """Of the manifest, without `sha256:`."""
    modified: datetime
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    manifest_bytes: int = 0
    texts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def weights(self) -> Layer:
        return next(layer for layer in self.layers if layer.media_type == MODEL)

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers) + int(self.config.get("_size", 0))

    @property
    def template(self) -> str:
        return self.texts.get(TEMPLATE, DEFAULT_TEMPLATE)

    @property
    def parameters(self) -> dict[str, Any]:
        return json.loads(self.texts.get(PARAMETERS, "{}"))


class Store:
    """A folder of models."""

    def __init__(self, folder: Path, *, is_written: bool = True) -> None:
        """`is_written`: its folders are made where they are missing, else only once something is put into them."""
        self.folder = folder
        self._headers: dict[str, Header] = {}
        if not is_written:
            return
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / "manifests").mkdir(parents=True, exist_ok=True)

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest.replace(":", "-")

    def manifest(self, name: Name) -> Path:
        """Where the manifest of a name lies, or would."""
        return self.folder / "manifests" / name.host / name.namespace / name.model / name.tag

    def get(self, name: Name) -> Stored | None:
        """The model of that name; None without one or with a broken manifest."""
        path = self.manifest(name)
        try:
            data = path.read_bytes()
            manifest = json.loads(data)
            config = json.loads(self.blob(manifest["config"]["digest"]).read_bytes())
            layers = tuple(
                Layer(one["mediaType"], one["digest"], one["size"], one.get("from", "")) for one in manifest["layers"]
            )
            modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except (OSError, ValueError, KeyError):
            return None
        config["_size"] = manifest["config"].get("size", 0)
        texts = {one.media_type: self._text(one.digest) for one in layers if one.media_type != MODEL}
        digest = hashlib.sha256(data).hexdigest()
        return Stored(name, digest, modified, config, layers, len(data), texts)

    def _text(self, digest: str) -> str:
        try:
            return self.blob(digest).read_text(encoding="utf-8")
        except OSError:
            return ""

    def parameters(self, digest: str) -> dict[str, Any]:
        """A layer of parameters."""
        return json.loads(self._text(digest) or "{}")

    def all(self) -> list[Stored]:
        """All models, newest first."""
        found = [stored for name in self._names() if (stored := self.get(name)) is not None]
        return sorted(found, key=lambda one: (-one.modified.timestamp(), one.name.full))

    def _names(self) -> Generator[Name]:
        root = self.folder / "manifests"
        for path in sorted(root.glob("*/*/*/*")):
            host, namespace, model, tag = path.relative_to(root).parts
            if not tag.startswith("."):
                yield Name(host, namespace, model, tag)

    def header(self, digest: str) -> Header:
        """What the weights say; defaults where they say nothing. Read once a blob."""
        if digest not in self._headers:
            self._headers[digest] = _read(self.blob(digest))
        return self._headers[digest]

    # --- changes ---

    def put_blob(self, data: bytes) -> Layer:
        """Writes a blob under its own digest; the layer has no media type yet."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        path = self.blob(digest)
        if not path.exists():
            write_whole(path, data)
        return Layer("", digest, len(data))

    def put(self, name: Name, config: Mapping[str, Any], layers: Iterable[Layer]) -> None:
        """Writes config and manifest; the model is there for all servers at once."""
        written = self.put_blob(json.dumps(config).encode())
        listed = [
            {"mediaType": one.media_type, "digest": one.digest, "size": one.size}
            | ({"from": one.from_} if one.from_ else {})
            for one in layers
        ]
        head = {"mediaType": CONFIG, "digest": written.digest, "size": written.size}
        manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": head, "layers": listed}
        write_whole(self.manifest(name), json.dumps(manifest).encode())

    def copy(self, source: Stored, destination: Name) -> None:
        write_whole(self.manifest(destination), self.manifest(source.name).read_bytes())

    def delete(self, stored: Stored) -> None:
        """Removes the name, and the blobs that no other manifest names."""
        self.manifest(stored.name).unlink(missing_ok=True)
        named = self._named()
        for layer in stored.layers:
            if layer.digest not in named:
                self.blob(layer.digest).unlink(missing_ok=True)

    def prune(self, now: float, spares_young: bool) -> int:
        """Removes blobs that no manifest names (from 0.21 only those not touched for an hour); how many they were."""
        named = {digest.replace(":", "-") for digest in self._named()}
        gone = 0
        for path in (self.folder / "blobs").iterdir():
            is_young = spares_young and now - path.stat().st_mtime < PRUNE_AGE_SECONDS
            if path.name not in named and not is_young:
                path.unlink(missing_ok=True)
                gone += 1
        return gone

    def _named(self) -> set[str]:
        found: set[str] = set()
        for path in (self.folder / "manifests").glob("*/*/*/*"):
            found |= set(re.findall(r"sha256:[0-9a-f]{64}", path.read_text(encoding="utf-8", errors="replace")))
        return found

    def install(self, entry: CatalogueModel) -> None:
        """Puts a model of the catalogue into the store."""
        weights = self.put_blob(weights_text(entry).encode())
        template = THINKING_TEMPLATE if "thinking" in entry.capabilities else CHAT_TEMPLATE
        template = TOOLS_TEMPLATE if "tools" in entry.capabilities else template
        template = INSERT_TEMPLATE + template if "insert" in entry.capabilities else template
        small = self.put_blob((DEFAULT_TEMPLATE if "embedding" in entry.capabilities else template).encode())
        arch = entry.metadata["general.architecture"]
        config = {
            "model_format": "gguf",
            "model_family": arch,
            "model_families": [arch],
            "model_type": entry.label,
            "file_type": entry.quantisation,
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [weights.digest, small.digest]},
        }
        others = small.size + len(json.dumps(config))
        layers = [Layer(MODEL, weights.digest, entry.size_bytes - others), Layer(TEMPLATE, small.digest, small.size)]
        self.put(parse_name(entry.name), config, layers)


def weights_digest(entry: CatalogueModel) -> str:
    """Of what stands for the weights of a model of the catalogue."""
    return "sha256:" + hashlib.sha256(weights_text(entry).encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """All of it or nothing, for readers in other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_bytes(data)
    staging.replace(path)


def parameter_label(count: int) -> str:
    """As Ollama's `format.HumanNumber`: 70.6B, 51.53M, 173K."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.1f}B"
    if count >= 1_000_000:
        return f"{count / 1e6:.2f}M" if count < 100_000_000 else f"{count / 1e6:.0f}M"
    return f"{count / 1e3:.0f}K" if count >= 1000 else str(count)


def config_of(header: Header, digests: list[str]) -> dict[str, Any]:
    """The config blob of a created model."""
    arch = str(header.metadata.get("general.architecture", "llama"))
    return {
        "model_format": "gguf",
        "model_family": arch,
        "model_families": [arch],
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
"""Facts of weights that say nothing: a very small model."""


def _read(path: Path) -> Header:
    gguf = read_header(path)
    if gguf is not None:
        tensors = tuple((one.name, one.type, one.shape) for one in gguf.tensors)
        metadata = _completed(gguf.metadata, tensors)
        words = metadata.get(f"{metadata.get('general.architecture', 'llama')}.vocab_size", 0)
        return Header(metadata, tensors, is_noise=words < _SPOKEN_VOCABULARY)
    try:
        if path.stat().st_size < 1 << 22:
            data = json.loads(path.read_bytes())
            if data["format"] == MAGIC:
                tensors = tuple((name, kind, tuple(shape)) for name, kind, shape in data["tensors"])
                return Header(data["metadata"], tensors, is_noise=False)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Header(_DEFAULTS, (), is_noise=True)


def _completed(metadata: dict[str, Any], tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> dict[str, Any]:
    """With the parameter count and vocabulary that Ollama computes."""
    count = 0
    for _, _, shape in tensors:
        product = 1
        for length in shape:
            product *= length
        count += product
    arch = metadata.get("general.architecture", "llama")
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    vocabulary = {f"{arch}.vocab_size": len(cast("list[str]", tokens))} if isinstance(tokens, list) else {}
    return {**vocabulary, **metadata, "general.parameter_count": count}
