"""Copies weights from tiny, randomly drawn Hugging Face models, and compares logits and every layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from assay.model.lm import LM
from assay.ops.step import rows_step
from assay.spec.load import validate
from assay.spec.model import ModelSpec

VOCAB, ROWS, LENGTH = 61, 2, 14
NAMES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn, so that no gain is one and no bias zero; float32, evaluation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.2 if p.dim() > 1 else 0.4))
            if p.dim() == 1:
                p.add_(0.7)
    return model.eval()


def model(tree: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LM:
    """The spec with exactly these weights: no name missing, none left over, every shape equal."""
    lm = LM(validate(ModelSpec, dict(tree), "here"))
    own = dict(lm.named_parameters())
    assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
    with torch.no_grad():
        for name, p in own.items():
            assert p.shape == weights[name].shape, f"{name}: {p.shape} {weights[name].shape}"
            p.copy_(weights[name])
    return lm.eval()


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Under the new names; None drops a tied copy."""
    return {new: t for old, t in state.items() if (new := rename(old)) is not None}


def llama_names(old: str, norms: Mapping[str, str], tied: bool = True) -> str | None:
    """`model.layers.0.self_attn.q_proj.weight` -> `blocks.0.mixer.q.weight`."""
    if old == "lm_head.weight":
        return None if tied else "head.out.weight"
    rest = old.removeprefix("model.")
    rest = {"embed_tokens.weight": "embed.weight", "norm.weight": "final_norm.weight"}.get(rest, rest)
    if not rest.startswith("layers."):
        return rest
    _, layer, place, *more = rest.split(".")
    place = {"self_attn": "mixer", "mlp": "ffn", **norms}[place]
    return ".".join(["blocks", layer, place, *(NAMES.get(m, m) for m in more)])


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
