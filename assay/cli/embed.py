"""Vectors of texts: a model's features, pooled over each text, a JSON list a line on stdout.

MODEL is a Hugging Face folder (an encoder such as BERT, or a decoder) or a checkpoint. Texts are arguments, or the
lines of --file. How texts are pooled, whether vectors have length 1, and how long a text may be is read from what
sentence-transformers wrote into the folder; else it is the mean, length 1, and what the model can tell apart.
"""

from __future__ import annotations

import json as lines
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Device, Json, Part, console, emit_json, fail, load_parts, pick_device

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.model.lm import LM

POOLS = ("mean", "first", "last")
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder or a checkpoint.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...")] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A text a line; - reads stdin.")] = None,
    pool: Annotated[
        str | None, typer.Option(help=f"{', '.join(POOLS)}. [default: as the folder says, or mean]")
    ] = None,
    normalise: Annotated[
        bool | None,
        typer.Option("--normalise/--raw", help="Vectors of length 1. [default: as the folder says, or yes]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 32,
    device: Device = "auto",
    part: Part = None,
    json: Json = False,
) -> None:
    given = read_texts(texts, file)
    if pool is not None and pool not in POOLS:
        fail(f"--pool {pool!r}: accepted: {', '.join(POOLS)}")
    load_parts(part)
    place = pick_device(device)
    if not model.is_dir():
        fail(f"{model}: no such folder")
    wanted = {"pool": pool or said_pool(model), "normalise": said_length(model) if normalise is None else normalise}
    from assay.engine.embedding import Embedder, tokenised
    from assay.parts.heads.pooled import Pooled

    made, tokenizer = load(model)
    embedder = Embedder(made.to(place), Pooled(**wanted))
    limit = min(embedder.limit, longest(model) or embedder.limit)
    found = tokenised(tokenizer, given, limit)
    if found.cut:
        console().print(f"{len(found.cut)} of {len(given)} texts are cut to {limit} tokens")
    vectors = embedder(found.ids, batch).tolist()
    if not json:
        for vector in vectors:
            print(lines.dumps(vector))
        return
    counts = {"tokens": [len(ids) for ids in found.ids], "cut": list(found.cut)}
    emit_json({"embeddings": vectors, "dimensions": made.spec.d_model, **counts, **wanted})


def read_texts(texts: list[str] | None, file: Path | None) -> list[str]:
    if (file is None) == (not texts):
        fail("texts are missing, or given twice; accepted: TEXT ... or --file FILE")
    if file is None:
        return list(texts or ())
    try:
        content = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except UnicodeDecodeError as error:
        fail(f"--file {file}: not UTF-8: {error}")
    return content.splitlines() or fail(f"--file {file}: no lines")


def load(folder: Path) -> tuple[LM, Tokenizer]:
    from assay.hub.load import import_folder
    from assay.hub.tokenizer import folder_tokenizer
    from assay.train.checkpoint import load_checkpoint

    if (folder / "model.yaml").is_file():
        model, tokenizer, _ = load_checkpoint(folder)
        return model, tokenizer
    imported = import_folder(folder)
    for key in imported.unread:
        console().print(f"configuration key that nothing reads: {key}")
    return imported.model, folder_tokenizer(folder)


def settings(path: Path, kind: type = dict) -> Any:
    """What a JSON file of sentence-transformers says; nothing without one."""
    if not path.is_file():
        return kind()
    try:
        told = lines.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not JSON: {error}")
    return told if isinstance(told, kind) else fail(f"{path}: a JSON {kind.__name__} is expected")


def said_pool(folder: Path) -> str:
    path = folder / "1_Pooling" / "config.json"
    told = settings(path)
    modes = [key for key, value in told.items() if key.startswith("pooling_mode_") and value is True]
    if not modes:
        return "mean"
    if len(modes) > 1 or modes[0] not in MODES:
        fail(f"{path}: {', '.join(modes)}; accepted: one of {', '.join(MODES)}. --pool overrides it")
    return MODES[modes[0]]


def said_length(folder: Path) -> bool:
    """Whether a folder's vectors have length 1: it names its modules, and one of them does that."""
    modules = settings(folder / "modules.json", list)
    types = [str(module.get("type")) for module in modules if isinstance(module, dict)]
    return not modules or any(name.endswith("Normalize") for name in types)


def longest(folder: Path) -> int | None:
    length = settings(folder / "sentence_bert_config.json").get("max_seq_length")
    return length if isinstance(length, int) and length > 0 else None
