"""What a model costs: parameters, state bytes, FLOPs and training memory, exact, before a tensor exists.

CONFIG is a shipped model, a spec YAML, a checkpoint folder, or a Hugging Face config.json or folder, of which no weight
is read. Several configs stand side by side, with what differs, and the context from which on one has the smaller state.
--hardware adds the least time that a machine's rates allow, and whether the model fits in it; `here` measures this
machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Json, Part, emit_json, fail, load_parts

if TYPE_CHECKING:
    from assay.cost.bill import Bill, Question, Sheet
    from assay.cost.hardware import Hardware, Roofline
    from assay.cost.levers import Largest
    from assay.cost.memory import Training
    from assay.cost.parallel import Share, Spread
    from assay.spec.model import ModelSpec

HERE = "here"


@dataclass(frozen=True)
class Account:
    """All that is said of one config. unread: keys of its config.json that nothing reads. share: with --parallel, what
    the process that has most of a training step has of it."""

    sheet: Sheet
    bill: Bill
    training: Training
    largest: Largest
    rooflines: dict[str, Roofline]
    unread: tuple[str, ...]
    share: Share | None = None

    @property
    def prefixed(self) -> list[str]:
        """Parts that read a prefix both ways: they are counted as if there were none."""
        sees = {one.site.name: getattr(one.part, "sees", None) for one in self.sheet.parts}
        return [name for name, rule in sees.items() if getattr(rule, "prefix", False)]

    def as_json(self) -> dict[str, Any]:
        return self.bill.as_json() | {
            "training": self.training.as_json(),
            "largest": self.largest.as_json(),
            "roofline": {name: r.as_json() for name, r in self.rooflines.items()},
            "unread": list(self.unread),
            "without_prefix": self.prefixed,
            "parallel": self.share.as_json() if self.share is not None else None,
        }


def run(
    items: Annotated[list[str], typer.Argument(metavar="CONFIG... [model.KEY=VALUE]...")],
    context: Annotated[
        int | None, typer.Option(help="Tokens in each sequence; the model's own context if absent.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16, f16, f32, int8, int4.")] = "bf16",
    kv_dtype: Annotated[str, typer.Option(help="Of the state: bf16, f16, f32, int8, int4.")] = "bf16",
    page: Annotated[int, typer.Option(help="Tokens a page: reserved bytes are whole pages.")] = 16,
    memory: Annotated[int, typer.Option(help="Encoder tokens that cross-attention reads.")] = 0,
    hardware: Annotated[
        list[str] | None,
        typer.Option(help="A shipped name, a YAML file, or `here`, which is measured; may be given again."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="State bytes and decode cost against context.")
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(metavar="AXIS=N,...", help="Training along data, shard, tensor, expert, context; offload=true."),
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="With --parallel: pieces of a step's --batch rows.")] = 1,
    part: Part = None,
    json: Json = False,
) -> None:
    from assay.cli._bill import draw, show
    from assay.cli.common import parse_overrides
    from assay.cost.bill import Question
    from assay.hub.specs import spec_of

    load_parts(part)
    configs = [i for i in items if "=" not in i]
    changes = parse_overrides([i for i in items if "=" in i])
    if not configs:
        fail("CONFIG: missing; a shipped model's name, a YAML file, a config.json or a folder is accepted")
    if any(path.startswith("recipe.") for path in changes):
        fail("a bill has no recipe; overrides here begin with model.")
    ask = Question(1 if context is None else context, batch, dtype, kv_dtype, page, memory)
    read = {name: spec_of(name, changes) for name in dict.fromkeys(configs)}
    how = spread(parallel, accumulate) if parallel is not None else None
    machines = {name: machine(name, ask.floats.dtype) for name in dict.fromkeys(hardware or ())}
    accounts = {name: account(spec, unread, ask, context, machines, how) for name, (spec, unread) in read.items()}
    if plot is not None:
        draw({name: a.sheet for name, a in accounts.items()}, plot, ask, machines)
    if json:
        emit_json(records(accounts))
        return
    show(accounts)


def records(accounts: dict[str, Account]) -> dict[str, Any]:
    """Of one config its own, of several all of them and where they cross."""
    from assay.cli._bill import crossovers

    found = {name: a.as_json() for name, a in accounts.items()}
    return next(iter(found.values())) if len(found) == 1 else {"configs": found, "crossovers": crossovers(accounts)}


def spread(text: str, pieces: int) -> Spread:
    """`data=8,shard=4,offload=true`, checked as a recipe's `parallel` is."""
    from assay.cost.parallel import Spread
    from assay.spec.load import validate
    from assay.train.parallel.spec import AXES, ParallelSpec

    items = text.split(",")
    axes = [item.partition("=") for item in items if item != "offload=true"]
    wrong = [key for key, _, count in axes if key not in AXES or not count.isdecimal()]
    if wrong:
        fail(f"--parallel: {wrong[0]!r}; accepted: AXIS=NUMBER,... with axes {', '.join(AXES)}; and offload=true")
    sizes = {key: int(count) for key, _, count in axes}
    if len(sizes) < len(axes):
        fail(f"--parallel: {text!r}; accepted: each axis once")
    offload = len(axes) < len(items)
    found = validate(ParallelSpec, sizes | {"offload": offload}, "--parallel")
    return Spread(found.sizes, pieces, offload)


def refuse_plans(spec: ModelSpec, how: Spread) -> None:
    """ValueError, by name, for what a run refuses to spread so beside what no weights can be dealt out for."""
    from assay.train.parallel import context, pipeline
    from assay.train.parallel.spec import ParallelSpec

    if (ranks := how.size("context")) > 1:
        context.refuse(spec, ranks)
    if how.size("pipeline") > 1:
        pipeline.refuse(spec, ParallelSpec(**how.sizes))


def machine(name: str, dtype: str) -> Hardware:
    """A shipped device, one of a YAML file, or this machine, measured in the dtype of the weights."""
    from assay.cost.bill import DTYPES
    from assay.cost.hardware import Hardware, load_hardware

    if name != HERE:
        return load_hardware(name)

    import torch

    from assay.measure.machine import cpu_name, matmul_flop_s, memory_byte_s, memory_bytes

    rate = matmul_flop_s(getattr(torch, DTYPES[dtype]))
    about = f"{cpu_name()}, {torch.get_num_threads()} threads, {dtype}"
    return Hardware.model_validate(
        {
            "name": about,
            "memory_bytes": memory_bytes(),
            "memory_byte_s": memory_byte_s(),
            "flop_s": {dtype: rate},
        }
    )


def account(
    spec: ModelSpec,
    unread: tuple[str, ...],
    ask: Question,
    context: int | None,
    machines: dict[str, Hardware],
    how: Spread | None,
) -> Account:
    """context: null is the model's own."""
    from dataclasses import replace

    from assay.cost.bill import Sheet
    from assay.cost.hardware import roofline
    from assay.cost.levers import largest
    from assay.cost.memory import training
    from assay.cost.parallel import share

    sheet = Sheet(spec)
    asked = replace(ask, context=spec.context if context is None else context)
    told = sheet.bill(asked)
    limits = {name: roofline(sheet, told, device) for name, device in machines.items()}
    if how is not None:
        refuse_plans(spec, how)
    part = share(sheet, asked, how) if how is not None else None
    return Account(sheet, told, training(sheet, asked), largest(sheet, told), limits, unread, part)
