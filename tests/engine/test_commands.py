"""`assay generate` and `assay chat` as others script against them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from assay.cli.main import main
from assay.data.tokenizers import Tokenizer
from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.model.lm import LM, build
from assay.spec.load import change
from assay.train.checkpoint import save_checkpoint
from tests.cache.models import spec
from tests.engine.test_text import chatty, tokenizer


def checkpoint(folder: Path, made: Tokenizer, position: str = "learned") -> tuple[str, LM]:
    lm = build(change(spec(("full", "window"), position), {"vocab": 258 if made.config else 256}), 1)
    save_checkpoint(folder, lm, made)
    return str(folder), lm


@pytest.fixture
def plain(tmp_path: Path) -> tuple[str, LM]:
    return checkpoint(tmp_path / "plain", tokenizer())


def expected(lm: LM, prompt: bytes, new: int, **sampling: float) -> list[int]:
    asked = Request(prompt=tuple(prompt), sampling=SamplingParams(**sampling), max_new=new, stop_tokens=frozenset({0}))  # type: ignore[arg-type]
    return [t.id for t in generate(lm, tokenizer(), [asked])]


def text(ids: list[int]) -> str:
    return bytes(ids).partition(b"\0")[0].decode("utf-8", "replace")


def test_stdout_is_the_continuation_alone(plain: tuple[str, LM], capsys: pytest.CaptureFixture[str]) -> None:
    path, lm = plain
    for options, sampling in (
        (["--temperature", "0"], {"temperature": 0}),
        (["--seed", "7", "--top-k", "9", "--top-p", "0.9"], {"seed": 7, "top_k": 9, "top_p": 0.9}),
    ):
        assert main(["generate", path, "--prompt", "so ", "--max-new", "12", *options]) == 0
        out = capsys.readouterr()
        assert out.out == text(expected(lm, b"so ", 12, **sampling)) and out.err == ""


def test_a_reply_may_not_end_at_once(plain: tuple[str, LM], capsys: pytest.CaptureFixture[str]) -> None:
    """An end of a text that comes at once, by a seed; and one that does not, since it is held off."""
    path, lm = plain
    ask = ["generate", path, "--prompt", "so ", "--max-new", "40", "--json", "--temperature", "9", "--seed"]
    seed = next(n for n in range(999) if len(expected(lm, b"so ", 40, temperature=9, seed=n)) < 9)
    told = []
    for more in ([], ["--min-new", "20"]):
        assert main([*ask, str(seed), *more]) == 0
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"])
    assert len(told[0]) < 9 and len(told[1]) >= 20 and told[1][: len(told[0]) - 1] == told[0][:-1]
    assert main([*ask, "1", "--min-new", "41"]) == 2
    assert "min_new: 41; accepted: 0 to max_new, which is 40" in capsys.readouterr().err


def test_json_is_the_last_line(plain: tuple[str, LM], capsys: pytest.CaptureFixture[str]) -> None:
    path, lm = plain
    assert main(["generate", path, "--prompt", "so ", "--max-new", "5", "--temperature", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["tokens"] == expected(lm, b"so ", 5, temperature=0)
    assert told["prompt_tokens"] == 3 and told["finish"] in ("length", "stop")


def test_what_fits_is_generated_and_what_does_not_is_refused(
    plain: tuple[str, LM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = plain
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 60))
    assert main(["generate", path, "--prompt", "-", "--ignore-eos", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]) == 4
    for args, message in (
        (
            ["--prompt", "x" * 60, "--max-new", "5"],
            "60 tokens and 5 new ones are 65; the positions of this model reach 64",
        ),
        (["--prompt", "x" * 64], "64 tokens and there is room for 64"),
        (["--prompt", "x", "--top-p", "2"], "top_p"),
        (["--prompt", "x", "--dtype", "f16"], "accepted: f32, bf16"),
        ([], "--prompt"),
    ):
        assert main(["generate", path, *args]) == 2
        out = capsys.readouterr()
        assert message in out.err and out.out == "" and len(out.err.splitlines()) == 1


def test_an_empty_prompt_begins_where_documents_begin(
    plain: tuple[str, LM], capsys: pytest.CaptureFixture[str]
) -> None:
    path, lm = plain
    assert main(["generate", path, "--prompt", "", "--max-new", "6", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == text(expected(lm, b"\0", 6, temperature=0))


def test_bf16_runs_in_bf16(plain: tuple[str, LM], capsys: pytest.CaptureFixture[str]) -> None:
    path, lm = plain
    assert main(["generate", path, "--prompt", "so ", "--max-new", "4", "--temperature", "0", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == text(expected(lm.to(torch.bfloat16), b"so ", 4, temperature=0))


def chat(path: str, typed: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["chat", path, "--max-new", "5", "--temperature", "0", *options])


def test_chat_goes_on_resets_and_quits(
    plain: tuple[str, LM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lm = plain
    first = expected(lm, b"one", 5, temperature=0)
    said = bytes(first).partition(b"\0")[0]
    second = expected(lm, b"one" + said + b"\ntwo", 5, temperature=0)
    assert chat(path, "one\n\ntwo\n/reset\none\n/quit\nthree\n", monkeypatch) == 0
    out = capsys.readouterr()
    assert out.out == "".join(text(ids) + "\n" for ids in (first, second, first))
    assert "no chat template" in out.err


def test_a_full_conversation_says_so_and_goes_on(
    plain: tuple[str, LM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lm = plain
    assert chat(path, "x" * 62 + "\n/reset\none\n", monkeypatch) == 0
    out = capsys.readouterr()
    assert "62 tokens and 5 new ones are 67; there is room for 64" in " ".join(out.err.split())
    assert out.out == "\n" + text(expected(lm, b"one", 5, temperature=0)) + "\n"


def test_chat_follows_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chatty("{% for m in messages %}{{ m.role[0] }}{{ m.content }}<|end|>{% endfor %}<|start|>")
    path, lm = checkpoint(tmp_path / "chatty", made)
    asked = Request(
        prompt=(*b"sS", 257, *b"uhi", 257, 256),
        sampling=SamplingParams(temperature=0),
        max_new=5,
        stop_tokens=frozenset({257}),
    )
    reply = "".join(t.text for t in generate(lm, made, [asked]))
    assert chat(path, "hi\n", monkeypatch, "--system", "S") == 0
    out = capsys.readouterr()
    assert out.out == reply + "\n" and out.err == ""
