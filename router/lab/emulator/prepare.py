"""The EMULATED fleet: what stands in for NVML and for the `ollama` executable when the router is run with `--rig`.

`prepare_rig` turns a text such as `2x3090` into a directory with GPUs and a furnished model store, and says how to
start servers on it. It starts nothing and reads no environment but the mapping that it is given.
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
from router.lab.emulator.spec import EmulatorSpec, SpecError, changed, nearest, parse_spec
from router.lab.emulator.store import Store

DIRECTORY_VARIABLE = "LLAMAYARD_RIG_DIR"
SPEED_VARIABLE = "LLAMAYARD_RIG_SPEED"
VERSION_VARIABLE = "LLAMAYARD_RIG_VERSION"


@dataclass(frozen=True, slots=True)
class PreparedEmulator:
    """An emulated machine that is ready to be run on."""

    reader: EmulatedGpuReader
    """Reads the emulated GPUs as the NVML reader reads real ones."""
    command: tuple[str, ...]
    """Starts an emulated `ollama serve`."""
    environment: Mapping[str, str]
    """What such a server needs beside the variables of Ollama."""
    models_directory: Path
    """The store of all its servers, for `OLLAMA_MODELS`."""
    title: str
    """For people: `EMULATED rig 2x3090`."""


def prepare_emulator(text: str, directory: Path, environment: Mapping[str, str]) -> PreparedEmulator:
    """Writes the rig that `text` describes into `directory`, which is made where it is missing.

    What dead processes left there is removed; living ones keep their memory until they are gone. Models of the
    catalogue that are missing from the store come back; others stay.

    Raises:
        SpecError: the text, or a variable that overrules it, describes no rig.
    """
    spec = _overruled(parse_spec(text), environment)
    names = _known_models(catalogue() if spec.models is None else spec.models)
    directory = directory.absolute()
    write_rig_file(spec, directory)
    _remove_leftovers(directory / "vram")
    models = directory / "models"
    _furnish(Store(models), names)
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
    )


def _overruled(spec: EmulatorSpec, environment: Mapping[str, str]) -> EmulatorSpec:
    """With the speed and version that variables name."""
    changes = {
        key: environment[name]
        for key, name in (("speed", SPEED_VARIABLE), ("version", VERSION_VARIABLE))
        if environment.get(name)
    }
    try:
        return replace(spec, **changed(changes))
    except SpecError as error:
        raise SpecError(f"{' or '.join((SPEED_VARIABLE, VERSION_VARIABLE))} in the environment: {error}") from error


def _known_models(names: Iterable[str]) -> tuple[str, ...]:
    known = catalogue()
    shortest = {parse_name(name).shortest: name for name in known}
    found: list[str] = []
    for name in names:
        try:
            found.append(shortest[parse_name(name).shortest])
        except (ValueError, KeyError) as error:
            raise SpecError(f"models: no {name!r} in the catalogue; " + nearest(name, known)) from error
    return tuple(found)


def _remove_leftovers(folder: Path) -> None:
    """Files of processes that are no more; `vram.uses` has removed their allocations already."""
    living = {use.pid for use in vram.uses(folder.parent)}
    for path in folder.iterdir():
        if not (path.stem.isdigit() and int(path.stem) in living):
            with contextlib.suppress(OSError):
                path.unlink()


def _furnish(store: Store, names: Iterable[str]) -> None:
    known = catalogue()
    for name in names:
        if store.get(parse_name(name)) is None:
            store.install(known[name])
