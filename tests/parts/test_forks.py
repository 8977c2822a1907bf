"""A state that is forked goes on twice: each branch as if it had read its own text from the start."""

from __future__ import annotations

import pytest
import torch

from assay.cache.cache import Cache
from assay.cache.size import Size
from assay.conform.cases import case, close, every, tiny
from assay.conform.stored import feed, tolerance
from assay.spec.base import MixerSpec

LENGTH, SHARED = 12, 7
RECURRENT = [
    pytest.param(spec, id=f"{kind.kind_name()}{i}")
    for kind in every()
    if kind.slot == "mixers"
    for i, spec in enumerate(tiny(kind))
    if isinstance(spec, MixerSpec) and not {"causal", "chunking"} & set(spec.refusals())
]


@pytest.mark.parametrize("spec", RECURRENT)
@torch.no_grad()
def test_both_branches_are_as_if_read_alone(spec: MixerSpec) -> None:
    c = case(spec)
    if not any(c.fields.values()) or c.memory(1) is not None:
        return
    c.modules.eval()
    one = c.noise((1, LENGTH, c.site.d_in), 1)
    other = torch.cat([one[:, :SHARED], c.noise((1, LENGTH - SHARED, c.site.d_in), 2)], 1)
    store = Cache(c.fields, Size(2, LENGTH, SHARED, 0), torch.float64, c.device)
    slot = store.open()
    feed(c, store, [slot], one[:, :SHARED], 0)
    twin = store.fork(slot)
    got: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for at in range(SHARED, LENGTH):  # in turns, so that one would write over what the other needs
        for number, (where, text) in enumerate(((twin, other), (slot, one))):
            got[number].append(feed(c, store, [where], text[:, at : at + 1], at))
    for pieces, text in ((got[0], other), (got[1], one)):
        whole = c.run(text.view(LENGTH, -1), c.step(1, LENGTH)).view(1, LENGTH, -1)[:, SHARED:]
        close(torch.cat(pieces, 1), whole, "a branch and its text alone", tolerance(c))
