"""What the loop minimises, and that it stops when it should."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.data.loader import Batch
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts.ffns.gated import GatedFfn
from assay.parts.heads.lm import LossOptions
from assay.train.evaluate import step_of, token_losses
from assay.train.learner import NLL, Learner
from assay.train.loop import Options, train
from assay.train.outcome import Diverged, Status, TrainResult
from tests.train.small import data, learner, model, recipe

# The first losses of the small model; the same run in float64 agrees to 1e-6.
GOLDEN = [6.17504, 6.07262, 6.2681, 6.02341, 5.87307, 5.98911, 5.52983, 5.99301]


def gradients(held: Learner, batch: Batch, counts: int = 1) -> dict[str, Tensor]:
    """The gradient that the loop forms of a batch cut into pieces."""
    held.optimizer.zero_grad()
    for piece in batch.split(batch.grid[0] // counts):
        held._objective(piece, batch.counted, {NLL: torch.zeros(())}).backward()
    return {n: p.grad.clone() for n, p in held.model.named_parameters() if p.grad is not None}


def uneven(held: Learner) -> Batch:
    """A batch whose second half has a fifth of the first half's targets."""
    batch = next(held.loader)
    targets = batch.targets.clone()
    half = len(targets) // 2
    targets[half:][torch.arange(len(targets) - half) % 5 != 0] = -1
    return replace(batch, targets=targets)


def test_pieces_of_unequal_counts_give_the_gradient_of_the_whole_batch() -> None:
    held = learner()
    held.model.double()
    batch = uneven(held)
    whole, cut = gradients(held, batch), gradients(held, batch, 4)
    assert all(torch.allclose(whole[n], cut[n], rtol=0, atol=1e-12) for n in whole)
    # The mean of the pieces' means is another gradient: what this test is there to tell apart.
    held.optimizer.zero_grad()
    for piece in batch.split(2):
        held._objective(piece, piece.counted * 2, {NLL: torch.zeros(())}).backward()
    worst = max((p.grad - whole[n]).abs().max() for n, p in held.model.named_parameters() if p.grad is not None)
    assert worst > 1e-3


def test_the_gradient_is_that_of_the_mean_cross_entropy() -> None:
    held = learner()
    batch = uneven(held)
    found = gradients(held, batch)
    held.optimizer.zero_grad()
    logits = held.model(step_of(batch)).logits
    kept = batch.targets >= 0
    F.cross_entropy(logits[kept], batch.targets[kept]).backward()
    for name, parameter in held.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulation_changes_no_loss() -> None:
    curves = [train(model(), recipe(batch__accumulate=n, tokens=256)).losses for n in (1, 2, 4)]
    for curve in curves[1:]:
        assert [t for t, _ in curve] == [t for t, _ in curves[0]]
        assert [v for _, v in curve] == pytest.approx([v for _, v in curves[0]], abs=1e-5)


def objective(options: LossOptions, logits: Tensor, targets: Tensor) -> Tensor:
    """The head's objective on given logits: features are the logits and the tied table is the identity."""
    held = learner(model(vocab=256, d_model=16)).model
    return held.head.loss(logits, targets, None, torch.eye(logits.shape[1], dtype=logits.dtype), options)["objective"]  # type: ignore[operator,union-attr,no-any-return]


def some_logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.tensor([3, -1, 0, 10, 4, -1, 7])


def test_label_smoothing_mixes_the_target_with_the_uniform_distribution() -> None:
    logits, targets = some_logits()
    kept = targets >= 0
    log_p = torch.log_softmax(logits[kept], -1)
    plain = -log_p[torch.arange(int(kept.sum())), targets[kept]].sum()
    uniform = -log_p.mean(-1).sum()
    found = objective(LossOptions(smoothing=0.3), logits, targets)
    torch.testing.assert_close(found, 0.7 * plain + 0.3 * uniform)


def test_the_z_loss_pulls_log_z_to_zero() -> None:
    logits, targets = some_logits()
    plain = torch.autograd.grad(objective(LossOptions(), logits, targets), logits)[0]
    with_z = torch.autograd.grad(objective(LossOptions(z=0.01), logits, targets), logits)[0]
    log_z = torch.logsumexp(logits, -1, keepdim=True)
    expected = 0.01 * 2 * log_z * torch.softmax(logits, -1) * (targets >= 0)[:, None]
    torch.testing.assert_close(with_z - plain, expected.detach())


def test_packed_documents_have_the_losses_of_separate_ones() -> None:
    held = learner()
    held.model.eval()
    batch = next(held.loader)
    packed = token_losses(held.model, batch)
    assert len(batch.starts) > batch.grid[0] + 1, "the batch must hold documents that begin inside a row"
    for start, stop in zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True):
        ids, targets = batch.inputs[start:stop], batch.targets[start:stop]
        index = torch.arange(stop - start)
        ends = torch.tensor([0, stop - start])
        alone = Batch(ids, targets, torch.zeros_like(ids), index, ends, torch.ones_like(ids), (1, stop - start))
        torch.testing.assert_close(token_losses(held.model, alone), packed[start:stop], rtol=0, atol=2e-5)


def test_the_recipes_loss_is_what_is_minimised() -> None:
    """Smoothing and z-loss reach the gradient: against the two formulas on the model's own logits."""
    held = learner(how=recipe(loss__smoothing=0.2, loss__z=0.01))
    batch = next(held.loader)
    found = gradients(held, batch)
    held.optimizer.zero_grad()
    kept = batch.targets >= 0
    logits = held.model(step_of(batch)).logits[kept]
    log_p = torch.log_softmax(logits, -1)
    plain = -log_p.gather(1, batch.targets[kept][:, None])[:, 0]
    total = 0.8 * plain - 0.2 * log_p.mean(-1) + 0.01 * torch.logsumexp(logits, -1).square()
    total.mean().backward()
    for name, parameter in held.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_mix_is_in_the_batches() -> None:
    sentence = b"The passkey is "
    for share, rows in ((0.0, 0), (1.0, 4)):
        held = learner(model(context=64), recipe(mix__share=share, batch__length=64, data__document_bytes=200))
        texts = [bytes(row.tolist()) for row in next(held.loader).inputs.view(4, 64)]
        assert sum(sentence in text for text in texts) == rows


class Tapped(GatedFfn):
    """A feed-forward part with a loss of its own (the mean of |y|, times 0.5), a count, and something to do after."""

    seen: tuple[dict[str, Tensor], ...] = ()

    def forward(self, x: Tensor, step: Step, here: Here) -> Tensor:
        y = super().forward(x, step, here)
        here.add("loss.size", 0.5 * y.abs().mean())
        here.add("stat.tokens", torch.tensor(float(len(y))))
        return y

    def after(self, taps: Mapping[str, Tensor]) -> None:
        self.seen = (*self.seen, dict(taps))


@pytest.mark.parametrize("pieces", [1, 2])
def test_loss_taps_are_added_and_stat_taps_summed_for_after(pieces: int) -> None:
    held = learner(how=recipe(batch__accumulate=pieces, clip=None))
    part = held.model.blocks[1].ffn  # type: ignore[union-attr]
    part.__class__ = Tapped
    held._after = [part]  # type: ignore[list-item]
    weight = part.down.weight  # type: ignore[union-attr]
    plain = learner()
    batch = next(plain.loader)
    plain_loss = plain.model(step_of(batch), targets=batch.targets).loss["objective"] / batch.counted
    plain_loss.backward()
    kept = []
    held.optimizer.step = lambda: kept.append(weight.grad.clone())  # type: ignore[assignment,union-attr,return-value]
    held.step(0, 8)
    part_grad = kept[0] - plain.model.blocks[1].ffn.down.weight.grad  # type: ignore[union-attr]
    expected = torch.zeros_like(weight)
    for piece in batch.split(4 // pieces):
        tap = held.model(step_of(piece)).taps["blocks.1.ffn.loss.size"]
        expected += torch.autograd.grad(tap, weight)[0] * piece.counted / batch.counted  # type: ignore[arg-type]
    torch.testing.assert_close(part_grad, expected, rtol=1e-4, atol=1e-6)
    assert [set(taps) for taps in part.seen] == [{"stat.tokens"}]  # type: ignore[union-attr]
    assert part.seen[0]["stat.tokens"] == 64  # type: ignore[index,union-attr]


def test_the_first_losses_are_golden() -> None:
    found = [loss for _, loss in train(model(), recipe()).losses]
    assert found == pytest.approx(GOLDEN, abs=1e-4)


def test_bfloat16_products_follow_the_float32_curve_and_keep_float32_weights() -> None:
    low = train(model(), recipe(precision="bfloat16", tokens=256))
    high = train(model(), recipe(tokens=256))
    pairs = list(zip(low.losses, high.losses, strict=True))
    assert all(abs(a[1] - b[1]) < 0.02 for a, b in pairs) and any(a[1] != b[1] for a, b in pairs)
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_clipping_bounds_the_update_direction() -> None:
    held = learner(how=recipe(clip=1e-3))
    seen: list[float] = []
    real = held.optimizer.step

    def step() -> Any:
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in held.model.parameters() if p.grad is not None)))
        return real()

    held.optimizer.step = step  # type: ignore[method-assign]
    taken = held.step(0, 8)
    assert float(taken.norm) > 1e-2 and seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_no_number_names_its_step() -> None:
    with pytest.raises(Diverged, match=r"step \d+ of 32: the (loss|gradient).*lower recipe.optimizer.lr") as caught:
        train(model(final_norm=None), recipe(optimizer__lr=1e30, tokens=2048, evaluation__tokens=0))
    assert 1 <= caught.value.step <= 32


def test_the_seed_decides_everything() -> None:
    first, again, other = (train(model(), recipe(seed=s, tokens=128)).losses for s in (1, 1, 2))
    assert first == again and first != other


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model(), recipe(tokens=64))
    assert torch.equal(torch.rand(3), expected)


def test_progress_reaches_the_last_step() -> None:
    seen: list[Status] = []
    result = train(model(), recipe(), on_progress=seen.append)
    assert seen[-1].step == seen[-1].steps == result.steps == 8
    assert seen[-1].loss_nats == result.losses[-1][1] and seen[-1].left_s == 0.0
    assert seen[-1].valid_nats == result.valid_losses[-1][1] == result.evaluation.loss_nats  # type: ignore[union-attr]
    assert [tokens for tokens, _ in result.valid_losses] == [256, 512]


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ({}, {"batch__length": 64}, r"recipe.batch.length: 64; model.context is 32"),
        ({"vocab": 200}, {}, r"model.vocab: 200; the recipe's tokenizer has 256 ids"),
        ({"head": None}, {}, "model.head: null"),
        ({}, {"data__valid_one_in": 0}, "evaluation.tokens=0"),
        ({"d_model": 400_000}, {"optimizer__lr_width": None}, r"needs about .* GiB of memory \(weights"),
    ],
)
def test_what_does_not_fit_is_refused(spec: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(model(**spec), recipe(**changes))


def test_memory_for_activations_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    held = learner()
    monkeypatch.setattr("assay.train.learner.available_bytes", lambda device: 200_000)
    with pytest.raises(ValueError, match=r"activations .*accumulate"):
        held.check_memory()
    monkeypatch.setattr("assay.train.learner.available_bytes", lambda device: 2_000_000)
    held.check_memory()


def test_a_finished_model_is_in_evaluation_mode_and_reports_its_data() -> None:
    result = train(model(), recipe())
    assert not result.model.training and result.tokens == 512
    assert result.dataset.digest == data().digest
    assert result.train_flops > 6 * 512 * sum(p.numel() for p in result.model.parameters())


def test_who_looks_at_the_model_after_a_validation_changes_nothing() -> None:
    # Dropout draws random numbers at every step and none in evaluation mode: both would show in the losses.
    spec, how = model(embed={"kind": "token", "dropout": 0.2}), recipe(evaluation__points=4)
    seen: list[tuple[int, float, float]] = []

    def watch(status: Status, found: TrainResult) -> None:
        assert not found.model.training and (found.steps, found.tokens) == (status.step, status.tokens)
        torch.randn(100)
        batch = next(Learner(spec, how, found.dataset, torch.device("cpu")).loader)
        before = torch.get_rng_state()
        loss = float(token_losses(found.model, batch).sum())
        assert torch.equal(before, torch.get_rng_state()) and found.evaluation is not None
        seen.append((status.step, found.evaluation.loss_nats, loss))
        time.sleep(0.5)

    alone, watched = train(spec, how), train(spec, how, options=Options(on_validation=watch))
    assert watched.losses == alone.losses and watched.valid_losses == alone.valid_losses
    assert all(map(torch.equal, watched.model.parameters(), alone.model.parameters()))
    assert [(step * 64, loss) for step, loss, _ in seen] == list(alone.valid_losses) and len(seen) == 4
    assert len({loss for _, _, loss in seen}) == 4 and watched.train_s < 2.0
