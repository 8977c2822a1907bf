"""Replies of an encoder-decoder, each beside recomputing encoder and decoder for every token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from assay.cache import Size
from assay.data.tokenizers import Tokenizer
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine, generate
from assay.engine.handoff import pack, unpack
from assay.engine.request import Request, SamplingParams
from assay.engine.runner import Runner
from assay.engine.session import Session
from assay.model.lm import LM, build
from assay.ops.step import rows_step
from assay.spec.load import dump, validate
from assay.spec.model import ModelSpec
from tests.cache.models import VOCAB, tokens
from tests.engine.test_text import tokenizer

TEXT: Tokenizer = tokenizer()
WINDOWED = {"kind": "gqa", "heads": 4, "position": "p", "sees": {"window": 5}}


def made() -> LM:
    both = {"kind": "gqa", "heads": 2, "position": "p", "sees": {"causal": False}}
    common = {"d_model": 16, "vocab": VOCAB, "layers": 2, "init": {"std": "fan_in", "embed": 1.0, "depth": False}}
    ffn, cross = {"kind": "gated", "width": 24}, {"kind": "cross", "heads": 4, "kv_heads": 2}
    stages = [
        {"branches": [{**part, "pre": "rmsnorm"}]} for part in ({"mixer": WINDOWED}, {"mixer": cross}, {"ffn": ffn})
    ]
    encoder = {
        **common,
        "context": 12,
        "positions": {"p": "learned"},
        "blocks": {"e": {"mixer": both, "ffn": ffn}},
        "head": None,
        "embed": {"kind": "token", "shared": True},
    }
    tree = {
        **common,
        "context": 64,
        "positions": {"p": "rope"},
        "blocks": {"d": {"stages": stages}},
        "encoder": encoder,
    }
    return build(validate(ModelSpec, tree, "here"), 2).double().eval()


LM_MADE = made()


def request(source: int, prompt: int, seed: int, new: int = 4) -> Request:
    ids = tokens(1, source + prompt, seed)[0].tolist()
    greedy = SamplingParams(temperature=0.0)
    return Request(prompt=tuple(ids[source:]), source=tuple(ids[:source]), sampling=greedy, max_new=new)


@torch.no_grad()
def alone(asked: Request) -> list[int]:
    said = list(asked.prompt)
    for _ in range(asked.max_new):
        step = rows_step(torch.tensor([said]), encode=rows_step(torch.tensor([asked.source])))
        logits = LM_MADE(step).logits
        assert logits is not None
        said.append(int(logits[-1].argmax()))
    return said[len(asked.prompt) :]


@given(
    asked=st.lists(
        st.builds(request, st.integers(1, 12), st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=4
    ),
    chunk=st.integers(1, 9),
)
@settings(max_examples=8)
def test_batches_equal_requests_alone(asked: list[Request], chunk: int) -> None:
    """Sources and prompts of every length, prefilled in chunks, past the decoder's window."""
    said: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    for token in generate(LM_MADE, TEXT, asked, chunk):
        said[token.request].append(token.id)
    assert list(said.values()) == [alone(each) for each in asked]


def test_a_source_joins_later_and_is_read_once() -> None:
    """A second sequence opens while the first decodes; each source goes through the encoder one time."""
    first, second = request(7, 3, 1), request(11, 2, 2)
    seen: list[int] = []
    assert LM_MADE.encoder is not None
    handle = LM_MADE.encoder.register_forward_pre_hook(lambda _, args: seen.append(int((args[0].seq >= 0).sum())))
    runner = Runner(LM_MADE, Size(2, 20, 4, 12))
    a = runner.open(20, first.source)
    said = [int(runner.feed([a], [first.prompt])[0].argmax())]
    b = runner.open(20, second.source)
    logits = runner.feed([a, b], [said, second.prompt])
    others = [int(logits[1].argmax())]
    for _ in range(3):
        said.append(int(logits[0].argmax()))
        logits = runner.feed([a, b], [said[-1:], others[-1:]])
        others.append(int(logits[1].argmax()))
    handle.remove()
    assert (said, others, seen) == (alone(first), alone(second), [7, 11])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ((), "a request without `source` cannot be answered"),
        ((1, VOCAB), f"source token {VOCAB}; the encoder has ids 0 to {VOCAB - 1}"),
        ((1,) * 13, "a source of 13 tokens; the positions of this model's encoder reach 12"),
    ],
)
def test_sources_that_cannot_be_read(source: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        list(generate(LM_MADE, TEXT, [Request(prompt=(1,), source=source)]))


def test_sources_and_encoders_belong_together() -> None:
    assert LM_MADE.encoder is not None
    plain = build(validate(ModelSpec, {**dump(LM_MADE.encoder.spec), "head": "lm", "embed": "token"}, "here"))
    with pytest.raises(ValueError, match="later tokens"):
        list(generate(plain, TEXT, [Request(prompt=(1,), source=(1,))]))
    tree = {
        "d_model": 16,
        "vocab": VOCAB,
        "layers": 1,
        "context": 9,
        "blocks": {"b": {"ffn": {"kind": "dense", "width": 8}}},
    }
    decoder = build(validate(ModelSpec, tree, "here"))
    with pytest.raises(ValueError, match="is what an encoder reads, and this model has none"):
        list(generate(decoder, TEXT, [Request(prompt=(1,), source=(1,))]))
    with pytest.raises(ValueError, match="cannot be answered"):
        Session(LM_MADE, TEXT)
    pooled = build(validate(ModelSpec, {**tree, "head": {"kind": "pooled"}}, "here"))
    with pytest.raises(ValueError, match="a head with logits for every token"):
        list(generate(pooled, TEXT, [Request(prompt=(1,))]))


@given(
    asked=st.lists(
        st.builds(request, st.integers(1, 12), st.integers(1, 9), st.integers(0, 99)), min_size=2, max_size=5
    ),
    config=st.builds(
        EngineConfig,
        max_running=st.integers(1, 4),
        tokens=st.just(24),
        page=st.sampled_from([1, 3, 16]),
        budget=st.integers(3, 12),
        chunk=st.integers(3, 9),
        preempt=st.sampled_from(["recompute", "swap"]),
        memory=st.sampled_from([None, 30_000]),
    ),
)
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_an_engine_in_pages_says_what_each_says_alone(asked: list[Request], config: EngineConfig) -> None:
    """In chunks, beside others, preempted with its memory and without; nothing of a memory is shared."""
    try:
        engine = Engine(LM_MADE, TEXT, config)
    except ValueError as error:  # the memory does not hold one sequence of the longest in such pages
        assert "memory: 30000" in str(error)
        return
    said: dict[int, list[int]] = {engine.submit(each): [] for each in asked}
    while engine.busy:
        for token in engine.step():
            said[token.request].append(token.id)
            assert token.reused == 0
        engine.runner.cache.check_integrity()
    assert list(said.values()) == [alone(each) for each in asked]
    assert engine.runner.cache.used_bytes() == 0


def test_a_reply_is_handed_over_with_what_its_encoder_read() -> None:
    config = EngineConfig(max_running=2, tokens=24, page=4)
    one, other, asked = Engine(LM_MADE, TEXT, config), Engine(LM_MADE, TEXT, config), request(9, 5, 3, new=6)
    number, said = one.submit(asked), []
    while not said:
        said += [token.id for token in one.step()]
    other.adopt(unpack(pack(one.hand_over(number), b"key"), b"key"))
    while other.busy:
        said += [token.id for token in other.step()]
    assert said == alone(asked) and one.runner.cache.used_bytes() == other.runner.cache.used_bytes() == 0
