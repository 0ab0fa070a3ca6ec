"""What the scheduler asks of an inference engine, as one typed protocol: sizes, options, slots and placement rules.

The protocol is part of the domain because a snapshot carries the rules of every engine in use
(`Snapshot.engines`), and the domain imports nothing. `router/engines/base.py` adds what the supervisor and the
controller ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from router.domain.footprint import Footprint, FootprintKey
from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.policy import Pin
from router.domain.request import RunnerOptions, Ticket
from router.domain.residency import Residency

FactsT = TypeVar("FactsT")

EstimateOn = Callable[[ModelFacts, InstanceSpec, int, FactsT], tuple[int, ...]]
"""(model, instance, context in tokens of one slot, snapshot) -> bytes on each GPU, in the instance's GPU order."""


class EngineRules(Protocol[FactsT]):
    """Pure questions to one engine: the same arguments give the same answer, and nothing is read or changed.

    The type parameter is always `Snapshot`; it is a parameter so that the snapshot can hold the rules.
    `context_length` is in tokens of one slot, already cut to the trained context. Methods that take a snapshot may
    read the server's version and the GPUs from it.
    """

    @property
    def kind(self) -> str:
        """The value of `InstanceSpec.engine` and `ModelFacts.engine` that selects this engine."""
        ...

    @property
    def title(self) -> str:
        """The engine's name in messages, e.g. `Ollama`."""
        ...

    # --- memory --------------------------------------------------------------------------------------------

    def estimate_bytes(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: FactsT
    ) -> tuple[int, ...]:
        """Returns the bytes that a load takes at most on each GPU of the instance; empty without GPUs."""
        ...

    def estimate_footprint(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: FactsT
    ) -> Footprint:
        """Returns the estimate by part, for the layer split that the router asks the server for; empty without GPUs."""
        ...

    def estimate_facts(self, spec: InstanceSpec, snapshot: FactsT) -> object:
        """Returns all of the snapshot that estimates for loads on this instance depend on, comparable by `==`.

        For models without layers of their own choice (`sets_own_layers`): an estimate for one of those may depend on
        anything.
        """
        ...

    def margin_ratio(self, model: ModelFacts) -> float:
        """Returns by how much more than its estimate a load that was never measured may take."""
        ...

    def worst_case_bytes(
        self,
        estimate: EstimateOn[FactsT],
        model: ModelFacts,
        spec: InstanceSpec,
        context_length: int,
        snapshot: FactsT,
    ) -> tuple[int, ...]:
        """Returns `estimate`'s answer, raised on each GPU to what the server may put there by its own rules."""
        ...

    def is_split_certain(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: FactsT) -> bool:
        """Returns False where the server may put the whole model on one GPU of several."""
        ...

    def footprint_key(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: FactsT
    ) -> FootprintKey:
        """Returns what the load's size depends on, the server's version included as far as it matters."""
        ...

    def sets_own_layers(self, model: ModelFacts) -> bool:
        """Returns True where the model itself says how many layers go to GPUs: part of it may then be on the CPU."""
        ...

    def explain_override(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: FactsT) -> str:
        """Returns the end of a load's reason where the load overrules the server's own offload rule, else ""."""
        ...

    def runs_elsewhere(self, model: ModelFacts) -> bool:
        """Returns True where the model's servers take nothing of this machine, so that only its instances matter."""
        ...

    # --- time ----------------------------------------------------------------------------------------------

    def reload_seconds(self, model: ModelFacts, fixed_seconds: float, bytes_per_second: float) -> float:
        """Returns the seconds from the decision to the first slot. The arguments are what recent loads showed."""
        ...

    # --- slots and options ---------------------------------------------------------------------------------

    def slots(self, model: ModelFacts, spec: InstanceSpec) -> int:
        """Returns how many requests for the model the instance serves at once."""
        ...

    def runner_options(
        self, model: ModelFacts, requested: Mapping[str, object], default_context_length: int
    ) -> RunnerOptions:
        """Returns those options of a request that need a reload where they differ; defaults are left out."""
        ...

    def default_options(self, model: ModelFacts, pin: Pin | None, default_context_length: int) -> RunnerOptions:
        """Returns the options of a load that no request asked for."""
        ...

    def default_context_length(self, model: ModelFacts, default_context_length: int) -> int:
        """Returns the context of a request that names none."""
        ...

    def options_with_context(
        self, model: ModelFacts, context_length: int, default_context_length: int
    ) -> RunnerOptions:
        """Returns the model's default options with this context."""
        ...

    def requested_context(self, options: RunnerOptions) -> int | None:
        """Returns the context that the options name, uncut."""
        ...

    def context_length(self, options: RunnerOptions, model: ModelFacts, spec: InstanceSpec) -> int:
        """Returns the context of one slot of a replica with these options on that instance."""
        ...

    def load_options(self, model: ModelFacts, options: RunnerOptions, default_context_length: int) -> RunnerOptions:
        """Returns the options as a load must spell them out, so that the model's own do not replace defaults."""
        ...

    def can_adapt(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        """Returns True where a replica with other options can serve a flexible ticket."""
        ...

    def gives_by_default(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        """Returns True where the replica has the context that its server gives a request which cannot name one, and
        that is enough for the ticket: the server then serves it without a reload."""
        ...

    # --- instances -----------------------------------------------------------------------------------------

    def tuned_for(self, like: InstanceSpec, gpus: Sequence[Gpu]) -> InstanceSpec:
        """Returns `like` with what a new instance over these GPUs has to be told about them."""
        ...
