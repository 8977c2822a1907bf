"""Generation and the cache on CUDA: the tokens that the CPU chooses."""

from __future__ import annotations

import copy

import pytest

from assay.engine.engine import generate
from assay.engine.request import SamplingParams
from assay.engine.session import Session
from tests.cache.models import model
from tests.engine.test_runner import TEXT, replies, request

KINDS = (("full", "full"), ("full", "window"), ("linear", "full"))


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("position", ["raw", "learned", "alibi"])
def test_greedy_tokens_equal_the_cpu(kinds: tuple[str, ...], position: str) -> None:
    lm = model(kinds, position).float()
    asked = [request(9, 1, max_new=6), request(3, 2, max_new=8), request(5, 3, max_new=3)]
    there = copy.deepcopy(lm).cuda()
    for chunk in (2, 512):
        assert replies(list(generate(there, TEXT, asked, chunk))) == replies(list(generate(lm, TEXT, asked, chunk)))


def test_drawn_tokens_equal_the_cpu() -> None:
    lm = model(("full", "window")).float()
    drawn = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)
    asked = [request(7, n, drawn, max_new=8) for n in range(3)]
    assert replies(list(generate(copy.deepcopy(lm).cuda(), TEXT, asked))) == replies(list(generate(lm, TEXT, asked)))


def test_a_session_goes_back() -> None:
    lm = model(("full", "linear")).float().cuda()
    session = Session(lm, TEXT)
    asked = request(9, 1, max_new=5)
    first = [token.id for token in session.reply(asked)]
    assert [token.id for token in session.reply(asked)] == first
