"""The sampler against Hugging Face's processors, and its draws against the probabilities they come from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from assay.engine.request import Request, SamplingParams
from assay.engine.sampler import Settings, draw, largest, penalised, probabilities, sample, uniform

VOCAB = 40


def random_logits(rows: int, seed: int) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(params: SamplingParams, ids: Tensor, logits: Tensor) -> Tensor:
    """Probabilities [1, V] as `generate` of transformers makes them, in its order."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        steps.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        steps.append(TypicalLogitsWarper(params.typical_p))
    return steps(ids, logits).softmax(-1)


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 17, 99]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    typical_p=st.sampled_from([0.1, 0.6, 0.95, 1.0, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
)


@given(params=st.lists(SETTINGS, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_row_equals_hugging_faces(params: list[SamplingParams], seed: int) -> None:
    """Rows with different settings in one call, each as if alone."""
    logits = random_logits(len(params), seed)
    ids = torch.randint(0, VOCAB, (len(params), 6), generator=torch.Generator().manual_seed(seed))
    settings = Settings.of(params)
    seen = torch.zeros(len(params), VOCAB, dtype=torch.bool).scatter(1, ids, True)
    ours = probabilities(penalised(logits, settings, seen, torch.zeros_like(seen, dtype=torch.long)), settings)
    for i, each in enumerate(params):
        expected = theirs(each, ids[i : i + 1], logits[i : i + 1].clone())[0]
        assert torch.equal(ours[i] > 0, expected > 0)
        assert torch.allclose(ours[i], expected, atol=1e-7)


def test_presence_and_frequency_by_hand() -> None:
    logits = torch.zeros(2, 4)
    said = torch.tensor([[0, 1, 3, 0], [2, 0, 0, 0]])
    settings = Settings.of([SamplingParams(presence_penalty=0.5), SamplingParams(frequency_penalty=0.25)])
    expected = torch.tensor([[0, -0.5, -0.5, 0], [-0.5, 0, 0, 0]])
    assert torch.equal(penalised(logits, settings, said > 0, said), expected)


def test_temperature_zero_is_argmax_beside_rows_that_draw() -> None:
    logits = random_logits(3, 1)
    settings = Settings.of([SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=1e-9)])
    p = probabilities(logits, settings)
    best = logits.argmax(-1)
    assert p[0, best[0]] == 1.0 and p[0].sum() == 1.0
    assert torch.allclose(p[1], logits[1].softmax(-1))
    assert p[2, best[2]] == 1.0 and bool(p.isfinite().all())
    tokens = sample(logits, Settings.of([SamplingParams(temperature=0.0)] * 3), torch.full((3,), 0.99))
    assert torch.equal(tokens, best)


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws of one seed; what top-p left out is never drawn."""
    logits = random_logits(1, 2)
    p = probabilities(logits, Settings.of([SamplingParams(top_p=0.9)]))
    uniforms = torch.tensor([uniform(11, n) for n in range(20_000)], dtype=torch.float64)
    tokens = torch.cat([draw(p.expand(1000, -1), u) for u in uniforms.split(1000)])
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    kept = p[0] > 0
    assert float(counts[~kept].sum()) == 0
    expected = p[0][kept] / p[0][kept].sum() * counts.sum()
    assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 0.01
    skewed = expected.roll(1)
    assert stats.chisquare(counts[kept].numpy(), skewed.numpy()).pvalue < 1e-9


def test_uniforms_are_uniform_and_keyed() -> None:
    values = [uniform(5, n) for n in range(4000)]
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert values[7] == uniform(5, 7) != uniform(6, 7)
    assert abs(float(torch.corrcoef(torch.tensor([values[:-1], values[1:]]))[0, 1])) < 0.05


def test_the_ends_of_the_unit_interval() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    assert [int(draw(p, torch.tensor([u], dtype=torch.float64))) for u in (0.0, 0.2499, 0.25, 1 - 2**-53)] == [
        1,
        1,
        3,
        3,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_is_torchs_the_first_of_equal_ones_and_not_a_number_where_one_stands(dtype: torch.dtype) -> None:
    logits = random_logits(6, 4).to(dtype)
    logits[1, 7] = logits[1, 30] = logits[1].max() + 1
    logits[2, 5] = float("nan")
    logits[3] = float("-inf")
    values, indices = largest(logits)
    torch.testing.assert_close(values.to(dtype), logits.amax(-1), rtol=0, atol=0, equal_nan=True)
    assert indices[[0, 4, 5]].tolist() == logits[[0, 4, 5]].argmax(-1).tolist()
    assert indices[1:4].tolist() == [7, 5, 0]


def test_logits_that_are_not_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        sample(torch.tensor([[0.0, float("nan")]]), Settings.of([SamplingParams()]), torch.zeros(1))


@pytest.mark.parametrize(
    "field",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"top_k": -1}, {"seed": -1}, {"topk": 1}],
)
def test_settings_out_of_range_are_refused_by_name(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        SamplingParams(**field)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt"):
        Request(prompt=())
