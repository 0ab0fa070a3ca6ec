"""Ollama's answers to what the scheduler asks (`domain/engine_rules.py`), from the modules that know them.

Pure and stateless: usable without a server, in the simulator and in `check-config` too.
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
from router.engines.ollama import footprint_estimator, offload_rules, runner_options
from router.engines.ollama.architectures import margin_ratio
from router.engines.ollama.tensor_split import told_shares

KIND = "ollama"


class OllamaRules:
    """Satisfies `EngineRules`; the protocol documents the methods."""

    kind = KIND
    title = "Ollama"

    def estimate_bytes(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return footprint_estimator.estimate_bytes(model, spec, context_length, snapshot)

    def estimate_footprint(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> Footprint:
        return footprint_estimator.estimated_footprint(model, spec, context_length, snapshot)

    def estimate_facts(self, spec: InstanceSpec, snapshot: Snapshot) -> object:
        return footprint_estimator.estimate_facts(spec, snapshot)

    def margin_ratio(self, model: ModelFacts) -> float:
        return margin_ratio(model)

    def worst_case_bytes(
        self, estimate: Estimate, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return footprint_estimator.worst_case_bytes(estimate, model, spec, context_length, snapshot)

    def is_split_certain(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> bool:
        return not any(footprint_estimator.may_use_single_gpu(model, spec, context_length, snapshot))

    def footprint_key(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> FootprintKey:
        version = footprint_estimator.version_of(spec, snapshot)
        return footprint_estimator.footprint_key(model, spec, context_length, version)

    def sets_own_layers(self, model: ModelFacts) -> bool:
        return model.is_opaque or runner_options.sets_num_gpu(model)

    def explain_override(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> str:
        return offload_rules.explain_override(model, spec, context_length, snapshot)

    def reload_seconds(self, model: ModelFacts, fixed_seconds: float, bytes_per_second: float) -> float:
        return fixed_seconds + model.weights_bytes / bytes_per_second

    def slots(self, model: ModelFacts, spec: InstanceSpec) -> int:
        return runner_options.slots_of(model, spec)

    def runner_options(
        self, model: ModelFacts, requested: Mapping[str, object], default_context_length: int
    ) -> RunnerOptions:
        return runner_options.runner_options(model, requested, default_context_length)

    def default_options(self, model: ModelFacts, pin: Pin | None, default_context_length: int) -> RunnerOptions:
        return runner_options.default_runner_options(model, pin, default_context_length)

    def default_context_length(self, model: ModelFacts, default_context_length: int) -> int:
        return runner_options.default_context_length_of(model, default_context_length)

    def options_with_context(
        self, model: ModelFacts, context_length: int, default_context_length: int
    ) -> RunnerOptions:
        return runner_options.with_context(model, context_length, default_context_length)

    def requested_context(self, options: RunnerOptions) -> int | None:
        return runner_options.requested_context(options)

    def context_length(self, options: RunnerOptions, model: ModelFacts, spec: InstanceSpec) -> int:
        return runner_options.context_of(options, model, spec)

    def load_options(self, model: ModelFacts, options: RunnerOptions, default_context_length: int) -> RunnerOptions:
        return runner_options.explicit_options(model, options, default_context_length)

    def can_adapt(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        return replica.context_length >= runner_options.context_of(ticket.options, ticket.model, spec)

    def gives_by_default(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        context = replica.context_length
        return (
            context == runner_options.context_of((), ticket.model, spec)
            and context >= runner_options.context_of(ticket.options, ticket.model, spec)
            and runner_options.differ_in_context_only(replica.options, ticket.options)
        )

    def runs_elsewhere(self, model: ModelFacts) -> bool:  # noqa: ARG002 (it never does)
        return False

    def tuned_for(self, like: InstanceSpec, gpus: Sequence[Gpu]) -> InstanceSpec:
        return told_shares(like, gpus)
