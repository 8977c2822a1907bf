"""Continue a text: the continuation alone on stdout, as it is made.

A seed makes it reproducible. The reply ends at an end-of-text token, unless --ignore-eos is given. An encoder-decoder
(T5, BART) reads the prompt with its encoder, and the reply is what its decoder says of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import _engine as options
from assay.cli.common import Json, console, emit_json, fail

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.engine.request import Request
    from assay.engine.runner import Token
    from assay.model.lm import LM


@options.replies()
def run(
    ckpt: options.Checkpoint,
    prompt: Annotated[
        str, typer.Option("--prompt", help="The text to continue, or that an encoder reads; - is stdin.")
    ],
    stop: options.Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    *,
    reply: options.Reply,
    json: Json = False,
) -> None:
    from assay.engine.config import position_limit
    from assay.engine.request import Request

    sampling, model, tokenizer = reply.open(ckpt)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids, source = asked(text, tokenizer, model.spec.encoder is not None)
    new = options.room(len(ids), reply.max_new, position_limit(model.spec))
    ends = frozenset() if ignore_eos else tokenizer.ends
    request = Request(
        prompt=ids, source=source, sampling=sampling, max_new=new, stop_tokens=ends, stop=tuple(stop or ())
    )
    report = write(model, tokenizer, request)
    if json:
        print()
        emit_json(report)


def asked(text: str, tokenizer: Tokenizer, two: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the reply follows, and what an encoder reads. two: the model has an encoder; its decoder begins with the
    tokens that the checkpoint names, or as transformers does with the first token of a text."""
    if not two:
        return tuple(tokenizer.begun(text).tolist()) or start(tokenizer), ()
    first = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    source = tuple(tokenizer.framed(text).tolist())
    if not source:
        fail("--prompt is empty, and an encoder reads at least one token")
    if not (tokenizer.starts or first):
        fail("generation_config.json: decoder_start_token_id: missing, and the tokenizer has no bos_token either")
    return tokenizer.starts or first, source


def start(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What an empty prompt begins with: the first token of a text, or what stands between two."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        fail("--prompt is empty, and this model's tokenizer names no token that a text begins with")
    return (first,)


def write(model: LM, tokenizer: Tokenizer, request: Request) -> dict[str, object]:
    """Print the continuation piece by piece; what `--json` tells about it."""
    from assay.engine.engine import generate

    began = time.perf_counter()
    times, ids, text, finish = [], [], "", None
    tokens: Iterator[Token] = generate(model, tokenizer, [request])
    for token in tokens:
        times.append(time.perf_counter())
        ids.append(token.id)
        text, finish = text + token.text, token.finish
        sys.stdout.write(token.text)
        sys.stdout.flush()
    if sys.stdout.isatty():
        print()
    decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    if decode is not None and console().is_terminal:
        console().print(f"{len(ids)} tokens, {decode:.1f} tok/s", style="dim")
    return {
        "text": text,
        "tokens": ids,
        "finish": finish,
        "prompt_tokens": len(request.source or request.prompt),
        "ttft_s": times[0] - began,
        "decode_tok_s": decode,
    }
