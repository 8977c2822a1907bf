"""One conversation: what of it is stored already is not computed again."""

from __future__ import annotations

from collections.abc import Iterator

from assay.cache import Size, Slot
from assay.data.tokenizers import Tokenizer
from assay.engine.request import Request
from assay.engine.runner import CHUNK, Runner, Token, context_limit, stream
from assay.model.lm import LM


class Session:
    """A model with one open sequence of up to `capacity` tokens (null: the model's context).

    `reply` keeps the cache of the prompt's longest beginning that is stored, and forgets the rest.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, capacity: int | None = None) -> None:
        limit = context_limit(model.spec)
        wanted = model.spec.context if capacity is None else capacity
        self.capacity = wanted if limit is None else min(wanted, limit)
        self.tokenizer, self.fed = tokenizer, list[int]()
        self.runner = Runner(model, Size(1, self.capacity, min(CHUNK, self.capacity)))
        self.slot: Slot = self.runner.open(self.capacity)

    @property
    def used(self) -> int:
        """Tokens that are stored."""
        return self.runner.cache.length(self.slot)

    def reset(self) -> None:
        self.runner.close(self.slot)
        self.slot, self.fed = self.runner.open(self.capacity), []

    def keep(self, prompt: tuple[int, ...]) -> int:
        """Go back to the longest stored beginning of the prompt, its last token apart; how long that is."""
        same = next((i for i, (a, b) in enumerate(zip(self.fed, prompt)) if a != b), min(len(self.fed), len(prompt)))
        at = self.runner.cache.reach(self.slot, min(same, len(prompt) - 1))
        self.runner.cache.rewind(self.slot, at)
        self.fed = self.fed[:at]
        return at

    def reply(self, request: Request) -> Iterator[Token]:
        """The reply to a whole conversation. ValueError when it does not fit. May be left before its end."""
        if request.horizon > self.capacity:
            raise ValueError(
                f"a conversation of {len(request.prompt)} tokens and {request.max_new} new ones are {request.horizon}; "
                f"there is room for {self.capacity}"
            )
        self.keep(request.prompt)
        known = list(request.prompt)
        try:
            for token in stream(self.runner, self.tokenizer, [self.slot], [request]):
                known.append(token.id)
                yield token
        except GeneratorExit:
            raise
        except BaseException:
            known = []  # cut off inside a step: some layers have stored its tokens and some have not
            self.reset()
            raise
        finally:
            self.fed = known[: self.used]
