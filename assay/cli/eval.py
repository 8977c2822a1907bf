"""The loss of a model on a text file, or its scores on tasks of lm-evaluation-harness.

CKPT is a checkpoint, or a Hugging Face folder.

--data: nats a token, bits a byte. FILE is UTF-8 text (one document), or .jsonl with one document a line. Every token is
predicted once from those before it in its row; rows are as long as the model's context, and a document does not see
the one before it.

--tasks (needs the extra `hf`): the harness's tasks by name, and task files with data of their own. A task file that
names Python code is refused, unless --trust-task-code says that it may run.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Device, Json, Part, console, emit_json, fail, in_dtype, load_parts, pick_device, progress

if TYPE_CHECKING:
    import torch

    from assay.data.tokenizers import Tokenizer
    from assay.model.lm import LM

PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
AT_ONCE = 16

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a Hugging Face folder.")]
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Text, or .jsonl.")]
Tasks = Annotated[str | None, typer.Option("--tasks", metavar="NAME|FILE.yaml,...", help="Tasks, by name or file.")]
Field = Annotated[
    str | None, typer.Option("--field", help="The text's field in each line of a .jsonl file. [default: text]")
]
Length = Annotated[int | None, typer.Option("--length", help="Tokens a row; the model's context by default.")]
Rows = Annotated[int | None, typer.Option("--rows", min=1, help=f"Rows of --data at once. [default: {AT_ONCE}]")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help=f"Requests of --tasks at once. [default: {AT_ONCE}]")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task at most.")]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Examples before each document; the task's by default.")
]
Trust = Annotated[bool, typer.Option("--trust-task-code", help="Run the Python code that task files name.")]


def run(
    checkpoint: Checkpoint,
    data: Data = None,
    tasks: Tasks = None,
    field: Field = None,
    length: Length = None,
    rows: Rows = None,
    batch: Batch = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    trust_task_code: Trust = False,
    dtype: Annotated[str, typer.Option("--dtype", help="f32, bf16, int8 or int4.")] = "f32",
    device: Device = "auto",
    part: Part = None,
    json: Json = False,
) -> None:
    if data is None and tasks is None:
        fail("--data: missing; give a text file to measure the loss on, or --tasks to score the model on")
    of_data: dict[str, Any] = {"--field": field, "--rows": rows}
    of_tasks: dict[str, Any] = {"--batch": batch, "--limit": limit, "--num-fewshot": num_fewshot}
    of_tasks |= {"--tasks": tasks, "--trust-task-code": trust_task_code or None}
    for name, value in (of_tasks if data is not None else of_data).items():
        if value is not None:
            fail(f"{name}: not with {'--data' if data is not None else '--tasks'}")
    if data is not None and not data.is_file():
        fail(f"--data {data}: no such file")
    if dtype not in PRECISIONS:
        fail(f"--dtype {dtype!r}: accepted: {', '.join(PRECISIONS)}")
    load_parts(part)
    where = (dtype, pick_device(device))
    if data is not None:
        how = {"field": field or "text", "length": length, "rows": rows or AT_ONCE}
        values = losses(checkpoint, data, how, where)
    else:
        how = {"length": length, "batch": batch or AT_ONCE, "limit": limit, "fewshot": num_fewshot}
        values = scores(checkpoint, str(tasks), {**how, "trust": trust_task_code}, where)
    if json:
        emit_json(values)


def opened(path: Path, device: torch.device) -> tuple[LM, Tokenizer]:
    """The model and the tokenizer of a checkpoint, or of a Hugging Face folder."""
    from assay.hub.load import CONFIG, import_folder
    from assay.hub.tokenizer import folder_tokenizer
    from assay.train.checkpoint import MODEL, load_checkpoint

    if (path / MODEL).is_file() or not (path / CONFIG).is_file():
        model, tokenizer, _ = load_checkpoint(path, device)
        return model, tokenizer
    tokenizer = folder_tokenizer(path)
    with progress() as bar:
        task = bar.add_task("reading tensors")
        imported = import_folder(path, told=lambda done, total: bar.update(task, completed=done, total=total))
    return imported.model.to(device), tokenizer


def context(length: int | None, model: LM) -> int:
    """How many tokens are read at once."""
    most = model.spec.context
    if length is not None and not 1 <= length <= most:
        fail(f"--length {length}: accepted: 1 to {most}, the model's context")
    return length if length is not None else most


def losses(checkpoint: Path, data: Path, how: Mapping[str, Any], where: tuple[str, torch.device]) -> dict[str, Any]:
    from assay.data.corpora import CorpusSpec, open_corpus
    from assay.data.loader import cover
    from assay.data.shards import encode_documents
    from assay.train.evaluate import evaluate

    dtype, device = where
    model, tokenizer = opened(checkpoint, device)
    length = context(how["length"], model)
    low = dtype == "bf16"  # float32 weights, cast for each product
    model = in_dtype(model, "f32" if low else dtype)
    lines = data.suffix == ".jsonl"
    kind: dict[str, Any] = {"kind": "jsonl", "field": how["field"]} if lines else {"kind": "text"}
    corpus = open_corpus(CorpusSpec(**kind, path=str(data), valid_one_in=0))
    with tempfile.TemporaryDirectory() as folder:
        shard = encode_documents(corpus.train, tokenizer, Path(folder))
        found = evaluate(model, cover(shard, length, how["rows"]), "bfloat16" if low else "float32")
        del shard  # mapped from the folder
    told = f"{found.loss_nats:.4f} nats/token, {found.bits_per_byte:.4f} bits/byte"
    print(f"{told} over {found.tokens} tokens")
    return {
        "loss_nats": found.loss_nats,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "in_context_nats": found.in_context_nats,
        "length": length,
        "precision": PRECISIONS[dtype],
    }


def scores(checkpoint: Path, tasks: str, how: Mapping[str, Any], where: tuple[str, torch.device]) -> dict[str, Any]:
    """The tasks are loaded before the model: what is wrong with them is then told at once."""
    from lm_eval.utils import make_table

    from assay.measure.harness import Harness, evaluate
    from assay.measure.taskfiles import load_tasks

    dtype, device = where
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        fail(f"--tasks {tasks!r}: names no task")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Libraries under the harness print as they go; stdout is for the scores.
    with contextlib.redirect_stdout(sys.stderr), progress() as bar:
        bar.add_task("loading tasks", total=None)
        loaded = load_tasks(names, how["trust"])
    model, tokenizer = opened(checkpoint, device)
    model = in_dtype(model, dtype)
    with contextlib.redirect_stdout(sys.stderr), progress() as bar:
        running = bar.add_task("building requests", total=None)
        told = lambda what, done, total: bar.update(running, description=what, completed=done, total=total)  # noqa: E731
        lm = Harness(model, tokenizer, context(how["length"], model), how["batch"], told)
        found = evaluate(lm, loaded, how["limit"], how["fewshot"], how["trust"])
    print(make_table(found))
    if "groups" in found:
        print(make_table(found, "groups"))
    if lm.cut:
        console().print(f"{lm.cut} requests were longer than {lm.max_length} tokens and lost their beginning")
    return {
        **summary(found),
        "length": lm.max_length,
        "cut": lm.cut,
        "precision": PRECISIONS[dtype],
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness found, under its own names for metrics, as JSON holds it."""
    from lm_eval import __version__

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(one) for key, one in value.items()}
        return None if value == "N/A" else value.item() if hasattr(value, "item") else value

    names = {"results": "results", "groups": "groups", "n-shot": "n_shot", "n-samples": "n_samples"}
    kept = {ours: plain(found[theirs]) for theirs, ours in names.items() if theirs in found}
    return {**kept, "versions": plain(found["versions"]), "lm_eval": __version__}
