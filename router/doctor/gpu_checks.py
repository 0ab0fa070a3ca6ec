"""Checks of the GPUs: driver, generation, PCIe link, heat, power, memory errors. Pure.

Limits are those of the practitioners' guide to several GPUs that the documentation names, and of Ollama's own
documentation (docs/gpu: compute capability 5.0, driver 531).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from router.doctor.facts import DoctorFacts, GpuFacts, Unread
from router.doctor.finding import Check, Outcome, failure, not_checked, note, ok, or_ok, warning
from router.doctor.kernel_log import xids
from router.domain.gpu import Gpu

_GIB = 1024**3

OLLAMA_DRIVER = (531, 0, 0)
MIXED_DRIVER = (550, 54, 14)
"""For Ada and Ampere in one machine."""
OLLAMA_CAPABILITY = (5, 0)
GOOD_CAPABILITY = (8, 0)
_AMPERE, _ADA = ((8, 0), (8, 6), (8, 7)), (8, 9)

GOOD_LINK_BYTES_PER_SECOND = 16e9
"""PCIe 4.0 x8, or 3.0 x16."""
BAD_LINK_BYTES_PER_SECOND = 4e9
"""PCIe 3.0 x4: 30–40 % fewer tokens a second for a model over several GPUs."""

WARM_CELSIUS = 85
HOT_CELSIUS = 90
POWER_TRANSIENTS_RATIO = 1.2
"""Short peaks above the limit, of all GPUs at once."""
POWER_REST_WATTS = 250
"""Processor, disks, fans."""
EXTERNAL_BYTES = _GIB
"""A desktop takes less."""


def _readable(gpus: Sequence[GpuFacts]) -> list[Gpu]:
    return [each.gpu for each in gpus if each.gpu.error is None]


def found(facts: DoctorFacts) -> list[Outcome]:
    """GPUs that the driver lists and can read, compared with the PCI bus."""
    present = facts.host.nvidia_devices
    if isinstance(facts.gpus, Unread):
        if facts.host.in_container and present:
            words = f"this container sees none of the machine's {_count(present)}: {facts.gpus.reason}"
            return [failure(words, "docker run --gpus all …   (needs nvidia-container-toolkit on the host)")]
        if present:
            words = f"{_count(present)} on the PCI bus, but the driver shows none: {facts.gpus.reason}"
            return [failure(words, "sudo dmesg | grep -i nvrm; sudo modprobe nvidia")]
        return not_checked(facts.gpus.reason)
    outcomes = [
        failure(f"GPU {gpu.index} is lost: {gpu.error}", "sudo dmesg | grep -i xid   (then reseat it and reboot)")
        for gpu in (each.gpu for each in facts.gpus)
        if gpu.error is not None
    ]
    listed = len(facts.gpus)
    if listed < present and not any(each.gpu.uuid.startswith("MIG-") for each in facts.gpus):
        words = f"the driver lists {listed} of {_count(present)} on the PCI bus"
        outcomes.append(failure(words, "sudo dmesg | grep -i nvrm   (power connector, riser, container's --gpus)"))
    return or_ok(outcomes, f"{_count(listed)}: {', '.join(_name(each.gpu) for each in facts.gpus)}")


def driver(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.gpus, Unread) or isinstance(facts.driver_version, Unread):
        return not_checked(_reason(facts.gpus, facts.driver_version))
    version = _driver_version(facts.driver_version)
    if version is None:
        return not_checked(f"the driver's version cannot be read from {facts.driver_version!r}")
    upgrade = "sudo apt install nvidia-driver-570   (or your distribution's newest), then reboot"
    if version < OLLAMA_DRIVER:
        return [failure(f"driver {facts.driver_version}: Ollama needs 531 or newer", upgrade)]
    capabilities = {gpu.compute_capability for gpu in _readable(facts.gpus)}
    if _ADA in capabilities and capabilities & set(_AMPERE) and version < MIXED_DRIVER:
        words = f"driver {facts.driver_version}: Ada with Ampere needs 550.54.14 or newer"
        return [failure(words, upgrade)]
    return ok(f"driver {facts.driver_version}")


def compute_capability(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    outcomes: list[Outcome] = []
    known = [(gpu, gpu.compute_capability) for gpu in _readable(facts.gpus) if gpu.compute_capability is not None]
    if not known:
        return not_checked("the driver does not tell it")
    for gpu, capability in known:
        text = f"{_label(gpu)}: compute capability {capability[0]}.{capability[1]}"
        if capability < OLLAMA_CAPABILITY:
            outcomes.append(failure(f"{text}: Ollama needs 5.0 and does not use it", "remove it, or replace it"))
        elif capability < GOOD_CAPABILITY:
            keep = f"placement.exclusive_gpus: {{{gpu.index}: [small models]}}"
            outcomes.append(warning(f"{text}: below 8.0 models that span GPUs are slow or fail", keep))
    return or_ok(outcomes, f"{', '.join(sorted({f'{c[0]}.{c[1]}' for _, c in known}))}, at least 8.0")


def pcie_link(facts: DoctorFacts) -> list[Outcome]:
    """The link now against the possible one, and the possible one against what models over several GPUs need."""
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    gpus = _readable(facts.gpus)
    known = [gpu for gpu in gpus if gpu.pcie_width and gpu.pcie_generation_max]  # virtual machines tell none, or 0
    if not known:
        return not_checked("the driver does not tell it, as in a virtual machine")
    outcomes = [outcome for gpu in known for outcome in _link(gpu, is_alone=len(gpus) == 1)]
    return or_ok(outcomes, ", ".join(f"GPU {gpu.index} {_possible(gpu)}" for gpu in known))


def _link(gpu: Gpu, *, is_alone: bool) -> Iterator[Outcome]:
    width, generation_max = gpu.pcie_width or 0, gpu.pcie_generation_max or 0
    width_max = gpu.pcie_width_max or width
    # An idle GPU lowers its generation to save power, but not its width.
    is_busy = (gpu.utilization_ratio or 0.0) > 0.1
    generation = (gpu.pcie_generation or generation_max) if is_busy else generation_max
    rate = 0.25e9 * 2.0 ** (generation - 1) * width
    now = f"{_label(gpu)}: PCIe {generation}.0 x{width}"
    command = f"nvidia-smi -q -i {gpu.index} -d PCI   (another slot, no riser, BIOS: bifurcation)"
    slow = "a model loads slowly" if is_alone else "a model over several GPUs"
    if rate <= BAD_LINK_BYTES_PER_SECOND:
        loss = slow if is_alone else f"{slow} loses 30–40 % of its tokens a second"
        yield (warning if is_alone else failure)(f"{now}, of {_possible(gpu)} possible: {loss}", command)
    elif width < width_max or generation < generation_max:
        yield warning(f"{now}, though {_possible(gpu)} is possible: badly seated, a riser, or a shared slot", command)
    elif rate < GOOD_LINK_BYTES_PER_SECOND and not is_alone:
        yield warning(f"{now}: below 4.0 x8, {slow} is slower", command)


def temperature(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    known = [(gpu, gpu.temperature_celsius) for gpu in _readable(facts.gpus) if gpu.temperature_celsius is not None]
    if not known:
        return not_checked("the driver does not tell it")
    outcomes: list[Outcome] = []
    for gpu, celsius in known:
        limit = round((gpu.power_limit_watts or 350) * 0.9)
        cap = f"sudo nvidia-smi -i {gpu.index} -pl {limit}   (after better airflow)"
        if celsius >= HOT_CELSIUS:
            outcomes.append(failure(f"{_label(gpu)}: {celsius} °C, the main cause of random failures", cap))
        elif celsius >= WARM_CELSIUS:
            outcomes.append(warning(f"{_label(gpu)}: {celsius} °C, close to throttling", cap))
    return or_ok(outcomes, ", ".join(f"GPU {gpu.index} {celsius} °C" for gpu, celsius in known))


def power(facts: DoctorFacts) -> list[Outcome]:
    """The power supply against the sum of the limits."""
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    limits = [gpu.power_limit_watts for gpu in _readable(facts.gpus)]
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits) or not known:
        return not_checked("the driver does not tell every power limit")
    total = sum(known)
    needed = total * POWER_TRANSIENTS_RATIO + POWER_REST_WATTS
    supply = facts.host.power_supply_watts
    words = f"the GPUs may draw {total:.0f} W, with peaks and the rest {needed:.0f} W"
    if supply is None:
        return not_checked(f"the supply's rating is not known to software ({words}): --power-supply WATTS")
    lower = f"sudo nvidia-smi -pl {max(100, round((supply - POWER_REST_WATTS) / POWER_TRANSIENTS_RATIO / len(known)))}"
    if supply < total + POWER_REST_WATTS:
        return [failure(f"{words}; the supply has {supply:.0f} W", lower)]
    if supply < needed:
        return [warning(f"{words}; the supply has {supply:.0f} W: a peak may reset the machine", lower)]
    return ok(f"{words}; the supply has {supply:.0f} W")


def kernel_errors(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.kernel_log, Unread):
        return not_checked(facts.kernel_log.reason)
    see = "sudo dmesg -T | grep -i xid"
    outcomes = [(failure if xid.is_hardware else warning)(xid.text, see) for xid in xids(facts.kernel_log)]
    return or_ok(outcomes, "no XID since the start of the kernel log")


def ecc(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    outcomes = [outcome for each in facts.gpus if each.gpu.error is None for outcome in _memory_errors(each)]
    has_ecc = [each.gpu.index for each in facts.gpus if each.health.ecc_mode is not None]
    if not has_ecc and not outcomes:
        return ok("no GPU here has ECC")
    return or_ok(outcomes, "no uncorrected memory error")


def _memory_errors(facts: GpuFacts) -> Iterator[Outcome]:
    health, label = facts.health, _label(facts.gpu)
    details = f"nvidia-smi -q -i {facts.gpu.index} -d ECC,ROW_REMAPPER"
    if health.row_remap_failed:
        yield failure(f"{label}: a broken memory row could not be replaced: the board is defective", details)
    if health.ecc_uncorrected_errors:
        yield failure(f"{label}: {health.ecc_uncorrected_errors} uncorrected memory errors: answers are wrong", details)
    if health.ecc_mode_pending is not None and health.ecc_mode != health.ecc_mode_pending:
        yield warning(
            f"{label}: ECC will be {'on' if health.ecc_mode_pending else 'off'} after a reboot", "sudo reboot"
        )


def persistence(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    known = [each for each in facts.gpus if each.health.persistence_mode is not None]
    if not known:
        return not_checked("the driver does not tell it")
    off = [str(each.gpu.index) for each in known if not each.health.persistence_mode]
    outcomes = (
        [warning(f"off on GPU {', '.join(off)}", "sudo systemctl enable --now nvidia-persistenced")] if off else []
    )
    return or_ok(outcomes, "on")


def external_memory(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    outcomes = [
        warning(f"{_label(each.gpu)}: other programs hold {each.external_bytes / _GIB:.1f} GiB", "nvidia-smi")
        for each in facts.gpus
        if each.gpu.error is None and each.external_bytes >= EXTERNAL_BYTES
    ]
    return or_ok(outcomes, "no other program holds VRAM worth naming")


def equal_gpus(facts: DoctorFacts) -> list[Outcome]:
    """Pitfall 5: sums differ between GPU generations and between layouts."""
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    kinds = sorted({_name(gpu) for gpu in _readable(facts.gpus)})
    if len(kinds) > 1:
        words = f"unequal GPUs ({', '.join(kinds)}): one seed may give different answers on each"
        return [note(words, "models.NAME.gpus: [0]   (pin models of reproducible tests to one GPU)")]
    return ok("equal GPUs; a model still answers otherwise on one GPU than over several")


def _driver_version(text: str) -> tuple[int, int, int] | None:
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    return None if match is None else (int(match[1]), int(match[2] or 0), int(match[3] or 0))


def _reason(*readings: object) -> str:
    return next((each.reason for each in readings if isinstance(each, Unread)), "")


def _count(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"


def _possible(gpu: Gpu) -> str:
    return f"{gpu.pcie_generation_max}.0 x{gpu.pcie_width_max or gpu.pcie_width}"


def _name(gpu: Gpu) -> str:
    return gpu.name.removesuffix(" (emulated)").removeprefix("NVIDIA ").removeprefix("GeForce ")


def _label(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({_name(gpu)})"


GPU_CHECKS = (
    Check("gpus-found", "GPUs", "a GPU that the driver does not show is not used", found),
    Check("gpu-driver", "driver", "older drivers lack what Ollama's CUDA and mixed generations need", driver),
    Check(
        "compute-capability", "compute capability", "the slowest GPU sets the pace of a model over several",
        compute_capability,
    ),
    Check("pcie-link", "PCIe link", "loads, and each token of a model over several GPUs, pass through it", pcie_link),
    Check("gpu-temperature", "temperature", "hot GPUs throttle, then fail in the middle of an answer", temperature),
    Check("power-supply", "power supply", "peaks of several GPUs at once reset a machine whose supply is short", power),
    Check("gpu-errors", "XIDs", "the driver reports errors of GPUs in the kernel log only", kernel_errors),
    Check("gpu-ecc", "memory errors", "uncorrected errors make wrong answers and crashes", ecc),
    Check("persistence-mode", "persistence mode", "without it the driver is unloaded when idle: each start waits",
          persistence),
    Check("external-vram", "external VRAM", "the router places models around what others hold", external_memory),
    Check("equal-answers", "equal answers", "the order of sums differs between GPUs and layouts", equal_gpus),
)  # fmt: skip
