"""A server under mixed load and under fire: does it stay right, responsive and as large as it was?

    python benchmarks/soak.py [--minutes 60] [--clients 12] [--pause 0] [--out FILE] [--seed N]

A small hybrid model (attention, a window, two recurrent layers; random weights) is served by `assay serve` in a process
of its own, with a cache too small for what is asked at once, and killed in the middle. What clients do is in
traffic.py. Every second: /health, and pages used + free + cached == all. Every quarter of a minute the clients pause:
then nothing runs, waits or holds a page, and the process's resident memory is read. Exit status 1 on any violation,
each told with a line on stderr; the result is one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers
from traffic import Traffic, Wrong, cases

from assay.data.bpe import byte_symbols
from assay.data.tokenizers import Tokenizer
from assay.measure.load import Process, gauges, slope
from assay.model.lm import LM, build
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from assay.train.checkpoint import save_checkpoint

QUIET_S, REST_S, HEALTH_S, DRAIN_S, READY_S = 15.0, 3.0, 10.0, 10.0, 120.0
GROWTH = 16 << 20
"""Bytes that a process may have grown by, from the end of the first quarter of its life to its end, by the median slope
of its resident memory."""
SETTLED, SETTLED_S = 4 << 20, 1200.0
"""The same from the middle of a life to its end, where it lasted so many seconds: by then a process has met whatever it
meets for the first time."""
NAME, RUNNING, PAGE, MEMORY = "small", 8, 8, 2_000_000
TEMPLATE = (
    "{%- for m in messages %}{{ '<|start|>' + m['role'] + '\\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


def small() -> LM:
    """Random weights whose greedy replies wander, so that a wrong token shows."""
    attention = {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "main"}
    recurrent = {"kind": "mamba2", "head_dim": 32, "state_size": 16}
    mixers = {"full": attention, "window": {**attention, "sees": {"window": 64}}, "recurrent": recurrent}
    tree = {
        "d_model": 64,
        "vocab": 258,
        "layers": 4,
        "context": 1024,
        "positions": {"main": {"kind": "rope"}},
        "blocks": {name: {"mixer": mixer, "ffn": {"kind": "gated", "width": 128}} for name, mixer in mixers.items()},
        "pattern": ["recurrent", "full", "window", "recurrent"],
        "head": {"kind": "lm", "tie": False},
        "init": {"std": "fan_in", "embed": 1.0, "depth": False},
    }
    return build(validate(ModelSpec, tree, "soak"), 1).eval()


def words() -> Tokenizer:
    """256 bytes, each its own id, and two special tokens."""
    made = HubTokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(byte_symbols())}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|start|>", "<|end|>"])
    return Tokenizer(made, {"chat_template": TEMPLATE, "bos_token": "<|start|>", "eos_token": "<|end|>"})


class Soak:
    """One server, the clients that visit it, and what was found."""

    def __init__(self, folder: Path, port: int, clients: int, seed: int, pause: float = 0.0) -> None:
        self.folder, self.port, self.clients, self.seed, self.pause = folder, port, clients, seed, pause
        self.url, self.violations = f"http://127.0.0.1:{port}", list[str]()
        self.life, self.up, self.go = 0, asyncio.Event(), asyncio.Event()
        self.cut = self.quiets = 0
        self.healths: list[float] = []
        self.memory: list[list[tuple[float, float]]] = []
        self.most: dict[str, float] = {}
        self.began = time.monotonic()

    def violate(self, what: str) -> None:
        self.violations.append(f"{time.monotonic() - self.began:.1f} s: {what}")
        print(f"VIOLATION {self.violations[-1]}", file=sys.stderr, flush=True)

    async def start(self) -> None:
        """The server, until it answers."""
        command = [sys.executable, "-m", "assay", "serve", str(self.folder / NAME), "--port", str(self.port)]
        command += ["--threads", "1", "--max-running", str(RUNNING), "--page", str(PAGE), "--memory", str(MEMORY)]
        env = {"OMP_NUM_THREADS": "1"}
        self.server = Process(command, f"{self.url}/health", self.folder / "log", env)
        await asyncio.to_thread(self.server.wait, READY_S)
        self.life += 1
        self.memory.append([])
        self.up.set()

    async def client(self, traffic: Traffic, end: float) -> None:
        """One visit after another. A connection may be lost where the server was killed, and nowhere else."""
        while time.monotonic() < end:
            await asyncio.sleep(self.pause)
            await self.up.wait()
            await self.go.wait()
            life = self.life
            try:
                await traffic.once()
            except Wrong as error:
                self.violate(str(error))
            except (openai.APIError, httpx.HTTPError, TimeoutError) as error:
                if self.up.is_set() and self.life == life:
                    self.violate(f"{type(error).__name__}: {error}")
                elif isinstance(error, openai.APITimeoutError | httpx.TimeoutException):
                    self.violate(f"a request had no end after the kill: {error}")
                else:
                    self.cut += 1

    async def watch(self, end: float) -> None:
        """Health and pages, every second."""
        async with httpx.AsyncClient(base_url=self.url, timeout=HEALTH_S) as http:
            while time.monotonic() < end:
                await self.up.wait()
                life, sent = self.life, time.monotonic()
                try:
                    status = (await http.get("/health")).status_code
                    self.healths.append(time.monotonic() - sent)
                    if status != 200:
                        self.violate(f"/health: {status}")
                    self.check_pages(await self.gauges(http))
                except httpx.HTTPError as error:
                    if self.up.is_set() and self.life == life:
                        self.violate(f"/health or /metrics: {type(error).__name__}")
                await asyncio.sleep(1.0)

    async def gauges(self, http: httpx.AsyncClient) -> dict[str, float]:
        found = gauges((await http.get("/metrics")).text)
        for name in ("running", "waiting", "pages_used", "pages_cached", "pages_total"):
            self.most[name] = max(self.most.get(name, 0.0), found[f"assay_{name}"])
        return found

    def check_pages(self, found: Mapping[str, float]) -> None:
        used, free, cached, total = (found[f"assay_pages_{name}"] for name in ("used", "free", "cached", "total"))
        if used + free + cached != total:
            self.violate(f"pages: {used:g} used + {free:g} free + {cached:g} cached are not {total:g}")

    async def pauses(self, traffic: Traffic, end: float, kill: float) -> None:
        """Now and then everybody rests; once, the server dies."""
        while time.monotonic() < end:
            await asyncio.sleep(min(QUIET_S, max(0.0, end - time.monotonic())))
            if self.life == 1 and time.monotonic() >= kill:
                await self.kill()
                continue
            self.go.clear()
            await self.quiet(traffic)
            self.progress(traffic)
            self.go.set()

    async def kill(self) -> None:
        """In the middle of whatever runs; then the next one, on the same port."""
        self.up.clear()
        self.server.end(signal.SIGKILL)
        if await asyncio.to_thread(self.server.status, 10.0) != -signal.SIGKILL:
            self.violate("the server outlived SIGKILL")
        print("  killed, and started again", file=sys.stderr, flush=True)
        await self.start()

    async def quiet(self, traffic: Traffic) -> None:
        """When everybody has been answered, nothing is left: no sequence, no page in use."""
        limit = time.monotonic() + 150.0
        while traffic.begun:
            if time.monotonic() > limit:
                late = sorted({kind for kind, _ in traffic.begun.values()})
                return self.violate(f"{len(traffic.begun)} requests without an end: {', '.join(late)}")
            await asyncio.sleep(0.02)
        limit = time.monotonic() + REST_S
        names = ("assay_running", "assay_waiting", "assay_pages_used")
        async with httpx.AsyncClient(base_url=self.url, timeout=HEALTH_S) as http:
            while any(held := [(found := await self.gauges(http))[name] for name in names]):
                if time.monotonic() > limit:
                    return self.violate(f"idle, and {dict(zip(names, held, strict=True))}")
                await asyncio.sleep(0.05)
        self.check_pages(found)
        self.quiets += 1
        self.memory[-1].append((time.monotonic() - self.began, float(self.server.resident_bytes())))

    def progress(self, traffic: Traffic) -> None:
        size = self.memory[-1][-1][1] / (1 << 20) if self.memory[-1] else 0.0
        said = f"{traffic.counts.total()} visits, {self.cut} cut off, {len(self.violations)} violations, {size:.0f} MiB"
        print(f"  {time.monotonic() - self.began:.0f} s: {said}", file=sys.stderr, flush=True)

    async def drain(self, traffic: Traffic) -> dict[str, Any]:
        """SIGTERM: the replies that run are finished, and the process ends with status 0, within 10 s."""
        heard = asyncio.Semaphore(0)

        async def long() -> str | None:
            body: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 80, "extra_body": {"ignore_eos": True}}
            finish = None
            async for one in await traffic.api.completions.create(stream=True, **body):
                heard.release()
                finish = one.choices[0].finish_reason if one.choices else finish
            return finish

        replies = [asyncio.create_task(long()) for _ in range(6)]
        for _ in replies:
            await heard.acquire()
        began = time.monotonic()
        self.server.end(signal.SIGTERM)
        status = await asyncio.to_thread(self.server.status, DRAIN_S)
        took = time.monotonic() - began
        ends = await asyncio.gather(*replies, return_exceptions=True)
        if status != 0:
            self.violate(f"after SIGTERM: status {status} after {took:.1f} s")
        if any(end != "length" for end in ends):
            self.violate(f"after SIGTERM: replies ended with {ends}")
        return {"drain_s": round(took, 2), "status": status}

    def growth(self) -> list[dict[str, float]]:
        """Of each life: how far its memory grew after its first quarter and in its second half, by the median slope."""
        out = []
        for points in self.memory:
            (rate, grown), (_, settled) = (grew(points[len(points) // part :]) for part in (4, 2))
            last = points[-1][1] if points else 0.0
            long = bool(points) and points[-1][0] - points[0][0] >= SETTLED_S
            for found, bound, when in (
                (grown, GROWTH, "life"),
                (settled if long else 0.0, SETTLED, "second half of one"),
            ):
                if found > bound:
                    self.violate(f"resident memory grew by {found / (1 << 20):.1f} MiB in a {when}")
            told = {"byte_s": rate, "grown_bytes": grown, "settled_bytes": settled, "bytes": last}
            out.append({"samples": len(points), **{name: round(value) for name, value in told.items()}})
        return out

    def defects(self) -> None:
        """The server's own log tells failures that no client may have seen."""
        for line in (self.folder / "log").read_text("utf-8", "replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                self.violate(f"the log has a line that is not JSON: {line[:200]}")
                continue
            if "error" in event:
                self.violate(f"the log: {json.dumps(event)[:400]}")

    async def run(self, seconds: float) -> dict[str, Any]:
        torch.set_num_threads(1)
        model, tokenizer = small(), words()
        save_checkpoint(self.folder / NAME, model, tokenizer)
        found = cases(model, tokenizer, 48, self.seed)
        await self.start()
        self.began = time.monotonic()
        end, kill = self.began + seconds, self.began + seconds / 2
        traffic = Traffic(self.url, NAME, found, random.Random(self.seed))
        self.go.set()
        tasks = [self.client(traffic, end) for _ in range(self.clients)]
        await asyncio.gather(self.watch(end), self.pauses(traffic, end, kill), *tasks)
        await self.quiet(traffic)
        ended = await self.drain(traffic)
        await traffic.close()
        self.defects()
        return {
            "seconds": round(seconds),
            "clients": self.clients,
            "visits": dict(sorted(traffic.counts.items())),
            "cut_off": self.cut,
            "lives": self.life,
            "quiet_checks": self.quiets,
            "most": self.most,
            "health_s": {"checks": len(self.healths), "worst": round(max(self.healths), 3)},
            "memory": self.growth(),
            **ended,
            "violations": self.violations,
        }


def grew(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Bytes a second, by the median slope, and the bytes that this makes from the first point to the last."""
    rate = slope(points)
    return rate, rate * (points[-1][0] - points[0][0]) if points else 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of each client before a visit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), free_port(), given.clients, given.seed, given.pause)
        try:
            result = asyncio.run(soak.run(60 * given.minutes))
        finally:
            if hasattr(soak, "server"):
                soak.server.__exit__()
    line = json.dumps(result)
    if given.out is not None:
        given.out.write_text(line + "\n")
    print(line)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
