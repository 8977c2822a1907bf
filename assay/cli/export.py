"""Write a checkpoint for other software: a Hugging Face folder or a GGUF file.

hf: config.json and safetensors of the architecture that computes exactly this model, where transformers has one; else
with modelling code that delegates to assay (trust_remote_code). gguf: for llama.cpp, where it has the architecture.
DIR must not exist or be empty. A README.md with the spec, the recipe and the scores goes with the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Json, Part, emit_json, fail, load_parts

if TYPE_CHECKING:
    from assay.hub.card import Origin

DTYPES = {"hf": ("f32", "bf16"), "gguf": ("f32", "bf16", "q8_0", "q4_0")}
SCORES = ("step", "tokens", "loss_nats", "valid_nats", "valid_bits_per_byte")


def run(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; new or empty.")],
    form: Annotated[str, typer.Option("--format", help=f"{', '.join(DTYPES)}.")] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="f32, bf16; gguf also q8_0, q4_0. [default: as the checkpoint was saved]"),
    ] = None,
    part: Part = None,
    json: Json = False,
) -> None:
    if form not in DTYPES:
        fail(f"--format {form!r}: accepted: {', '.join(DTYPES)}")
    if dtype is not None and dtype not in DTYPES[form]:
        fail(f"--dtype {dtype!r}: accepted for --format {form}: {', '.join(DTYPES[form])}")
    load_parts(part)
    from assay.hub.export import check_new, export_hf
    from assay.hub.gguf_export import export_gguf
    from assay.train.checkpoint import load_checkpoint

    check_new(out)
    model, tokenizer, spec = load_checkpoint(checkpoint)
    write: Any = {"hf": export_hf, "gguf": export_gguf}[form]
    done = write(model, tokenizer, out, dtype, origin(checkpoint))
    print(f"{out}: {told(done.family, form)}, {sum(done.bytes.values()):,} bytes")
    if json:
        from assay.spec.load import digest

        emit_json({"format": form, "out": str(out), "spec_digest": digest(spec), **vars(done)})


def told(family: str | None, form: str) -> str:
    if family is None:
        return "no architecture of transformers is this model, so it carries its own code (trust_remote_code)"
    return f"a {family} model" + (" as GGUF" if form == "gguf" else "")


def origin(folder: Path) -> Origin:
    """What the checkpoint's folder tells about its training; nothing, for a model that was not trained here."""
    from assay.hub.card import Origin
    from assay.spec.load import digest
    from assay.train.checkpoint import RECIPE
    from assay.train.folder import METRICS, read_metrics
    from assay.train.recipe import load_recipe

    name, path = folder.resolve().name, folder / RECIPE
    if not path.is_file():
        return Origin(name)
    last: dict[str, Any] = {}
    for row in read_metrics(folder / METRICS):
        last |= row
    scores = {key: last[key] for key in SCORES if key in last}
    return Origin(name, path.read_text("utf-8"), digest(load_recipe(folder)), scores)
