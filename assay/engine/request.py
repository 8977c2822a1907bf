"""What somebody asks of a model, as frozen values. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from assay.spec.base import Spec

TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class SamplingParams(Spec):
    """How the next token is drawn from the logits. The defaults draw from the model's own distribution.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: nucleus sampling (Holtzman et al. 2020,
    arXiv 1904.09751). min_p: keeps tokens at least that share as likely as the best one (Nguyen et al. 2024, arXiv
    2407.01082). typical_p: keeps the tokens whose information is nearest to its mean, that hold this share (Meister et
    al. 2022, arXiv 2202.00666). repetition_penalty: divides the positive logits, and multiplies the negative ones, of
    all tokens of the prompt and the reply (Keskar et al. 2019, arXiv 1909.05858). presence_penalty, frequency_penalty:
    taken off the logits of tokens in the reply, once or for each occurrence. logit_bias: token id -> what is added to
    its logit before anything else. seed: null draws one.
    """

    temperature: float = Field(default=1.0, ge=0.0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    typical_p: float = Field(default=1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[TokenId, Bias], ...] = ()
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _one_bias_a_token(self) -> Self:
        ids = [token for token, _ in self.logit_bias]
        twice = next((token for token in ids if ids.count(token) > 1), None)
        if twice is not None:
            raise ValueError(f"logit_bias: token {twice} stands twice; accepted: each token once")
        return self

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Beams(Spec):
    """Beam search: the `width` likeliest beginnings go on, of which one ends when it says a stop token.

    A reply's score is the sum of its log-probabilities over its length to the power of `length_penalty`: above 0 long
    replies gain (Wu et al. 2016, arXiv 1609.08144, section 7, in the form that transformers has). The search ends when
    no beginning can still beat what has ended.
    """

    width: int = Field(default=4, ge=1, le=256)
    length_penalty: float = 1.0


class Contrastive(Spec):
    """Contrastive search (Su et al. 2022, arXiv 2202.06417, equation 5): of the `candidates` likeliest tokens the one
    with the largest (1 - penalty) * probability - penalty * the cosine of its hidden state and the most similar one
    before it. penalty: 0 takes the likeliest token."""

    candidates: int = Field(default=4, ge=2, le=256)
    penalty: float = Field(default=0.6, ge=0.0, le=1.0)


class Grammar(Spec):
    """What a reply must be; exactly one field is given.

    json_schema: JSON that the schema (a mapping, or its JSON text) accepts. regex: a text that matches from its first
    character to its last, in the syntax of Rust's regex crate without look-around. choice: one of these texts.
    json_object: any JSON object.
    """

    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    json_object: bool = False

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """One JSON text for a schema, whoever wrote it: characters as themselves, keys in their order."""
        try:
            read = json.loads(value) if isinstance(value, str) else value
            text = json.dumps(read, ensure_ascii=False)
            text.encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"this is not JSON: {error}") from None
        if value is not None and not isinstance(read, Mapping):
            raise ValueError(f"{text:.80}; accepted: a JSON object that is a schema")
        if value is not None and "x-guidance" in read:
            raise ValueError("'x-guidance' is not accepted: how a schema is read is not the request's to choose")
        return None if value is None else text

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) not in (None, (), False)]
        if len(given) != 1:
            accepted = ", ".join(type(self).model_fields)
            raise ValueError(f"grammar: {' and '.join(given) or 'nothing'} given; accepted: exactly one of {accepted}")
        if "" in self.choice:
            raise ValueError("grammar.choice: '' is among the texts; accepted: texts of at least one character")
        return self


class GrammarLimits(Spec):
    """What compiling and following a grammar may take; beyond that it is refused, or its reply ends with an error.

    max_chars: of a schema, a regex, or all choices together. compile_fuel, step_fuel: the work that compiling it, and
    one token, may take, in llguidance's units (about 50,000 and 14,000 to the millisecond). states: of its lexer, 1 to
    2 kB each. kept: compiled grammars that are kept for the next request with the same one. compile_s: seconds of
    processor time that a server gives a client's, since those numbers do not bound all of the work.
    """

    max_chars: int = Field(default=1 << 16, ge=1)
    compile_fuel: int = Field(default=1_000_000, ge=1)
    step_fuel: int = Field(default=200_000, ge=1)
    states: int = Field(default=50_000, ge=1)
    kept: int = Field(default=64, ge=1)
    compile_s: int = Field(default=2, ge=1)


class Serving(Spec):
    """How a request is treated beside others. priority: a lower one is more urgent. deadline_s: seconds after its
    arrival at which it is given up; null: never. tenant: prompts are shared in the cache with the same tenant's
    requests only."""

    priority: int = 0
    deadline_s: float | None = Field(default=None, gt=0.0)
    tenant: str = ""


class Request(Spec):
    """A prompt and how it is to be continued: up to `max_new` tokens, or until a stop token or a stop text.

    Neither a stop token nor a stop text is part of the reply's text. source: what an encoder-decoder's encoder reads;
    the prompt then begins the reply. min_new: no stop token before that many tokens, unless a grammar leaves nothing
    else. n: how many replies. logprobs: how many of the likeliest tokens are told with each token; null tells none, nor
    the token's own.
    """

    prompt: tuple[int, ...] = Field(min_length=1)
    source: tuple[int, ...] = ()
    sampling: SamplingParams = SamplingParams()
    max_new: int = Field(default=128, ge=1)
    stop_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    min_new: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=16)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    grammar: Grammar | None = None
    serving: Serving = Serving()

    @model_validator(mode="after")
    def _stops_say_something(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every reply at once")
        if self.min_new > self.max_new:
            raise ValueError(f"min_new: {self.min_new}; accepted: 0 to max_new, which is {self.max_new}")
        return self

    @property
    def horizon(self) -> int:
        """The length that the sequence may reach."""
        return len(self.prompt) + self.max_new
