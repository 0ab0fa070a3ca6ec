"""`llamayard pin MODEL GPU[,GPU]` and `unpin MODEL`: where a model must run, until the router restarts.

`--save` also writes it into the configuration file, once the router has accepted it; everything else in the file stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router.cli.config_edit import CannotEdit, with_gpus
from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_OK
from router.cli.loaded_models import loaded_models, rows_of, where
from router.cli.ps import pin_text
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient
from router.config.inputs import ConfigError

_TIMEOUT_SECONDS = 60.0
"""The router checks whether all models with rules still fit, by their files."""


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the router refuses it, or the file cannot be written."""
    inputs = inputs_of(arguments, environment)
    client = RouterClient(inputs.endpoint())
    gpus = _gpus(getattr(arguments, "gpus", None))
    if arguments.save and inputs.path is None:
        raise ConfigError(["--save: there is no configuration file: llamayard init writes one; or name it by --config"])
    body: dict[str, Any] = {"model": arguments.model, **({"gpus": gpus} if gpus else {})}
    answer = client.call("POST", "/llamayard/pin" if gpus else "/llamayard/unpin", body, _TIMEOUT_SECONDS)
    rows = rows_of(loaded_models(client.get("/llamayard/status")), answer["model"])
    problem = ""
    if arguments.save:
        assert inputs.path is not None
        problem = _saved(inputs.path, answer["model"], gpus)
    saved = str(inputs.path) if arguments.save and not problem else None
    print_problems(f"warning: {warning}" for warning in answer["warnings"])
    if arguments.json:
        print(json.dumps({**answer, "saved": saved, "replicas": rows}, indent=2, ensure_ascii=False))
    else:
        print("\n".join([_text(answer, saved), *_elsewhere(answer, rows)]))
    print_problems([problem] if problem else [])
    return EXIT_FAILED if problem else EXIT_OK


def _gpus(text: str | None) -> list[str]:
    """`0,1` -> its parts; none for `unpin`. Raises ConfigError."""
    if text is None:
        return []
    gpus = [part.strip() for part in text.split(",")]
    if not all(gpus):
        raise ConfigError([f"{text or 'no GPU'}: write one GPU or several, such as 0 or 0,1"])
    return gpus


def _saved(path: Path, model: str, gpus: Sequence[str]) -> str:
    """Writes the file; the problem if that fails."""
    kept = f"the running router has it until it restarts, but {path} is as it was: "
    by_hand = f"; write it by hand: models: {{'{model}': {{gpus: [{', '.join(gpus)}]}}}}"
    try:
        text = path.read_text(encoding="utf-8")
        edited = with_gpus(text, model, gpus)
        if edited != text:
            _replace(path.resolve(), edited)
    except CannotEdit as error:
        return f"{kept}{error}{by_hand}"
    except (OSError, UnicodeDecodeError) as error:
        return f"{kept}{getattr(error, 'strerror', None) or error}{by_hand}"
    return ""


def _replace(path: Path, text: str) -> None:
    """Writes the file anew with its rights, so that nobody reads half of it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    draft = Path(name)
    try:
        draft.write_text(text, encoding="utf-8")
        shutil.copymode(path, draft)
        owner = path.stat()
        if os.geteuid() == 0:
            os.chown(draft, owner.st_uid, owner.st_gid)
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def _text(answer: Mapping[str, Any], saved: str | None) -> str:
    pin: Mapping[str, Any] = answer["pin"] or {}
    where_saved = f", and saved in {saved}" if saved is not None else ""
    if not pin.get("gpus"):
        until = " until the router restarts" if pin.get("origin") == "run time" and saved is None else ""
        return f"{answer['model']}: is not pinned to GPUs{until}{where_saved}"
    if pin["origin"] == "configuration":
        return f"{answer['model']}: is pinned to GPU {', '.join(pin['gpus'])} by the configuration{where_saved}"
    text = pin_text({"gpus": pin["gpus"]})
    return f"{answer['model']}: pinned to {text}" + (where_saved or " until the router restarts")


def _elsewhere(answer: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    pin: Mapping[str, Any] = answer["pin"] or {}
    wanted: Sequence[str] = pin.get("gpus") or ()
    others = [row for row in rows if wanted and sorted(row["gpus"]) != sorted(wanted)]
    return [f"  it is still on {where(row)}: `llamayard unload {answer['model']}` lets it move" for row in others]
