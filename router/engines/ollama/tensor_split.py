"""The shares in which a server distributes a model's layers over several GPUs.

The shares follow the memory of the GPUs, so that all of it is usable; they are equal on equal GPUs. Servers from 0.30
on receive them in `LLAMA_ARG_TENSOR_SPLIT`. Older servers ignore it and are assumed to split evenly, as they do if the
same amount is free on each GPU. By their source (v0.24, `llm/server.go`, `findBestFit`) they go by what is free at the
time of the load, which is unknown when it is planned. The bytes of each share are computed in `footprint_estimator.py`.

Source: llama.cpp, `--tensor-split` (common/arg.cpp: numbers separated by comma or slash; further GPUs get nothing).
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
"""Approximate memory of each GPU that is not available for layers: driver, margin, CUDA context, compute buffer."""

Shares = tuple[float, ...]
"""One number per GPU; only their ratios matter."""


@lru_cache(maxsize=1024)
def memory_shares(total_bytes: tuple[int, ...]) -> Shares:
    """Shares by the memory that each GPU has for layers, in whole GiB; all 1 if they are the same."""
    sizes = tuple(float(max(1, round(total / _GIB) - _KEPT_GIB)) for total in total_bytes)
    return (1.0,) * len(sizes) if len(set(sizes)) <= 1 else sizes


def split_text(shares: Shares) -> str:
    """The shares in the format of `LLAMA_ARG_TENSOR_SPLIT`: `22,10`."""
    return ",".join(f"{share:g}" for share in shares)


@lru_cache(maxsize=256)
def parsed_split(text: str) -> Shares:
    """Parses a value of `LLAMA_ARG_TENSOR_SPLIT`; empty if it is invalid."""
    try:
        shares = tuple(float(part) for part in re.split("[,/]", text)) if text.strip() else ()
    except ValueError:
        return ()
    return shares if all(share >= 0.0 for share in shares) and 0.0 < sum(shares) < float("inf") else ()


def shares_for(configured: Shares, gpus: int) -> Shares:
    """The shares of a number of GPUs, padded with 0; all 1 if none is configured for these GPUs."""
    shares = (*configured[:gpus], *(0.0,) * (gpus - len(configured)))
    return shares if any(shares) else (1.0,) * gpus


def told_shares(like: InstanceSpec, gpus: Sequence[Gpu]) -> InstanceSpec:
    """`like` for a new instance over these GPUs: with shares in its environment if their memory differs."""
    if TENSOR_SPLIT in like.environment:
        return like
    shares = memory_shares(tuple(gpu.memory_total_bytes for gpu in gpus))
    if len(set(shares)) <= 1:
        return like
    return replace(like, environment={**like.environment, TENSOR_SPLIT: split_text(shares)})


def shares_of(spec: InstanceSpec, version: str | None) -> Shares:
    """The share of each GPU of the instance: those of its environment; equal ones if its server ignores them.

    `version` is that of the server. None (unknown yet) counts as one that uses them.
    """
    number = parse_version(version)
    if number is not None and number < (0, 30):
        return (1.0,) * len(spec.gpus)
    return shares_for(parsed_split(spec.environment.get(TENSOR_SPLIT, "")), len(spec.gpus))


def unequal_text(spec: InstanceSpec) -> str:
    """The shares in the environment of the instance in canonical format; "" if they are equal."""
    shares = shares_for(parsed_split(spec.environment.get(TENSOR_SPLIT, "")), len(spec.gpus))
    return split_text(shares) if len(set(shares)) > 1 else ""
