"""Models in 8 and 4 bits: what is packed, what they say beside float models of the same values, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from assay.cli.common import in_dtype
from assay.cli.main import main
from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.model.lm import LM, build
from assay.ops.packed import Packed, pack, packed_bytes
from assay.ops.step import rows_step
from assay.passes.quantise import quantise
from assay.spec.load import load_model
from assay.train.checkpoint import save_checkpoint
from tests.measure.subjects import subject
from tests.model.small import made

MODELS = ("lab-64", "lab-64-kimi-linear", "lab-64-jamba", "lab-64-qwen3-next")


def packed(model: LM) -> dict[str, Packed]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, Packed)}


def unpacked(model: LM) -> LM:
    """A float model of the same values."""
    found = copy.deepcopy(model)
    for name, p in packed(model).items():
        place, _, leaf = name.rpartition(".")
        setattr(found.get_submodule(place), leaf, nn.Parameter(p.values_()))
    return found


def logits(model: LM, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found = model(rows_step(ids)).logits
    assert found is not None
    return found


def drawn(rows: int, length: int, most: int) -> Tensor:
    return torch.randint(most, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_it_says_what_a_float_model_of_its_values_says(name: str, dtype: str) -> None:
    model = quantise(build(load_model(name)), dtype)
    beside = unpacked(model)
    assert not packed(beside)
    ids = drawn(2, 12, model.spec.vocab)
    mine, theirs = logits(model, ids), logits(beside, ids)
    # Rows are rounded to 127ths of their groups' largest: about 1 % of a product, less in a sum of many.
    assert 0 < (mine - theirs).norm() / theirs.norm() < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_what_is_packed_and_what_is_not(name: str) -> None:
    model = build(load_model(name))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    found = packed(quantise(model, "int4"))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shapes
    assert {p.bits for n, p in found.items() if n.startswith("blocks.")} == {4} and found["embed.weight"].bits == 8
    kept = shapes.keys() - found.keys()
    assert not any(".router." in n for n in found) and {n for n in shapes if "norm" in n} <= kept
    assert all(len(shapes[n]) >= 2 and shapes[n][-2] >= 16 for n in found)
    assert not any(p.requires_grad for p in model.parameters())


def test_experts_are_packed_and_their_router_is_not() -> None:
    spec = {"ffn": {"kind": "moe", "experts": 3, "width": 20, "bias": True, "shared": {"kind": "gated", "width": 24}}}
    model = quantise(made(spec).float(), "int4")
    moe, beside, ids = model.blocks[0].ffn, unpacked(model), drawn(2, 9, 17)
    assert [type(getattr(moe, n)) for n in ("gate", "up", "down")] == [Packed] * 3 and moe.up.shape == (3, 20, 16)
    assert {p.bits for n, p in packed(model).items() if ".ffn." in n} == {4} and not packed(moe.router)
    mine, theirs = logits(model, ids), logits(beside, ids)
    assert 0 < (mine - theirs).norm() / theirs.norm() < 0.02
    alone = torch.cat([logits(model, ids[:1, :n])[-1:] for n in range(1, 10)])
    torch.testing.assert_close(alone, mine[:9], rtol=1e-3, atol=1e-3)


def test_an_untied_head_is_in_eight_bits_and_the_rest_keeps_its_dtype() -> None:
    model = quantise(made().bfloat16(), "int4")
    assert packed(model)["head.out.weight"].bits == 8 and next(model.parameters()).dtype == torch.bfloat16
    assert model.blocks[0].mixer_norm.weight.dtype == torch.bfloat16
    assert logits(model, drawn(1, 5, 17)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_replies_are_the_same_alone_and_in_company(dtype: str) -> None:
    """Greedy, with prompts of different lengths, read whole and in one batch."""
    data = subject(dtype=torch.float32)
    model = quantise(data.model, dtype)
    prompts = [tuple(drawn(1, n, 256)[0].tolist()) for n in (3, 9, 5)]
    asked = [Request(prompt=p, sampling=SamplingParams(temperature=0.0), max_new=6) for p in prompts]
    alone = [[t.id for t in generate(model, data.tokenizer, [one])] for one in asked]
    together: list[list[int | None]] = [[] for _ in asked]
    for token in generate(model, data.tokenizer, asked):
        together[token.request].append(token.id)
    assert together == alone


def test_training_is_refused_and_so_is_another_dtype() -> None:
    with pytest.raises(ValueError, match="'int2'; accepted: int8, int4"):
        quantise(made().float(), "int2")
    model = quantise(made().float(), "int8")
    with pytest.raises(ValueError, match="'int4': these weights are packed already"):
        quantise(model, "int4")
    model.blocks[0].mixer_norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="for inference; train with float weights"):
        model(rows_step(drawn(1, 4, 17)))


def test_codes_are_of_the_weights_as_they_are_and_the_rest_is_bfloat16() -> None:
    model = made().float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = in_dtype(model, "int8")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    codes = {name: p.codes for name, p in packed(found).items()}
    assert all(torch.equal(held, pack(before[name], 8).codes) for name, held in codes.items())
    assert not all(torch.equal(held, pack(before[name].bfloat16(), 8).codes) for name, held in codes.items())


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_verbs_take_it(dtype: str, bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = subject()
    save_checkpoint(tmp_path, data.model.float(), data.tokenizer)
    how = ["--prompt-len", "8", "--new-tokens", "4", "--seconds", "0.1", "--dtype", dtype, "--json"]
    assert main(["bench", str(tmp_path), *how]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    layer = 4 * packed_bytes(16, 16, bits) + 2 * packed_bytes(24, 16, bits) + packed_bytes(16, 24, bits)
    assert values["weight_bytes"] == 2 * layer + packed_bytes(256, 16, 8) + 2 * 5 * 16
    assert values["dtype"] == dtype and values["roofline"]["weight_bytes_read"] == values["weight_bytes"]
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 20)
    save_checkpoint(tmp_path / "beside", unpacked(quantise(data.model, dtype)), data.tokenizer)
    losses = []
    for ckpt, chosen in ((tmp_path, "f32"), (tmp_path, dtype), (tmp_path / "beside", "f32")):
        assert main(["eval", str(ckpt), "--data", str(text), "--dtype", chosen, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss_nats"])
    plain, mine, theirs = losses
    assert mine != plain and abs(mine - theirs) < 0.01 * theirs  # rows are rounded as well
    assert main(["generate", str(tmp_path), "--prompt", "a", "--max-new", "3", "--dtype", dtype]) == 0
