"""Train a model with a recipe; the run's folder is a checkpoint that generate, eval and bench read.

MODEL is a shipped name, a YAML file or a checkpoint folder (its spec, not its weights); so is the recipe. Changes are
dotted paths: model.layers=4 recipe.tokens=8192. Ctrl-C saves first, and --resume goes on bit for bit, also after a
kill. metrics.jsonl in the folder has a line for every step; --track tells trackers the same.

What was imported is trained further by `assay train CKPT --from CKPT`: its weights and its tokenizer are taken, and
the optimiser is new. The shipped recipes' learning rates are for new weights; recipe.optimizer.lr sets a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import (
    Device,
    Json,
    Overrides,
    Part,
    console,
    emit_json,
    fail,
    load_parts,
    parse_overrides,
    pick_device,
)

if TYPE_CHECKING:
    from assay.train.outcome import Status, TrainResult
    from assay.train.recipe import Recipe


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped name, a YAML file or a checkpoint folder.")],
    changes: Overrides = None,
    recipe: Annotated[str, typer.Option("--recipe", help="A shipped name, a YAML file or a run's folder.")] = "quick",
    out: Annotated[Path | None, typer.Option("--out", metavar="RUN", help="The run's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="CKPT", help="Begin with another run's last save, or an import's weights."),
    ] = None,
    save_every: Annotated[float, typer.Option("--save-every", metavar="SECONDS", help="Time between saves.")] = 60.0,
    track: Annotated[
        str, typer.Option("--track", metavar="NAME,...", help="Tell tensorboard, wandb or mlflow every metric, too.")
    ] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    device: Device = "auto",
    part: Part = None,
    json: Json = False,
) -> None:
    if out is None:
        fail("--out: missing; give the folder that the run is to be kept in")
    if resume and start is not None:
        fail("--resume goes on with the run in --out, --from begins a new one: give one of them")
    load_parts(part)
    found = parse_overrides(changes)
    place = pick_device(device)

    import torch

    from assay.measure.machine import matmul_flop_s
    from assay.spec.load import load_model
    from assay.train.loop import Options, train
    from assay.train.precision import resolve
    from assay.train.recipe import load_recipe
    from assay.train.tracking.base import kinds

    spec = load_model(model, {k: v for k, v in found.items() if k.startswith("model.")})
    how = load_recipe(recipe, {k: v for k, v in found.items() if k.startswith("recipe.")})
    how = adopted(how, start, out) if start is not None else how
    dtype = getattr(torch, resolve(how, place).precision)
    first = environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks
    options = Options(
        track=kinds(track), compile=compiled, save_s=save_every, flop_s=matmul_flop_s(dtype, place) if first else None
    )
    with Watch() if first else nullcontext() as watch, on_stop(start, out, first):
        result = train(spec, how, out, start or resume, place, watch, options)
    if not first:
        return
    report(result, options.flop_s, out, json)


@contextmanager
def on_stop(start: Path | None, out: Path, speaks: bool) -> Iterator[None]:
    """Says how a run goes on that Ctrl-C stopped."""
    try:
        yield
    except KeyboardInterrupt:
        how_to = "the same command with --resume" if start is None else f"--recipe {out} --resume, without --from,"
        if speaks:
            console().print(f"stopped; {how_to} goes on from {out}", soft_wrap=True)
        raise


def report(result: TrainResult, flop_s: float | None, out: Path, json: bool) -> None:
    values = summary(result, flop_s)
    tell(values, out)
    if json:
        emit_json({**values, "checkpoint": str(out)})


def adopted(recipe: Recipe, start: Path, out: Path) -> Recipe:
    """The recipe for what `start` holds, and a line that says what is taken of it."""
    from assay.train.folder import holds_run, own_words

    if not start.is_dir():
        fail(f"--from {start}: no such folder")
    if holds_run(start):
        return recipe
    made = own_words(recipe, start)
    words = "the recipe's tokenizer, which is also its own" if made == recipe else "its own tokenizer"
    note = f"begins with the weights of {start}, {words}, and a new optimiser"
    console().print(note if made == recipe else f"{note}; to resume, --recipe {out}", soft_wrap=True)
    return made


class Watch:
    """A bar on a terminal; elsewhere a line on stderr every ten seconds."""

    def __enter__(self) -> Watch:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        screen = console()
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=screen,
            disable=not screen.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._told = -10.0
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, status: Status) -> None:
        import time

        line = describe(status)
        self._bar.update(self._task, completed=status.step, total=status.steps, description=line)
        if self._bar.disable and (time.monotonic() - self._told > 10 or status.step == status.steps):
            self._told = time.monotonic()
            console().print(line, soft_wrap=True)


def describe(status: Status) -> str:
    """One line: how far, the losses, the rates."""
    parts = [f"step {status.step}/{status.steps}", f"loss {status.loss_nats:.3f}"]
    parts += [f"valid {status.valid_nats:.3f}"] if status.valid_nats is not None else []
    parts += [f"{status.tok_s:,.0f} tok/s"]
    return "  ".join(parts + ([f"MFU {status.mfu:.0%}"] if status.mfu is not None else []))


def summary(result: TrainResult, flop_s: float | None) -> dict[str, Any]:
    """What --json prints. Losses are of the validation text: nats a token, bits a byte."""
    from assay.spec.load import digest

    found, took = result.evaluation, result.train_s * result.recipe.parallel.processes
    values: dict[str, Any] = {
        "loss_nats": found.loss_nats if found else None,
        "bits_per_byte": found.bits_per_byte if found else None,
        **({"ema_loss_nats": result.averaged.loss_nats} if result.averaged else {}),
        "train_loss_nats": result.losses[-1][1] if result.losses else None,
        "steps": result.steps,
        "tokens": result.tokens,
        "train_s": result.train_s,
        "train_tok_s": result.train_tok_s,
        "mfu": result.train_flops / took / flop_s if flop_s and took else None,
        "params": sum(p.numel() for p in result.model.parameters()),
        "precision": result.recipe.precision,
    }
    return values | {"spec_digest": digest(result.model.spec), "recipe_digest": result.recipe.digest}


def tell(values: dict[str, Any], out: Path) -> None:
    loss, bits = values["loss_nats"], values["bits_per_byte"]
    found = f"validation loss {loss:.4f} nats/token, {bits:.4f} bits/byte; " if loss is not None else ""
    print(
        f"{found}{values['steps']} steps, {values['tokens']} tokens, {values['train_tok_s']:.0f} tok/s; saved in {out}"
    )
