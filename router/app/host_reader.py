"""Reads the machine for `llamayard doctor`: PCI bus, devices, kernel log, systemd, limits, disk, port. Blocking.

Changes nothing: it opens files to read them, asks programs that only report, and binds the router's port for a moment.
Each reading has a deadline. What cannot be read is an `Unread` with the reason.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import mmap
import os
import re
import resource
import shlex
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from router.doctor.facts import HostFacts, StoreFacts, Unread

_COMMAND_SECONDS = 10.0
_PROBE_SECONDS = 2.0
_READ_SECONDS = 2.0
"""How long the speed of the store is measured."""
_READ_BYTES_MAX = 2 * 1024**3
_READ_BYTES_MIN = 64 * 1024**2
"""A smaller file says nothing about a disk."""
_CHUNK_BYTES = 8 * 1024**2
_KERNEL_RECORD_BYTES = 8192
_NVIDIA_VENDOR, _DISPLAY_CLASS = "0x10de", "0x03"
_STOCK_UNIT = "ollama"
_CLIENT_VARIABLES = frozenset({"OLLAMA_HOST"})
"""Of the `ollama` command as a client, too."""
_ERROR_HEADER = "X-Llamayard-Error"
_RUNNERS = frozenset({"ollama", "llama-server", "ollama_llama_server"})


def run(command: Sequence[str], environment: Mapping[str, str]) -> str | Unread:
    """The standard output of a program that only reports."""
    program = shutil.which(command[0], path=environment.get("PATH"))
    if program is None:
        return Unread(f"there is no program `{command[0]}`")
    try:
        done = subprocess.run(
            [program, *command[1:]],
            env=dict(environment),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unread(f"`{' '.join(command)}` does not answer: {error}")
    if done.returncode and not done.stdout.strip():
        return Unread(f"`{' '.join(command)}` fails: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return done.stdout


def host_facts(environment: Mapping[str, str], open_files_needed: int, power_supply_watts: float | None) -> HostFacts:
    return HostFacts(
        memory_total_bytes=psutil.virtual_memory().total,
        open_files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        open_files_needed=open_files_needed,
        clock_synchronized=_clock(environment),
        in_container=_in_container(environment),
        nvidia_devices=_nvidia_devices(Path("/sys/bus/pci/devices")),
        closed_devices=_closed_devices(Path("/dev")),
        power_supply_watts=power_supply_watts,
    )


def _clock(environment: Mapping[str, str]) -> bool | Unread:
    answer = run(("timedatectl", "show", "--property=NTPSynchronized", "--value"), environment)
    if isinstance(answer, Unread):
        return answer
    words = {"yes": True, "no": False}
    return words.get(answer.strip(), Unread("timedatectl does not tell whether the clock is synchronised"))


def _in_container(environment: Mapping[str, str]) -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or bool(environment.get("container"))


def _nvidia_devices(folder: Path) -> int:
    return sum(
        _text(device / "vendor") == _NVIDIA_VENDOR and _text(device / "class").startswith(_DISPLAY_CLASS)
        for device in folder.glob("*")
    )


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").strip()
    return ""


def _closed_devices(folder: Path) -> tuple[str, ...]:
    paths = sorted({*folder.glob("nvidia[0-9]*"), *folder.glob("nvidiactl"), *folder.glob("nvidia-uvm")})
    return tuple(str(path) for path in paths if not os.access(path, os.R_OK | os.W_OK))


# --- kernel log -------------------------------------------------------------------------------------------------


def kernel_log(environment: Mapping[str, str], device: Path = Path("/dev/kmsg")) -> tuple[str, ...] | Unread:
    """Lines of the kernel log since the boot, as far as the kernel keeps them."""
    with contextlib.suppress(OSError):
        return _kernel_records(device)
    answer = run(("dmesg",), environment)
    if isinstance(answer, Unread):
        return Unread(f"this user may not read the kernel log (run the doctor with sudo): {answer.reason}")
    return tuple(answer.splitlines())


def _kernel_records(device: Path) -> tuple[str, ...]:
    lines: list[str] = []
    descriptor = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                record = os.read(descriptor, _KERNEL_RECORD_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EPIPE:  # a record was overwritten meanwhile
                    continue
                raise
            if not record:
                break
            lines += _messages(record.decode("utf-8", "replace"))
    finally:
        os.close(descriptor)
    return tuple(lines)


def _messages(record: str) -> Iterator[str]:
    """The message of `6,1234,5678,-;message`; lines that begin with a space are a record's fields."""
    for line in record.splitlines():
        if not line.startswith(" "):
            yield line.partition(";")[2] or line


# --- other servers ----------------------------------------------------------------------------------------------


def stock_service(environment: Mapping[str, str]) -> str:
    """What runs a stock Ollama: its unit, or a process that no router started; "" if nothing does."""
    state = run(("systemctl", "is-active", _STOCK_UNIT), environment)
    if isinstance(state, str) and state.strip() == "active":
        return f"{_STOCK_UNIT}.service is active"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if _is_server(process.cmdline()) and not any(_is_router(each.cmdline()) for each in process.parents()):
                return f"`{shlex.join(process.cmdline()[:3])}` runs as process {process.pid}"
    return ""


def _is_server(command: Sequence[str]) -> bool:
    return bool(command) and Path(command[0]).name == "ollama" and "serve" in command


def _is_router(command: Sequence[str]) -> bool:
    return any(Path(part).name in ("llamayard", "router") for part in command) and "serve" in command


def service_environment(environment: Mapping[str, str]) -> dict[str, str] | Unread:
    """The variables that the stock service's unit gives its server; empty if there is no such unit."""
    answer = run(("systemctl", "show", _STOCK_UNIT, "--property=Environment", "--value"), environment)
    if isinstance(answer, Unread):
        return answer
    pairs = (part.partition("=") for part in shlex.split(answer))
    return server_variables({name: value for name, equals, value in pairs if equals})


def server_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that an Ollama server obeys, without those of its client."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith("OLLAMA_") or name == "CUDA_VISIBLE_DEVICES") and name not in _CLIENT_VARIABLES
    }


def is_runner(pid: int) -> bool:
    """Whether the process is one of Ollama's; True too if that cannot be told, as in a container."""
    try:
        return psutil.Process(pid).name() in _RUNNERS
    except psutil.Error:
        return True


def ollama_version(binary: str, environment: Mapping[str, str]) -> str | Unread:
    """The version of the program itself, not of a server that runs."""
    nobody = {**environment, "OLLAMA_HOST": "127.0.0.1:1"}
    answer = run((binary, "--version"), nobody)
    if isinstance(answer, Unread):
        return answer
    found = re.findall(r"version is (\S+)", answer)
    return found[-1] if found else Unread(f"`{binary} --version` tells none: {answer.strip()[:80]}")


def port_holder(host: str, port: int, *, is_tls: bool = False) -> str | Unread:
    """What listens on the address; "" if nothing does, or a router. `is_tls`: whether the router speaks TLS there."""
    if port == 0:
        return ""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        return ""
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return Unread(f"{host}:{port} cannot be tried: {error.strerror or error}")
    return _listener({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, is_tls=is_tls)


def _listener(host: str, port: int, *, is_tls: bool) -> str:
    try:
        is_router, _ = _get(host, port, "/llamayard/status", is_tls=is_tls)
        if is_router:
            return ""
        is_stock = b"Ollama is running" in _get(host, port, "/", is_tls=is_tls)[1]
        return "a stock Ollama" if is_stock else "another web server"
    except (OSError, http.client.HTTPException):
        return f"a program that does not speak {'HTTPS' if is_tls else 'HTTP'}"


def _get(host: str, port: int, path: str, *, is_tls: bool) -> tuple[bool, bytes]:
    """Whether the answer is a router's, be it an error, and its body."""
    connection = http.client.HTTPConnection(host, port, timeout=_PROBE_SECONDS)
    if is_tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only who it is, nothing is sent
        connection = http.client.HTTPSConnection(host, port, timeout=_PROBE_SECONDS, context=context)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": f"localhost:{port}"})
        reply = connection.getresponse()
        is_router = reply.status == http.client.OK or reply.getheader(_ERROR_HEADER) is not None
        return is_router, reply.read(65536)


# --- the store --------------------------------------------------------------------------------------------------


def store_facts(folder: Path) -> StoreFacts:
    existing = next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))
    try:
        usage = shutil.disk_usage(existing)
        total, free = usage.total, usage.free
    except OSError:
        total, free = 0, 0
    exists = folder.is_dir()
    manifests, blobs = folder / "manifests", folder / "blobs"
    present = [each for each in (folder, manifests, blobs) if each.is_dir()]
    return StoreFacts(
        folder=folder,
        exists=exists,
        is_readable=all(os.access(each, os.R_OK | os.X_OK) for each in present),
        is_writable=all(os.access(each, os.W_OK | os.X_OK) for each in present),
        total_bytes=total,
        free_bytes=free,
        read_bytes_per_second=_read_rate(blobs),
    )


def _read_rate(blobs: Path) -> float | Unread:
    try:
        sizes = [(path.stat().st_size, path) for path in blobs.iterdir() if path.is_file()]
    except OSError as error:
        return Unread(f"{blobs}: {error.strerror}")
    size, path = max(sizes, default=(0, blobs))
    if size < _READ_BYTES_MIN:
        return Unread("no model is large enough to measure the disk with")
    try:
        return _measured_rate(path)
    except OSError as error:
        return Unread(f"{path.name[:24]}…: cannot be read past the page cache: {error.strerror}")


def _measured_rate(path: Path) -> float:
    """Bytes a second, read from the disk itself (O_DIRECT), so that the page cache stays as it is."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        with mmap.mmap(-1, _CHUNK_BYTES) as buffer:
            started, done = time.monotonic(), 0
            while done < _READ_BYTES_MAX and time.monotonic() - started < _READ_SECONDS:
                count = os.preadv(descriptor, [buffer], done)
                if count < _CHUNK_BYTES:
                    done += count
                    break
                done += count
            return done / max(1e-6, time.monotonic() - started)
    finally:
        os.close(descriptor)
