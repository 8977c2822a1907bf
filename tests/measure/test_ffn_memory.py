"""What networks store: a key that is planted, and coefficients, triggers and values counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.data.loader import windows
from assay.measure import ffn_memory
from assay.measure.subject import Subject
from assay.ops.step import rows_step
from tests.measure.subjects import spec, subject

KEY = 6


@torch.no_grad()
def planted() -> tuple[Subject, int, int, list[int]]:
    """A key of the first layer that answers to one token and promotes another: the stream is the embedding there. And
    what follows the token wherever it stands."""
    made = subject(spec())
    text = windows(made.text, 16, 64, join=True)
    (token, _), *_ = Counter(text.inputs.tolist()).most_common(1)
    behind = [b for a, b in zip(text.inputs.tolist(), text.targets.tolist(), strict=True) if a == token and b >= 0]
    follows = Counter(behind).most_common(1)[0][0]
    block, table = made.model.blocks[0], made.model.embed.table()
    table.copy_(F.normalize(table, dim=-1))
    block.mixer.out.weight.zero_()
    block.ffn.gate.weight[KEY] = 4 * table[token]
    block.ffn.up.weight[KEY] = table[token]
    block.ffn.down.weight[:, KEY] = table[follows]
    return made, token, follows, behind


def test_a_planted_key_is_found() -> None:
    made, token, follows, behind = planted()
    rows = ffn_memory.measure(made, tokens=1024, keys=24, triggers=len(behind), grams=1)
    mine = {row["key"]: row for row in rows if row["layer"] == 0}
    assert mine[KEY]["share_1"] == 1.0 and mine[KEY]["ngram"] == made.tokenizer.decode([token])
    assert mine[KEY]["promotes"].split(" ")[0] == repr(made.tokenizer.decode([follows]))[1:-1]
    assert mine[KEY]["agreement"] == pytest.approx(behind.count(follows) / len(behind), abs=1e-6)
    assert mine["chance"]["share_1"] < 0.5


@torch.no_grad()
def test_every_number_of_a_layer_by_hand() -> None:
    made = subject(spec())
    rows = ffn_memory.measure(made, tokens=256, keys=24, triggers=5, grams=2)
    text = windows(made.text, 16, 16, join=True)
    ids, block, caught = text.inputs.view(16, 16), made.model.blocks[1], dict[str, Tensor]()
    hook = block.ffn.register_forward_pre_hook(lambda _, args: caught.update(x=args[0]))
    made.model(rows_step(ids))
    hook.remove()
    x, ffn = caught["x"], block.ffn
    hidden = F.silu(x @ ffn.gate.weight.T) * (x @ ffn.up.weight.T)
    norm = made.model.final_norm
    assert norm is not None
    ones, twos, agreed = [], [], []
    for key in range(24):
        order = sorted(
            (p for p in range(256) if p % 16 and text.targets[p] >= 0), key=lambda p: -float(hidden[p, key])
        )[:5]
        ones.append(max(Counter(int(text.inputs[p]) for p in order).values()) / 5)
        twos.append(max(Counter((int(text.inputs[p - 1]), int(text.inputs[p])) for p in order).values()) / 5)
        top = int((made.model.embed.table() @ norm(ffn.down.weight[:, key])).argmax())
        agreed.append(sum(int(text.targets[p]) == top for p in order) / 5)
    found = next(row for row in rows if row["layer"] == 1 and row["key"] == "all")
    for name, values in (("share_1", ones), ("share_2", twos), ("agreement", agreed)):
        assert found[name] == pytest.approx(sum(values) / 24, abs=1e-9)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="triggers: 0; accepted: at least 1"):
        ffn_memory.measure(subject(spec()), triggers=0)
