"""Factories for machines, models and requests in the simulator's tests."""

from __future__ import annotations

from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest, ModelFacts
from router.lab.simulator.gpus import GpuLedger, SimGpu
from router.lab.simulator.machine import Machine, RunStats
from router.lab.simulator.requests import Request
from router.lab.simulator.timeline import Timeline
from router.lab.simulator.weight_transfer import PageCache, WeightTransfers
from router.lab.simulator.world import WORLD

GIB = 1024**3


def gpu(index: int, gib: int = 24) -> SimGpu:
    return SimGpu(GpuUuid(f"GPU-{index}"), index, "a GPU", gib * GIB, 0, 384, 9_751_000_000, 35.6)


def model(name: str, gigabytes: float, *, blob: str | None = None, is_embedding: bool = False) -> ModelFacts:
    """A llama model of this size with 32 layers."""
    return ModelFacts(
        name=name,
        digest=name,
        blob=BlobDigest(blob or f"sha256:{name}"),
        weights_bytes=int(gigabytes * 1e9),
        architecture="llama",
        layers=32,
        embedding_length=4096,
        head_count=32,
        head_count_kv=(8,) * 32,
        key_length=128,
        value_length=128,
        vocabulary_size=128_256,
        context_length=131_072,
        is_embedding=is_embedding,
    )


def new_machine(*gpus: SimGpu, warm: tuple[ModelFacts, ...] = ()) -> Machine:
    timeline = Timeline()
    cache = PageCache(100 * GIB)
    for one in warm:
        cache.read(one.blob, one.weights_bytes)
    return Machine(timeline, WORLD, GpuLedger(gpus), WeightTransfers(timeline, WORLD, cache), RunStats())


def request(
    number: int,
    facts: ModelFacts,
    *,
    prompt: int = 100,
    tokens: int = 10,
    session: int | None = None,
    shared: int = 0,
) -> Request:
    return Request(
        id=number,
        user="user",
        session=number if session is None else session,
        turn=0,
        model=facts,
        prompt_tokens=prompt,
        shared_tokens=shared,
        generated_tokens=tokens,
    )


def play(machine: Machine, until: float | None = None) -> None:
    """Advances the clock until no timer is left, or until this time."""
    ended = False
    if until is not None:

        def stop() -> None:
            nonlocal ended
            ended = True

        machine.timeline.at(until, stop)
    while not ended and machine.timeline.step():
        pass
