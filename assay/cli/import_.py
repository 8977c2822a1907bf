"""Make a checkpoint from a Hugging Face folder, a GGUF file, or a model's name on the hub.

SOURCE is a folder with config.json, safetensors and tokenizer.json; a .gguf file; or owner/model[@revision], which is
fetched into the hub's cache (never with HF_HUB_OFFLINE=1; configuration, safetensors and tokenizer only). Every tensor
is used once and every parameter filled, or the import fails and says which. The tokenizer and the chat template come
along, so that bill, eval, generate and chat read the checkpoint. Quantised numbers become float32.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Json, Part, emit_json, fail, load_parts, progress

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.hub.load import Imported

DTYPES = {"f32": "float32", "bf16": "bfloat16"}


def run(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="HF_DIR, FILE.gguf or owner/model[@revision].")],
    out: Annotated[Path | None, typer.Option("--out", metavar="CKPT", help="The checkpoint's folder.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: f32 or bf16. [default: as they are; f32 from GGUF]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take tokenizer and chat template from this folder.")
    ] = None,
    part: Part = None,
    json: Json = False,
) -> None:
    if out is None:
        fail("--out: missing; give the folder that the checkpoint is to be kept in")
    if dtype is not None and dtype not in DTYPES:
        fail(f"--dtype {dtype!r}: accepted: {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"--out {out}: is there already, and is not an empty folder")
    load_parts(part)
    began = time.perf_counter()
    imported, words, asked = opened(source, dtype, tokenizer)
    keep(out, imported, words)
    values = {
        **summary(imported, words),
        "generation": asked,
        "import_s": time.perf_counter() - began,
        "checkpoint": str(out),
    }
    tell(values)
    if json:
        emit_json(values)


def opened(source: str, dtype: str | None, folder: Path | None) -> tuple[Imported, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer, which is read first (it is small, and what is missing is known at once), and the
    settings for replies that are not taken over."""
    import torch

    from assay.data.settings import Generation
    from assay.hub.generation import unheeded
    from assay.hub.gguf import read_gguf
    from assay.hub.gguf_config import source_of
    from assay.hub.load import import_folder, load
    from assay.hub.remote import fetch, is_name
    from assay.hub.tokenizer import folder_tokenizer, gguf_tokenizer

    kind = None if dtype is None else getattr(torch, DTYPES[dtype])
    path = Path(source)
    if not path.exists() and is_name(source) and path.suffix != ".gguf":
        path = fetch(source)
    with progress() as bar:
        task = bar.add_task("reading tensors")
        told = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        if path.is_dir():
            words = folder_tokenizer(folder or path)
            if folder is not None:  # what a decoder begins with is the model's, not the vocabulary's
                words = replace(words, starts=Generation.of(path).starts)
            return import_folder(path, dtype=kind, told=told), words, unheeded(path)
        file = read_gguf(path)
        words = folder_tokenizer(folder) if folder is not None else gguf_tokenizer(file.metadata, file.where)
        return load(source_of(file), kind, told), words, {}


def keep(out: Path, imported: Imported, tokenizer: Tokenizer) -> None:
    """Write the checkpoint beside its place, and put it there whole."""
    from assay.train.checkpoint import save_checkpoint

    if tokenizer.vocab_size > imported.spec.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {imported.spec.vocab}")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_checkpoint(part, imported.model, tokenizer)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def summary(imported: Imported, tokenizer: Tokenizer) -> dict[str, Any]:
    from assay.engine.template import chat_template
    from assay.spec.load import digest

    parameters = list(imported.model.parameters())
    return {
        "family": imported.family.__name__.rpartition(".")[2],
        "spec_digest": digest(imported.spec),
        "params": sum(p.numel() for p in parameters),
        "weight_bytes": sum(p.nbytes for p in parameters),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        "vocab": tokenizer.vocab_size,
        "chat_template": chat_template(tokenizer) is not None,
        "unread": list(imported.unread),
        "skipped": imported.skipped,
    }


def tell(values: dict[str, Any]) -> None:
    from assay.hub.generation import told as setting

    for key in values["unread"]:
        print(f"configuration key that nothing reads: {key}")
    for name, reason in values["skipped"].items():
        print(f"tensor that no parameter needs: {name} ({reason})")
    for key, value in values["generation"].items():
        print(setting(key, value))
    template = "with a chat template" if values["chat_template"] else "no chat template"
    print(
        f"{values['family']}: {values['params']:,} parameters in {values['dtype']}, {values['vocab']:,} tokens, "
        f"{template}; saved in {values['checkpoint']} after {values['import_s']:.1f} s"
    )
