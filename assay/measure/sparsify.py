"""A trained model whose attention is told where to look, layer by layer.

Legend: N tokens, R x T rows and columns of the grid, S entries of the view, H query heads, G groups of heads that look
at the same, I heads and K size of an indexer's queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from assay.measure.subject import Subject
from assay.model.lm import LM
from assay.ops import attend as ops
from assay.ops.here import Here
from assay.ops.sees import Sees
from assay.ops.step import Step, View
from assay.parts.base import Mixer
from assay.parts.mixers.gqa import GqaMixer
from assay.parts.mixers.mla import Asked, MlaMixer


@dataclass(frozen=True)
class Look:
    """What a layer is about to look at. x: its mixer's input; logits: -inf where a token does not see."""

    mixer: Any
    x: Float[Tensor, "N D"]
    q: Float[Tensor, "N H K"]
    view: View
    step: Step
    logits: Float[Tensor, "R H T S"]

    @property
    def seen(self) -> Bool[Tensor, "R H T S"]:
        return self.logits > float("-inf")

    def turn(self, q: Float[Tensor, "N I K"], k: Float[Tensor, "N _ K"]) -> tuple[Tensor, Tensor]:
        """Others' queries and keys with the mixer's position scheme on their leading dimensions."""
        if not self.mixer.scheme:
            return q, k
        dim = self.mixer.scheme_dim
        first, second = self.mixer.scheme[0].on_qk(q[..., :dim], k[..., :dim], self.step)
        return torch.cat([first, q[..., dim:]], -1), torch.cat([second, k[..., dim:]], -1)


Choice = Callable[[Look], Bool[Tensor, "R G T S"] | None]
"""Which of the visible entries stay visible; None: all."""


@dataclass(frozen=True)
class Call:
    """The attention that a choice is made for."""

    view: View
    step: Step
    sees: Sees
    rule: ops.Scores
    made: ops.Plan | None


class Told(Mixer):
    """A mixer with a `choice` set beside it, which is asked with the mixer's own input."""

    choice: Choice
    x: Tensor

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        self.x = x
        return super().forward(x, step, here)


class ToldGqa(Told, GqaMixer):
    """Grouped-query attention that looks where it is told."""

    def plan(self, q: Float[Tensor, "N H K"], view: View, step: Step) -> ops.Plan | None:
        return told(self, q, Call(view, step, self.spec.sees, self.rule(q), super().plan(q, view, step)))


class ToldMla(Told, MlaMixer):
    """Latent attention that looks where it is told."""

    def mixed(self, q: Tensor, view: View, asked: Asked) -> Tensor:
        plan = told(self, q, Call(view, asked.step, Sees(), self.rule(), asked.plan))
        return super().mixed(q, view, replace(asked, plan=plan))


TOLD: tuple[tuple[type, type], ...] = ((GqaMixer, ToldGqa), (MlaMixer, ToldMla))


def told(mixer: ToldGqa | ToldMla, q: Tensor, call: Call) -> ops.Plan | None:
    """The plan with what the mixer's choice leaves."""
    logits = ops.logits(q, call.view, call.step, call.sees, call.rule, call.made)
    kept = mixer.choice(Look(mixer, mixer.x, q, call.view, call.step, logits))
    return call.made if kept is None else ops.within(kept, call.made, call.step, call.view.layout, call.sees)


def sparsified(subject: Subject, choice: Choice) -> Subject:
    """The same weights, every layer of which that looks everywhere asks the choice first."""
    made = subject.variant(subject.spec)
    for block, name, mixer, kind in dense_layers(made.model):
        other = kind(mixer.spec, mixer.site)
        other.load_state_dict(mixer.state_dict(), assign=True)
        other.scheme, other.choice = mixer.scheme, choice
        setattr(block, name, other)
    made.model.eval().requires_grad_(False)
    return made


def dense_layers(model: LM) -> list[tuple[Any, str, Any, type]]:
    """(block, name in it, mixer, what can be told in its place) of attention that chooses nothing by itself."""
    found = []
    for block in dict.fromkeys(model.blocks):  # a block that another is tied to stands there twice
        for name, part in block.named_children():
            kind = next((ours for theirs, ours in TOLD if type(part) is theirs), None)
            if kind is not None and not chooses(part.spec):
                found.append((block, name, part, kind))
    return found


def chooses(spec: Any) -> bool:
    """Whether a mixer has a rule of its own for which keys it attends to."""
    return spec.select is not None if spec.kind_name() == "mla" else spec.scores.blocks is not None
