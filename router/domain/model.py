"""A model as its files describe it: its weights, layers and abilities. Sizes are integer bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from router.domain.instance import InstanceName, InstanceSpec

BlobDigest = NewType("BlobDigest", str)
"""`sha256:…` of a weights file. Residency and slots belong to it, not to a model's name.

A digest belongs to one engine: an engine that serves the same file as another prefixes it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What decides a model's size and behaviour; read from `/api/tags` and `/api/show`."""

    name: str
    """Shortest form with its tag, e.g. `llama3.3:70b`, as `/api/tags` prints it."""
    digest: str
    """The manifest's digest."""
    blob: BlobDigest
    weights_bytes: int
    architecture: str
    layers: int
    embedding_length: int
    head_count: int
    head_count_kv: tuple[int, ...]
    """KV heads of each layer (one value per layer; layers without attention have 0)."""
    key_length: int
    value_length: int
    vocabulary_size: int
    context_length: int
    """The trained context in tokens; a larger asked one is cut to it."""
    sliding_window: int | None = None
    parameters: tuple[tuple[str, str], ...] = ()
    """PARAMETER lines of the Modelfile that matter to a runner, sorted: `("num_ctx", "4096")`."""
    is_embedding: bool = False
    input_bytes: int | None = None
    """Token embedding table, which stays in host memory, where the tensor table told its size."""
    output_bytes: int | None = None
    """Output layer, which goes to the last GPU."""
    is_shared: bool = True
    """Whether the store that all spawned instances share holds it."""
    attached_on: frozenset[InstanceName] | None = None
    """Attached servers whose own store holds it; None: it is not known that any lacks it."""
    is_opaque: bool = False
    """Whether the format of its weights is unknown: its size is its weights' until the GPUs show what it takes."""
    engine: str = "ollama"
    """Kind of the engine that serves it."""

    def is_on(self, spec: InstanceSpec) -> bool:
        """Returns True where the instance is of the model's engine and can load it."""
        if spec.engine != self.engine:
            return False
        if not spec.attached:
            return self.is_shared
        return self.attached_on is None or spec.name in self.attached_on


NO_MODEL = ModelFacts("", "", BlobDigest(""), 0, "", 0, 0, 0, (), 0, 0, 0, 0)
"""Stands where no facts are needed, as in tests of the books alone."""
