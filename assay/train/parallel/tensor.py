"""Tensor parallelism: the heads and channels of each part dealt out, two exchanges a part (one each way).

Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3): a part's input is copied to all ranks, its products are
cut by column on the way in and by row on the way out, and the ranks' outputs are summed. Which weights are cut where is
the table that each part declares (`assay.spec.shard`).
"""

from __future__ import annotations

from typing import Any

from assay.model.lm import LM, Forgetting
from assay.parts.base import Part
from assay.parts.cut import cut
from assay.spec.model import ModelSpec
from assay.spec.shard import Cut, cut_fields, cut_weights, owned
from assay.train.parallel import vocab
from assay.train.parallel.exchange import Line, copied, gathered, joined, scattered, sliced, summed
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.plan import deal_of


def apply(model: LM, mesh: Mesh) -> None:
    """Cut the model to this rank's piece, in place. ValueError, by name, for a part that cannot be cut so."""
    deal_of(model.spec, mesh)
    line, found = Line.of(mesh, "tensor"), {m.name: m for m in model.modules() if isinstance(m, Part)}
    few = {}
    for site, spec in owned(model.spec):
        if cuts := cut_weights(spec, site, "tensor", line.ranks):
            _cut(found[site.name], cuts, line, mesh.spec.sequence)
            few[site.name] = spec.copied(site)
    vocab.apply(model, line, model.spec.vocab)
    if mesh.spec.sequence:
        _spread_tokens(model, line)
    assert isinstance(model.blank, Forgetting)
    sources = model.spec.sources
    fields = {}
    for name, kept in model.blank.fields.items():
        _, layer, rest = name.split(".", 2)  # a block's state stands under its own name, its weights under its source's
        weights = f"blocks.{sources[int(layer)]}.{rest}"
        fields[name] = cut_fields(kept, line.ranks, few[weights]) if weights in few else kept
    model.blank = Forgetting(fields)


def _cut(part: Part, cuts: dict[str, Cut], line: Line, sequence: bool) -> None:
    cut(part, cuts, line.rank, line.ranks)
    if part.spec.slot in ("mixers", "ffns"):
        into, out_of = (gathered, scattered) if sequence else (copied, summed)
        part.register_forward_pre_hook(lambda module, args: (into(args[0], line), *args[1:]))
        part.register_forward_hook(lambda module, args, out: out_of(out, line))


def _spread_tokens(model: LM, line: Line) -> None:
    """Between the parts that are cut, each rank has its share of the step's tokens (Korthikanti et al. 2022, arXiv
    2205.05198, section 4.2.2): norms and what is saved for them cost a rank its share, and no byte more is sent.
    ValueError, by name, for a model in which something else reads tokens there."""
    refuse_sequence(model.spec, line.ranks)

    def into(module: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[0].shape[0] % line.ranks:
            raise ValueError(
                f"parallel.sequence: {args[0].shape[0]} tokens of a step and parallel.tensor={line.ranks}; accepted: "
                f"rows of a process times recipe.batch.length a multiple of {line.ranks}"
            )
        return sliced(args[0], line), *args[1:]

    model.blocks[0].register_forward_pre_hook(into)
    model.blocks[-1].register_forward_hook(lambda module, args, out: (joined(out[0], line), *out[1:]))


def refuse_sequence(spec: ModelSpec, ranks: int) -> None:
    """ValueError, by name, for what needs all tokens between the parts that are cut."""
    what = "parallel.sequence is not supported"
    for layer, source in enumerate(spec.sources):
        if layer != source:
            raise ValueError(f"blocks.{layer}: like blocks.{source}: {what}; accepted: false")
        if any(stage.dropout for stage in spec.expand()[layer]):
            raise ValueError(f"blocks.{layer}: dropout, which is drawn for all tokens: {what}; accepted: dropout 0")
        for site, part in spec.layer_parts(layer):
            whole = part.slot in ("mixers", "ffns") and not part.pieces(site).get("tensor")
            if whole or "neighbours" in part.refusals():
                raise ValueError(f"{site.name}: {part.slot[:-1]} {part.kind_name()}: {what}; accepted: false")
