"""What `generate` and `chat` share: the options of a reply, and a checkpoint ready to run."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from assay.cli.common import Device, Part, fail, in_dtype, load_parts, pick_device

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.engine.request import SamplingParams
    from assay.model.lm import LM

DTYPES = ("f32", "bf16", "int8", "int4")

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint folder.")]
MaxNew = Annotated[
    int | None, typer.Option("--max-new", min=1, help="Tokens of a reply at most. [default: 128, or what fits]")
]
MinNew = Annotated[int, typer.Option("--min-new", min=0, help="No token ends the reply before so many.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from the K most likely tokens; 0 is all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the most likely tokens that hold a share P.")]
MinP = Annotated[float, typer.Option("--min-p", help="Draw from tokens at least P times as likely as the best.")]
TypicalP = Annotated[
    float, typer.Option("--typical-p", help="Draw from tokens of typical information that hold a share P.")
]
Repetition = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 makes tokens that were used less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed draws the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the reply before this text. May be repeated.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="f32, bf16, int8 or int4. [default: as the checkpoint was saved]")
]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How the tokens of a reply are drawn, how many, and what runs the model."""

    max_new: MaxNew = None
    min_new: MinNew = 0
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    typical_p: TypicalP = 1.0
    repetition_penalty: Repetition = 1.0
    seed: Seed = None
    dtype: Dtype = None
    device: Device = "auto"
    part: Part = None

    def open(self, checkpoint: str) -> tuple[SamplingParams, LM, Tokenizer]:
        """How to draw (checked before the model is read, which takes its time), the model and its tokenizer."""
        load_parts(self.part)
        from assay.engine.request import SamplingParams

        sampling = SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
        return sampling, *load(checkpoint, self.device, self.dtype)


def replies(**defaults: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb whose parameter `reply: Reply` stands for every option of Reply, with these defaults of its own."""
    hints = get_type_hints(Reply, include_extras=True)
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(f.name, f.default),
            annotation=hints[f.name],
        )
        for f in dataclasses.fields(Reply)
    ]

    def verb(run: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run)
        def spread(**given: object) -> None:
            values = {option.name: given.pop(option.name, option.default) for option in options}
            run(**given, reply=Reply(**values))  # type: ignore[arg-type]

        own = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(run, eval_str=True).parameters.values()]
        at = next(place for place, p in enumerate(own) if p.name == "reply")
        spread.__signature__ = inspect.Signature([*own[:at], *options, *own[at + 1 :]])  # type: ignore[attr-defined]
        return spread

    return verb


def load(path: str, device: str, dtype: str | None) -> tuple[LM, Tokenizer]:
    """The model of a checkpoint on its device, in its dtype, and its tokenizer."""
    if dtype is not None and dtype not in DTYPES:
        fail(f"--dtype {dtype!r}: accepted: {', '.join(DTYPES)}")
    from assay.train.checkpoint import load_checkpoint

    model, tokenizer, _ = load_checkpoint(path, pick_device(device))
    return (model if dtype is None else in_dtype(model, dtype)), tokenizer


def room(prompt: int, wanted: int | None, limit: int | None) -> int:
    """How many new tokens to ask for: what was said, else 128 or what the limit leaves."""
    if wanted is not None or limit is None:
        return wanted or 128
    if prompt >= limit:
        fail(f"the prompt has {prompt} tokens and there is room for {limit}, so nothing can follow it")
    return min(128, limit - prompt)
