"""Prompts and documents begin, and replies end, where they do under transformers with the same files."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers
from transformers.models.llama import LlamaTokenizer

from assay.cli import chat
from assay.cli.main import main
from assay.data.tokenizers import Tokenizer
from assay.engine.request import SamplingParams
from assay.engine.session import Session
from assay.engine.template import encode
from assay.hub.export import export_hf
from assay.hub.tokenizer import folder_tokenizer, gguf_tokenizer
from assay.train.checkpoint import load_checkpoint
from tests.hub.test_tokenizer import sentencepiece
from tests.hub.tiny import rope
from tests.model.hf import randomised

TEXT = Path(string.__file__).read_text("utf-8")
SPECIAL = ["<unk>", "<s>", "</s>", "<turn>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>{% endfor %}<turn>assistant\n"
PROMPT = "the words of a text"
MESSAGES = [{"role": "user", "content": "a text"}, {"role": "assistant", "content": "of words"}]


def words(legacy: bool, template: str | None) -> LlamaTokenizer:
    """A small vocabulary under transformers' own class for Llama's."""
    made = hf.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    model = json.loads(made.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    found = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True, legacy=legacy)
    found.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    found.chat_template = template
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "newer"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose greedy reply to the prompt meets an end of text after four tokens: not its tokenizer's own."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = words(request.param, TEMPLATE)
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, rope_parameters=rope(), **sizes
    )
    model: Any = randomised(transformers.LlamaForCausalLM(config), seed=3)
    model.generation_config.eos_token_id = None
    said = model.generate(**tokenizer(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=5, pad_token_id=0)
    model.generation_config.eos_token_id = [2, int(said[0, -2])]
    model.save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    assert main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 0
    return tmp_path / "ours"


def theirs(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_a_reply_begins_and_ends_as_under_transformers(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = theirs(folder)
    given = tokenizer(PROMPT, return_tensors="pt")
    assert given["input_ids"][0, 0] == 1
    said = model.generate(**given, do_sample=False, max_new_tokens=20, pad_token_id=0)
    wanted = said[0, given["input_ids"].shape[1] :]
    capsys.readouterr()
    asked = ["generate", str(checkpoint), "--prompt", PROMPT, "--temperature", "0", "--max-new", "20", "--json"]
    assert main(asked) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert got["tokens"] == wanted.tolist() and got["finish"] == "stop" and len(wanted) < 20
    assert got["prompt_tokens"] == given["input_ids"].shape[1]
    assert main([*asked, "--ignore-eos"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]) == 20


@torch.no_grad()
def test_every_document_begins_as_under_transformers(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = theirs(folder)
    texts, losses = ["the words", "of a text", "a"], []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 2]])
        losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    capsys.readouterr()
    assert main(["eval", str(checkpoint), "--data", str(data), "--json"]) == 0
    got, wanted = json.loads(capsys.readouterr().out.splitlines()[-1]), torch.cat(losses)
    assert got["tokens"] == len(wanted)
    assert got["loss_nats"] == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_a_conversation_begins_once(folder: Path, checkpoint: Path) -> None:
    model, tokenizer, _ = load_checkpoint(checkpoint)
    # The class for Llama's makes its own of tokenizer.json's space before every piece.
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = reference.apply_chat_template(MESSAGES)["input_ids"]
    assert wanted.count(1) == 1 and list(encode(MESSAGES, TEMPLATE, tokenizer)) == wanted
    bare = Tokenizer(tokenizer.hf, {**tokenizer.config, "chat_template": None}, tokenizer.also_end)
    talk = chat.Chat(Session(model, bare), SamplingParams(temperature=0.0), 4, None)
    assert list(talk.prompt(PROMPT)) == reference(PROMPT)["input_ids"]
    list(talk.answer(PROMPT))
    assert talk.prompt("more").count(1) == 1 and talk.ids[-1] not in tokenizer.ends


def test_the_ends_stay_with_the_model(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    listed = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    model, tokenizer, _ = load_checkpoint(checkpoint)
    assert tokenizer.ends == folder_tokenizer(folder).ends == set(listed) and len(listed) == 2
    export_hf(model, tokenizer, tmp_path / "out")
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert sorted(config.eos_token_id) == sorted(listed)


def test_a_gguf_file_names_the_ends_of_turns_and_messages(tmp_path: Path) -> None:
    values = {"general.architecture": "llama"} | {f"tokenizer.ggml.{k}": v for k, v in sentencepiece(False).items()}
    assert gguf_tokenizer(values, "a.gguf").ends == {2}
    more = {**values, "tokenizer.ggml.eot_token_id": 300, "tokenizer.ggml.eom_token_id": 301}
    made = gguf_tokenizer(more, "a.gguf")
    assert made.ends == {2, 300, 301} and made.begun("a")[0] == 1 and made.begun("").tolist() == [1]
    made.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.ends == made.ends and again.begun("a b").tolist() == made.begun("a b").tolist()
    silent = gguf_tokenizer({**more, "tokenizer.ggml.add_bos_token": False}, "a.gguf")
    assert silent.first == () and silent.begun("a").tolist() == silent.encode("a").tolist()
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.eot_token_id: 9000; a token from 0 to"):
        gguf_tokenizer({**more, "tokenizer.ggml.eot_token_id": 9000}, "a.gguf")


def test_a_list_of_ends_that_is_none_is_refused(tmp_path: Path) -> None:
    words(True, None).save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).ends == {2}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.load(tmp_path).ends == {2, 7}
    for wrong in (["a"], [True], -1, [[2]], 0.5):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: .*; a token's id"):
            Tokenizer.load(tmp_path)


def test_a_tokenizer_that_says_so_neither_cuts_nor_fills_texts(tmp_path: Path) -> None:
    made = words(True, None).backend_tokenizer
    wanted = made.encode(PROMPT, add_special_tokens=False).ids
    made.enable_truncation(3)
    made.enable_padding(length=60)
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(PROMPT).tolist() == wanted and len(wanted) > 3
