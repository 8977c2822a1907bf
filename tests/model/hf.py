"""Tiny, randomly drawn Hugging Face models, and logits and every layer's output beside ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from assay.model.lm import LM
from assay.ops.step import rows_step

VOCAB, ROWS, LENGTH = 61, 2, 14


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn, so that no gain is one and no bias zero; float32, evaluation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.2 if p.dim() > 1 else 0.4))
            if p.dim() == 1:
                p.add_(0.7)
    return model.eval()


def ids(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def differences(lm: LM, reference: Any) -> dict[str, float]:
    """Largest difference over the largest reference value, for the logits, the embedding and every layer's output."""
    x = ids()
    theirs = reference(input_ids=x, output_hidden_states=True, use_cache=False)
    out = lm(rows_step(x, listen=frozenset(["*"])))
    assert out.logits is not None
    hidden = [h.flatten(0, 1) for h in theirs.hidden_states]
    mine = (
        [out.taps["blocks.0.in"]] + [out.taps[f"blocks.{i}.out"] for i in range(len(hidden) - 2)] + [out.taps["final"]]
    )
    pairs = {f"hidden {i}": (a, b) for i, (a, b) in enumerate(zip(mine, hidden, strict=True))}
    pairs["logits"] = (out.logits, theirs.logits.flatten(0, 1))
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def assert_equal(lm: LM, reference: Any) -> None:
    told = differences(lm, reference)
    assert max(told.values()) <= 1e-4, told
