"""Parameters and state bytes of published models: counts from their papers and checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from assay.cost.bill import Question, Sheet, bill
from assay.hub.family import read
from assay.spec.model import ModelSpec
from tests.cost.models import decoder, gemma3_27b, gpt2, llama3_8b, llama31_405b, mixtral_8x7b
from tests.cost.published import ACTIVE, GEMMA3_27B, PARAMETERS

GIB = 2**30


@pytest.mark.parametrize(
    ("make", "total", "active", "embedding"),
    [
        (llama3_8b, 8_030_261_248, 8_030_261_248, 2 * 128_256 * 4096),
        (gpt2, 124_439_808, 124_439_808, 50_257 * 768),
        (mixtral_8x7b, 46_702_792_704, 12_879_925_248, 2 * 32_000 * 4096),
        (llama31_405b, 405_853_388_800, 405_853_388_800, 2 * 128_256 * 16_384),
    ],
)
def test_parameters(make: Callable[[], ModelSpec], total: int, active: int, embedding: int) -> None:
    told = bill(make(), Question(16))
    assert told.params == {"total": total, "active": active, "embedding": embedding}
    assert told.weight_bytes == 2 * total
    assert sum(layer.params for layer in told.layers) == total
    assert sum(layer.active for layer in told.layers) == active


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (decoder(4096, 32, (32, 32), 11008, 32_000), 524_288),  # Llama 2 7B
        (llama3_8b(), 131_072),
        (decoder(8192, 80, (64, 8), 29568, 152_064), 327_680),  # Qwen2.5 72B
        (llama31_405b(), 516_096),
        (decoder(8192, 95, (64, 8), 22016, 102_400), 2 * 194_560),  # DeepSeek 67B, the baseline of DeepSeek-V2
    ],
)
def test_state_bytes_of_a_token(spec: ModelSpec, expected: int) -> None:
    """2 (k and v) x layers x key heads x head size x 2 bytes."""
    told = bill(spec, Question(100, batch=3))
    assert told.state_bytes_per_token == expected
    assert told.state_bytes == 3 * 100 * expected and told.reserved_bytes == 3 * 112 * expected
    assert bill(spec, Question(100, kv_dtype="f32")).state_bytes_per_token == 2 * expected


@pytest.mark.parametrize(("context", "mixed", "full"), [(32_768, 2.91, 15.5), (131_072, 10.41, 62.0)])
def test_windows_in_five_of_six_layers(context: int, mixed: float, full: float) -> None:
    ask = Question(context)
    a, b = (bill(gemma3_27b(p), ask).state_bytes / GIB for p in (["local"] * 5 + ["global"], ["global"]))
    assert (round(a, 2), round(b, 2)) == (mixed, full)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_configuration_has_the_parameters_of_its_checkpoint(name: str) -> None:
    values, total = PARAMETERS[name]
    found = read(values, name)
    told = bill(found.spec, Question(16))
    assert told.params["total"] == sum(told.params_by.values()) == total
    assert told.params["active"] == ACTIVE.get(name, told.params["active"])
    assert (told.params["active"] < total) == ("num_experts_per_tok" in values)
    unused = {"num_key_value_heads", "rms_norm_eps", "rope_theta", "intermediate_size"}
    assert set(found.unread) <= unused, "what its family does not have"


@pytest.mark.parametrize(("context", "expected"), [(32_768, 2.91), (131_072, 10.41)])
def test_gemma3_27b_from_its_configuration(context: int, expected: float) -> None:
    """arXiv 2503.19786, figure 6: five local layers of six leave a sixth of the cache."""
    sheet = Sheet(read(GEMMA3_27B).spec)
    assert round(sheet.state_bytes(Question(context)) / GIB, 2) == expected


def test_latent_attention_keeps_576_values_a_layer() -> None:
    """DeepSeek-V3 (arXiv 2412.19437): a latent of 512 and 64 turned dimensions, in 61 layers, of 2 bytes."""
    sheet = Sheet(read(PARAMETERS["DeepSeek-V3"][0]).spec)
    assert sheet.state_bytes(Question(1000)) == 1000 * 70_272 == 1000 * 61 * 576 * 2


@pytest.mark.parametrize(("kv", "width"), [("bf16", 256), ("f32", 512), ("int8", 128 + 4), ("int4", 64 + 4)])
def test_quantised_state(kv: str, width: int) -> None:
    """A vector of 128 in 8 or 4 bits, and 2 bytes each of scale and zero."""
    told = bill(llama3_8b(), Question(1000, kv_dtype=kv))
    assert told.state_bytes_per_token == 2 * 32 * 8 * width
    assert told.state_bytes == 1000 * 2 * 32 * 8 * width


def test_odd_sizes_round_up() -> None:
    """Seven values of 4 bits fill four bytes."""
    spec = decoder(14, 1, (2, 1), 8, 5, mixer={"position": None})
    assert bill(spec, Question(3, kv_dtype="int4")).state_bytes_per_token == 2 * (4 + 4)


def test_dense_flops_of_a_known_model() -> None:
    """2 FLOPs for each matrix weight, and 4 x layers x d for each visible pair (Kaplan et al. 2020, table 1)."""
    n = 512
    told = bill(llama3_8b(), Question(n)).flops
    matrices = 8_030_261_248 - 128_256 * 4096 - (2 * 32 + 1) * 4096  # without the input table and the norms
    assert told["prefill"] == n * 2 * matrices + 4 * 32 * 4096 * n * (n + 1) // 2
    assert told["decode_per_token"] == 2 * matrices + 4 * 32 * 4096 * n
    assert told["train_per_token"] == 3 * told["prefill"] // n
