"""Exported models: transformers loads them and computes the same; what no family has is named, and delegated."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import yaml

from assay.cli.main import main
from assay.data.tokenizers import Tokenizer
from assay.data.vocabularies import from_bytes
from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.hub.export import export_hf
from assay.hub.express import as_family, express
from assay.hub.load import import_folder
from assay.model.lm import LM, build
from assay.ops.step import rows_step
from assay.spec.load import change, digest, dump, validate
from assay.spec.model import ModelSpec
from assay.train.checkpoint import load_checkpoint, save_checkpoint
from assay.train.loop import train
from tests.hub import tiny
from tests.model.hf import ids, randomised
from tests.train import small

logging.getLogger("transformers").setLevel(logging.ERROR)

LLAMA: dict[str, Any] = {
    "d_model": 32,
    "vocab": 61,
    "layers": 2,
    "context": 64,
    "positions": {"turn": {"kind": "rope", "dim": 8}},
    "blocks": {
        "only": {"mixer": {"kind": "gqa", "heads": 4, "position": "turn"}, "ffn": {"kind": "gated", "width": 40}}
    },
}
ODD: dict[str, Any] = {
    **LLAMA,
    "layers": 3,
    "positions": {"slope": {"kind": "alibi", "heads": 4}, "place": {"kind": "learned"}},
    "blocks": {
        "a": {
            "mixer": {"kind": "gqa", "heads": 4, "position": "slope", "gate": "head"},
            "ffn": {"kind": "dense", "width": 9},
        },
        "b": {"mixer": {"kind": "gqa", "heads": 2, "kv_heads": 1, "sees": {"window": 5}}},
        "c": {"like": "blocks.0"},
    },
    "pattern": ["a", "b", "c"],
    "head": {"kind": "lm", "tie": True},
}


def spec(tree: dict[str, Any] = LLAMA, **changes: Any) -> ModelSpec:
    return change(validate(ModelSpec, tree, "here"), {k.replace("__", "."): v for k, v in changes.items()})


def drawn(model: ModelSpec) -> LM:
    made = build(model)
    randomised(made, 5)
    return made


@torch.no_grad()
def logits(model: LM, x: torch.Tensor) -> torch.Tensor:
    found = model(rows_step(x)).logits
    assert found is not None
    return found.unflatten(0, tuple(x.shape))


def close(a: torch.Tensor, b: torch.Tensor, part: float = 1e-5) -> None:
    assert float((a - b).abs().max().detach()) <= part * float(b.abs().max().detach())


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_family_is_written_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    """From its own files in and out again: the first family that has it is its own, and transformers says the same."""
    tiny.save(name, tmp_path / "in")
    got, x = import_folder(tmp_path / "in"), ids(2, 14)
    done = export_hf(got.model, Tokenizer(from_bytes()), tmp_path / "out")
    assert done.family == got.family.__name__.rpartition(".")[2]
    theirs, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    close(theirs.eval()(x).logits, logits(got.model, x))
    again = import_folder(tmp_path / "out")
    assert (digest(again.spec), again.unread) == (digest(got.spec), ())


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"blocks__only__mixer__sees": {"window": 5}}, "mistral"),
        ({"blocks__only__mixer__bias": "qkv"}, "qwen2"),
        ({"blocks__only__mixer__qk_norm": {}}, "qwen3"),
        ({"blocks__only__scale": 0.5}, "granite"),
        ({"blocks__only__mixer__scores": {"dropout": 0.1}, "blocks__only__dropout": 0.1, "init__std": 0.5}, "llama"),
        ({"blocks__only__mixer__gate": "head"}, None),
        ({"positions__turn__scaling": {"kind": "ntk", "factor": 2.0}}, None),
        ({"blocks__only__conv": "conv"}, None),
    ],
)
def test_the_first_family_that_has_a_model_is_taken(changes: dict[str, Any], family: str | None) -> None:
    found, why = express(spec(**changes))
    assert (found and found.name) == family
    assert ("llama" in why) == (family != "llama")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__only__mixer__gate": "head"}, r"blocks\.0\.mixer\.gate: 'head'; 'none' is expected"),
        ({"blocks__only__mixer__scores": {"sink": True}}, r"blocks\.0\.mixer\.scores\.sink: True; False is expected"),
        (
            {"blocks__only__norm": {"place": "sandwich"}},
            r"blocks\.0\.mixer_post\.kind: 'rmsnorm'; 'nothing' is expected",
        ),
        ({"blocks__only__ffn": {"kind": "dense", "width": 8}}, r"blocks\.0\.ffn: 'dense'; 'gated' is expected"),
        ({"final_norm": "layernorm"}, "final_norm: 'layernorm'; 'rmsnorm' is expected"),
        ({"positions__turn__dim": 4}, r"rope: dim: 4; 8 \(the whole head\) is expected"),
        ({"embed": {"kind": "token", "scale": 2.0}}, r"embed\.scale: 2\.0; 1\.0 is expected"),
        ({"d_model": 36, "blocks__only__mixer__head_dim": 8, "blocks__only__mixer__heads": 5}, "a divisor of d_model"),
    ],
)
def test_what_llama_has_not_is_named_by_field(changes: dict[str, Any], message: str) -> None:
    """The last one transformers' own LlamaConfig refuses."""
    with pytest.raises(ValueError, match=message):
        as_family(spec(**changes), "llama")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[LM, Any]:
    """A model that no family has (alibi beside a learned table, gated heads, a layer without an ffn, shared weights),
    and transformers' view of it."""
    folder, model = tmp_path_factory.mktemp("own") / "model", drawn(spec(ODD))
    assert export_hf(model, Tokenizer(from_bytes()), folder).family is None
    theirs, report = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model, theirs.eval()


@torch.no_grad()
def test_a_model_of_its_own_delegates(own: tuple[LM, Any]) -> None:
    """Logits, loss, padding on either side."""
    (model, theirs), x = own, ids(2, 14)
    close(theirs(x).logits, logits(model, x))
    assert torch.equal(theirs(x, logits_to_keep=2).logits, theirs(x).logits[:, -2:])
    loss = F.cross_entropy(logits(model, x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(theirs(x, labels=x).loss, loss)
    for real in (slice(5, 14), slice(0, 9)):
        mask = torch.ones_like(x)
        mask[1] = 0
        mask[1, real] = 1
        found = theirs(x, attention_mask=mask).logits
        close(found[0], logits(model, x)[0])
        close(found[1, real], logits(model, x[1:, real])[0])
    with pytest.raises(ValueError, match="attention_mask: shape"):
        theirs(x, attention_mask=torch.ones(2, 3))


def counted(theirs: Any, sizes: list[int]) -> Any:
    """Notes how many columns each call of the model gets."""
    return theirs.register_forward_pre_hook(
        lambda _, given, named: sizes.append(named["input_ids"].shape[1]), with_kwargs=True
    )


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_a_model_of_its_own_generates(own: tuple[LM, Any], cached: bool) -> None:
    """As one pass over the whole text says, padded rows too; with the cache each step brings one token."""
    (model, theirs), x, sizes = own, ids(2, 6), list[int]()
    mask = torch.ones_like(x)
    mask[1, :2] = 0
    hook = counted(theirs, sizes)
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": cached}
    said = theirs.generate(x, attention_mask=mask, **asked)
    hook.remove()
    assert sizes == [6, *([1] * 11 if cached else range(7, 18))]
    for row, start in ((0, 0), (1, 2)):
        text = x[row : row + 1, start:]
        for _ in range(12):
            text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
        assert text[0, -12:].tolist() == said[row, 6:].tolist()


RECURRENT: dict[str, Any] = {
    **LLAMA,
    "positions": {"turn": {"kind": "rope", "scaling": {"kind": "ntk", "factor": 2.0}}},
    "blocks": {
        "a": {"mixer": {"kind": "gated_deltanet", "heads": 2}, "ffn": {"kind": "gated", "width": 12}},
        "b": {"mixer": {"kind": "gqa", "heads": 4, "position": "turn", "sees": {"window": 4}}},
    },
    "pattern": ["a", "b"],
}


@torch.no_grad()
def test_a_cache_has_states_and_windows_and_beams(tmp_path: Path) -> None:
    """A recurrence and a window: greedy tokens are the engine's; beams and drawn tokens are those without a cache."""
    model = drawn(spec(RECURRENT))
    assert export_hf(model, Tokenizer(from_bytes()), tmp_path / "out").family is None
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    x = ids(2, 6)
    usual = {"attention_mask": torch.ones_like(x), "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    greedy = theirs.generate(x, do_sample=False, **usual)
    asked = [Request(prompt=tuple(row), max_new=9, sampling=SamplingParams(temperature=0.0)) for row in x.tolist()]
    engine: list[list[int]] = [[], []]
    for token in generate(model, Tokenizer(from_bytes()), asked):
        engine[token.request] += [] if token.id is None else [token.id]
    assert greedy[:, 6:].tolist() == engine
    for how in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 9, "num_return_sequences": 2}):
        found = []
        for cached in (True, False):
            torch.manual_seed(4)
            found.append(theirs.generate(x, use_cache=cached, **how, **usual))
        assert torch.equal(*found)
    with pytest.raises(ValueError, match="cache_implementation: 'static'; accepted: null"):
        theirs.generate(x, cache_implementation="static", **usual)


def test_a_model_of_its_own_is_saved_again_by_transformers(own: tuple[LM, Any], tmp_path: Path) -> None:
    own[1].save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(ids(1, 9)).logits, own[1](ids(1, 9)).logits)


def test_a_head_that_the_code_does_not_carry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head: the modelling code is for decoders"):
        export_hf(drawn(spec(ODD, head=None)), Tokenizer(from_bytes()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_trained_model_goes_out_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    train(small.model(), small.recipe(), run)
    assert main(["export", str(run), "--format", "hf", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["family"], told["format"], told["spec_digest"]) == ("llama", "hf", digest(small.model()))
    assert told["bytes"] == {p.name: p.stat().st_size for p in out.iterdir()}
    model, tokenizer, _ = load_checkpoint(run)
    x = ids(2, 14)
    torch.testing.assert_close(logits(import_folder(out).model, x), logits(model, x), rtol=1e-6, atol=1e-6)
    assert hf.AutoTokenizer.from_pretrained(out)("héllo")["input_ids"] == tokenizer.encode("héllo").tolist()
    text = (out / "README.md").read_text()
    described = yaml.safe_load(text.split("## Architecture")[1].split("```yaml\n")[1].split("```")[0])
    assert digest(validate(ModelSpec, described, "card")) == digest(small.model())
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "valid_nats" in line][-1]
    assert f"| valid_nats | {last['valid_nats']:.4f} |" in text
    made = yaml.safe_load(text.split("## Training")[1].split("```yaml\n")[1].split("```")[0])
    assert made == yaml.safe_load((run / "recipe.yaml").read_text())
    assert dump(small.recipe())["tokens"] == made["tokens"] and "vllm serve" in text


def test_bfloat16_halves_the_file(tmp_path: Path) -> None:
    model = drawn(spec())
    sizes = [
        export_hf(model, Tokenizer(from_bytes()), tmp_path / dtype, dtype).bytes["model.safetensors"]
        for dtype in ("f32", "bf16")
    ]
    assert 1.7 < sizes[0] / sizes[1] < 2.0
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert theirs.dtype == torch.bfloat16
    rounded = dict(model.named_parameters())["blocks.1.mixer.q.weight"].bfloat16()
    assert torch.equal(theirs.model.layers[1].self_attn.q_proj.weight, rounded)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "ckpt", build(small.model()), Tokenizer(from_bytes()))
    return tmp_path / "ckpt"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--format", "onnx"], "--format 'onnx': accepted: hf, gguf"),
        (["--dtype", "q8_0"], "--dtype 'q8_0': accepted for --format hf: f32, bf16"),
        (["--format", "gguf", "--dtype", "f16"], "--dtype 'f16': accepted for --format gguf: f32, bf16, q8_0, q4_0"),
        (["--format", "gguf"], "tokenizer: a byte tokenizer has no merges"),
    ],
)
def test_mistakes_are_one_message(
    checkpoint: Path, line: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out"), *line]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0]
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_nothing_is_written_over(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert main(["export", str(checkpoint), "--out", str(out)]) == 2
    assert f"--out {out}: is there and not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    assert (out / "config.json").is_file()
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
