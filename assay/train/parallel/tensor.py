"""Tensor parallelism: the heads and channels of each part dealt out, two exchanges a part (one each way).

Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3): a part's input is copied to all ranks, its products are
cut by column on the way in and by row on the way out, and the ranks' outputs are summed. Which weights are cut where is
the table that each part declares (`assay.spec.shard`).
"""

from __future__ import annotations

from assay.model.lm import LM, Forgetting
from assay.parts.base import Part
from assay.parts.cut import cut
from assay.spec.shard import cut_fields, cut_weights, owned
from assay.train.parallel import vocab
from assay.train.parallel.exchange import Line, copied, summed
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.plan import deal_of


def apply(model: LM, mesh: Mesh) -> None:
    """Cut the model to this rank's piece, in place. ValueError, by name, for a part that cannot be cut so."""
    deal_of(model.spec, mesh)
    line, found = Line.of(mesh, "tensor"), {m.name: m for m in model.modules() if isinstance(m, Part)}
    cut_names = set()
    for site, spec in owned(model.spec):
        if dims := cut_weights(spec, site, "tensor"):
            _cut(found[site.name], dims, line)
            cut_names.add(site.name)
    vocab.apply(model, line, model.spec.vocab)
    assert isinstance(model.blank, Forgetting)
    sources = model.spec.sources
    fields = {}
    for name, kept in model.blank.fields.items():
        _, layer, rest = name.split(".", 2)  # a block's state stands under its own name, its weights under its source's
        weights = f"blocks.{sources[int(layer)]}.{rest}"
        fields[name] = cut_fields(kept, line.ranks) if weights in cut_names else kept
    model.blank = Forgetting(fields)


def _cut(part: Part, dims: dict[str, int], line: Line) -> None:
    cut(part, dims, line.rank, line.ranks)
    if part.spec.slot in ("mixers", "ffns"):
        part.register_forward_pre_hook(lambda module, args: (copied(args[0], line), *args[1:]))
        part.register_forward_hook(lambda module, args, out: summed(out, line))
