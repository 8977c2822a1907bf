"""What the verbs share: options, errors, JSON output, progress, devices. Nothing here imports torch at the top."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from assay.model.lm import LM

DEVICES = ("auto", "cpu", "cuda", "mps")

Device = Annotated[str, typer.Option("--device", help=f"Where to run: {', '.join(DEVICES)}.")]
Part = Annotated[
    list[Path] | None,
    typer.Option("--part", metavar="FILE.py", help="A mechanism from your own file. The file is run: it is code."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Dotted changes, such as model.blocks.*.mixer.kv_heads=2 or recipe.tokens=8192."
    ),
]


class UserError(ValueError):
    """A mistake of the user's: its message is all they need to see."""


def fail(message: str) -> NoReturn:
    """End the command with exit status 2 and this one message on stderr."""
    raise UserError(message)


def debugging() -> bool:
    """Whether ASSAY_DEBUG asks for tracebacks (so does `--debug`)."""
    return os.environ.get("ASSAY_DEBUG", "") not in ("", "0")


def message_of(error: Exception) -> tuple[str, int] | None:
    """What to tell the user, and the exit status; None for what is a defect of ours and deserves its traceback."""
    if isinstance(error, typer.Abort):
        return "aborted", 1
    if isinstance(error, typer.TyperException):
        return _usage(error)
    if isinstance(error, ValidationError):
        return f"error: {_validation(error)}", 2
    if isinstance(error, ModuleNotFoundError):
        hint = install_hint(error.name or "")
        return (f"error: this needs the Python package {error.name!r}: {hint}", 2) if hint else None
    if isinstance(error, OSError):
        return f"error: {_os_error(error)}", 2
    if isinstance(error, MemoryError):
        return f"error: out of memory: {error}".rstrip(": "), 2
    return (f"error: {error}", 2) if isinstance(error, ValueError) else None


def _usage(error: typer.TyperException) -> tuple[str, int]:
    """A mistake in the command line itself: no such option, a missing argument. Without a verb: the help."""
    ctx = getattr(error, "ctx", None)
    if ctx is not None and error.message == ctx.get_help():
        return error.message, error.exit_code
    hint = f" (see {ctx.command_path} --help)" if ctx is not None else ""
    cause = error.__cause__
    given = f" Given: {cause.errors()[0]['input']!r}." if isinstance(cause, ValidationError) else ""
    return f"error: {' '.join(error.format_message().split())}{given}{hint}", error.exit_code


def _validation(error: ValidationError) -> str:
    problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
    return f"{error.title}: {'; '.join(problems)}"


def _os_error(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    where = f": {error.filename}" if error.filename else ""
    what = (
        "the disk is full; free some space and run the same command again"
        if error.errno == errno.ENOSPC
        else error.strerror
    )
    return f"{what}{where}"


def install_hint(module: str) -> str | None:
    """`pip install 'assay[extra]'` for a module that an extra of assay brings (`dev` brings them all); None for any
    other."""
    wanted = module.partition(".")[0].lower()
    try:
        requirements = metadata.requires("assay") or []
    except metadata.PackageNotFoundError:
        return None
    for line in requirements:
        name, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip(" '\"")
        plain = "".join(
            c if c.isalnum() else "_" for c in name.strip().partition("[")[0].partition(">")[0].partition("<")[0]
        )
        if extra not in ("", "dev") and plain.lower() == wanted:
            return f"pip install 'assay[{extra}]'"
    return None


def emit_json(values: Mapping[str, Any]) -> None:
    """Print one line of strict JSON on stdout: what a verb ends with under `--json`. NaN and infinities are null."""
    print(json.dumps(_finite(values), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """Where people are told things while they wait: stderr, so that stdout stays what was asked for."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A rich progress display on stderr; silent where stderr is not a terminal."""
    from rich.progress import Progress

    screen = console()
    return Progress(console=screen, disable=not screen.is_terminal, transient=True)


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator that is there; one that is named and missing is refused."""
    if name not in DEVICES:
        fail(f"--device {name!r}: accepted: {', '.join(DEVICES)}")
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [device for device, found in there.items() if found]
    if name != "auto" and name not in usable:
        fail(f"--device {name}: not available here (torch {torch.__version__}); available: {', '.join(usable)}")
    return torch.device(usable[0] if name == "auto" else name)


def in_dtype(model: LM, dtype: str) -> LM:
    """The model with weights in f32, bf16, int8 or int4. The last two are for inference; what they leave float is
    bfloat16, and so is what is stored of a sequence."""
    import torch

    from assay.passes.quantise import DTYPES, quantise

    model = quantise(model, dtype) if dtype in DTYPES else model  # of the weights as they are, not rounded twice
    return model.to(torch.float32 if dtype == "f32" else torch.bfloat16)


def load_parts(files: Iterable[Path] | None) -> None:
    """Register the mechanisms of the user's own files (`--part`); each file is run as code."""
    from assay.spec import registry

    for path in files or ():
        registry.load_file(path)


def parse_overrides(pairs: Iterable[str] | None) -> dict[str, Any]:
    """`model.` and `recipe.` paths with their values; a path of any other kind, or one given twice, is refused."""
    from assay.spec.load import parse_override

    changes: dict[str, Any] = {}
    for pair in pairs or ():
        path, value = parse_override(pair)
        if path.partition(".")[0] not in ("model", "recipe"):
            fail(f"{pair!r}: an override begins with model. or recipe.")
        if path in changes:
            fail(f"{path}: given twice")
        changes[path] = value
    return changes
