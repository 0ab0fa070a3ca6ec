"""What is taken out of service: it takes no new work, finishes what runs, and its models are unloaded.

By an operator, or by the router itself, for GPUs that fail or are too hot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceSpec


@dataclass(frozen=True, slots=True)
class DrainTarget:
    """One GPU, one instance, or everything if neither is given."""

    gpu: GpuUuid | None = None
    instance: InstanceName | None = None


@dataclass(frozen=True, slots=True)
class Drained:
    """All that is drained now."""

    gpus: frozenset[GpuUuid] = frozenset()
    instances: frozenset[InstanceName] = frozenset()
    everything: bool = False
    unfit: tuple[tuple[GpuUuid, str], ...] = ()
    """GPUs that the router has taken out of service, each with the reason: `GPU 1 is at 92 °C`."""

    def __bool__(self) -> bool:
        return self.everything or bool(self.gpus or self.instances or self.unfit)

    def reason_of(self, gpu: GpuUuid) -> str:
        """Why the router has taken the GPU out of service; "" if it has not."""
        return next((reason for uuid, reason in self.unfit if uuid == gpu), "") if self.unfit else ""

    def has_gpu(self, gpu: GpuUuid) -> bool:
        """Returns True if nothing new may use the GPU."""
        return self.everything or gpu in self.gpus or bool(self.reason_of(gpu))

    def covers(self, spec: InstanceSpec) -> bool:
        """Returns True if the instance takes no new work: by its name, or because of one of its GPUs."""
        if not self:
            return False
        if self.everything or spec.name in self.instances or not self.gpus.isdisjoint(spec.gpus):
            return True
        return bool(self.unfit) and any(self.reason_of(gpu) for gpu in spec.gpus)

    def plus(self, target: DrainTarget) -> Drained:
        if target.gpu is not None:
            return replace(self, gpus=self.gpus | {target.gpu})
        if target.instance is not None:
            return replace(self, instances=self.instances | {target.instance})
        return replace(self, everything=True)

    def minus(self, target: DrainTarget) -> Drained:
        """Without the target; an operator drains nothing any more if that is everything."""
        if target.gpu is not None:
            return replace(self, gpus=self.gpus - {target.gpu})
        if target.instance is not None:
            return replace(self, instances=self.instances - {target.instance})
        return Drained(unfit=self.unfit)


NOTHING_DRAINED = Drained()
