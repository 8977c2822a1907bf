"""The one sampler: logits to probabilities, and probabilities to a token, as pure functions with a setting a row.

The order is Hugging Face's: repetition penalty (then presence and frequency), temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from assay.engine.request import SamplingParams


@dataclass(frozen=True)
class Settings:
    """The settings of B rows as columns; None where no row asks for that step."""

    temperature: Float[Tensor, "B 1"]
    top_k: Int[Tensor, "B 1"] | None
    top_p: Float[Tensor, "B 1"] | None
    min_p: Float[Tensor, "B 1"] | None
    repetition: Float[Tensor, "B 1"] | None
    presence: Float[Tensor, "B 1"] | None
    frequency: Float[Tensor, "B 1"] | None

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device | str = "cpu") -> Settings:
        def column(values: list[float], neutral: float) -> Tensor | None:
            return torch.tensor(values, device=device)[:, None] if any(v != neutral for v in values) else None

        return cls(
            torch.tensor([float(r.temperature) for r in rows], device=device)[:, None],
            column([r.top_k for r in rows], 0),
            column([r.top_p for r in rows], 1.0),
            column([r.min_p for r in rows], 0.0),
            column([r.repetition_penalty for r in rows], 1.0),
            column([r.presence_penalty for r in rows], 0.0),
            column([r.frequency_penalty for r in rows], 0.0),
        )


def penalised(
    logits: Float[Tensor, "B V"], settings: Settings, seen: Bool[Tensor, "B V"], said: Int[Tensor, "B V"]
) -> Float[Tensor, "B V"]:
    """`seen`: tokens of the prompt and the reply. `said`: how often each token stands in the reply."""
    if settings.repetition is not None:
        scaled = torch.where(logits < 0, logits * settings.repetition, logits / settings.repetition)
        logits = torch.where(seen, scaled, logits)
    if settings.presence is not None:
        logits = logits - settings.presence * (said > 0)
    return logits if settings.frequency is None else logits - settings.frequency * said


def warped(logits: Float[Tensor, "B V"], settings: Settings) -> Float[Tensor, "B V"]:
    """Logits over the temperature, -inf where top-k, top-p or min-p leave a token out. Shifted: the largest is 0."""
    heat = torch.where(settings.temperature > 0, settings.temperature, 1.0)
    z = (logits - logits.amax(-1, keepdim=True)) / heat
    if settings.top_k is not None:
        z = z.masked_fill(z < _kth(z, settings.top_k), float("-inf"))
    if settings.top_p is not None:
        z = z.masked_fill(_outside_nucleus(z, settings.top_p), float("-inf"))
    if settings.min_p is not None:  # p < min_p * p_max, and the largest logit is 0
        z = z.masked_fill((z < settings.min_p.log()) & (z < 0), float("-inf"))
    return z


def _kth(z: Tensor, top_k: Tensor) -> Tensor:
    """[B, 1]: the value of the k-th largest entry of each row; -inf for rows that keep all."""
    size = z.shape[-1]
    best = z.topk(min(int(top_k.max()), size), -1).values
    kth = best.gather(-1, (top_k.clamp(1, best.shape[-1]) - 1))
    return torch.where(top_k > 0, kth, float("-inf"))


def _outside_nucleus(z: Tensor, top_p: Tensor) -> Tensor:
    """Tokens that are not needed for the most likely ones to hold a share `top_p`; the likeliest always stays."""
    values, order = z.sort(-1)
    outside = (values.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    outside[..., -1] = False
    return torch.zeros_like(outside).scatter(-1, order, outside)


def probabilities(logits: Float[Tensor, "B V"], settings: Settings) -> Float[Tensor, "B V"]:
    """What each row draws from, without penalties: temperature 0 puts all on the argmax (of equal ones the first)."""
    greedy = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(settings.temperature > 0, warped(logits, settings).softmax(-1), greedy)


def draw(p: Float[Tensor, "B V"], uniforms: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The token where the cumulated probability passes u (inverse transform), for u in [0, 1). Summed in float64;
    a token of probability 0 is never drawn."""
    total = p.double().cumsum(-1)
    mass = total[:, -1:]
    at = torch.minimum(uniforms.double()[:, None] * mass, torch.nextafter(mass, torch.zeros_like(mass)))
    return torch.searchsorted(total, at, right=True).squeeze(-1)


def sample(
    logits: Float[Tensor, "B V"],
    settings: Settings,
    uniforms: Float[Tensor, "B"],
    history: tuple[Tensor, Tensor] | None = None,
) -> Int[Tensor, "B"]:
    """A token for each row, from float32 logits (float64 stay). `history`: (seen, said) of `penalised`.

    ValueError when the model's logits are not numbers.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bool(torch.isnan(logits).any()):
        raise ValueError("the model returned logits that are not numbers (NaN): its weights are damaged or it diverged")
    logits = logits if history is None else penalised(logits, settings, *history)
    if not bool(settings.temperature.any()):
        return logits.argmax(-1)
    return draw(probabilities(logits, settings), uniforms)


def uniform(seed: int, number: int) -> float:
    """The `number`-th uniform draw of a seed (Philox, Salmon et al. 2011): a function of these two alone, so a
    request's tokens do not depend on its batch neighbours, nor on what was drawn before and taken back."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=number)).random())
