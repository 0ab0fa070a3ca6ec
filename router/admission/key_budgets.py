"""How much each key has used of its limits: the one writer of that state.

Whether a request fits is arithmetic on the key's limits and a few numbers (`router/domain/rate_limit.py`). A request
counts when its head is admitted. Its tokens are reserved by an estimate when it asks for a slot. When it ends, the
reservation is replaced by what the answer reports; a request that got no answer gives all of it back. Usage is not kept
across restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from router.domain.access_key import UNLIMITED, AccessKey, KeyLimits
from router.domain.rate_limit import DAY_SECONDS, MINUTE_SECONDS, full_after, level_at, seconds_until
from router.errors import RateLimited

_BUSY_RETRY_SECONDS = 1


class _Bucket:
    """One limit's level. It starts full."""

    __slots__ = ("capacity", "fill_seconds", "full_at", "period", "seconds_each")

    def __init__(self, capacity: int, fill_seconds: float, period: str) -> None:
        self.capacity, self.fill_seconds, self.period = capacity, fill_seconds, period
        self.seconds_each = fill_seconds / capacity
        self.full_at = float("-inf")

    def missing_seconds(self, amount: float, now: float) -> int:
        return seconds_until(amount, self.full_at, self.capacity, self.fill_seconds, now)

    def headers(self, kind: str, now: float) -> dict[str, str]:
        """OpenAI's, as of now."""
        level = int(level_at(self.full_at, self.capacity, self.fill_seconds, now) + 1e-6)
        return {
            f"x-ratelimit-limit-{kind}": str(self.capacity),
            f"x-ratelimit-remaining-{kind}": str(max(0, level)),
            f"x-ratelimit-reset-{kind}": f"{self.missing_seconds(self.capacity, now)}s",
        }


class _Usage:
    """What one key has used."""

    __slots__ = ("limits", "name", "requests", "running", "tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits = UNLIMITED
        self.running = 0
        """Inference requests in progress."""
        self.requests: _Bucket | None = None
        self.tokens: tuple[_Bucket, ...] = ()
        """By the minute and by the day."""

    def adopt(self, limits: KeyLimits) -> None:
        """Takes limits that have changed; an unchanged one keeps its level."""
        self.limits = limits
        before = {each.period: each for each in self.tokens}
        self.requests = _resized(self.requests, limits.requests_per_minute, MINUTE_SECONDS, "minute")
        minute = _resized(before.get("minute"), limits.tokens_per_minute, MINUTE_SECONDS, "minute")
        day = _resized(before.get("day"), limits.tokens_per_day, DAY_SECONDS, "day")
        self.tokens = tuple(bucket for bucket in (minute, day) if bucket is not None)


def _resized(bucket: _Bucket | None, capacity: int | None, fill_seconds: float, period: str) -> _Bucket | None:
    if capacity is None:
        return None
    return bucket if bucket is not None and bucket.capacity == capacity else _Bucket(capacity, fill_seconds, period)


class KeyBudgets:
    """Usage by the name of the key, at most one entry for each key of the ring."""

    __slots__ = ("_now", "_usage")

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._usage: dict[str, _Usage] = {}

    def __len__(self) -> int:
        return len(self._usage)

    def begin(self, key: AccessKey, *, takes_slot: bool) -> Charge | None:
        """Counts a request; None for a key without limits. `takes_slot`: whether it is an inference request.

        Raises:
            RateLimited: the key has no request left in this minute, or too many in progress.
        """
        limits = key.limits
        if limits is UNLIMITED:  # as the ring has it
            return None
        usage = self._usage.get(key.name)
        if usage is None:
            usage = self._usage[key.name] = _Usage(key.name)
        if usage.limits is not limits:
            usage.adopt(limits)
        requests, most = usage.requests, limits.concurrent_requests
        if most is not None and takes_slot and usage.running >= most:
            raise RateLimited(
                f"key '{key.name}' has {usage.running} requests in progress (concurrent_requests={most})",
                retry_after_seconds=_BUSY_RETRY_SECONDS,
            )
        if requests is not None:
            now = self._now()
            if requests.full_at > now and (seconds := requests.missing_seconds(1.0, now)):
                raise RateLimited(
                    f"key '{key.name}' may send {requests.capacity} requests a minute; the next in {seconds} s",
                    retry_after_seconds=seconds,
                    headers=requests.headers("requests", now),
                )
            requests.full_at = full_after(requests.full_at, 1.0, requests.seconds_each, now)
        usage.running += takes_slot
        return Charge(usage, self._now, takes_slot)

    def forget_others(self, names: Collection[str]) -> None:
        """Drops the usage of keys that are gone."""
        self._usage = {name: usage for name, usage in self._usage.items() if name in names}


class Charge:
    """One request of a key with limits. `settle` must be called exactly once."""

    __slots__ = ("_now", "_prompt_tokens", "_reserved", "_takes_slot", "_usage")

    def __init__(self, usage: _Usage, now: Callable[[], float], takes_slot: bool) -> None:
        self._usage = usage
        self._now = now
        self._takes_slot = takes_slot
        self._reserved: int | None = None
        self._prompt_tokens = 0

    def reserve(self, prompt_tokens: int, output_tokens: int) -> None:
        """Reserves the tokens that the request will probably take; does nothing when called again.

        Raises:
            RateLimited: they are not there.
        """
        buckets = self._usage.tokens
        if self._reserved is not None or not buckets:
            return
        now, tokens = self._now(), prompt_tokens + output_tokens
        for bucket in buckets:
            if bucket.full_at > now and (seconds := bucket.missing_seconds(tokens, now)):
                raise RateLimited(
                    f"key '{self._usage.name}' may use {bucket.capacity} tokens a {bucket.period}, and this request "
                    f"needs about {tokens}; in {seconds} s",
                    retry_after_seconds=seconds,
                    headers=bucket.headers("tokens", now),
                )
        self._reserved, self._prompt_tokens = tokens, prompt_tokens
        for bucket in buckets:
            taken = tokens if tokens < bucket.capacity else bucket.capacity
            bucket.full_at = full_after(bucket.full_at, taken, bucket.seconds_each, now)

    def settle(self, prompt_tokens: int | None, output_tokens: int) -> None:
        """The request has ended and took that many tokens.

        `prompt_tokens`: None if its answer began and does not say; then what was reserved for the prompt counts.
        """
        usage = self._usage
        usage.running -= self._takes_slot
        buckets = usage.tokens
        if not buckets:
            return
        tokens = (self._prompt_tokens if prompt_tokens is None else prompt_tokens) + output_tokens
        now, reserved = self._now(), self._reserved or 0
        for bucket in buckets:
            taken = tokens - (reserved if reserved < bucket.capacity else bucket.capacity)
            bucket.full_at = full_after(bucket.full_at, taken, bucket.seconds_each, now)

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, as of now."""
        usage, now = self._usage, self._now()
        headers = {} if usage.requests is None else usage.requests.headers("requests", now)
        if usage.tokens:
            tightest = min(usage.tokens, key=lambda each: level_at(each.full_at, each.capacity, each.fill_seconds, now))
            headers |= tightest.headers("tokens", now)
        return headers
