"""How fast a model serves, or with --train trains, and how near the machine's limits that is.

MODEL is a checkpoint, or a shipped name or YAML file, whose weights are then random. The roofline and the share of
the machine's arithmetic (MFU) stand on rates that are measured in the same run: a product of 2048 in the same dtype,
and memory read in pieces as large as the weights and the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from assay.cli.common import (
    Device,
    Json,
    Overrides,
    Part,
    emit_json,
    fail,
    in_dtype,
    load_parts,
    parse_overrides,
    pick_device,
    progress,
)

if TYPE_CHECKING:
    import torch

    from assay.model.lm import LM
    from assay.spec.model import ModelSpec
    from assay.train.recipe import Precision

DTYPES: Mapping[str, Literal["float32", "bfloat16"]] = {"f32": "float32", "bf16": "bfloat16"}
PACKED = ("int8", "int4")
"""For serving alone."""


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a shipped name or a YAML file.")],
    changes: Overrides = None,
    train: Annotated[bool, typer.Option("--train", help="Optimiser steps instead of serving.")] = False,
    prompt_len: Annotated[int, typer.Option("--prompt-len", min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to decode after it.")] = 64,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences. [default: 1; training: 16]")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="--train: tokens a row. [default: the context]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="--train: steps by the clock.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="Serving: how long to measure.")] = 5.0,
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, bf16, int8 or int4. [default: bf16 where this machine multiplies it natively]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: as torch finds them]")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="--train: through torch.compile.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Serving on a CPU: which kernel each millisecond went to.")
    ] = False,
    device: Device = "auto",
    part: Part = None,
    json: Json = False,
) -> None:
    check(dtype, train, profile)
    load_parts(part)
    found = parse_overrides(changes)
    if any(path.startswith("recipe.") for path in found):
        fail("bench has no recipe; overrides here begin with model.")
    place = pick_device(device)

    import torch

    from assay.train.precision import native_bfloat16

    if profile and place.type != "cpu":
        fail(f"--profile is of kernels on a CPU; accepted: --device cpu, not {place.type}")
    if threads is not None:
        torch.set_num_threads(threads)
    native = "bf16" if native_bfloat16(place.type) else "f32"
    name = dtype or native
    about = {"model": model, "dtype": name, "device": place.type, "threads": torch.get_num_threads()}
    if train:
        values = about | training(model, found, (batch or 16, seq, steps, DTYPES[name], compiled), place)
    else:
        values = about | serving(model, found, (batch or 1, prompt_len, new_tokens, seconds, name), place, profile)
    (tell_training if train else tell_serving)(values)
    if json:
        emit_json(values)


def check(dtype: str | None, train: bool, profile: bool) -> None:
    """Options that cannot be honoured together, by name."""
    if profile and train:
        fail("--profile is of serving; accepted: without --train")
    if train and dtype in PACKED:
        fail(f"--dtype {dtype}: weights of this kind have no gradient; accepted with --train: {', '.join(DTYPES)}")
    if dtype is not None and dtype not in (*DTYPES, *PACKED):
        fail(f"--dtype {dtype!r}: accepted: {', '.join((*DTYPES, *PACKED))}")


def training(
    source: str, changes: dict[str, Any], how: tuple[int, int | None, int, Precision, bool], place: torch.device
) -> dict[str, Any]:
    from assay.measure.training import WARM, bench_recipe, utilisation
    from assay.spec.load import load_model

    batch, seq, steps, precision, compiled = how
    spec = load_model(source, changes)
    length = seq or spec.context
    with progress() as bar:
        task = bar.add_task("training", total=WARM + steps)
        found = utilisation(
            spec, bench_recipe(batch, length, precision), place, steps, compiled, lambda _: bar.advance(task)
        )
    return {"batch": batch, "seq": length, **found.as_json()}


def opened(source: str, changes: dict[str, Any], place: torch.device) -> tuple[LM, ModelSpec]:
    """A checkpoint's model, or one with random weights."""
    from assay.model.lm import build
    from assay.spec.load import load_model
    from assay.train.checkpoint import WEIGHTS, load_checkpoint

    if (Path(source) / WEIGHTS).is_file():
        if changes:
            fail(f"{source}: a checkpoint's weights belong to its own spec; model. overrides need a spec alone")
        model, _, spec = load_checkpoint(source, place)
        return model, spec
    spec = load_model(source, changes)
    return build(spec, 0, place).eval(), spec


def serving(
    source: str,
    changes: dict[str, Any],
    how: tuple[int, int, int, float, str],
    place: torch.device,
    profile: bool = False,
) -> dict[str, Any]:
    from assay.engine.runner import check_context
    from assay.measure.memory import measured, predicted
    from assay.measure.profile import profiled
    from assay.measure.serving import Load, Serving, roofline
    from assay.ops.packed import held_bytes

    batch, prompt, new, budget_s, name = how
    model, spec = opened(source, changes, place)
    check_context(spec, prompt, new)
    model = in_dtype(model, name)
    load = Load(batch, prompt + new, new, read=prompt)
    measured_load = Serving(model, load)
    times = measured_load.measure(budget_s)
    roof = roofline(model, load)
    tok_s, read_s = batch / times.gap, batch * prompt / times.prefill
    limit = {"decode_tok_s": batch / roof.decode_s, "prefill_tok_s": batch * prompt / roof.prefill_s}
    shares = {"decode_share": tok_s / limit["decode_tok_s"], "prefill_share": read_s / limit["prefill_tok_s"]}
    return {
        "batch": batch,
        "prompt_len": prompt,
        "new_tokens": new,
        "prefill_tok_s": read_s,
        "decode_tok_s": tok_s,
        "ttft_s": times.first,
        "itl_ms_p50": 1e3 * times.gap,
        "itl_ms_p99": 1e3 * times.late(0.99),
        "weight_bytes": sum(held_bytes(p) for p in model.parameters()),
        "state_bytes_predicted": predicted(model, batch, prompt + new),
        "state_bytes_measured": measured(model, batch, prompt + new),
        "roofline": {**limit, **shares, **roof.as_json()},
        **({"profile": profiled(measured_load)} if profile else {}),
    }


def tell_training(values: dict[str, Any]) -> None:
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in values["matmul_gflop_s"].items())
    print(
        f"{values['train_tok_s']:,.0f} tok/s training (batch {values['batch']} x {values['seq']}, {values['dtype']}, "
        f"{values['threads']} threads)"
    )
    print(f"MFU {values['mfu']:.1%} of {values['mfu_of']}; exact FLOPs {values['exact_utilisation']:.1%}")
    print(f"matmul of 2048 in GFLOP/s: {rates}")


def tell_serving(values: dict[str, Any]) -> None:
    roof = values["roofline"]
    print(
        f"prefill {values['prefill_tok_s']:,.0f} tok/s ({roof['prefill_share']:.0%} of the roofline), "
        f"first token after {1e3 * values['ttft_s']:.1f} ms"
    )
    print(
        f"decode {values['decode_tok_s']:,.1f} tok/s ({roof['decode_share']:.0%} of the roofline, "
        f"{roof['decode_tok_s']:,.0f}), {values['itl_ms_p50']:.2f} ms a token, p99 {values['itl_ms_p99']:.2f}"
    )
    print(
        f"weights {values['weight_bytes']:,} bytes, state {values['state_bytes_measured']:,} bytes "
        f"(predicted {values['state_bytes_predicted']:,}), memory {roof['memory_gb_s']:.1f} GB/s"
    )
    if "profile" in values:
        from assay.measure.profile import table

        print("\n".join(table(values["profile"])))
