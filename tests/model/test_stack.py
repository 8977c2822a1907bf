"""What the stack adds to its parts: packing, taps, shared blocks, checkpointing, copies, tracing."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from assay.model.lm import LM, build, state_table, weight_table
from assay.ops.step import rows_step
from assay.spec.load import load_model, shelf
from tests.model.small import BLOCK, ids, logits, loss, made, packed, spec

LIKE: dict[str, Any] = {"blocks": {"b": BLOCK, "again": {"like": "blocks.0"}}, "pattern": ["b", "again"]}


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"mixer": {"kind": "gqa", "heads": 4, "sees": {"window": 3}, "position": "p"}},
        {"mixer": {"kind": "linear", "heads": 2}},
        {"ffn": {"kind": "moe", "experts": 3, "width": 8}},
        {"norm": {"place": "post"}},
    ],
)
def test_packed_documents_are_as_if_alone(block: dict[str, Any]) -> None:
    lm, x = made(block), ids(24)
    first, second = [5, 1, 6], [2, 10]
    together = logits(lm, packed(x, [first, second])).split(first + second)
    for i, part in enumerate(x.split(first + second)):
        alone = logits(lm, rows_step(part[None], horizon=32))
        assert torch.allclose(together[i], alone, rtol=0, atol=1e-12), f"document {i}"
    assert not torch.allclose(together[1], logits(lm, rows_step(x[None], horizon=32))[5:6])


def test_emit_picks_the_logits_of_its_tokens() -> None:
    lm, step = made(), rows_step(ids(12).view(2, 6))
    some = torch.tensor([5, 0, 11])
    assert torch.allclose(logits(lm, step.with_(emit=some)), logits(lm, step)[some], rtol=0, atol=1e-13)


def test_tap_names() -> None:
    names = {f"blocks.{i}.{n}" for i in range(2) for n in ("in", "out", "mixer.q", "mixer.k", "mixer.mix")}
    names |= {f"blocks.{i}.ffn.router.{n}" for i in range(2) for n in ("logits", "choice", "share")} | {"final"}
    lm = made({"ffn": {"kind": "moe", "experts": 3, "width": 8}}).eval()
    step = rows_step(ids(6)[None])
    every = lm(step.with_(listen=frozenset(["*"])))
    assert every.taps.keys() == names
    assert every.taps["blocks.1.mixer.q"].shape == (6, 4, 4) and every.taps["blocks.0.mixer.k"].shape == (6, 2, 4)
    assert every.taps["blocks.0.ffn.router.logits"].shape == (6, 3)
    assert torch.equal(every.taps["blocks.0.out"], every.taps["blocks.1.in"])
    assert lm.head is not None and torch.equal(lm.head(every.taps["final"], step, lm.embed.table()), every.logits)
    some = lm(step.with_(listen=frozenset(["blocks.1.*.q", "final"]))).taps
    assert some.keys() == {"blocks.1.mixer.q", "final"}


def test_taps_are_free_when_nobody_listens() -> None:
    """No tensor is kept, and listening changes no result."""
    lm, step = made(), rows_step(ids(6)[None])
    silent = lm(step)
    assert silent.taps == {}
    assert torch.equal(silent.logits, lm(step.with_(listen=frozenset(["*"]))).logits)
    moe = made({"ffn": {"kind": "moe", "experts": 3, "width": 8}})
    assert {n.split(".", 4)[4] for n in moe(step).taps} == {"loss.balance", "stat.load"}, "training reads these always"
    assert moe.eval()(step).taps == {}


def test_like_shares_weights_and_keeps_its_own_state() -> None:
    tied, free = made(**LIKE), made()
    copied = {f"blocks.{i}.{n}": p for n, p in tied.blocks[0].named_parameters() for i in range(2)}
    free.load_state_dict({**free.state_dict(), **copied, "embed.weight": tied.embed.weight})
    free.head.load_state_dict(tied.head.state_dict())  # type: ignore[union-attr]
    step, targets = rows_step(ids(8)[None]), ids(8, 1)
    assert torch.equal(logits(tied, step), logits(free, step))
    for lm in (tied, free):
        loss(lm, step, targets)["objective"].backward()
    for name, p in tied.blocks[0].named_parameters():
        both = [free.get_parameter(f"blocks.{i}.{name}").grad for i in range(2)]
        assert p.grad is not None and torch.allclose(p.grad, both[0] + both[1], rtol=0, atol=1e-12), name  # type: ignore[operator]
    fields = state_table(tied.spec)
    assert [n for n, f in fields.items() if f] == ["blocks.0.mixer", "blocks.1.mixer"]
    assert set(weight_table(tied.spec)) == {n for n, _ in tied.named_parameters()}
    heard = tied(step.with_(listen=frozenset(["*.in"]))).taps
    assert heard.keys() == {"blocks.0.in", "blocks.1.in"}


@pytest.mark.parametrize("name", sorted(shelf("models")))
def test_declared_weights_are_the_built_ones(name: str) -> None:
    declared = weight_table(load_model(name))
    with torch.device("meta"):
        lm = LM(load_model(name))
    assert {n: tuple(p.shape) for n, p in lm.named_parameters()} == {n: w.shape for n, w in declared.items()}
    assert not list(lm.buffers())


def test_a_block_is_the_unit_of_checkpointing() -> None:
    """Recomputed in the backward pass: the same loss and gradients."""
    lm, x, given = made(), torch.randn(6, 16, dtype=torch.float64), {}
    step = rows_step(ids(6)[None], listen=frozenset(["*"]))
    states = lm._stateless(step)
    step = step.with_(tables=lm._tables(step, states))
    results = []
    for again in (False, True):
        h = x.clone().requires_grad_()
        run: Any = (lambda *a: checkpoint(lm.blocks[0], *a, use_reentrant=False)) if again else lm.blocks[0]
        y, _, taps = run(h, given, step, states)
        grads = torch.autograd.grad(y.square().sum(), [h, *lm.blocks[0].parameters()])
        results.append([y, *grads, *(taps[k] for k in sorted(taps))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_copies_and_state_dicts() -> None:
    lm, step = made(), rows_step(ids(6)[None])
    twin, fresh = copy.deepcopy(lm), made(seed=1)
    expected = logits(lm, step).detach()
    assert not torch.allclose(logits(fresh, step), expected)
    fresh.load_state_dict(lm.state_dict())
    with torch.no_grad():
        for p in lm.parameters():
            p.zero_()
    assert torch.equal(logits(twin, step), expected) and torch.equal(logits(fresh, step), expected)


TRACE = """
import torch
from assay.model.lm import build
from assay.ops.step import training_step
from assay.spec.load import load_model
lm = build(load_model("lab-64"))
traced = 0
def count(graph, inputs):
    global traced
    traced += 1
    return graph.forward
run = torch.compile(lambda step, targets: lm(step, targets=targets).loss["nll"], backend=count, fullgraph=True)
for documents in ([16, 16], [4, 12, 16], [7, 9, 2, 14]):
    ids = torch.randint(0, 256, (32,))
    seq = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    index = torch.cat([torch.arange(n) for n in documents])
    step = training_step(ids, seq, index, (2, 16), 128)
    assert torch.allclose(run(step, ids), lm(step, targets=ids).loss["nll"]), documents
print(traced)
"""


def test_traces_whole_and_once() -> None:
    """Without the shape checks of the test run, which would be traced with the model."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ASSAY_NO_SHAPES": "1"}
    run = subprocess.run([sys.executable, "-c", TRACE], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["1"], "a batch of other documents traced again"


def test_build_is_the_same_for_a_seed() -> None:
    a, b, c = (build(spec(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a if a[n].dim() == 2)
