"""In what shares a server puts a model's layers on the GPUs of an instance over several.

By the GPUs' memory, so that what all hold together is held: even on equal GPUs. From 0.30 a server is told the shares
(`LLAMA_ARG_TENSOR_SPLIT`). One before that cannot be told and is taken to share evenly, as it does on GPUs that have
as much free; by its source (v0.24, `llm/server.go`, `findBestFit`) it goes by what is free on each GPU when it loads,
which is not known when a load is planned. It puts no bytes to the layers: that is
`router/engines/ollama/footprint_estimator.py`.

Source: llama.cpp, `--tensor-split` (common/arg.cpp: numbers by comma or slash; GPUs beyond them get nothing).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec
from router.engines.ollama.server_version import parse_version

TENSOR_SPLIT = "LLAMA_ARG_TENSOR_SPLIT"
_GIB = 1024**3
_KEPT_GIB = 2
"""About what each GPU keeps, whatever its size: the driver's own, the margin, a CUDA context, a compute buffer."""

Shares = tuple[float, ...]


@lru_cache(maxsize=1024)
def memory_shares(total_bytes: tuple[int, ...]) -> Shares:
    """By what each GPU has for layers, in whole GiB; GPUs that differ by less are equal, and have 1 each."""
    sizes = tuple(float(max(1, round(total / _GIB) - _KEPT_GIB)) for total in total_bytes)
    return (1.0,) * len(sizes) if len(set(sizes)) <= 1 else sizes


def split_text(shares: Shares) -> str:
    """As `LLAMA_ARG_TENSOR_SPLIT` has them: `22,10`."""
    return ",".join(f"{share:g}" for share in shares)


@lru_cache(maxsize=256)
def parsed_split(text: str) -> Shares:
    """The shares that such a text names; empty where it is none."""
    try:
        shares = tuple(float(part) for part in re.split("[,/]", text)) if text.strip() else ()
    except ValueError:
        return ()
    return shares if all(share >= 0.0 for share in shares) and 0.0 < sum(shares) < float("inf") else ()


def shares_for(told: Shares, gpus: int) -> Shares:
    """What of these shares so many GPUs get; even ones where none are told, or none for these."""
    shares = (*told[:gpus], *(0.0,) * (gpus - len(told)))
    return shares if any(shares) else (1.0,) * gpus


def told_shares(like: InstanceSpec, gpus: Sequence[Gpu]) -> InstanceSpec:
    """`like` for a new instance over these GPUs, with the variable that names the shares where their memory differs."""
    if TENSOR_SPLIT in like.environment:
        return like
    shares = memory_shares(tuple(gpu.memory_total_bytes for gpu in gpus))
    if len(set(shares)) <= 1:
        return like
    return replace(like, environment={**like.environment, TENSOR_SPLIT: split_text(shares)})


def shares_of(spec: InstanceSpec, version: str | None) -> Shares:
    """One for each GPU of the instance: what its server is told, where it heeds that, else even ones.

    `version`: of the server, None where it is not known yet: then it is taken for one that heeds.
    """
    number = parse_version(version)
    if number is not None and number < (0, 30):
        return (1.0,) * len(spec.gpus)
    return shares_for(parsed_split(spec.environment.get(TENSOR_SPLIT, "")), len(spec.gpus))


def unequal_text(spec: InstanceSpec) -> str:
    """The shares that the instance's variables name where they are not even, written in one way; else ""."""
    shares = shares_for(parsed_split(spec.environment.get(TENSOR_SPLIT, "")), len(spec.gpus))
    return split_text(shares) if len(set(shares)) > 1 else ""
