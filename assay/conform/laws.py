"""The laws every part obeys or refuses by name. Each raises AssertionError with what differed."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from assay.conform.cases import MEMORY, PREFIX, TOKENS, Case, case, close
from assay.ops.state import Stateless
from assay.ops.step import Step
from assay.parts.cut import piece
from assay.spec.base import Cost, StateField
from assay.spec.load import canonical, digest, dump, parse_yaml, to_yaml
from assay.spec.shard import Cut


def law_reference(c: Case) -> None:
    """Outputs and all gradients equal the float64 reference."""
    if c.slot not in ("mixers", "ffns", "norms", "residuals"):
        return
    assert c.reference is not None, "no `reference` stands beside the spec"
    x = c.noise((9, c.site.d_in), 1).requires_grad_()
    step = c.step(1, 9)
    if c.slot == "norms":
        c.part.eval()
    mine = c.run(x, step)
    # The reference runs on the CPU, wherever the part does.
    own = c.part.named_parameters()
    weights = {name: p.detach().cpu().clone().requires_grad_(p.requires_grad) for name, p in own}
    y = x.detach().cpu().clone().requires_grad_()
    theirs = _reference(c, weights, y, step)
    close(mine.cpu(), theirs, "output")
    probe = c.noise(tuple(mine.shape), 2)
    learned = {"x": (x, y)} | {n: (p, weights[n]) for n, p in c.part.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((mine * probe).sum(), [a for a, _ in learned.values()], materialize_grads=True)
    expected = torch.autograd.grad(
        (theirs * probe.cpu()).sum(), [b for _, b in learned.values()], materialize_grads=True
    )
    for name, a, b in zip(learned, grads, expected, strict=True):
        close(a.cpu(), b, f"gradient of {name}")


def _reference(c: Case, weights: dict[str, Tensor], x: Tensor, step: Step) -> Tensor:
    if c.slot == "norms":
        return c.reference(c.spec, weights, x)
    if c.slot == "residuals":
        extra = {"layers": c.site.layers} if "layers" in inspect.signature(c.reference).parameters else {}
        return c.reference(c.spec, weights, x, c.sublayer, **extra)
    given: dict[str, Any] = {"memory": step.memory.h.cpu()} if step.memory is not None else {}
    if "prefix" in inspect.signature(c.reference).parameters:
        given["prefix"] = PREFIX
    return c.reference(c.spec, weights, x, step.positions.cpu(), **given)


def law_causal(c: Case) -> None:
    """A changed token moves nothing before it."""
    if c.slot not in TOKENS:
        return
    x, step = c.noise((10, c.site.d_in), 1), c.step(1, 10)
    changed = torch.cat([x[:6], c.noise((4, c.site.d_in), 3)])
    # A changed future regroups the experts' rows, and with them the blocking of a product: not bitwise for those.
    close(c.run(x, step)[:6], c.run(changed, step)[:6], "the past after the future changed", 1e-12)


def law_neighbours(c: Case) -> None:
    """A sequence's outputs do not depend on the other rows of its batch."""
    if c.slot not in TOKENS:
        return
    x = c.noise((12, c.site.d_in), 1)
    together = c.run(x, c.step(2, 6))
    other = torch.cat([x[:6], c.noise((6, c.site.d_in), 3)])
    close(c.run(other, c.step(2, 6))[:6], together[:6], "a row beside another neighbour", 1e-12)
    close(c.run(x[:6], c.step(1, 6)), together[:6], "a row alone", 1e-12)


def packed_step(c: Case, lengths: tuple[int, ...]) -> Step:
    """Documents one after another in one row."""
    total = sum(lengths)
    index = torch.cat([torch.arange(n, device=c.device) for n in lengths])
    seq = torch.cat([torch.full((n,), i, device=c.device) for i, n in enumerate(lengths)])
    memory = c.memory(len(lengths))
    memory = None if memory is None else type(memory)(memory.h, memory.seq, memory.index, None)
    return c.step(1, total).with_(seq=seq, index=index, positions=index, memory=memory)


def law_packing(c: Case) -> None:
    """Documents packed in a row give what each gives alone."""
    if c.slot not in TOKENS:
        return
    lengths = (4, 1, 7)
    x = c.noise((sum(lengths), c.site.d_in), 1)
    packed = c.run(x, packed_step(c, lengths)).split(lengths)
    for i, part in enumerate(x.split(lengths)):
        step = packed_step(c, (lengths[i],))
        if step.memory is not None:
            whole = c.memory(len(lengths))
            assert whole is not None
            rows = whole.seq == i
            step = step.with_(memory=type(whole)(whole.h[rows], whole.seq[rows] * 0, whole.index[rows], None))
        close(packed[i], c.run(part, step), f"document {i} packed and alone", 1e-12)


def law_weights(c: Case) -> None:
    """The declared weights are exactly the built parameters: names, shapes, dtypes."""
    if c.slot == "linears":
        from assay.spec.base import Fan, LinearSpec

        assert isinstance(c.spec, LinearSpec)
        declared = c.spec.fan(Fan(c.site.d_in, c.site.d_out, bias=True), c.site)
    else:
        declared = c.spec.weights(c.site)
    built = {name: tuple(p.shape) for name, p in c.part.named_parameters()}
    assert built == {name: w.shape for name, w in declared.items()}, "declared and built parameters differ"
    assert not list(c.part.buffers()), "a part has no buffers: tables are made in `prepare`, statistics are parameters"


def law_executed(c: Case) -> None:
    """Declared executed FLOPs equal torch's counter on the matmul backend."""
    if c.slot not in ("mixers", "ffns"):
        return
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        c.run(c.noise((length, c.site.d_in), 1), c.step(1, length))
    memory = MEMORY if c.memory(1) is not None else 0
    linears = sum(w.flops for w in c.spec.weights(c.site).values()) * length
    children = [child.cost(place, length, 0, memory) for child, place in c.spec.children(c.site).values()]
    predicted = linears + sum((c.spec.cost(c.site, length, 0, memory), *children), Cost()).executed
    assert counter.get_total_flops() == predicted, f"{counter.get_total_flops()} counted, {predicted} declared"


def law_split(c: Case) -> None:
    """Cut in two along the declared dimensions and summed, the halves equal the whole (tensor parallelism)."""
    table = c.spec.weights(c.site)
    if c.slot not in ("mixers", "ffns") or all(w.split is None for w in table.values()):
        return
    x, step = c.noise((12, c.site.d_in), 1), c.step(2, 6)
    halves = [c.run(x, step, half_states(c)) for c in (halved(c, 0), halved(c, 1))]
    close(halves[0] + halves[1], c.run(x, step), "the sum of two halves")


def halved(c: Case, rank: int) -> Case:
    """A copy whose parameters are one half of those that say how they split."""
    half = copy.deepcopy(c)
    half.part.piece = (rank, 2)
    table = c.spec.weights(c.site)
    for name, p in half.part.named_parameters():
        weight = table[name]
        if weight.split is not None:
            assert weight.shape[weight.split] % 2 == 0, f"{name}: {weight.shape[weight.split]} is not cut in two"
            p.data = piece(p.data, Cut("tensor", weight.split, sections=weight.sections), rank, 2).clone()
        row = table.get(name.removesuffix("bias") + "weight")
        if rank and name.endswith("bias") and row is not None and row.split == 1:
            p.data.zero_()  # the bias of a sum of halves is added once
    return half


def half_states(c: Case) -> dict[str, Stateless]:
    def cut(f: StateField) -> StateField:
        if f.split is None:
            return f
        return replace(f, shape=tuple(n // 2 if i == f.split else n for i, n in enumerate(f.shape)))

    return {n: Stateless(tuple(cut(f) for f in fs), torch.float64, c.device) for n, fs in c.fields.items()}


def law_checkpoint(c: Case) -> None:
    """Recomputed in the backward pass: the same gradients and the same taps, once each."""
    if c.slot not in TOKENS or c.slot == "norms":
        return
    step = c.step(2, 6).with_(listen=frozenset(["*"]))
    grads, taps = [], []
    for again in (False, True):
        x = c.noise((12, c.site.d_in), 1).requires_grad_()
        heard: dict[str, Tensor] = {}

        def call(value: Tensor, into: dict[str, Tensor] = heard) -> tuple[Tensor, dict[str, Tensor]]:
            fresh: dict[str, Tensor] = {}
            return c.run(value, step, taps=fresh), fresh

        y, heard = checkpoint(call, x, use_reentrant=False) if again else call(x)
        (y * c.noise(tuple(y.shape), 2)).sum().backward()
        grads.append(x.grad)
        taps.append(heard)
    assert grads[0] is not None and grads[1] is not None
    close(grads[1], grads[0], "gradient")
    assert taps[0].keys() == taps[1].keys(), "the taps differ"
    for name in taps[0]:
        close(taps[1][name].double(), taps[0][name].double(), f"tap {name}")


def law_roundtrip(c: Case) -> None:
    """Through YAML and back the spec is equal and keeps its digest; a part's kind is always written."""
    for tree in (dump(c.spec), canonical(c.spec)):
        again = type(c.spec).model_validate(parse_yaml(to_yaml(tree), "roundtrip"))
        assert again == c.spec, f"{again} is not {c.spec}"
        assert digest(again) == digest(c.spec), "the digest changed"


def law_precision(c: Case) -> None:
    """In float32 the outputs stay within 2e-5 of float64's."""
    if c.slot not in TOKENS:
        return
    x, step = c.noise((12, c.site.d_in), 1), c.step(2, 6)
    exact = c.run(x, step)
    low = case(c.spec, c.device)
    low.modules.load_state_dict(c.modules.state_dict())
    low.modules.float()
    memory = step.memory
    memory = None if memory is None else type(memory)(memory.h.float(), memory.seq, memory.index, memory.grid)
    close(low.run(x.float(), step.with_(memory=memory)).double(), exact, "float32", 2e-5)


def law_device(c: Case) -> None:
    """On torch's device without values the part runs, forward and backward: it looks at none of them (a host that
    asks waits for an accelerator), and makes no tensor elsewhere than where its input is."""
    if c.slot not in TOKENS:
        return
    bare = case(c.spec, "meta")
    x = bare.noise((12, c.site.d_in), 1).requires_grad_()
    y = bare.run(x, bare.step(2, 6))
    assert y.device == x.device, f"the output is on {y.device}"
    y.sum().backward()


def law_traces(c: Case) -> None:
    """One graph without breaks, and another batch of the same size runs it again without tracing."""
    if c.slot not in TOKENS:
        return
    torch._dynamo.reset()
    traced = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal traced
        traced += 1
        return graph.forward

    run = torch.compile(lambda x, step: c.run(x, step), backend=count, fullgraph=True)
    for seed in (1, 2):
        x, step = c.noise((12, c.site.d_in), seed), c.step(2, 6)
        close(run(x, step), c.run(x, step), "traced", 1e-12)
    assert traced == 1, f"traced {traced} times for two batches of one size"
