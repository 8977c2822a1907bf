"""Serve a checkpoint over HTTP, as OpenAI's clients speak it, with a chat page at /.

One line on stdout says the address once requests can be answered; the log goes to stderr, a JSON object a line. SIGTERM
and Ctrl-C let running replies finish for 8 seconds. Any address but this machine's own needs --api-key-file.
--replicas N serves from N processes with an engine each; --apart from two, one that reads prompts and one that goes on
with the replies; --split 2p3d from two that read and three that go on. --threads, --max-running and --memory are then
of each process. --prefill and --decode say what is done otherwise where prompts are read, and where replies go on.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from assay.cli import _engine as options
from assay.cli.common import Device, Part, fail, load_parts, pick_device

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.engine.apart.cluster import Cluster
    from assay.engine.apart.router import ClusterConfig, Role
    from assay.engine.config import EngineConfig
    from assay.engine.engine import Engine
    from assay.engine.server.worker import Served
    from assay.engine.sides import Setup, Side
    from assay.engine.storage import Storage
    from assay.model.lm import LM

Builds: TypeAlias = "dict[Role, Callable[[], Engine]]"
ROUTES = ("least_loaded", "round_robin", "prefix")
PREPARED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes one that is free.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of the model. [default: torch's]")]
Keys = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line, in a file that nobody else may read."),
]
MetricsKeys = Annotated[
    Path | None,
    typer.Option("--metrics-key-file", metavar="FILE", help="Keys for /metrics alone. [default: the only key, if one]"),
]
Running = Annotated[int, typer.Option("--max-running", min=1, help="Replies that are computed at once.")]
Page = Annotated[int, typer.Option("--page", min=1, help="Tokens of a cache page.")]
Memory = Annotated[
    int | None,
    typer.Option("--memory", min=1, metavar="BYTES", help="Of the cache. [default: 512 tokens a running reply]"),
]
KvDtype = Annotated[
    str | None, typer.Option("--kv-dtype", help="Keys and values as bf16, int8 or int4. [default: as the model]")
]
CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", metavar="DIR", help="Where pages are kept that memory no longer has.")
]
CacheBytes = Annotated[
    int | None, typer.Option("--cache-bytes", min=1, metavar="BYTES", help="Of --cache-dir at most. [default: 8 GiB]")
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same reply, to the bit, with any number of threads and, but for f32, in any company; slower.",
    ),
]
Replicas = Annotated[int, typer.Option("--replicas", min=1, help="Processes with an engine each.")]
Apart = Annotated[bool, typer.Option("--apart", help="One process reads prompts, another goes on with the replies.")]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="XpYd", help="X processes read prompts, Y go on with the replies. [--apart: 1p1d]"),
]
Prefill = Annotated[
    list[str] | None,
    typer.Option(
        "--prefill",
        metavar="KEY=VALUE",
        help="Where prompts are read: attention, chunk, budget; with --apart max_running, memory, threads too.",
    ),
]
Decode = Annotated[
    list[str] | None,
    typer.Option(
        "--decode",
        metavar="KEY=VALUE",
        help="Where replies go on: attention; with --apart kv_dtype, max_running, memory, threads, ... too.",
    ),
]
Route = Annotated[
    str | None,
    typer.Option("--route", help="Among replicas: round_robin, least_loaded or prefix. [default: least_loaded]"),
]
Ready = Annotated[
    Path | None, typer.Option("--ready-file", metavar="FILE", help="Gets the address once requests can be answered.")
]


def run(
    ckpt: options.Checkpoint,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dtype: options.Dtype = None,
    threads: Threads = None,
    device: Device = "auto",
    deterministic: Deterministic = False,
    api_key_file: Keys = None,
    metrics_key_file: MetricsKeys = None,
    max_running: Running = 16,
    page: Page = 16,
    memory: Memory = None,
    kv_dtype: KvDtype = None,
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = None,
    replicas: Replicas = 1,
    apart: Apart = False,
    split: Split = None,
    prefill: Prefill = None,
    decode: Decode = None,
    route: Route = None,
    ready_file: Ready = None,
    part: Part = None,
) -> None:
    from assay.engine.server.config import ServerConfig, read_keys

    check(ckpt, dtype, kv_dtype)
    keys, watchers = (None if file is None else read_keys(file) for file in (api_key_file, metrics_key_file))
    config = ServerConfig(name=Path(ckpt).resolve().name, host=host, port=port, keys=keys, watchers=watchers)
    pick_device(device)
    load_parts(part)
    from assay.engine.config import EngineConfig
    from assay.engine.server.run import end, serve
    from assay.engine.sides import Setup

    cluster = processes(replicas, split or ("1p1d" if apart else None), route)
    engine = EngineConfig(max_running=max_running, page=page, memory=memory, policy="eager")
    setups = roles(Setup(engine, kv_dtype, threads), side("prefill", prefill), side("decode", decode), cluster)
    load = partial(options.load, ckpt, device, dtype)
    builds: Builds = {}
    for role, setup in setups.items():
        stored = partial(storage, Path(ckpt), (dtype, setup.kv_dtype), cache_dir, bounded(cache_dir, cache_bytes))
        builds[role] = partial(built, load, setup, stored, deterministic)
    speaking = setups["decode" if "decode" in setups else "whole"].config
    with ExitStack() as open_:
        make = partial(served, ckpt, builds, part, open_, (cluster, speaking))
        limit = speaking.max_running * (1 if cluster is None else cluster.speakers) + config.limits.waiting
        serve(config, make, limit, partial(ready, config.name, ready_file))
    end()


def keep_few_products() -> None:
    """Ask oneDNN, and torch before it, to remember 128 shapes of products. By itself each remembers 1,024, of 0.3 to
    0.9 MB: prompts of all lengths come to 700 MiB in float32 and 950 in bfloat16. To prepare one takes half a
    millisecond, which a step pays for each of a layer's widths. Heeded by a process that has multiplied nothing yet,
    and by those that it starts; what the environment says stands. The steps of a long training may have more."""
    for name, count in PREPARED.items():
        os.environ.setdefault(name, count)


def served(
    ckpt: str,
    builds: Builds,
    part: list[Path] | None,
    open_: ExitStack,
    front_of: tuple[ClusterConfig | None, EngineConfig],
) -> Served:
    """The engine in this process, or the front of several in others, which ends with `open_`."""
    keep_few_products()
    cluster, engine = front_of
    if cluster is None:
        return builds["whole"]()
    return open_.enter_context(
        front(ckpt, engine, cluster, {r: partial(elsewhere, b, part) for r, b in builds.items()})
    )


def side(name: str, given: list[str] | None) -> Side:
    from assay.engine.sides import Side
    from assay.spec.load import parse_override, validate

    pairs = [parse_override(text) for text in given or ()]
    return validate(Side, {key.replace("-", "_"): value for key, value in pairs}, f"--{name}")


def roles(whole: Setup, prefill: Side, decode: Side, cluster: ClusterConfig | None) -> dict[Role, Setup]:
    """The engine of each kind of process."""
    from assay.engine.sides import apart, together

    if cluster is not None and cluster.route == "apart":
        return apart(whole, prefill, decode)
    return {"whole": together(whole, prefill, decode)}


def check(ckpt: str, dtype: str | None, kv_dtype: str | None) -> None:
    if not Path(ckpt).is_dir():
        fail(f"{ckpt}: no such folder; accepted: a checkpoint")
    from assay.engine.storage import KV_DTYPES

    for name, given, accepted in (("dtype", dtype, options.DTYPES), ("kv-dtype", kv_dtype, KV_DTYPES)):
        if given is not None and given not in accepted:
            fail(f"--{name} {given!r}: accepted: {', '.join(accepted)}")


def ready(name: str, file: Path | None, url: str) -> None:
    print(f"{name} is served at {url}", flush=True)
    if file is not None:
        file.write_text(f"{url}\n")


def bounded(folder: Path | None, limit: int | None) -> int:
    if limit is not None and folder is None:
        fail("--cache-bytes: there is no folder that it could bound; accepted: with --cache-dir")
    return limit or 8 << 30


def processes(replicas: int, split: str | None, route: str | None) -> ClusterConfig | None:
    """What was asked for beside one engine in this process; None: nothing."""
    if split is not None and (replicas > 1 or route is not None):
        fail("--apart, --split: some processes read and others go on; accepted: without --replicas and --route")
    counts = None if split is None else re.fullmatch(r"([1-9]\d?)p([1-9]\d?)d", split)
    if split is not None and counts is None:
        fail(f"--split {split!r}: accepted: how many read and how many go on, as in 1p2d")
    if route is not None and route not in ROUTES:
        fail(f"--route {route!r}: accepted: {', '.join(ROUTES)}")
    if counts is None and replicas == 1:
        if route is not None:
            fail("--route: one process has nobody to choose among; accepted: with --replicas 2 or more")
        return None
    from assay.engine.apart.router import ClusterConfig

    if counts is not None:
        return ClusterConfig(route="apart", prefill=int(counts[1]), decode=int(counts[2]))
    return ClusterConfig.model_validate({"route": route or ROUTES[0], "replicas": replicas})


def storage(ckpt: Path, dtypes: tuple[str | None, str | None], folder: Path | None, limit: int, model: LM) -> Storage:
    """dtypes: of the weights, and of keys and values."""
    from assay.engine.storage import Storage, kv_formats, on_disk
    from assay.model.lm import state_table

    dtype, kv_dtype = dtypes
    formats = None if kv_dtype is None else kv_formats(kv_dtype, state_table(model.spec, model.prefix))
    return Storage(formats, None if folder is None else on_disk(ckpt, folder, limit, dtype))


def built(
    load: Callable[[], tuple[LM, Tokenizer]], setup: Setup, stored: Callable[[LM], Storage], deterministic: bool
) -> Engine:
    """In the thread that will run it: thread counts are a thread's own."""
    import torch

    from assay.engine.engine import Engine

    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    torch.use_deterministic_algorithms(deterministic)
    model, tokenizer = load()
    engine = Engine(model, tokenizer, setup.config, storage=stored(model))
    gc.collect()
    gc.freeze()  # else a collection in the middle of replies goes through all of it too: modules, model, vocabulary
    return engine


def elsewhere(build: Callable[[], Engine], part: list[Path] | None) -> Engine:
    """In another process, which knows no mechanisms of the user's yet."""
    load_parts(part)
    return build()


def front(
    ckpt: str, engine: EngineConfig, cluster: ClusterConfig, make: Mapping[Role, Callable[[], Engine]]
) -> Cluster:
    """Of engines in other processes; the weights are read there alone."""
    from assay.data.tokenizers import Tokenizer
    from assay.engine.apart.cluster import Cluster
    from assay.train.checkpoint import load_spec

    folder = Path(ckpt)
    return Cluster(make, load_spec(folder), Tokenizer.load(folder), engine, cluster)
