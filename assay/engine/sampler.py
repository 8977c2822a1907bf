"""The one sampler: logits to probabilities, and probabilities to a token, as pure functions with a setting a row.

The order is Hugging Face's: repetition penalty (then presence and frequency), temperature, top-k, top-p, min-p,
typical-p.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from assay.engine.request import SamplingParams
from assay.ops import native


@dataclass(frozen=True)
class Settings:
    """The settings of B rows as columns; None where no row asks for that step."""

    temperature: Float[Tensor, "B 1"]
    top_k: Int[Tensor, "B 1"] | None
    top_p: Float[Tensor, "B 1"] | None
    min_p: Float[Tensor, "B 1"] | None
    typical_p: Float[Tensor, "B 1"] | None
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
            column([r.typical_p for r in rows], 1.0),
            column([r.repetition_penalty for r in rows], 1.0),
            column([r.presence_penalty for r in rows], 0.0),
            column([r.frequency_penalty for r in rows], 0.0),
        )

    def of_rows(self, rows: Int[Tensor, "N"]) -> Settings:
        """The settings of these rows, of which some may be the same."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})


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
    """Logits over the temperature, -inf where top-k, top-p, min-p or typical-p leave a token out. Shifted: without
    typical-p, which may leave out the largest, that is 0.

    Tokens that are as likely as the last one kept are kept too, so equal logits never make the order matter.
    """
    heat = torch.where(settings.temperature > 0, settings.temperature, 1.0)
    z = (logits - logits.amax(-1, keepdim=True)).div_(heat)
    cuts = [_kth(z, settings.top_k)] if settings.top_k is not None else []
    if settings.top_p is not None:
        cuts.append(_nucleus(z, settings.top_p, cuts[0] if cuts else None))
    if settings.min_p is not None:  # p < min_p * p_max, and the largest logit is 0
        cuts.append(settings.min_p.log())
    if cuts:
        z = torch.where(z < functools.reduce(torch.maximum, cuts), float("-inf"), z)
    return z if settings.typical_p is None else _typical(z, settings.typical_p)


def _kth(z: Tensor, top_k: Tensor) -> Tensor:
    """[B, 1]: the value of the k-th largest entry of each row; -inf for rows that keep all."""
    size = z.shape[-1]
    best = z.topk(min(int(top_k.max()), size), -1).values
    kth = best.gather(-1, (top_k.clamp(1, best.shape[-1]) - 1))
    return torch.where(top_k > 0, kth, float("-inf"))


def _nucleus(z: Tensor, top_p: Tensor, least: Tensor | None) -> Tensor:
    """[B, 1]: the value of the last token that is needed for the most likely ones to hold a share `top_p`, of those
    that are at least `least`; -inf for rows that keep all."""
    values = _sorted(z)
    if least is not None:
        values = torch.where(values < least, float("-inf"), values)
    mass = values.softmax(-1).cumsum(-1)
    first = torch.searchsorted(mass, (1 - top_p).to(mass.dtype), right=True).clamp(
        max=z.shape[-1] - 1
    )  # the best stays
    return torch.where(top_p < 1, values.gather(-1, first), float("-inf"))


def _typical(z: Tensor, share: Tensor) -> Tensor:
    """-inf for all but the tokens whose information is nearest to its mean, the row's entropy, until they hold a share
    `typical_p` (Meister et al. 2022, equation 7), of what the other cuts have left; rows with share 1 keep all."""
    log = z.log_softmax(-1)
    entropy = -torch.where(log > float("-inf"), log.exp() * log, 0.0).sum(-1, keepdim=True)
    away = (log + entropy).abs()  # infinite for what is left out
    order = away.argsort(-1)
    mass = log.exp().gather(-1, order).cumsum(-1)
    last = (mass < share).sum(-1, keepdim=True).clamp(max=z.shape[-1] - 1)
    return torch.where((away > away.gather(-1, order.gather(-1, last))) & (share < 1), float("-inf"), z)


def _sorted(z: Tensor) -> Tensor:
    """Each row from its smallest value to its largest. NumPy's sort is some 30 times as fast as torch's on a CPU."""
    return torch.from_numpy(np.sort(z.numpy(), -1)) if z.device.type == "cpu" else z.sort(-1).values


def largest(logits: Float[Tensor, "B V"]) -> tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
    """The largest of each row, a NaN where there is one, and where it stands first. NumPy's is some 10 times as fast as
    torch's on a CPU, and the kernels' need not be given float32."""
    if logits.device.type != "cpu":
        found = logits.max(-1)
        return found.values, found.indices
    compiled = native.serving(logits)
    told = None if compiled is None else compiled.argmax(logits)
    if told is not None:
        return told
    logits = logits if logits.dtype == torch.float64 else logits.float()
    indices = torch.from_numpy(logits.detach().numpy().argmax(-1))
    return logits.gather(-1, indices[:, None])[:, 0], indices


def probabilities(logits: Float[Tensor, "B V"], settings: Settings) -> Float[Tensor, "B V"]:
    """What each row draws from, without penalties: temperature 0 puts all on the argmax (of equal ones the first)."""
    drawn = warped(logits, settings).softmax(-1)
    if bool((settings.temperature > 0).all()):
        return drawn
    greedy = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(settings.temperature > 0, drawn, greedy)


def draw(p: Float[Tensor, "B V"], uniforms: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The token where the cumulated probability passes u (inverse transform), for u in [0, 1). Summed in float64;
    a token of probability 0 is never drawn."""
    total = p.cumsum(-1, dtype=torch.float64)
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
    values, indices = largest(logits)
    if bool(values.isnan().any()):
        raise ValueError("the model returned logits that are not numbers (NaN): its weights are damaged or it diverged")
    greedy = not bool(settings.temperature.any())
    if history is not None:
        logits = penalised(logits, settings, *history)
        return logits.argmax(-1) if greedy else draw(probabilities(logits, settings), uniforms)
    return indices if greedy else draw(probabilities(logits, settings), uniforms)


def uniform(seed: int, number: int, choice: int = 0) -> float:
    """The `number`-th uniform draw of a seed (Philox, Salmon et al. 2011): a function of these alone, so a request's
    tokens do not depend on its batch neighbours, nor on what was drawn before and taken back. The choices of a request
    have keys of their own: the seed is the lower half of Philox's 128 bits, the choice the upper one."""
    return float(np.random.Generator(np.random.Philox(key=seed | choice << 64, counter=number)).random())
