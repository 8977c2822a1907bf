"""What a model costs: parameters, state bytes and FLOPs, exact, before a tensor exists.

CONFIG is a shipped model, a spec YAML or a checkpoint folder. Several configs stand side by side, with what differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Json, Part, emit_json, fail, load_parts

if TYPE_CHECKING:
    from assay.cost.bill import Bill


def run(
    items: Annotated[list[str], typer.Argument(metavar="CONFIG... [model.KEY=VALUE]...")],
    context: Annotated[
        int | None, typer.Option(help="Tokens in each sequence; the model's own context if absent.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16, f16, f32.")] = "bf16",
    kv_dtype: Annotated[str, typer.Option(help="Of the state: bf16, f16, f32, int8, int4.")] = "bf16",
    page: Annotated[int, typer.Option(help="Tokens a page: reserved bytes are whole pages.")] = 16,
    memory: Annotated[int, typer.Option(help="Encoder tokens that cross-attention reads.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.html", help="State bytes against context.")] = None,
    part: Part = None,
    json: Json = False,
) -> None:
    from assay.cli.common import parse_overrides
    from assay.cost.bill import Question, bill
    from assay.spec.load import load_model

    load_parts(part)
    configs = [i for i in items if "=" not in i]
    changes = parse_overrides([i for i in items if "=" in i])
    if not configs:
        fail("CONFIG: missing; a shipped model's name, a YAML file or a checkpoint folder is accepted")
    if any(path.startswith("recipe.") for path in changes):
        fail("a bill has no recipe; overrides here begin with model.")
    specs = {name: load_model(name, changes) for name in configs}
    bills = {n: bill(s, Question(context or s.context, batch, dtype, kv_dtype, page, memory)) for n, s in specs.items()}
    if plot is not None:
        draw(specs, plot, Question(1, batch, dtype, kv_dtype, page, memory))
    if json:
        records = {name: b.as_json() for name, b in bills.items()}
        emit_json(next(iter(records.values())) if len(records) == 1 else {"configs": records})
        return
    show(bills)
    if len(specs) > 1:
        differences({name: s.model_dump() for name, s in specs.items()})


def human(value: float, unit: str) -> str:
    """1.07 GiB, 8.03 B, 19.3 GFLOP: three significant digits."""
    if unit == "bytes":
        for name in ("B", "KiB", "MiB", "GiB"):
            if value < 1024:
                return f"{value:.4g} {name}"
            value /= 1024
        return f"{value:.4g} TiB"
    for name in ("", "K", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.4g} {name}{unit}"
        value /= 1000
    return f"{value:.4g} E{unit}"


def rows(b: Bill) -> list[tuple[str, str]]:
    ask = b.question
    per = f"{ask['context']:,} tokens x {ask['batch']}"
    return [
        ("parameters", f"{b.params['total']:,}"),
        ("  active for a token", f"{b.params['active']:,}"),
        ("  input table and untied head", f"{b.params['embedding']:,}"),
        ("weight bytes", human(b.weight_bytes, "bytes")),
        ("state a token", human(b.state_bytes_per_token, "bytes")),
        (f"state at {per}", human(b.state_bytes, "bytes")),
        (f"  reserved in pages of {ask['page']}", human(b.reserved_bytes, "bytes")),
        ("training FLOPs a token", human(b.flops["train_per_token"], "FLOP")),
        (f"prefill FLOPs, {per}", human(b.flops["prefill"], "FLOP")),
        ("  executed in full squares", human(b.flops["prefill_executed"], "FLOP")),
        ("decode FLOPs a token", human(b.flops["decode_per_token"], "FLOP")),
    ]


def show(bills: dict[str, Bill]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("", *bills, header_style="bold", pad_edge=False)
    for cells in zip(*(rows(b) for b in bills.values()), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    console.print(table)
    if any(b.question["kv_dtype"] in ("int8", "int4") for b in bills.values()):
        console.print(
            "int8 and int4 state: codes, with a scale and a zero of 2 bytes a vector; no cache here stores them yet."
        )
    if len(bills) == 1:
        console.print(layers(next(iter(bills.values()))))


def layers(b: Bill) -> Any:
    """Runs of layers that cost the same are one line."""
    from rich.table import Table

    table = Table(
        "layers", "parts", "parameters", "state a token", "state", "decode FLOPs", header_style="bold", pad_edge=False
    )
    runs: list[tuple[str, str, Any]] = []
    for layer in b.layers:
        same = runs and (runs[-1][2].parts, runs[-1][2].params, runs[-1][2].state_bytes, runs[-1][2].decode_flops) == (
            layer.parts,
            layer.params,
            layer.state_bytes,
            layer.decode_flops,
        )
        first = runs.pop()[0] if same else layer.name
        runs.append((first, layer.name, layer))
    for first, last, layer in runs:
        name = first if first == last else f"{first} to {last.rpartition('.')[2]}"
        table.add_row(
            name,
            ", ".join(dict.fromkeys(layer.parts.values())),
            f"{layer.params:,}",
            human(layer.state_bytes_per_token, "bytes"),
            human(layer.state_bytes, "bytes"),
            human(layer.decode_flops, "FLOP"),
        )
    return table


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a tree by dotted path."""
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in flatten(value, f"{path}.{name}".lstrip(".")).items()}
    return {path: tree}


def differences(trees: dict[str, dict[str, Any]]) -> None:
    """The fields in which the configs are not the same."""
    from rich.console import Console
    from rich.table import Table

    flat = {name: flatten(tree) for name, tree in trees.items()}
    table = Table("field", *flat, header_style="bold", pad_edge=False, title="what differs", title_justify="left")
    for path in dict.fromkeys(p for leaves in flat.values() for p in leaves):
        values = [leaves.get(path, "") for leaves in flat.values()]
        if any(v != values[0] for v in values):
            table.add_row(path, *("" if v == "" else str(v) for v in values))
    Console(highlight=False).print(table)


def draw(specs: dict[str, Any], path: Path, ask: Any) -> None:
    """A self-contained page: state bytes against context, both axes logarithmic."""
    from dataclasses import replace

    import plotly.graph_objects as go

    from assay.cost.bill import bill

    contexts = [2**i for i in range(7, 21)]
    figure = go.Figure()
    for name, spec in specs.items():
        values = [bill(spec, replace(ask, context=c)).state_bytes for c in contexts]
        figure.add_scatter(x=contexts, y=values, name=name.replace("<", "&lt;"), mode="lines+markers")
    figure.update_layout(
        title="State bytes against context",
        xaxis={"type": "log", "title": "context (tokens)"},
        yaxis={"type": "log", "title": f"state bytes (batch {ask.batch}, {ask.kv_dtype})"},
        template="plotly_white",
    )
    path.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
