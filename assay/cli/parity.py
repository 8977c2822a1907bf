"""Whether an imported model computes what its reference does: logits, every layer, padded batches, greedy tokens.

HF_DIR is a Hugging Face folder. It is imported and compared with transformers (extra `hf`; float32, eager attention,
no code from the folder, nothing downloaded), or with the tensors of --reference. Where it differs, the first place
that makes the difference is named, and the cause where changing one thing makes it vanish. Exit status 1 when it
differs, 2 for bad input.

A reference file is safetensors with input_ids [R, T] and logits [R, T, V], and where they are known hidden.0 (the
input of layer 0) to hidden.L (the last layer's output before the final norm) and final (after it), all [R, T, D];
greedy_ids [R, n] and greedy_logits [R, n, V], the likeliest continuation; leftpad.* and rightpad.*: input_ids,
attention_mask and logits of a padded batch. Of an encoder-decoder input_ids are the source, decoder_input_ids [R, U]
what the decoder reads, and enc.hidden.* and enc.final the encoder's.

Steps inside a layer: mixer_norm, mixer.q and mixer.k (after the turn), mixer.scores (the attention's shares),
mixer.mix, mixer, ffn_norm, ffn.router.logits, ffn.router.choice, ffn; enc. stands before those of an encoder. They are
seen where transformers runs; with a reference file the step is where the cause acts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Json, Part, emit_json, fail, load_parts, progress

if TYPE_CHECKING:
    from assay.hub.load import Imported
    from assay.measure.parity import Report

PADS = "pad.logits: transformers itself computes another thing for a padded row than for the row alone"


def run(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and safetensors.")],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the configuration from this file instead.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Outputs to compare with, instead of running transformers.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a row, where transformers runs.")] = 48,
    part: Part = None,
    json: Json = False,
) -> int:
    import torch

    from assay.hub.load import import_folder

    load_parts(part)
    if not folder.is_dir():
        fail(f"{folder}: no such folder")
    with progress() as bar:
        reading = bar.add_task("reading tensors")
        told = lambda done, total: bar.update(reading, completed=done, total=total)  # noqa: E731
        imported = import_folder(folder, config, torch.float32, told)
        report = compared(folder, config, reference, imported, (tokens, bar))
    notes = {"unread": list(imported.unread), "skipped": imported.skipped}
    show(report, notes)
    if json:
        emit_json({**report.as_json(), **notes})
    return 0 if report.match else 1


def compared(
    folder: Path, config: Path | None, reference: Path | None, imported: Imported, how: tuple[int, Any]
) -> Report:
    """With a file or with transformers. how: tokens a row, and where progress is shown."""
    from assay.data.settings import read_object
    from assay.hub.load import CONFIG
    from assay.measure.parity import compare
    from assay.measure.reference import numbers_of, read_reference, sample

    tokens, bar = how
    numbers = numbers_of(read_object(config or folder / CONFIG))
    inside = None
    if reference is not None:
        found = read_reference(reference, imported.spec)
    else:
        from assay.hub.live import open_live

        running = bar.add_task("running transformers", total=None)
        live = open_live(folder, imported.family, imported.spec, config)
        ids = sample(imported.spec, tokens)
        found = live.reference(ids, lambda done, total: bar.update(running, completed=done, total=total))
        inside = lambda layer, side: live.inside(layer, ids, side)  # noqa: E731
    trials = bar.add_task("comparing", total=None)
    report = compare(imported, found, numbers, inside, lambda done: bar.update(trials, description=f"trial {done}"))
    if reference is not None:
        return report
    return replace(
        report, absent=tuple(name.replace("pad.logits: not in the reference", PADS) for name in report.absent)
    )


def show(report: Report, notes: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from assay.measure.parity import TOLERANCE

    console = Console(highlight=False)
    table = Table("quantity", "max |d| / max |ref|", "", header_style="bold", pad_edge=False)
    for row in report.rows:
        table.add_row(row.quantity, f"{row.max_rel_diff:.2e}", "" if row.match else "[red]differs[/red]")
    console.print(table)
    for name in report.absent:
        console.print(f"not compared: {escape(name)}")
    for key in notes["unread"]:
        console.print(f"configuration key that nothing reads: {escape(key)}")
    for name, reason in notes["skipped"].items():
        console.print(f"tensor that no parameter needs: {escape(name)} ({escape(reason)})")
    verdict = "match" if report.match else "they differ"
    console.print(f"{verdict}: at most {report.max_rel_diff:.2e}, tolerance {TOLERANCE:g}", style="bold")
    if (first := report.first_divergence) is not None:
        where = f"layer {first.layer}, " if first.layer is not None else ""
        console.print(f"first difference: {where}step {first.step}, {first.max_rel_diff:.2e}")
        console.print(f"likely cause: {escape(first.cause or 'none of the usual ones; no single change explains it')}")
