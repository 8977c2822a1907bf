"""Talk with a checkpoint: /reset begins anew, /quit ends, Ctrl-C cuts a reply short.

With a chat template in tokenizer_config.json the turns follow it; without one the model continues the text.
What the conversation has in its cache is not computed again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import _engine as options
from assay.cli.common import console, fail

if TYPE_CHECKING:
    from assay.engine.request import SamplingParams
    from assay.engine.runner import Token
    from assay.engine.session import Session


@options.replies(temperature=0.8, top_p=0.95)
def run(
    ckpt: options.Checkpoint,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message, for models with a template.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens of the whole conversation. [default: the model's]")
    ] = None,
    *,
    reply: options.Reply,
) -> None:
    from assay.engine.session import Session

    sampling, model, tokenizer = reply.open(ckpt)
    if model.spec.encoder is not None:
        fail(f"{ckpt}: an encoder-decoder, which answers one text at a time: use assay generate")
    chat = Chat(Session(model, tokenizer, context), sampling, reply.max_new, system, reply.min_new)
    if chat.template is None:
        note = "no chat template in tokenizer_config.json: the model continues your text"
        console().print(note + ("; --system is not used" if system else ""), style="dim")
    for line in lines():
        if line == "/quit":
            break
        if line == "/reset":
            chat.reset()
        elif line:
            say(chat, line)


def lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    while True:
        try:
            yield input("> ").strip() if sys.stdin.isatty() else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return


class Chat:
    """The conversation so far, as messages (with a template) or as ids (without)."""

    def __init__(
        self, session: Session, sampling: SamplingParams, max_new: int | None, system: str | None, min_new: int = 0
    ) -> None:
        from assay.engine.template import chat_template

        self.session, self.sampling, self.max_new, self.system = session, sampling, max_new, system
        self.min_new = min_new
        self.template = chat_template(session.tokenizer)
        self.turn = 0
        self.reset()

    def reset(self) -> None:
        self.session.reset()
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.ids: tuple[int, ...] = ()

    def prompt(self, line: str) -> tuple[int, ...]:
        from assay.engine.template import encode

        tokenizer = self.session.tokenizer
        if self.template is not None:
            return encode([*self.messages, {"role": "user", "content": line}], self.template, tokenizer)
        new = tokenizer.encode("\n" + line) if self.ids else tokenizer.begun(line)
        return (*self.ids, *new.tolist())

    def answer(self, line: str) -> Generator[Token]:
        """The reply, token by token; it belongs to the conversation as far as it was read."""
        from assay.engine.request import Request

        prompt, ends = self.prompt(line), self.session.tokenizer.ends
        room = options.room(len(prompt), self.max_new, self.session.capacity)
        seed = self.sampling.seed
        drawn = self.sampling.model_copy(update={"seed": None if seed is None else seed + self.turn})
        request = Request(prompt=prompt, sampling=drawn, max_new=room, min_new=self.min_new, stop_tokens=ends)
        text, ids = "", list(prompt)
        try:
            for token in self.session.reply(request):
                text += token.text
                ids += [token.id] if token.id is not None and token.id not in ends else []
                yield token
        finally:
            if len(ids) > len(prompt) or text:
                self.turn += 1
                self.ids = tuple(ids)
                self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]


def say(chat: Chat, line: str) -> None:
    """Show one reply as it comes, with its rate beneath; a mistake or Ctrl-C ends the reply, not the conversation."""
    from rich.live import Live
    from rich.text import Text

    began, count, text = time.perf_counter(), 0, ""
    tty = sys.stdout.isatty()

    def status() -> str:
        rate = count / (time.perf_counter() - began)
        return f"{count} tokens, {rate:.1f} tok/s, context {chat.session.used} of {chat.session.capacity}"

    answer = chat.answer(line)
    try:
        with (
            Live(Text(), transient=True, vertical_overflow="visible", auto_refresh=False)
            if tty
            else nullcontext() as live
        ):
            for token in answer:
                count, text = count + 1, text + token.text
                if live is None:
                    print(token.text, end="", flush=True)
                else:
                    live.update(Text.assemble(text, "\n", (status(), "dim")), refresh=True)
    except ValueError as error:
        console().print(f"{error} (/reset begins anew)", style="yellow")
    except KeyboardInterrupt:
        answer.close()
        console().print("cut short", style="dim")
    print(text if tty else "", flush=True)
    if count and console().is_terminal:
        console().print(status(), style="dim")
