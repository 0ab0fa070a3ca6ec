"""Sets up the EMULATED machine: replaces NVML and the `ollama` executable when the router runs with `--rig`.

`prepare_emulator` turns a specification such as `2x3090` into a directory with GPUs and a filled model store, and
returns how to start servers on it. Starts nothing; reads only the environment mapping it is given.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from router.domain.model_names import parse_name
from router.lab.emulator import vram
from router.lab.emulator.catalogue import catalogue
from router.lab.emulator.gpu_reader import EmulatedGpuReader, write_rig_file
from router.lab.emulator.runner_process import PACKAGE_ROOT
from router.lab.emulator.spec import EmulatorSpec, SpecError, parse_spec, read_overrides, suggestion
from router.lab.emulator.store import Store

DIRECTORY_VARIABLE = "LLAMAYARD_RIG_DIR"
SPEED_VARIABLE = "LLAMAYARD_RIG_SPEED"
VERSION_VARIABLE = "LLAMAYARD_RIG_VERSION"
_OVERRIDES = {
    "speed": SPEED_VARIABLE,
    "version": VERSION_VARIABLE,
    "deviation": "LLAMAYARD_RIG_DEVIATION",
    "seed": "LLAMAYARD_RIG_SEED",
}
"""Key of the specification -> environment variable that overrides it."""


@dataclass(frozen=True, slots=True)
class PreparedEmulator:
    """An emulated machine that is ready to start servers."""

    reader: EmulatedGpuReader
    """Reads the emulated GPUs; same interface as the NVML reader."""
    command: tuple[str, ...]
    """Starts an emulated `ollama serve`."""
    environment: Mapping[str, str]
    """Environment variables of these servers, in addition to Ollama's."""
    models_directory: Path
    """Model store shared by all its servers, for `OLLAMA_MODELS`."""
    title: str
    """Display name: `EMULATED rig 2x3090`."""
    spec: EmulatorSpec


def prepare_emulator(text: str, directory: Path, environment: Mapping[str, str]) -> PreparedEmulator:
    """Writes the emulated machine that `text` specifies into `directory`, creating it if missing.

    Files of dead processes are removed; living processes keep their memory. Missing catalogue models are reinstalled;
    other models stay.

    Raises:
        SpecError: the text or an overriding variable is invalid.
    """
    spec = _with_overrides(parse_spec(text), environment)
    names = _catalogue_names(catalogue() if spec.models is None else spec.models)
    directory = directory.absolute()
    write_rig_file(spec, directory)
    _remove_leftovers(directory / "vram")
    models = directory / "models"
    _install_missing(Store(models), names)
    root = str(PACKAGE_ROOT)
    path = f"{root}:{environment['PYTHONPATH']}" if environment.get("PYTHONPATH") else root
    return PreparedEmulator(
        reader=EmulatedGpuReader(directory),
        command=(sys.executable, "-m", "router.lab.emulator.server", "serve"),
        environment={
            DIRECTORY_VARIABLE: str(directory),
            VERSION_VARIABLE: spec.version,
            SPEED_VARIABLE: repr(spec.speed),
            "PYTHONPATH": path,
        },
        models_directory=models,
        title=f"EMULATED rig {text}",
        spec=spec,
    )


def _with_overrides(spec: EmulatorSpec, environment: Mapping[str, str]) -> EmulatorSpec:
    """Applies the environment variables."""
    overrides = {key: environment[name] for key, name in _OVERRIDES.items() if environment.get(name)}
    try:
        return replace(spec, **read_overrides(overrides))
    except SpecError as error:
        raise SpecError(f"{' or '.join(_OVERRIDES[key] for key in overrides)} in the environment: {error}") from error


def _catalogue_names(names: Iterable[str]) -> tuple[str, ...]:
    models = catalogue()
    catalogue_names = {parse_name(name).shortest: name for name in models}
    resolved: list[str] = []
    for name in names:
        try:
            resolved.append(catalogue_names[parse_name(name).shortest])
        except (ValueError, KeyError) as error:
            raise SpecError(f"models: no {name!r} in the catalogue; " + suggestion(name, models)) from error
    return tuple(resolved)


def _remove_leftovers(folder: Path) -> None:
    """Removes files of dead processes; `vram.allocations` has already removed their records."""
    live_pids = {allocation.pid for allocation in vram.allocations(folder.parent)}
    for path in folder.iterdir():
        if not (path.stem.isdigit() and int(path.stem) in live_pids):
            with contextlib.suppress(OSError):
                path.unlink()


def _install_missing(store: Store, names: Iterable[str]) -> None:
    models = catalogue()
    for name in names:
        if store.get(parse_name(name)) is None:
            store.install(models[name])
