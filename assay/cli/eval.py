"""The loss of a checkpoint on a text file: nats a token, bits a byte.

FILE is UTF-8 text (one document), or .jsonl with one document a line. Every token is predicted once from those before
it in its row; rows are as long as the model's context, and a document does not see the one before it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.common import Device, Json, Part, emit_json, fail, load_parts, pick_device

PRECISIONS = {"f32": "float32", "bf16": "bfloat16"}


def run(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder.")],
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Text, or .jsonl.")] = None,
    field: Annotated[str, typer.Option("--field", help="The text's field in each line of a .jsonl file.")] = "text",
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens a row; the model's context by default.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows at once.")] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="f32 or bf16.")] = "f32",
    device: Device = "auto",
    part: Part = None,
    json: Json = False,
) -> None:
    if data is None:
        fail("--data: missing; give a text file to measure the loss on")
    if not data.is_file():
        fail(f"--data {data}: no such file")
    if dtype not in PRECISIONS:
        fail(f"--dtype {dtype!r}: accepted: {', '.join(PRECISIONS)}")
    load_parts(part)
    place = pick_device(device)
    values = losses(checkpoint, data, {"field": field, "length": length, "rows": rows}, (PRECISIONS[dtype], place))
    print(
        f"{values['loss_nats']:.4f} nats/token, {values['bits_per_byte']:.4f} bits/byte over {values['tokens']} tokens"
    )
    if json:
        emit_json(values)


def losses(checkpoint: Path, data: Path, how: dict[str, Any], where: tuple[str, Any]) -> dict[str, Any]:
    from assay.data.corpora import CorpusSpec, open_corpus
    from assay.data.loader import cover
    from assay.data.shards import encode_documents
    from assay.train.checkpoint import load_checkpoint
    from assay.train.evaluate import evaluate

    precision, device = where
    model, tokenizer, spec = load_checkpoint(checkpoint, device)
    length = how["length"] if how["length"] is not None else spec.context
    if not 1 <= length <= spec.context:
        fail(f"--length {length}: accepted: 1 to {spec.context}, the model's context")
    lines = data.suffix == ".jsonl"
    kind: dict[str, Any] = {"kind": "jsonl", "field": how["field"]} if lines else {"kind": "text"}
    corpus = open_corpus(CorpusSpec(**kind, path=str(data), valid_one_in=0))
    with tempfile.TemporaryDirectory() as folder:
        shard = encode_documents(corpus.train, tokenizer, Path(folder))
        found = evaluate(model, cover(shard, length, how["rows"]), precision)
        del shard  # mapped from the folder
    return {
        "loss_nats": found.loss_nats,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "in_context_nats": found.in_context_nats,
        "length": length,
        "precision": precision,
    }
