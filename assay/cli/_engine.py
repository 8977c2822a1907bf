"""What `generate` and `chat` share: sampling options, and a checkpoint ready to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.common import fail, pick_device

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.model.lm import LM

DTYPES = ("f32", "bf16")

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint folder.")]
MaxNew = Annotated[
    int | None, typer.Option("--max-new", min=1, help="Tokens of a reply at most. [default: 128, or what fits]")
]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from the K most likely tokens; 0 is all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the most likely tokens that hold a share P.")]
MinP = Annotated[float, typer.Option("--min-p", help="Draw from tokens at least P times as likely as the best.")]
Repetition = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 makes tokens that were used less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed draws the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the reply before this text. May be repeated.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="f32 or bf16. [default: as the checkpoint was saved]")]


def load(path: str, device: str, dtype: str | None) -> tuple[LM, Tokenizer]:
    """The model of a checkpoint on its device, in its dtype, and its tokenizer."""
    if dtype is not None and dtype not in DTYPES:
        fail(f"--dtype {dtype!r}: accepted: {', '.join(DTYPES)}")
    import torch

    from assay.train.checkpoint import load_checkpoint

    model, tokenizer, _ = load_checkpoint(path, pick_device(device))
    if dtype is not None:
        model = model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return model, tokenizer


def room(prompt: int, wanted: int | None, limit: int | None) -> int:
    """How many new tokens to ask for: what was said, else 128 or what the limit leaves."""
    if wanted is not None or limit is None:
        return wanted or 128
    if prompt >= limit:
        fail(f"the prompt has {prompt} tokens and there is room for {limit}, so nothing can follow it")
    return min(128, limit - prompt)
