"""What the router asks of an inference engine, as typed protocols: `engines/ollama/engine.py` and
`engines/openai/engine.py` answer.

Each part of the router knows only the protocol that it needs:

- the scheduler: `SchedulingRules`, pure questions about memory, options, slots and placement;
- the supervisor: `ServerRules`, how a server is started, probed, and what its output says of its GPUs;
- the controller's poller: `ModelSource`, what is loaded and which models there are;
- the controller's effects: `Loader`, loads and unloads;
- the request path: `EndpointRules`, which paths a server has.

`Engine` is all of them. The engine of an instance or a model is chosen by its kind (`InstanceSpec.engine`,
`ModelFacts.engine`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from router.domain.actions import Load, Unload
from router.domain.engine_rules import EngineRules
from router.domain.events import LoadedModel, LoadFailed, LoadFinished, LoadMeasured, UnloadFinished
from router.domain.instance import InstanceSpec, InstanceView
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot

SchedulingRules = EngineRules[Snapshot]
"""Declared in the domain, because a snapshot carries the rules."""


RepeatPenalty = Literal["repeat_penalty", "repetition_penalty"] | None
"""What a server that has OpenAI's API calls the penalty on repeated tokens; None: it has none, nor other extensions."""


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """How a model is asked for on a server that has OpenAI's API."""

    name: str
    """The server's own name of the model."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Headers of each request, such as the server's key."""
    repeat_penalty: RepeatPenalty = None


class EngineError(Exception):
    """A call to a server that did not succeed. `status` is the HTTP status for it; `message` the server's text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class ProbeFailed(Exception):
    """A server gave no sign of life; the text says why."""

    is_local = False
    """Whether the router itself could not ask, for want of file descriptors: it says nothing about the server."""


class NotAsked(ProbeFailed):
    """The router itself could not ask."""

    is_local = True


class GpuReport(Protocol):
    """What one run of a server has said about its GPUs so far."""

    def read_line(self, line: str) -> bool:
        """Takes one line of output. Returns True where it said something about the GPUs."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the server cannot be trusted with its GPUs yet; None once it may serve."""
        ...

    @property
    def is_final(self) -> bool:
        """True where no further line can solve the problem."""
        ...

    @property
    def has_devices(self) -> bool:
        """True once any device was reported."""
        ...

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Devices that the server uses beyond those of its instance."""
        ...


class LoadReader(Protocol):
    """Reads from one server's output what its loads take."""

    def read_line(self, line: str) -> LoadMeasured | None:
        """Takes one line of output. Returns what a load took, with the line that ends it."""
        ...


class ServerRules(Protocol):
    """How one server process is started and watched. Its environment is `InstanceSpec.environment`."""

    def command(self, spec: InstanceSpec) -> tuple[str, ...]:
        """Returns the program and its arguments."""
        ...

    async def probe(self, url: str, timeout_seconds: float) -> str:
        """Returns the version of a server that is well.

        Raises:
            ProbeFailed: no usable answer within the timeout.
        """
        ...

    def load_reader(self, spec: InstanceSpec) -> LoadReader:
        """Returns a reader for one run of the instance's server."""
        ...

    def gpu_report(self, spec: InstanceSpec) -> GpuReport:
        """Returns an empty report for one run of the instance's server."""
        ...


class Loader(Protocol):
    """Carries loads and unloads out. Both end by themselves within their deadline and raise nothing."""

    async def load(self, load: Load) -> LoadFinished | LoadFailed: ...

    async def unload(self, unload: Unload) -> UnloadFinished: ...


class ModelSource(Protocol):
    """What the servers of one engine have. A call that fails raises `EngineError`: unknown is not empty."""

    @property
    def kind(self) -> str: ...

    @property
    def title(self) -> str: ...

    async def loaded(self, spec: InstanceSpec) -> tuple[LoadedModel, ...]:
        """Returns the models that the instance has loaded, with their facts where those are known."""
        ...

    async def refresh(self) -> None:
        """Reads the list of models anew."""
        ...

    async def facts(self, name: str) -> ModelFacts | None:
        """Returns the facts of a model by any form of its name; None where the engine has none."""
        ...

    async def tidy(self) -> bool:
        """Removes what an earlier run left behind. Returns False to be called again later."""
        ...


class EndpointRules(Protocol):
    """Which paths a server has."""

    def known(self, view: InstanceView, path: str) -> bool | None:
        """Returns whether the server has the path; None where it has not been asked yet."""
        ...

    async def has(self, view: InstanceView, path: str) -> bool:
        """Asks the server whether it has the path, unless the answer is known.

        Raises:
            InstanceLost: it cannot be asked.
        """
        ...


class Engine(SchedulingRules, ServerRules, Loader, ModelSource, Protocol):
    """Everything that the router asks of one engine."""

    @property
    def endpoint_support(self) -> EndpointRules: ...

    def on_demand_instance(self, spec: InstanceSpec, port: int) -> InstanceSpec:
        """Returns the instance that the dispatcher asked for, with its address and its whole environment."""
        ...
