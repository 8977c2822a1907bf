"""Evaluation against losses counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from assay.data.loader import cover, windows
from assay.data.shards import Shard
from assay.model.lm import LM, build
from assay.train.evaluate import evaluate, step_of, token_losses
from assay.train.utilisation import train_flops_per_token
from tests.train.small import model

TEXT = [list(b"a first document of some length\0"), list(b"short\0"), list("ünïcödé and the rest of it\0".encode())]


def uniform() -> LM:
    """A model whose logits are all 0."""
    made = build(model())
    torch.nn.init.zeros_(made.embed.weight)  # type: ignore[arg-type]
    return made


def test_a_uniform_model_costs_eight_bits_a_byte() -> None:
    found = evaluate(uniform(), cover(Shard.of(TEXT), 8, 2))
    assert found.loss_nats == pytest.approx(math.log(256)) and found.bits_per_byte == pytest.approx(8.0)
    assert found.tokens == found.bytes == sum(len(d) - 1 for d in TEXT)
    assert found.in_context_nats == pytest.approx(0.0, abs=1e-6)


def test_bits_per_byte_divide_by_the_bytes_that_the_targets_stand_for() -> None:
    """nats x tokens / (bytes x ln 2), with tokens of 3 bytes: a third of the bits of bytes."""
    found = evaluate(uniform(), cover(Shard.of(TEXT, [3] * 256), 8, 2))
    assert found.bytes == 3 * found.tokens
    assert found.bits_per_byte == pytest.approx(found.loss_nats * found.tokens / (found.bytes * math.log(2)))
    assert found.bits_per_byte == pytest.approx(8 / 3)


def test_sums_by_place_equal_a_loop_over_tokens() -> None:
    made, batch = build(model(), seed=2).eval(), windows(Shard.of(TEXT), 16, 3)
    with torch.no_grad():
        log_p = torch.log_softmax(made(step_of(batch)).logits, -1)
    sums, counts = [0.0] * 16, [0] * 16
    for i, target in enumerate(batch.targets.tolist()):
        if target >= 0:
            sums[int(batch.index[i])] -= float(log_p[i, target])
            counts[int(batch.index[i])] += 1
    found = evaluate(made, [batch])
    assert list(found.index_tokens) == counts and found.index_nats == pytest.approx(sums, rel=1e-5)
    assert found.loss_nats == pytest.approx(sum(sums) / sum(counts))
    early, late = slice(0, 4), slice(12, 16)
    expected = sum(sums[early]) / sum(counts[early]) - sum(sums[late]) / sum(counts[late])
    assert found.in_context_nats == pytest.approx(expected, rel=1e-5)
    assert found.last_nats == pytest.approx(sum(sums[14:]) / sum(counts[14:]), rel=1e-5)


def test_bins_weigh_places_by_their_tokens() -> None:
    found = evaluate(build(model(), seed=2), [windows(Shard.of(TEXT), 16, 3)])
    places, losses = found.by_position(4)
    assert places == [1.5, 5.5, 9.5, 13.5]
    per_bin = [sum(found.index_tokens[i : i + 4]) for i in range(0, 16, 4)]
    assert sum(n * v for n, v in zip(per_bin, losses, strict=True)) / found.tokens == pytest.approx(found.loss_nats)
    assert found.by_position(100)[0] == [float(i) for i in range(16) if found.index_tokens[i]]


def test_batches_of_several_lengths_and_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made, shard = build(model(), seed=2), Shard.of(TEXT)
    batches = [windows(shard, 16, 2), windows(shard, 8, 3)]
    whole, parts = evaluate(made, batches), [evaluate(made, [b]) for b in batches]
    assert whole.tokens == sum(p.tokens for p in parts)
    assert sum(whole.index_nats) == pytest.approx(sum(sum(p.index_nats) for p in parts))
    direct = token_losses(made, batches[0])
    monkeypatch.setattr("assay.train.evaluate.LOGITS", 16 * 256)  # one row at a time
    torch.testing.assert_close(token_losses(made, batches[0]), direct)


def test_dropout_is_off_and_the_models_mode_is_put_back() -> None:
    spec = model(embed={"kind": "token", "dropout": 0.5})
    made, batch = build(spec).train(), windows(Shard.of(TEXT), 16, 3)
    assert evaluate(made, [batch]) == evaluate(made, [batch]) and made.training


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate(build(model()), [])


def test_training_flops_are_the_published_formula() -> None:
    """gpt-11m's shape without its position table, after PaLM's appendix B."""
    spec, count = model(), sum(p.numel() for p in build(model()).parameters())
    assert train_flops_per_token(spec, 16) == 6 * count + 12 * 2 * 16 * 16
