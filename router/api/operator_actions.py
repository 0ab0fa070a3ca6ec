"""What operators can ask of the running router beyond events for the controller; the app provides it."""

from __future__ import annotations

from dataclasses import dataclass

from router.api.logs import Output
from router.api.operator_commands import Reload
from router.api.pins import ChangePin


@dataclass(frozen=True, slots=True)
class OperatorActions:
    reload: Reload
    change_pin: ChangePin
    output: Output
    """What the servers have written."""
