"""Sizes and durations that bound one request, for every way into the router.

Fields that an operator can set are named as their keys in the configuration: `server.*`, `queue.*`, `stream.*`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from router.errors import BodyTooLarge, WaitTimeout


@dataclass(slots=True)
class RequestLimits:
    """One value for the whole router; only a reload changes it."""

    max_body_bytes: int
    queue_timeout_seconds: float
    first_byte_timeout_seconds: float
    """From the last byte of the request to the first byte of the instance's reply."""
    idle_timeout_seconds: float
    """Between two pieces of a reply."""
    max_connections: int = 8192
    """Of clients, for each listener."""
    connect_timeout_seconds: float = 5.0
    """For a new connection to an instance."""
    head_timeout_seconds: float = 30.0
    """From a request head's first byte to its last."""
    body_timeout_seconds: float = 60.0
    """Between two pieces of a request's body."""
    body_total_timeout_seconds: float = 3600.0
    """From a body's first byte to its last, except for uploads that are streamed."""
    body_bytes_per_second_min: float = 500.0
    """Least average rate of a body, after `body_timeout_seconds` in which it may be slower."""
    connection_timeout_seconds: float = 3600.0
    """Between two requests on a client's connection; long, because clients such as Go's keep theirs for as long."""
    half_closed_timeout_seconds: float = 2.0
    """For aiohttp to answer a client that has closed its sending side."""
    upload_slot_timeout_seconds: float = 2.0
    """For the rest of a body once its request holds a slot, so that a slow sender does not occupy one."""
    linger_timeout_seconds: float = 5.0
    """For reading the rest of a refused request, so that its sender sees the response and not a reset."""

    def become(self, other: RequestLimits) -> None:
        """Takes over the values of `other`, for everybody who holds these limits."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def check_body_size(self, body_bytes: int) -> None:
        """
        Raises:
            BodyTooLarge: the body is longer than `max_body_bytes`.
        """
        if body_bytes > self.max_body_bytes:
            raise BodyTooLarge(f"the request body is larger than {self.max_body_bytes} bytes (server.max_body_bytes)")

    def first_byte_timeout(self) -> WaitTimeout:
        seconds = self.first_byte_timeout_seconds
        return WaitTimeout(f"no reply from the instance within {seconds:.0f} s (stream.first_byte_timeout_seconds)")

    def idle_timeout(self) -> WaitTimeout:
        seconds = self.idle_timeout_seconds
        return WaitTimeout(f"the stream was silent for {seconds:.0f} s (stream.idle_timeout_seconds)")
