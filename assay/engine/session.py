"""One conversation: what of it is stored already is not computed again."""

from __future__ import annotations

from collections.abc import Iterator

from assay.data.tokenizers import Tokenizer
from assay.engine.config import EngineConfig, sequence_limit
from assay.engine.engine import Engine
from assay.engine.request import Request
from assay.engine.runner import CHUNK, Token, check_source
from assay.model.lm import LM

PAGE = 16
SNAPSHOTS = 8  # states of recurrent layers that are kept, to go on from


class Session:
    """A model with one conversation of up to `capacity` tokens at a time (null: the model's context). ValueError for a
    model that answers nothing but what its encoder has read.

    A prompt that begins as an earlier one goes on from what that one has stored, in whole pages.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, capacity: int | None = None) -> None:
        check_source(model.spec, ())
        limit = sequence_limit(model.spec, None)
        self.capacity = limit if capacity is None else min(capacity, limit)
        self.tokenizer, self.used = tokenizer, 0
        chunk = min(CHUNK, self.capacity)
        self.config = EngineConfig(
            max_running=1, tokens=self.capacity, page=PAGE, budget=chunk, chunk=chunk, border=1, snapshots=SNAPSHOTS
        )
        self.engine = Engine(model, tokenizer, self.config)

    def reset(self) -> None:
        """Forget everything."""
        self.engine, self.used = Engine(self.engine.runner.model, self.tokenizer, self.config), 0

    def reply(self, request: Request) -> Iterator[Token]:
        """The reply to a whole conversation. ValueError when it does not fit. May be left before its end."""
        if request.horizon > self.capacity:
            raise ValueError(
                f"a conversation of {len(request.prompt)} tokens and {request.max_new} new ones are {request.horizon}; "
                f"there is room for {self.capacity}"
            )
        number = self.engine.submit(request)
        self.used = len(request.prompt)
        try:
            while self.engine.busy:
                for token in self.engine.step():
                    if token.finish == "error":
                        raise ValueError(token.why)
                    self.used += token.id is not None
                    yield token
        except GeneratorExit:
            self.engine.cancel(number)
            raise
        except BaseException:  # cut off inside a step: some layers have stored its tokens and some have not
            self.reset()
            raise
