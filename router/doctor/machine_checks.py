"""Checks of Ollama, its store, the host and the endpoint. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from router.doctor.facts import DoctorFacts, Unread
from router.doctor.finding import Check, Outcome, failure, not_checked, note, ok, or_ok, warning
from router.doctor.known_versions import OLDEST_SERVED, faults_of
from router.engines.ollama.server_version import parse_version

_GIB = 1024**3
SLOW_STORE_BYTES_PER_SECOND = 0.5e9
"""A SATA disk: the 42 GB of a 70B take over a minute."""
LITTLE_SPACE_RATIO = 0.05

REPLACED_VARIABLES: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "instances[].gpus",
    "OLLAMA_CONTEXT_LENGTH": "ollama.context_length",
    "OLLAMA_FLASH_ATTENTION": "ollama.flash_attention",
    "OLLAMA_KEEP_ALIVE": "ollama.keep_alive",
    "OLLAMA_KV_CACHE_TYPE": "ollama.kv_cache_type",
    "OLLAMA_MODELS": "ollama.models",
    "OLLAMA_NUM_PARALLEL": "ollama.num_parallel",
    "OLLAMA_ORIGINS": "server.cors_origins",
    "OLLAMA_SCHED_SPREAD": "ollama.spread",
}
"""What replaces a server's variable; others go to `ollama.env`."""


def binary(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.ollama.binary, Unread):
        return [failure(facts.ollama.binary.reason, "curl -fsSL https://ollama.com/install.sh | sh")]
    return ok(facts.ollama.binary)


def version(facts: DoctorFacts) -> list[Outcome]:
    told = facts.ollama.version
    if isinstance(told, Unread):
        return not_checked(told.reason)
    number = parse_version(told)
    if number is None:
        return not_checked(f"no version can be read from {told!r}")
    newer = "curl -fsSL https://ollama.com/install.sh | sh   (then restart the router)"
    if number < OLDEST_SERVED:
        return [failure(f"Ollama {told}: the router serves {'.'.join(map(str, OLDEST_SERVED))} and newer", newer)]
    gpus = () if isinstance(facts.gpus, Unread) else tuple(each.gpu for each in facts.gpus)
    capabilities = tuple(gpu.compute_capability for gpu in gpus if gpu.compute_capability is not None)
    unequal = len({gpu.memory_total_bytes for gpu in gpus}) > 1
    outcomes = [
        warning(f"Ollama {told}: reported: {fault.what} ({fault.url})", newer)
        for fault in faults_of(number, capabilities, has_unequal_gpus=unequal)
    ]
    return or_ok(outcomes, f"Ollama {told}")


def stock_service(facts: DoctorFacts) -> list[Outcome]:
    if facts.ollama.stock_service:
        return [warning(facts.ollama.stock_service, "sudo systemctl disable --now ollama")]
    return ok("none runs")


def environment(facts: DoctorFacts) -> list[Outcome]:
    outcomes = [_ignored(name, value, "this shell") for name, value in sorted(facts.ollama.environment.items())]
    unit = facts.ollama.service_environment
    if isinstance(unit, Unread):
        outcomes.append(note(f"the stock service's unit is not checked: {unit.reason}"))
    else:
        outcomes += [_ignored(name, value, "ollama.service") for name, value in sorted(unit.items())]
    return or_ok(outcomes, "no variable that the router's servers would ignore")


def _ignored(name: str, value: str, where: str) -> Outcome:
    key = REPLACED_VARIABLES.get(name, f"ollama.env: {{{name}: …}}")
    return warning(f"{name}={value} in {where} has no effect on the router's servers", f"set {key} instead")


def store_access(facts: DoctorFacts) -> list[Outcome]:
    store = facts.store
    if not store.exists:
        return [note(f"{store.folder} does not exist yet: the first pull creates it", "ollama pull llama3.1:8b")]
    if not store.is_readable:
        return [failure(f"{store.folder} cannot be read by this user", f"sudo setfacl -R -m u:$USER:rX {store.folder}")]
    if not store.is_writable:
        words = f"{store.folder} cannot be written by this user: pull, create and delete fail"
        return [warning(words, f"sudo setfacl -R -m u:$USER:rwX {store.folder}")]
    return ok(str(store.folder))


def store_space(facts: DoctorFacts) -> list[Outcome]:
    store = facts.store
    if not store.total_bytes:
        return not_checked(f"the file system of {store.folder} cannot be read")
    words = f"{store.free_bytes / _GIB:.0f} of {store.total_bytes / _GIB:.0f} GiB free"
    clean = "ollama list; ollama rm MODEL"
    if store.free_bytes < _GIB:
        return [failure(f"{words}: pulls fail", clean)]
    if store.free_bytes < LITTLE_SPACE_RATIO * store.total_bytes:
        return [warning(words, clean)]
    return ok(words)


def store_speed(facts: DoctorFacts) -> list[Outcome]:
    rate = facts.store.read_bytes_per_second
    if isinstance(rate, Unread):
        return not_checked(rate.reason)
    largest = _largest_bytes(facts)
    loads = f": the largest model ({largest / 1e9:.1f} GB) loads in {largest / rate:.0f} s" if largest and rate else ""
    words = f"{rate / 1e9:.2f} GB/s{loads}"
    if rate < SLOW_STORE_BYTES_PER_SECOND:
        return [warning(words, "move the models to an NVMe disk and set ollama.models")]
    return ok(words)


def host_memory(facts: DoctorFacts) -> list[Outcome]:
    largest, total = _largest_bytes(facts), facts.host.memory_total_bytes
    if not total:
        return not_checked("the size of the host's memory cannot be read")
    if isinstance(facts.models, Unread):
        return not_checked(facts.models.reason)
    words = f"{total / _GIB:.0f} GiB"
    if largest > total:
        words += f", less than the largest model ({largest / _GIB:.0f} GiB): each load is read from the disk again"
        return [warning(words, "more memory, or ollama rm MODEL")]
    return ok(f"{words}; the largest model has {largest / _GIB:.0f} GiB")


def open_files(facts: DoctorFacts) -> list[Outcome]:
    limit, needed = facts.host.open_files_max, facts.host.open_files_needed
    if limit < needed:
        words = f"{limit} open files are allowed; a full queue needs {needed}"
        return [warning(words, f"ulimit -n {needed}   (systemd: LimitNOFILE={needed})")]
    return ok(f"{limit} are allowed")


def clock(facts: DoctorFacts) -> list[Outcome]:
    synchronized = facts.host.clock_synchronized
    if isinstance(synchronized, Unread):
        return not_checked(synchronized.reason)
    return or_ok([] if synchronized else [warning("not synchronised", "sudo timedatectl set-ntp true")], "synchronised")


def port(facts: DoctorFacts) -> list[Outcome]:
    holder, address = facts.configuration.port_holder, facts.configuration.address
    if isinstance(holder, Unread):
        return not_checked(holder.reason)
    if holder:
        words = f"{address} is taken by {holder}"
        return [failure(words, "sudo systemctl disable --now ollama   (or another server.port)")]
    return ok(f"{address} is free, or the router's own")


def devices(facts: DoctorFacts) -> list[Outcome]:
    closed = facts.host.closed_devices
    if closed:
        return [failure(f"this user may not open {', '.join(closed)}", "sudo usermod -aG video,render $USER")]
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    return ok("the GPUs' device files can be opened")


def _largest_bytes(facts: DoctorFacts) -> int:
    return 0 if isinstance(facts.models, Unread) else max((model.weights_bytes for model in facts.models), default=0)


MACHINE_CHECKS = (
    Check("ollama-binary", "ollama", "the router starts one server for each GPU from it", binary),
    Check("ollama-version", "version", "some releases do not find GPUs, or misplace models", version),
    Check("stock-service", "stock service", "it holds VRAM and the port, and the router cannot move its models",
          stock_service),
    Check("environment", "environment", "servers get their variables from the configuration only", environment),
    Check("device-files", "device files", "without them servers run on the CPU and say so in a log only", devices),
    Check("store-access", "store", "all instances share one folder of models", store_access),
    Check("store-space", "store space", "a full disk breaks pulls and logs", store_space),
    Check("store-speed", "store speed", "swapping a model costs what reading it takes", store_speed),
    Check("host-memory", "host memory", "models in the page cache load several times faster", host_memory),
    Check("open-files", "open files", "each request takes two connections", open_files),
    Check("clock", "clock", "a wrong clock breaks TLS, pulls and the order of logs", clock),
    Check("port", "port", "a server on the router's port gets its clients", port),
)  # fmt: skip
