"""Programs that answer a load, for benchmarks/serve.py: assay's engine, servers over HTTP, and transformers."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch

from assay.data.tokenizers import Tokenizer
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine
from assay.engine.request import Request, SamplingParams
from assay.measure.load import Heard, usage
from assay.model.lm import LM

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    new: int


@dataclass(frozen=True)
class Answer:
    heard: Heard
    text: str


class Subject(Protocol):
    def __call__(self, asks: Sequence[Ask]) -> list[Answer]: ...


class InProcess:
    """assay's engine, called."""

    def __init__(self, model: LM, words: Tokenizer, **config: Any) -> None:
        self.words = words
        self.engine = Engine(model, words, EngineConfig(**{"tokens": 1024, **config}))

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        sent, at, ids = time.perf_counter(), defaultdict[int, list[float]](list), defaultdict[int, list[int]](list)
        numbers = [self.engine.submit(Request(prompt=a.prompt, max_new=a.new, sampling=GREEDY)) for a in asks]
        while self.engine.busy:
            for token in self.engine.step():
                assert token.id is not None, token
                at[token.request].append(time.perf_counter())
                ids[token.request].append(token.id)
        return [Answer(Heard(sent, tuple(at[n]), len(ids[n])), self.words.decode(ids[n])) for n in numbers]


class OverHttp:
    """A server that speaks OpenAI's completions, with streams."""

    def __init__(self, url: str, **body: Any) -> None:
        self.url, self.body = url, body

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        return asyncio.run(self._all(asks))

    async def _all(self, asks: Sequence[Ask]) -> list[Answer]:
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
            return list(await asyncio.gather(*(self._one(http, ask) for ask in asks)))

    async def _one(self, http: httpx.AsyncClient, ask: Ask) -> Answer:
        asked = {"prompt": list(ask.prompt), "max_tokens": ask.new, "temperature": 0, "ignore_eos": True}
        asked |= {"stream": True, "stream_options": {"include_usage": True}, **self.body}
        sent, at, text, tokens = time.perf_counter(), list[float](), "", 0
        async with http.stream("POST", "/v1/completions", json=asked) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{self.url}: {answer.status_code} {(await answer.aread())[:400]!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                tokens = usage(event) or tokens
                said = "".join(choice["text"] for choice in event["choices"])
                if said:
                    at.append(time.perf_counter())
                    text += said
        return Answer(Heard(sent, tuple(at), tokens), text)


class Transformers:
    """Hugging Face's continuous batching, with a budget of tokens a step and pages like assay's defaults."""

    def __init__(self, folder: Path, dtype: torch.dtype, words: Tokenizer, count: int) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.words = words
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        batching = transformers.generation.configuration_utils.ContinuousBatchingConfig
        self.config = transformers.GenerationConfig
        self.batching = batching(page_size=16, num_blocks=count * 64, max_batch_tokens=512, allow_block_sharing=False)

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        config = self.config(max_new_tokens=asks[0].new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        made = self.model.generate_batch(
            [list(ask.prompt) for ask in asks],
            generation_config=config,
            continuous_batching_config=self.batching,
            record_timestamps=True,
            warmup=False,
        )
        found = {tuple(one.prompt_ids): one for one in made.values()}
        ones = [found[ask.prompt] for ask in asks]
        ids = [one.generated_tokens for one in ones]
        heard = [Heard(one.created_time, tuple(one.timestamps), len(one.generated_tokens)) for one in ones]
        return [Answer(one, self.words.decode(said)) for one, said in zip(heard, ids, strict=True)]
