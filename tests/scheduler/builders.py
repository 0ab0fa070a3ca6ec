"""Builders for the tests of the scheduler: small GPUs, models, instances and snapshots.

Sizes are in MiB, so that sums are easy to check.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.domain.gpu import Gpu, GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import Policy
from router.domain.request import Layout, RunnerOptions, Ticket, TicketId
from router.domain.reservation import Reservation
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Engines, Failure, Snapshot
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.rules import KIND, OllamaRules
from router.llm_api.prompt_fingerprint import fingerprints

MIB = 1024**2
GB = 10**9

LLAMA_70B = ModelFacts(
    name="llama3.3:70b",
    digest="a6eb4748fd29",
    blob=BlobDigest("sha256:70b"),
    weights_bytes=42_520_413_916,
    architecture="llama",
    layers=80,
    embedding_length=8192,
    head_count=64,
    head_count_kv=(8,) * 80,
    key_length=128,
    value_length=128,
    vocabulary_size=128_256,
    context_length=131_072,
    input_bytes=tensor_bytes("Q4_K", (8192, 128_256)),
    output_bytes=(tensor_bytes("Q6_K", (8192, 128_256)) or 0) + (tensor_bytes("F32", (8192,)) or 0),
)
"""Llama 3.3 70B Q4_K_M, as reported by `/api/tags` and `/api/show`."""


def gpu_id(number: int) -> GpuUuid:
    return GpuUuid(f"GPU-{number}")


def gpu(number: int, free_mib: int, total_mib: int = 24_000, clock_hertz: int | None = None) -> Gpu:
    """A GPU of `total_mib`, `free_mib` of it free; faster with a higher memory clock."""
    return Gpu(
        uuid=gpu_id(number),
        index=number,
        name="test GPU",
        memory_total_bytes=total_mib * MIB,
        memory_free_bytes=free_mib * MIB,
        memory_used_bytes=(total_mib - free_mib) * MIB,
        memory_bus_width_bits=None if clock_hertz is None else 384,
        memory_clock_hertz=clock_hertz,
    )


def model(name: str, weights_mib: int = 1000, *, context_length: int = 8192, **changes: object) -> ModelFacts:
    """A small model whose blob is named after it."""
    fields: dict[str, object] = {
        "name": name,
        "digest": f"digest of {name}",
        "blob": BlobDigest(f"sha256:{name}"),
        "weights_bytes": weights_mib * MIB,
        "architecture": "llama",
        "layers": 32,
        "embedding_length": 4096,
        "head_count": 32,
        "head_count_kv": (8,) * 32,
        "key_length": 128,
        "value_length": 128,
        "vocabulary_size": 32_000,
        "context_length": context_length,
    }
    return ModelFacts(**{**fields, **changes})  # type: ignore[arg-type]


def instance(name: str, *gpus: int, slots: int = 2) -> InstanceSpec:
    return InstanceSpec(InstanceName(name), tuple(map(gpu_id, gpus)), f"http://127.0.0.1/{name}", num_parallel=slots)


def view(name: str, *gpus: int, state: InstanceState = InstanceState.READY, slots: int = 2) -> InstanceView:
    return InstanceView(instance(name, *gpus, slots=slots), state)


def residency(
    on: str,
    of: ModelFacts,
    *mib: int,
    state: ResidencyState = ResidencyState.READY,
    in_flight: int = 0,
    used_at: float = 0.0,
    slots: int = 2,
    options: RunnerOptions = (),
    load: int | None = None,
) -> Residency:
    """The model `of` on the instance `on`; `mib`: its size on each GPU of the instance."""
    return Residency(
        instance=InstanceName(on),
        blob=of.blob,
        name=of.name,
        options=options,
        state=state,
        slots=slots,
        in_flight=in_flight,
        per_gpu_bytes=tuple(size * MIB for size in mib),
        context_length=8192,
        loaded_at=0.0,
        used_at=used_at,
        expires_at=None,
        model=of,
        load_id=None if load is None else LoadId(load),
    )


def reservation(load: int, on: str, of: ModelFacts, needs: Iterable[tuple[int, int]], **times: float) -> Reservation:
    """A reservation; `needs`: pairs of GPU number and MiB."""
    needed = tuple((gpu_id(number), size * MIB) for number, size in needs)
    return Reservation(LoadId(load), InstanceName(on), of.blob, needed, times.get("made_at", 0.0),
                       times.get("sent_at"), times.get("finished_at"))  # fmt: skip


def key(on: str, of: ModelFacts) -> ResidencyKey:
    return (InstanceName(on), of.blob)


def snapshot(
    gpus: Iterable[Gpu] = (),
    views: Iterable[InstanceView] = (),
    residencies: Iterable[Residency] = (),
    reservations: Iterable[Reservation] = (),
    *,
    now: float = 1000.0,
    changed_at: float = float("-inf"),
    failures: tuple[Failure, ...] = (),
    draining: Iterable[ResidencyKey] = (),
    policy: Policy | None = None,
) -> Snapshot:
    """A snapshot without margin, unless `policy` has one, so that all free memory is available."""
    read = {found.uuid: found for found in gpus}
    return Snapshot(
        now=now,
        policy=policy or Policy(vram_margin_bytes=0),
        gpus=read,
        gpus_read_at=now,
        instances={found.spec.name: found for found in views},
        residencies={(found.instance, found.blob): found for found in residencies},
        reservations={found.load_id: found for found in reservations},
        changed_at=changed_at,
        changed_on=dict.fromkeys(read, changed_at),
        failures=failures,
        draining=frozenset(draining),
        engines=OLLAMA,
    )


def ticket(
    number: int,
    of: ModelFacts,
    *,
    options: RunnerOptions = (),
    keep_alive_seconds: float | None = None,
    arrived_at: float = 0.0,
    deadline: float = 10_000.0,
    is_flexible: bool = False,
    layout: Layout | None = None,
    client: str = "",
    session: str = "",
    prompt_tokens: int = 0,
    output_tokens_max: int | None = None,
    prompt: bytes = b"",
) -> Ticket:
    """A ticket; `prompt` determines its fingerprints, but not `prompt_tokens`."""
    return Ticket(
        TicketId(number), of, options, 0, keep_alive_seconds, arrived_at, deadline, client, session,
        prompt_tokens=prompt_tokens, output_tokens_max=output_tokens_max, is_flexible=is_flexible, layout=layout,
        fingerprints=(lambda: fingerprints(prompt)) if prompt else None,
    )  # fmt: skip


def by_weight(of: ModelFacts, spec: InstanceSpec, context: int, facts: Snapshot) -> tuple[int, ...]:
    """An `Estimate` for tests: the weights, split evenly over the GPUs."""
    count = len(spec.gpus)
    return tuple(of.weights_bytes // count for _ in range(count))


class ByWeight(OllamaRules):
    """Ollama's rules with simple footprints (`by_weight`)."""

    def estimate_bytes(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return by_weight(model, spec, context_length, snapshot)


BY_WEIGHT: Engines = {KIND: ByWeight()}
OLLAMA: Engines = {KIND: OllamaRules()}
