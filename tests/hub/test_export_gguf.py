"""GGUF files: transformers and our reader find the model again; what llama.cpp does not have is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers

from assay.cli.main import main
from assay.data.tokenizers import Tokenizer
from assay.data.vocabularies import bpe
from assay.hub.export import export_hf
from assay.hub.express import agree
from assay.hub.gguf_config import open_gguf
from assay.hub.gguf_export import export_gguf
from assay.hub.gguf_vocab import vocabulary
from assay.hub.load import import_folder, load
from assay.hub.tokenizer import LLAMA3, QWEN2, SPLITS, WHOLE_FIRST
from assay.model.lm import LM, build
from assay.ops.step import rows_step
from assay.spec.load import change, validate
from assay.spec.model import ModelSpec
from assay.train.checkpoint import save_checkpoint
from tests.hub import tiny, write_gguf
from tests.model.hf import ids, randomised

logging.getLogger("transformers").setLevel(logging.ERROR)

VOCAB = 290
TEXT = "the mat don't that 12 héllo  x\n\n y"
SQUARE = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA3_LAYERS = {"num_hidden_layers": 7, "layer_types": [tiny.SLIDING] * 5 + [tiny.FULL, tiny.SLIDING]}
# As far from the defaults as transformers' own reader of these files goes.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": False, "mlp_bias": False, "rope_parameters": tiny.rope()}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"attention_bias": False, "head_dim": 128}),
    "gemma2": ("gemma2", {**SQUARE, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3_text": (
        "gemma3",
        {**SQUARE, **GEMMA3_LAYERS, "rope_parameters": {tiny.FULL: tiny.rope(900.0), tiny.SLIDING: tiny.rope(1e4)}},
    ),
    "mixtral": ("llama", {"sliding_window": None}),
    "qwen3_moe": ("qwen3moe", {"mlp_only_layers": [], "attention_bias": False}),
    # transformers passes over `expert_feed_forward_length`: it reads experts of Qwen3's own width, its default, alone.
    "qwen3_moe-768": ("qwen3moe", {"mlp_only_layers": [], "attention_bias": False, "moe_intermediate_size": 768}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
}
OURS_ALONE = ("mixtral", "qwen3_moe", "granite", "olmo2")  # which transformers does not read from such files
LLAMA: dict[str, Any] = {
    "d_model": 64,
    "vocab": VOCAB,
    "layers": 1,
    "context": 64,
    "positions": {"turn": {"kind": "rope"}},
    "blocks": {
        "only": {"mixer": {"kind": "gqa", "heads": 4, "position": "turn"}, "ffn": {"kind": "gated", "width": 96}}
    },
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    made = bpe(["the cat sat on the mat and that was that. don't 123 hello there"] * 3, VOCAB - 2)
    return Tokenizer(made, {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"})


def spec(**changes: Any) -> ModelSpec:
    return change(validate(ModelSpec, LLAMA, "here"), {k.replace("__", "."): v for k, v in changes.items()})


def drawn(model: ModelSpec) -> LM:
    made = build(model)
    randomised(made, 5)
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_the_same_model_is_read_back(name: str, words: Tokenizer, tmp_path: Path) -> None:
    """By us and by transformers; the tensors are those that the gguf package's own names and llama.cpp's rules say."""
    config, model, values = tiny.FAMILIES[name.partition("-")[0]]
    known, changes = KNOWN[name]
    theirs: Any = randomised(model(config(**{**values, "vocab_size": VOCAB, **changes})), seed=3)
    theirs.save_pretrained(tmp_path / "in")
    got, x = import_folder(tmp_path / "in"), ids(2, 14)
    assert export_gguf(got.model, words, tmp_path / "out").family == known
    with open_gguf(tmp_path / "out" / "model.gguf") as source:
        back = load(source)
    agree(back.spec, got.spec)  # a file does not say how experts are balanced in training
    assert back.unread == ()
    wanted = theirs(x).logits.flatten(0, 1)
    torch.testing.assert_close(
        back.model(rows_step(x)).logits, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    expected = write_gguf.tensors(load_file(tmp_path / "in" / "model.safetensors"), theirs.config)
    assert stored.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(stored[key], value, rtol=1e-6, err_msg=key)
    if name in OURS_ALONE:
        return
    read = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(read(x).logits.flatten(0, 1), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_tokenizer_is_read_back(words: Tokenizer, tmp_path: Path) -> None:
    export_gguf(drawn(spec()), words, tmp_path / "out")
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert theirs(TEXT)["input_ids"] == words.encode(TEXT).tolist()
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    told = {key: field.contents() for key, field in fields.items()}
    assert told["tokenizer.ggml.pre"] == "gpt-2" and told["tokenizer.chat_template"] == "{{ messages }}"
    assert told["tokenizer.ggml.eos_token_id"] == 0 and not told["tokenizer.ggml.add_bos_token"]
    assert told["tokenizer.ggml.tokens"][-2:] == ["[PAD288]", "[PAD289]"]
    assert told["tokenizer.ggml.token_type"][:2] + told["tokenizer.ggml.token_type"][-1:] == [3, 1, 5]


@pytest.mark.parametrize(
    ("dtype", "kind", "share"), [("bf16", "BF16", 2**-8), ("q8_0", "Q8_0", 0.57 / 127), ("q4_0", "Q4_0", 1.01 / 8)]
)
def test_matrices_are_as_exact_as_their_blocks(
    dtype: str, kind: str, share: float, words: Tokenizer, tmp_path: Path
) -> None:
    """By the gguf package's reader. share: of the largest number in a block of 32, the most by which one may be off;
    its scale is kept in half precision."""
    model = drawn(spec())
    export_gguf(model, words, tmp_path / "out", dtype)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for theirs, ours in (("ffn_up", "ffn.up"), ("ffn_down", "ffn.down"), ("attn_v", "mixer.v")):
        tensor = found[f"blk.0.{theirs}.weight"]
        assert tensor.tensor_type.name == kind
        value = model.get_parameter(f"blocks.0.{ours}.weight").detach().numpy().reshape(-1, 32)
        off = np.abs(dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32) - value)
        assert (off <= share * np.abs(value).max(1, keepdims=True)).all()
        assert off.max() > 0
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert found["output.weight"].tensor_type.name == ("Q8_0" if dtype == "q4_0" else kind)


def test_rows_of_no_whole_blocks_are_in_half_precision(words: Tokenizer, tmp_path: Path) -> None:
    export_gguf(drawn(spec(blocks__only__ffn__width=40)), words, tmp_path / "out", "q8_0")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert (found["blk.0.ffn_down.weight"], found["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_llama_3_is_a_tensor_of_factors(words: Tokenizer, tmp_path: Path) -> None:
    """Our reader takes them for the rule that made them; transformers' own formula makes the same."""
    scaling = {"kind": "llama3", "factor": 8.0, "original": 8192}
    model = spec(positions__turn={"kind": "rope", "theta": 5e5, "scaling": scaling})
    export_gguf(drawn(model), words, tmp_path / "out")
    export_hf(drawn(model), words, tmp_path / "hf")
    config = hf.AutoConfig.from_pretrained(tmp_path / "hf")
    made = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 5e5 ** (-torch.arange(0, 16, 2) / 16)
    with open_gguf(tmp_path / "out" / "model.gguf") as source:
        assert load(source).spec.positions["main"].scaling.factor == 8.0  # type: ignore[attr-defined]
    found = next(t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "rope_freqs.weight")
    np.testing.assert_allclose(found.data, (plain / made).numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__only__mixer__gate": "head"}, r"llama: blocks\.0\.mixer\.gate: 'head'; 'none' is expected"),
        ({"blocks__only__mixer__sees": {"window": 5}}, r"llama: blocks\.0\.mixer\.sees\.window: 5; None is expected"),
        ({"blocks__only__ffn__act": "relu"}, r"llama: blocks\.0\.ffn\.act: 'relu'; 'silu' is expected"),
        ({"positions__turn__scaling": {"kind": "dynamic", "factor": 2.0, "original": 64}}, "scaling.*: 'dynamic'"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(
    changes: dict[str, Any], message: str, words: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"no architecture of llama.cpp is this model .*{message}"):
        export_gguf(drawn(spec(**changes)), words, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def split_by(step: Any, **model: Any) -> Tokenizer:
    """The tokenizer of these tests with another pre-tokenizer."""
    made = bpe(["the cat sat on the mat and that was that. don't 123 hello there"] * 3, VOCAB - 2)
    made.pre_tokenizer = step
    tree = json.loads(made.to_str())
    tree["model"] |= model
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tree)))


def levelled(pattern: str) -> Any:
    words, last = pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    return pre_tokenizers.Sequence([words, last])


@pytest.mark.parametrize(
    ("tokenizer", "rule"),
    [
        (split_by(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])), "smollm"),
        (split_by(levelled(LLAMA3), ignore_merges=True), "llama-bpe"),
        (split_by(levelled(QWEN2)), "qwen2"),
    ],
)
def test_rules_of_splitting_are_known_by_name(tokenizer: Tokenizer, rule: str) -> None:
    assert vocabulary(tokenizer, VOCAB)["tokenizer.ggml.pre"] == rule


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_a_rule_that_was_imported_goes_out_under_its_name(name: str) -> None:
    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in SPLITS[name]]
    read = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found = vocabulary(split_by(read, ignore_merges=name in WHOLE_FIRST), VOCAB)
    assert found["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (split_by(pre_tokenizers.ByteLevel(True)), "the pre-tokenizer .*add_prefix_space"),
        (split_by(levelled(LLAMA3)), "ignore_merges False with the rule llama-bpe"),
        (split_by(levelled(r"\w+")), "the pre-tokenizer .*; llama.cpp takes byte-level BPE with merges"),
        (split_by(pre_tokenizers.Whitespace()), "BPE with the pre-tokenizer Whitespace"),
    ],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer: {message}"):
        vocabulary(tokenizer, VOCAB)


def test_the_verb_writes_a_file_and_its_card(
    words: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "ckpt", drawn(spec()).bfloat16(), words)
    line = ["export", str(tmp_path / "ckpt"), "--format", "gguf", "--out", str(tmp_path / "out"), "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["family"], sorted(told["bytes"])) == ("llama", ["README.md", "model.gguf"])
    assert "matrices in bf16" in (tmp_path / "out" / "README.md").read_text()
