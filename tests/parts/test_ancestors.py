"""What came before attention alone: the LSTM, a convolution between gates, an encoder and decoder with attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from assay.conform.cases import Case, noise
from assay.conform.stored import feed, open_cache
from assay.cost.bill import Question, bill
from assay.data.tokenizers import Tokenizer
from assay.data.vocabularies import from_bytes
from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.model.lm import LM, build
from assay.ops.step import rows_step
from assay.spec.load import load_model
from tests.parts.small import D, close, part, put, rows, x


def torchs(c: Case) -> nn.LSTM:
    """torch's own with the same weights; its forget gate has the offset in a bias."""
    w, width = c.weights(), c.spec.size(c.site)  # type: ignore[attr-defined]
    theirs = nn.LSTM(D, width, batch_first=True).double()
    bias = w["into.bias"].clone()
    bias[width : 2 * width] += c.spec.forget  # type: ignore[attr-defined]
    named = {"weight_ih_l0": w["into.weight"], "weight_hh_l0": w["recur"], "bias_ih_l0": bias}
    theirs.load_state_dict({**named, "bias_hh_l0": torch.zeros(4 * width)})
    return theirs


@pytest.mark.parametrize("width", [None, 7])
def test_the_lstm_is_torchs(width: int | None) -> None:
    """Outputs and all gradients; the gates stand in torch's order."""
    c = part("mixers", "lstm", width=width, forget=0.6)
    theirs, tokens = torchs(c), x(24).requires_grad_()
    mine = c.run(tokens, rows(2, 12))
    other = theirs(tokens.view(2, 12, D))[0].flatten(0, 1) @ c.weights()["out.weight"].T
    close(mine, other, 1e-13)
    probe = noise((24, D), 5)
    ours = torch.autograd.grad((mine * probe).sum(), [tokens, c.part.recur, c.part.into.weight, c.part.into.bias])
    want = [tokens, theirs.weight_hh_l0, theirs.weight_ih_l0, theirs.bias_ih_l0]
    for a, b in zip(ours, torch.autograd.grad((other * probe).sum(), want), strict=True):
        close(a, b, 1e-12)


def test_the_lstm_remembers_what_torchs_does() -> None:
    """h and c after 12 tokens, and that they are all it remembers whatever the context."""
    c = part("mixers", "lstm")
    tokens = noise((2, 12, D), 3)
    cache, slots = open_cache(c, 2, 6)
    for first, last in ((0, 6), (6, 7), (7, 12)):
        feed(c, cache, slots, tokens[:, first:last], first)
    _, (h, cell) = torchs(c)(tokens)
    after = c.step(2, 1, 12)
    state = cache.begin(slots, after)["part"]
    for name, theirs in (("h", h), ("c", cell)):
        close(state.load(name, after).read().double(), theirs[0], 1e-6)
    assert {f.bytes(n, "bfloat16") for f in c.spec.state(c.site) for n in (1, 1000)} == {4 * D}


def test_an_open_gate_keeps_and_a_shut_one_forgets() -> None:
    """With the forget gate's logit far up the cell sums what enters it; far down it is what entered last."""
    tokens = x(6)
    for logit in (40.0, -40.0):
        c = part("mixers", "lstm", forget=0.0)
        bias = torch.zeros(4 * D)
        bias[:D], bias[D : 2 * D] = 40.0, logit
        put(c, recur=torch.zeros(4 * D, D), into__bias=bias)
        c.part.into.weight.data[: 2 * D] = 0.0
        entered = torch.tanh(tokens @ c.weights()["into.weight"][2 * D : 3 * D].T)
        cell = entered.cumsum(0) if logit > 0 else entered
        told = torch.sigmoid(tokens @ c.weights()["into.weight"][3 * D :].T) * torch.tanh(cell)
        close(c.run(tokens, rows(1, 6)), told @ c.weights()["out.weight"].T, 1e-12)


@pytest.mark.parametrize(("size", "bias"), [(3, False), (4, True)])
def test_the_gated_convolution_is_transformers(size: int, bias: bool) -> None:
    c = part("mixers", "gated_conv", size=size, bias=bias)
    config = Lfm2Config(hidden_size=D, conv_L_cache=size, conv_bias=bias, num_hidden_layers=1, layer_types=["conv"])
    theirs, w = Lfm2ShortConv(config, 0).double(), c.weights()
    named = {"conv.weight": w["weight"][:, None], "out_proj.weight": w["out.weight"]}
    named["in_proj.weight"] = torch.cat([w[f"{n}.weight"] for n in ("b", "c", "value")])
    if bias:
        named |= {"conv.bias": w["shift"], "out_proj.bias": w["out.bias"]}
        named["in_proj.bias"] = torch.cat([w[f"{n}.bias"] for n in ("b", "c", "value")])
    theirs.load_state_dict(named)
    close(c.run(x(24), rows(2, 12)), theirs(x(24).view(2, 12, D)).flatten(0, 1), 1e-12)


def test_a_gated_convolution_looks_back_size_tokens() -> None:
    """Another first token moves `size` outputs, and a shut gate B hides it from all that come later."""
    c, tokens = part("mixers", "gated_conv", size=4), x(9)
    other = torch.cat([noise((1, D), 8), tokens[1:]])
    moved = (c.run(tokens, rows(1, 9)) - c.run(other, rows(1, 9))).detach().abs().amax(-1) > 0
    assert moved.tolist() == [True] * 4 + [False] * 5


PAIRS = (("a cat", "katze\n"), ("a dog", "hunde\n"))


def spelled(*texts: str) -> Tensor:
    return torch.tensor([list(text.encode()) for text in texts])


@pytest.fixture(scope="module")
def translator() -> LM:
    """The shipped ancestor after 80 steps on two pairs of texts."""
    lm = build(load_model("rnn-attention"), 0)
    tuned = torch.optim.AdamW(lm.parameters(), 1e-2)
    source, target = spelled(*(a for a, _ in PAIRS)), spelled(*(b for _, b in PAIRS))
    step = rows_step(torch.cat([torch.full((2, 1), 10), target[:, :-1]], 1), encode=rows_step(source))
    losses = []
    for _ in range(80):
        loss = lm(step, targets=target.flatten()).loss
        assert loss is not None
        tuned.zero_grad()
        loss["objective"].backward()
        tuned.step()
        losses.append(float(loss["objective"].detach()) / target.numel())
    assert losses[-1] < 0.1 < losses[0], losses[-1]
    return lm.eval()


def test_a_recurrent_encoder_and_decoder_learn_two_words(translator: LM) -> None:
    """What the decoder says follows what the encoder read: nothing else tells the two apart."""
    greedy = SamplingParams(temperature=0.0)
    ask = [Request(prompt=(10,), source=tuple(a.encode()), sampling=greedy, max_new=6) for a, _ in PAIRS]
    said: dict[int, list[int]] = {0: [], 1: []}
    for token in generate(translator, Tokenizer(from_bytes(), {}), ask):
        said[token.request].append(token.id)
    assert [bytes(said[i]).decode() for i in (0, 1)] == [b for _, b in PAIRS]


def test_the_decoder_remembers_its_states_and_the_source() -> None:
    """h and c of 64 numbers in float32 in both layers whatever is said, and 2 x 64 numbers of two bytes for each token
    of the source."""
    spec = load_model("rnn-attention")
    for context in (1, 100):
        assert bill(spec, Question(context, memory=5)).state_bytes == 2 * (2 * 64 * 4 + 5 * 2 * 64 * 2)
