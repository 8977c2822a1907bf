"""`assay generate` of encoder-decoders says what transformers' generate says for the same folder and text."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from assay.cli.main import main
from assay.data.tokenizers import Tokenizer
from assay.train.checkpoint import load_checkpoint
from tests.hub import encoders
from tests.model.hf import randomised

TEXT = Path(string.__file__).read_text("utf-8")
PROMPT = "translate the words of a text"
NEW, PENALTY = 12, 1.5  # without a penalty random weights repeat one token


def t5_words() -> Any:
    """A unigram vocabulary whose texts end in </s>, as T5's."""
    made = hf.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        TEXT.splitlines(),
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bart_words() -> Any:
    """Byte-level merges whose texts stand between <s> and </s>, as BART's."""
    made = hf.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXT.splitlines(), trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module", params=["t5", "bart", "bart-forced"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A folder of transformers, our checkpoint of it, and transformers' greedy ids after those it begins with."""
    kind, _, forced = request.param.partition("-")
    here = tmp_path_factory.mktemp(request.param)
    folder, ours = here / "theirs", here / "ours"
    words = t5_words() if kind == "t5" else bart_words()
    words.save_pretrained(folder)
    config, cls, values = encoders.MADE[kind]
    more = {"decoder_start_token_id": 2, "forced_bos_token_id": None} if kind == "bart" else {}
    sizes = {
        **values,
        **more,
        "vocab_size": len(words),
        "eos_token_id": words.eos_token_id,
        "forced_eos_token_id": None,
    }
    model: Any = randomised(cls(config(**sizes, attn_implementation="eager")), seed=5)
    with torch.no_grad():
        for name, p in model.named_parameters():  # so that what is said hangs on what is read, and not on biases
            p.mul_(0.05 if name.endswith("bias") else 5.0 if "encoder_attn" in name else 1.0)
    model.generation_config.forced_bos_token_id = 0 if forced else None
    model.save_pretrained(folder)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    # A vocabulary with ids of its own: AutoTokenizer would put T5's own class around it.
    given = transformers.PreTrainedTokenizerFast.from_pretrained(folder)(PROMPT, return_tensors="pt")
    how = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW, "repetition_penalty": PENALTY}
    said = loaded.generate(given["input_ids"], attention_mask=given["attention_mask"], **how)
    assert main(["import", str(folder), "--out", str(ours)]) == 0
    return folder, ours, (given["input_ids"][0].tolist(), said[0].tolist())


def asked(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    line = ["generate", str(checkpoint), "--prompt", PROMPT, "--temperature", "0", "--max-new", str(NEW)]
    assert main([*line, "--repetition-penalty", str(PENALTY), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_greedy_tokens_are_transformers_own(
    folders: tuple[Path, Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ours, (source, said) = folders
    _, tokenizer, _ = load_checkpoint(ours)
    config = transformers.GenerationConfig.from_pretrained(folder)
    first = [i for i in (config.decoder_start_token_id, config.forced_bos_token_id) if i is not None]
    assert list(tokenizer.starts) == first == said[: len(first)]
    assert (len(first) == 2) == ("forced" in str(folder))
    assert tokenizer.framed(PROMPT).tolist() == source and source[-1] == tokenizer.eos_id
    got = asked(ours, capsys)
    wanted = said[len(first) :]
    assert got["tokens"][: len(wanted)] == wanted and len(set(wanted)) > 2
    assert got["prompt_tokens"] == len(source)
    assert got["text"] == tokenizer.decode(got["tokens"])


def test_the_source_matters_to_its_last_token(
    folders: tuple[Path, Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source without what stands around it gives another reply."""
    _, ours, _ = folders
    whole = asked(ours, capsys)["tokens"]
    monkeypatch.setattr(Tokenizer, "framed", Tokenizer.encode)
    assert asked(ours, capsys)["tokens"] != whole


def test_the_first_tokens_are_the_models_whatever_vocabulary_is_given(
    folders: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    words, weights = tmp_path / "words", tmp_path / "weights"
    for path in folders[0].iterdir():
        place = words if path.name.startswith("tokenizer") else weights
        place.mkdir(exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    assert main(["import", str(weights), "--tokenizer", str(words), "--out", str(tmp_path / "ours")]) == 0
    assert load_checkpoint(tmp_path / "ours")[1].starts == load_checkpoint(folders[1])[1].starts != ()


def test_chat_names_what_answers_instead(folders: tuple[Path, Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(folders[1])]) == 2
    assert "an encoder-decoder, which answers one text at a time: use assay generate" in capsys.readouterr().err


def test_a_decoder_without_a_first_token_is_refused(
    folders: tuple[Path, Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = folders[1] / "generation_config.json"
    kept = path.read_text()
    path.write_text("{}")
    try:
        bare = main(["generate", str(folders[1]), "--prompt", PROMPT, "--max-new", "1"])
        told = capsys.readouterr().err
    finally:
        path.write_text(kept)
    named = load_checkpoint(folders[1])[1].bos_id is not None
    assert bare == (0 if named else 2) and ("decoder_start_token_id: missing" in told) != named
