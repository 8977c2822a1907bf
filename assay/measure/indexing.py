"""Lightning indexers taught to find what the layers of a frozen model attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.measure.sparsify import Look, dense_layers, sparsified
from assay.measure.subject import Subject
from assay.model.init import initialise
from assay.ops.step import View
from assay.parts.base import build
from assay.parts.selectors.indexer import Indexer, IndexerSelector
from assay.spec.base import InitSpec, Site
from assay.train.evaluate import step_of
from assay.train.optim.adamw import set_rate
from assay.train.recipe import ScheduleSpec
from assay.train.schedule import factor

SCHEDULE = ScheduleSpec(kind="cosine", warmup=0.05, final=0.1)
OTHER = 1 << 30
"""Added to the run's seed: the rows are others than those of its training."""


@dataclass(frozen=True)
class Lesson:
    """So many batches of the recipe's shape and mix, at the peak learning rate `rate`; `heads` of an indexer."""

    steps: int
    rate: float = 1e-2
    heads: int = 4


@dataclass(frozen=True)
class Taught:
    """An indexer for each layer by the name of its mixer, and what each step left between them and the attention:
    nats a token and layer."""

    indexers: dict[str, IndexerSelector]
    divergence: tuple[float, ...]

    def worth(self, look: Look) -> Float[Tensor, "R 1 T S"]:
        """What each entry is worth to each token."""
        asked, view, one = self.asked(look)
        return one.scores(asked, view, look.seen[:, 0])[:, None]

    def asked(self, look: Look) -> tuple[tuple[Tensor, ...], View, IndexerSelector]:
        one = self.indexers[look.mixer.name]
        asked, entries = one.read(look.x, look.x, look.step, look.turn)
        shape = look.view.layout.seq.shape
        return asked, View({name: t.view(*shape, -1) for name, t in entries.items()}, look.view.layout), one


def teach(subject: Subject, lesson: Lesson) -> Taught:
    """The dense warm-up of DeepSeek-V3.2 (DeepSeek-AI 2025, arXiv 2512.02556, section 2.1.1, equation 3): the model
    stays as it is, and gives the attention that its indexers are to predict."""
    assert subject.dataset is not None
    recipe, pupils = subject.recipe, new(subject, lesson.heads)
    weights = [p for one in pupils.values() for p in one.parameters()]
    optimizer = torch.optim.AdamW(weights, lesson.rate, weight_decay=0.0)
    left: list[float] = []
    taught = Taught(pupils, ())

    def study(look: Look) -> None:
        with torch.enable_grad():
            asked, view, one = taught.asked(look)
            loss = one.divergence(asked, view, look.logits)
        loss.backward()
        left.append(float(loss.detach()))

    model = sparsified(subject, study).model
    mix = [(recipe.mix.passkey, recipe.mix.share)] if recipe.mix.share else []
    loader = subject.dataset.stream(recipe.batch.rows, recipe.batch.length, recipe.seed + OTHER, mix)
    for number in range(lesson.steps):
        with torch.no_grad():
            model(step_of(next(loader).to(subject.device)))
        set_rate(optimizer, lesson.rate * factor(SCHEDULE, number, lesson.steps))
        optimizer.step()
        optimizer.zero_grad()
    each = [sum(left[i : i + len(pupils)]) / len(pupils) for i in range(0, len(left), len(pupils))]
    return Taught(pupils, tuple(each))


def new(subject: Subject, heads: int) -> dict[str, IndexerSelector]:
    """An indexer for each layer, as many dimensions wide as its mixer turns."""
    weight = next(subject.model.parameters())
    made: dict[str, IndexerSelector] = {}
    for _, _, mixer, _ in dense_layers(subject.model):
        width = mixer.site.d_in
        site = Site(f"{mixer.name}.index", 0, 1, width, width, init=InitSpec(std="fan_in"))
        spec = Indexer(heads=heads, head_dim=mixer.scheme_dim, keep=subject.length, align=1.0)
        one = build(spec, site)
        initialise(one, spec.weights(site), subject.recipe.seed + mixer.site.layer)
        made[mixer.name] = one.to(weight)
    return made
