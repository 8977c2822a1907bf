"""Serve a checkpoint over HTTP, as OpenAI's clients speak it, with a chat page at /.

One line on stdout says the address once requests can be answered; the log goes to stderr, a JSON object a line. SIGTERM
and Ctrl-C let running replies finish for 10 seconds. Any address but this machine's own needs --api-key-file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import _engine as options
from assay.cli.common import Device, Part, fail, load_parts, pick_device

if TYPE_CHECKING:
    from assay.engine.engine import Engine

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes one that is free.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of the model. [default: torch's]")]
Keys = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line, in a file that nobody else may read."),
]
Running = Annotated[int, typer.Option("--max-running", min=1, help="Replies that are computed at once.")]
Page = Annotated[int, typer.Option("--page", min=1, help="Tokens of a cache page.")]
Memory = Annotated[
    int | None,
    typer.Option("--memory", min=1, metavar="BYTES", help="Of the cache. [default: 512 tokens a running reply]"),
]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Only algorithms that give the same each time.")]
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
    max_running: Running = 16,
    page: Page = 16,
    memory: Memory = None,
    ready_file: Ready = None,
    part: Part = None,
) -> None:
    from assay.engine.server.config import Limits, ServerConfig, read_keys

    if not Path(ckpt).is_dir():
        fail(f"{ckpt}: no such folder; accepted: a checkpoint")
    if dtype is not None and dtype not in options.DTYPES:
        fail(f"--dtype {dtype!r}: accepted: {', '.join(options.DTYPES)}")
    keys = None if api_key_file is None else read_keys(api_key_file)
    name, limits = Path(ckpt).resolve().name, Limits()
    config = ServerConfig(name=name, host=host, port=port, keys=keys, limits=limits)
    pick_device(device)

    from assay.engine.config import EngineConfig
    from assay.engine.server.run import serve

    load_parts(part)
    engine = EngineConfig(max_running=max_running, page=page, memory=memory)

    def ready(url: str) -> None:
        print(f"{name} is served at {url}", flush=True)
        if ready_file is not None:
            ready_file.write_text(f"{url}\n")

    def make() -> Engine:
        """In the thread that will run it: thread counts are a thread's own."""
        import torch

        from assay.engine.engine import Engine

        if threads is not None:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        return Engine(*options.load(ckpt, device, dtype), engine)

    serve(config, make, max_running + limits.waiting, ready)
