"""What an operator has taken out of service. It takes no new work, finishes what runs, and its models are unloaded."""

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

    def __bool__(self) -> bool:
        return self.everything or bool(self.gpus or self.instances)

    def has_gpu(self, gpu: GpuUuid) -> bool:
        """Returns True if nothing new may use the GPU."""
        return self.everything or gpu in self.gpus

    def covers(self, spec: InstanceSpec) -> bool:
        """Returns True if the instance takes no new work: by its name, or because of one of its GPUs."""
        if not self:
            return False
        return self.everything or spec.name in self.instances or not self.gpus.isdisjoint(spec.gpus)

    def plus(self, target: DrainTarget) -> Drained:
        if target.gpu is not None:
            return replace(self, gpus=self.gpus | {target.gpu})
        if target.instance is not None:
            return replace(self, instances=self.instances | {target.instance})
        return replace(self, everything=True)

    def minus(self, target: DrainTarget) -> Drained:
        """Without the target; nothing is drained any more if that is everything."""
        if target.gpu is not None:
            return replace(self, gpus=self.gpus - {target.gpu})
        if target.instance is not None:
            return replace(self, instances=self.instances - {target.instance})
        return Drained()


NOTHING_DRAINED = Drained()
