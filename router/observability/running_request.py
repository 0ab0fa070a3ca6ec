"""A request that holds a slot and is with a server now, as the dashboard shows it."""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.instance import InstanceName
from router.observability.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """Times are seconds of the controller's clock."""

    request_id: str
    client: str
    key: str
    """The name of its access key; "" without one."""
    model: str
    instance: InstanceName
    route: str
    arrived_at: float
    granted_at: float
    first_byte_at: float | None
    """None while the server works on the prompt."""
    chunks: int
    """Parts of the reply so far: for a stream about its tokens, otherwise 0 or 1."""


def running_request(record: RequestRecord, first_byte_at: float | None, chunks: int) -> RunningRequest | None:
    """Of the record of a request with a server; None if it has no slot."""
    if record.instance is None or record.granted_at is None:
        return None
    return RunningRequest(
        request_id=record.request_id,
        client=record.client,
        key="" if record.key is None else record.key.name,
        model=record.model,
        instance=record.instance,
        route=record.route,
        arrived_at=record.arrived_at,
        granted_at=record.granted_at,
        first_byte_at=first_byte_at,
        chunks=chunks,
    )
