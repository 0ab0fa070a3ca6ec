"""What the scheduler asks of servers that run elsewhere: they take nothing of this machine, and are always loaded.

Pure and stateless. The protocol in `domain/engine_rules.py` documents the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.domain.footprint import Footprint, FootprintKey
from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.policy import Pin
from router.domain.request import RunnerOptions, Ticket
from router.domain.residency import Residency
from router.domain.snapshot import Estimate, Snapshot
from router.engines.openai.servers import KIND


class AttachedRules:
    """Satisfies `EngineRules`."""

    kind = KIND
    title = "OpenAI-compatible"

    def estimate_bytes(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return ()

    def estimate_footprint(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> Footprint:
        return Footprint.of(())

    def estimate_facts(self, spec: InstanceSpec, snapshot: Snapshot) -> object:
        return None

    def margin_ratio(self, model: ModelFacts) -> float:
        return 0.0

    def worst_case_bytes(
        self, estimate: Estimate, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return ()

    def is_split_certain(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> bool:
        return True

    def footprint_key(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> FootprintKey:
        return FootprintKey(model.blob, 0, context_length, spec.num_parallel, "")

    def sets_own_layers(self, model: ModelFacts) -> bool:
        return False

    def explain_override(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> str:
        return ""

    def reload_seconds(self, model: ModelFacts, fixed_seconds: float, bytes_per_second: float) -> float:
        return 0.0

    def slots(self, model: ModelFacts, spec: InstanceSpec) -> int:
        return spec.num_parallel

    def runner_options(
        self, model: ModelFacts, requested: Mapping[str, object], default_context_length: int
    ) -> RunnerOptions:
        return ()

    def default_options(self, model: ModelFacts, pin: Pin | None, default_context_length: int) -> RunnerOptions:
        return ()

    def default_context_length(self, model: ModelFacts, default_context_length: int) -> int:
        return model.context_length

    def options_with_context(
        self, model: ModelFacts, context_length: int, default_context_length: int
    ) -> RunnerOptions:
        return ()

    def requested_context(self, options: RunnerOptions) -> int | None:
        return None

    def context_length(self, options: RunnerOptions, model: ModelFacts, spec: InstanceSpec) -> int:
        return model.context_length

    def load_options(self, model: ModelFacts, options: RunnerOptions, default_context_length: int) -> RunnerOptions:
        return options

    def can_adapt(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        return True

    def gives_by_default(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        return True

    def tuned_for(self, like: InstanceSpec, gpus: Sequence[Gpu]) -> InstanceSpec:
        return like

    def runs_elsewhere(self, model: ModelFacts) -> bool:
        return True
