"""What somebody asks of a model, as frozen values. No torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from assay.spec.base import Spec


class SamplingParams(Spec):
    """How the next token is drawn from the logits. The defaults draw from the model's own distribution.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: nucleus sampling (Holtzman et al. 2020,
    arXiv 1904.09751). min_p: keeps tokens at least that share as likely as the best one (Nguyen et al. 2024, arXiv
    2407.01082). repetition_penalty: divides the positive logits, and multiplies the negative ones, of all tokens of
    the prompt and the reply (Keskar et al. 2019, arXiv 1909.05858). presence_penalty, frequency_penalty: taken off the
    logits of tokens in the reply, once or for each occurrence. seed: null draws one.
    """

    temperature: float = Field(default=1.0, ge=0.0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Request(Spec):
    """A prompt and how it is to be continued: up to `max_new` tokens, or until a stop token or a stop text.

    Neither a stop token nor a stop text is part of the reply's text. source: what an encoder-decoder's encoder reads;
    the prompt then begins the reply.
    """

    prompt: tuple[int, ...] = Field(min_length=1)
    source: tuple[int, ...] = ()
    sampling: SamplingParams = SamplingParams()
    max_new: int = Field(default=128, ge=1)
    stop_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _stops_say_something(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every reply at once")
        return self

    @property
    def horizon(self) -> int:
        """The length that the sequence may reach."""
        return len(self.prompt) + self.max_new
