"""Tokenizers side by side: bytes a token, what they do not know, misspelt words, speed.

--data is a text file, a folder of them or .jsonl; without it, the standard library's Python sources. What is trained
sees nine documents in ten, and the rest is what is measured.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.common import Json, emit_json, fail

if TYPE_CHECKING:
    from assay.data.vocabulary_table import Compared

Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Text, a folder of texts, or .jsonl.")]
Kinds = Annotated[str, typer.Option("--kinds", metavar="KIND,...", help="Which, by kind, in this order.")]
Vocab = Annotated[int, typer.Option("--vocab", min=1, help="Ids of those that are trained.")]
KINDS = "byte,char,word,word_bytes,bpe,wordpiece,unigram"


def run(data: Data = None, kinds: Kinds = KINDS, vocab: Vocab = 1024, json: Json = False) -> None:
    from assay.data.corpora import CorpusSpec, open_corpus
    from assay.data.tokenizers import TokenizerSpec
    from assay.data.vocabularies import TRAINED
    from assay.data.vocabulary_table import compare

    if data is not None and not data.exists():
        fail(f"--data {data}: no such file or folder")
    source = (
        CorpusSpec()
        if data is None
        else CorpusSpec(kind="jsonl" if data.suffix == ".jsonl" else "text", path=str(data))
    )
    wanted = [
        TokenizerSpec.model_validate({"kind": kind, "vocab": vocab if kind in TRAINED else None})
        for kind in (name.strip() for name in kinds.split(","))
    ]
    found = compare(open_corpus(source), wanted)
    print(table(found))
    if json:
        emit_json({"tokenizers": [asdict(row) for row in found]})


def table(rows: list[Compared]) -> str:
    """As Markdown."""
    head = (
        "kind",
        "ids",
        "bytes/token",
        "unknown",
        "tokens/word",
        "misspelt",
        "of these unknown",
        "trained, s",
        "MB/s",
    )
    lines = [head, ("---",) * len(head)]
    for row in rows:
        lines.append(
            (
                row.kind,
                f"{row.vocab:,}",
                f"{row.bytes_per_token:.2f}",
                f"{row.unknown:.1%}",
                f"{row.word_tokens:.2f}",
                f"{row.misspelt_tokens:.2f}",
                f"{row.misspelt_unknown:.0%}",
                f"{row.train_s:.1f}",
                f"{row.encode_byte_s / 1e6:.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
