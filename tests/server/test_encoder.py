"""An encoder-decoder over HTTP: prompts are what its encoder reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.model.lm import LM, build
from assay.spec.load import change
from tests.engine.test_encoder_decoder import LM_MADE
from tests.server.live import Live, words

START, SOURCE, CONTEXT = 5, 40, 64


class Both(Live):
    """The tests' encoder-decoder with the server's words."""

    def __init__(self) -> None:
        super().__init__(page=4, max_running=3)
        self.model, self.tokenizer = model(), replace(words(), starts=(START,))


def model() -> LM:
    sizes = {"vocab": 258, "context": CONTEXT, "encoder.vocab": 258, "encoder.context": SOURCE}
    return build(change(LM_MADE.spec, sizes), 2).eval()


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    with Both() as live:
        yield live


def alone(live: Both, source: tuple[int, ...], new: int) -> str:
    request = Request(
        prompt=(START,), source=source, max_new=new, sampling=SamplingParams(temperature=0.0), stop_tokens=frozenset()
    )
    return "".join(token.text for token in generate(live.model, live.tokenizer, [request]))


def test_prompts_are_what_the_encoder_reads(both: Both) -> None:
    body = {"max_tokens": 9, "temperature": 0, "ignore_eos": True}
    texts = ["one text", "another, which is longer", "x"]
    sources = [tuple(both.tokenizer.framed(text).tolist()) for text in texts]
    expected = [alone(both, source, 9) for source in sources]
    assert len(set(expected)) == 3
    for prompt in (texts, [list(source) for source in sources]):
        answer = both.ok("/v1/completions", {**body, "prompt": prompt})
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert answer["usage"]["prompt_tokens"] == sum(map(len, sources))
        assert answer["usage"]["completion_tokens"] == 27
    told = both.ok("/tokenize", {"prompt": texts[0]})
    assert tuple(told["tokens"]) == sources[0]


def test_what_does_not_fit_is_refused(both: Both) -> None:
    answer = both.post("/v1/completions", {"prompt": [1] * (SOURCE + 1), "max_tokens": 1})
    assert answer.status_code == 400 and f"41 tokens; accepted: up to {SOURCE}" in answer.text
    answer = both.post("/v1/completions", {"prompt": [1] * SOURCE, "max_tokens": CONTEXT})
    assert answer.status_code == 400 and "the context of this model is 64" in answer.text
    assert both.post("/v1/completions", {"prompt": [1] * SOURCE, "max_tokens": CONTEXT - 1}).status_code == 200
