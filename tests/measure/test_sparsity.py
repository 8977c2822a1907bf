"""What a few keys hold: closed forms for even attention, sorting for the best keys, and models that have the rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from assay.measure import sparsity
from assay.measure.indexing import Lesson, teach
from assay.measure.sparsify import sparsified
from assay.measure.subject import Subject
from assay.spec.load import change
from assay.train.evaluate import step_of
from tests.measure.subjects import recipe, spec, subject

LENGTH, TAIL = 32, 4
RANKED = ("oracle", "shared", "indexer", "random")
PAGED = ("bounds", "mean")


def made(**mixer: Any) -> Subject:
    """Weights drawn wide, so that attention is uneven."""
    wide = change(spec(**mixer), {"context": LENGTH})
    found = subject(wide, recipe(LENGTH))
    with torch.no_grad():
        for name, p in found.model.named_parameters():
            if "mixer.q" in name:
                p.mul_(4.0)
    return found


def measured(found: Subject, **options: Any) -> dict[tuple[str, int], dict[str, Any]]:
    rows = sparsity.measure(found, page=2, windows=4, steps=2, **{"shares": (0.25,), **options})
    return {(row["method"], row["keep"]): row for row in rows}


def test_even_attention_holds_what_its_keys_are() -> None:
    """Queries of zero: k of n keys hold k / n, whole pages behind the query and its own as far as it goes."""
    found = made()
    with torch.no_grad():
        for name, p in found.model.named_parameters():
            if "mixer.q" in name:
                p.zero_()
    rows = measured(found)
    places = np.arange(LENGTH - TAIL, LENGTH)
    for name in RANKED:
        assert rows[name, 8]["mass"] == pytest.approx(np.mean(8 / (places + 1)), rel=1e-6)
    for name in PAGED:
        assert rows[name, 8]["mass"] == pytest.approx(np.mean((6 + places % 2 + 1) / (places + 1)), rel=1e-6)


def test_the_oracle_holds_what_sorting_says() -> None:
    found = made()
    rows = measured(found, shares=(0.125, 0.25, 0.5))
    step = step_of(found.joined(LENGTH, 4 * LENGTH), frozenset(["*.probs"]))
    taps = found.model.eval()(step).taps
    p = np.stack([t.detach().numpy().reshape(4, LENGTH, 2, LENGTH)[:, -TAIL:] for t in taps.values()])
    for keep in (4, 8, 16):
        most = np.sort(p, -1)[..., -keep:].sum(-1).mean()
        assert rows["oracle", keep]["mass"] == pytest.approx(most, rel=1e-9)
        together = np.argsort(p.mean(-2), -1)[..., -keep:]
        held = np.take_along_axis(p, together[..., None, :], -1).sum(-1).mean()
        assert rows["shared", keep]["mass"] == pytest.approx(held, rel=1e-9)
        others = [rows[name, keep]["mass"] for name in ("bounds", "mean", "indexer", "random")]
        assert most > held > max(*others[2:]) and most > max(others)


@pytest.mark.parametrize("by", PAGED)
def test_pages_are_those_of_a_model_that_has_the_rule(by: str) -> None:
    found = made()
    rows = measured(found, methods=[by])
    blocks = {"by": by, "size": 2, "keep": 4}
    ruled = found.variant(change(found.spec, {"blocks.b.mixer.scores": {"blocks": blocks}}))
    alone = sparsity.measure(ruled, page=2, windows=4)
    assert [row["method"] for row in alone] == ["none"] and alone[0]["mass"] is None
    assert rows[by, 8]["loss_nats"] == pytest.approx(alone[0]["loss_nats"], rel=1e-9)
    assert rows["none", LENGTH]["loss_nats"] != pytest.approx(alone[0]["loss_nats"], rel=1e-6)


@pytest.mark.parametrize(
    "mixer",
    [
        {},
        {"kind": "mla", "heads": 2, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4},
        {"kv_heads": 1, "sees": {"window": 20}},
    ],
)
def test_all_keys_are_no_loss(mixer: dict[str, Any]) -> None:
    found = made() if "kind" not in mixer else subject(latent(mixer), recipe(LENGTH))
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    rows = measured(found, shares=(1.0,))
    for (name, keep), row in rows.items():
        assert keep == LENGTH and row["mass"] == pytest.approx(1.0)
        assert row["loss_delta_nats"] == pytest.approx(0.0, abs=1e-9), name
    for name, p in found.model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


def latent(mixer: dict[str, Any]) -> Any:
    tree = {"blocks.b.mixer": {**mixer, "position": "main"}, "context": LENGTH}
    return change(spec(), tree)


def test_an_indexer_comes_closer_to_the_attention() -> None:
    """Than it began, and than keys at random are to it."""
    found = made()
    taught = teach(found, Lesson(60))
    first, last = (np.mean(taught.divergence[part]) for part in (slice(0, 5), slice(-5, None)))
    assert last < 0.7 * first
    rows = measured(found, methods=["indexer", "random"])
    assert rows["indexer", 8]["mass"] > rows["random", 8]["mass"]


def test_a_layer_is_told_before_the_next_one_looks() -> None:
    """What the first layer does not see, the second layer's input does not hold: the inputs change."""
    found = made()
    batch = found.joined(LENGTH, LENGTH)
    inputs: list[torch.Tensor] = []

    def blind(look: Any) -> Any:
        inputs.append(look.x)
        return torch.eye(LENGTH, dtype=torch.bool)[None, None] if look.mixer.site.layer == 0 else None

    with torch.no_grad():
        for choice in (lambda look: inputs.append(look.x), blind):
            sparsified(found, choice).model(step_of(batch))
    assert torch.equal(inputs[0], inputs[2]) and not torch.allclose(inputs[1], inputs[3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["orakel"]}, "sparsity: methods: 'orakel'; accepted: oracle, shared, bounds"),
        ({"shares": [0.001]}, "sparsity: shares: 0.001; accepted: 1 to 32 keys of 32"),
        ({"shares": [2.0]}, "sparsity: shares"),
        ({"page": 3}, "sparsity: page: 3; accepted: a divisor of 4"),
        ({"windows": 0}, "sparsity: windows: 0; accepted: 1 or more"),
    ],
)
def test_options_that_measure_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsity.measure(made(), **{"shares": (0.125,), "page": 2, **given})
