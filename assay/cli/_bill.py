"""A bill for people: tables at 80 columns, the sentence on the largest term, and the plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from assay.cli.bill import Account
    from assay.cost.bill import Bill, LayerBill, Question, Sheet
    from assay.cost.hardware import Hardware, Roofline
    from assay.cost.levers import Largest
    from assay.cost.parallel import Share
    from assay.spec.model import ModelSpec

PARTS = {
    "embeds": "input table",
    "mixers": "mixers",
    "ffns": "feed-forward",
    "experts": "routed experts",
    "heads": "head",
    "other": "norms and the rest",
}
LONGEST = 48
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
DASHES = ("solid", "dash", "dot", "dashdot")  # lines of one course show through each other
TICKS = {128: "128", 512: "512", 2048: "2K", 8192: "8K", 32_768: "32K", 131_072: "128K", 524_288: "512K"}


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
            return f"{value:.4g} {name}{unit}".rstrip()
        value /= 1000
    return f"{value:.4g} E{unit}"


def span(seconds: float) -> str:
    """Seconds, milliseconds or microseconds."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.1e} s"


def show(accounts: Mapping[str, Account]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    bills = [a.bill for a in accounts.values()]
    groups = [key for key in ("mixers", "ffns", "experts") if any(b.params_by[key] for b in bills)]
    console.print(grid(["", *accounts], zip(*(rows(a, groups) for a in accounts.values()), strict=True)))
    if any(b.question["kv_dtype"] in ("int8", "int4") for b in bills):
        console.print(
            "int8 and int4 state: codes, with a scale and a zero of 2 bytes a vector; no cache here stores them yet."
        )
    if len(accounts) == 1:
        only = next(iter(accounts.values()))
        console.print(layers(only.bill))
        console.print(grid(["training memory", "bytes"], [[row] for row in kept(only)]))
        if only.share is not None:
            console.print(grid(["of one process", "bytes"], [[row] for row in shared(only.share)]))
            if only.share.stages:
                console.print(staged(only.share))
                console.print(
                    f"Stages of equal work wait {100 * only.share.bubble:.1f} % of a step; the one with most is above."
                )
            fits(only.share, only.rooflines.values(), console)
    devices = list(next(iter(accounts.values())).rooflines)
    for device in devices:
        console.print(roofs(accounts, device))
    if devices:
        console.print("At the full rates of one device, which kernels come near and do not reach.")
    for name, found in accounts.items():
        label = f"{escape(name)}: " if len(accounts) > 1 else ""
        console.print(f"{label}{sentence(found.largest)}")
        if found.prefixed:
            told = "one of p tokens adds p (p - 1) / 2 visible pairs to the prefill of each"
            console.print(f"{label}{len(found.prefixed)} mixers are counted without a prefix: {told}.")
        if found.unread:
            console.print(f"{label}configuration keys that nothing reads: {escape(', '.join(found.unread))}")
    if len(accounts) > 1:
        for line in crossings(accounts):
            console.print(escape(line))
        differences({name: a.sheet.spec for name, a in accounts.items()})


def crossings(accounts: Mapping[str, Account]) -> Iterator[str]:
    """Of each two configs, which one's state is the smaller, and from which context on."""
    for x in crossovers(accounts):
        start = "at every context" if x["context"] == 1 else f"from {x['context']:,} tokens on"
        yield f"the state of {x['below']} is below that of {x['above']} {start}"


def crossovers(accounts: Mapping[str, Account]) -> list[dict[str, Any]]:
    """`below`, `above` and the `context` from which on the state of the one stays below that of the other; no entry for
    two that are never apart for good."""
    from assay.cost.bill import Question, crossover

    found = []
    for (a, one), (b, other) in permutations(accounts.items(), 2):
        context = crossover(one.sheet, other.sheet, Question(**one.bill.question))
        if context is not None:
            found.append({"below": a, "above": b, "context": context})
    return found


def grid(head: Sequence[str], lines: Any) -> Table:
    """Each line is one (label, value) a column after the first."""
    table = empty(head)
    for cells in lines:
        table.add_row(cells[0][0], *(value for _, value in cells))
    return table


def empty(head: Sequence[str], title: str | None = None) -> Table:
    """Columns that fold what is too wide for the screen."""
    from rich.markup import escape
    from rich.table import Column, Table

    columns = [Column(escape(cell), overflow="fold") for cell in head]
    return Table(*columns, header_style="bold", pad_edge=False, title=title, title_justify="left")


def rows(account: Account, groups: Sequence[str]) -> list[tuple[str, str]]:
    b, ask = account.bill, account.bill.question
    per = f"{ask['context']:,} tokens x {ask['batch']}"
    return [
        ("parameters", f"{b.params['total']:,}"),
        ("  active for a token", f"{b.params['active']:,}"),
        ("  input table and untied head", f"{b.params['embedding']:,}"),
        *((f"  {PARTS[key]}", human(b.params_by[key], "")) for key in groups),
        ("weight bytes", human(b.weight_bytes, "bytes")),
        ("state a token", human(b.state_bytes_per_token, "bytes")),
        (f"state at {per}", human(b.state_bytes, "bytes")),
        (f"  reserved in pages of {ask['page']}", human(b.reserved_bytes, "bytes")),
        ("training FLOPs a token", human(b.flops["train_per_token"], "FLOP")),
        (f"prefill FLOPs, {per}", human(b.flops["prefill"], "FLOP")),
        ("  executed in full squares", human(b.flops["prefill_executed"], "FLOP")),
        ("decode FLOPs a token", human(b.flops["decode_per_token"], "FLOP")),
        ("training memory, same tokens", human(account.training.need.total, "bytes")),
    ]


def kept(account: Account) -> list[tuple[str, str]]:
    found, ask = account.training, account.bill.question
    low = "" if ask["dtype"] == "f32" else f" in f32, with {ask['dtype']} copies"
    each = {
        f"weights{low}": found.need.weights,
        f"gradients{low}": found.need.gradients,
        "AdamW's two moments": found.need.moments,
        f"activations of {ask['context']:,} tokens x {ask['batch']}": found.need.activations,
        "  with one block at a time run again": found.recomputed,
        "  beside them, where attention keeps its scores": found.scores,
        "in all, scores not kept": found.need.total,
    }
    return [(name, human(count, "bytes")) for name, count in each.items()]


def shared(found: Share) -> list[tuple[str, str]]:
    """What the process with most of a step keeps, and what it sends in one."""
    names = ("weights", "gradients", "moments", "gathered", "activations", "total")
    held = [(name, getattr(found, name)) for name in names]
    held += [("  on the device", found.device), ("  on the host", found.host)] if found.host else []
    sent = [(f"sent a step: {kind}", size) for kind, size in found.sent.items() if size]
    return [(name, human(size, "bytes")) for name, size in held + sent]


def staged(found: Share) -> Table:
    """What each stage of a pipeline keeps (trained: weights, gradients and moments), of how many pieces, and what it
    sends in a step to other stages."""
    table = empty(["stage", "layers", "trained", "pieces held", "activations", "sent a step"])
    for number, one in enumerate(found.stages):
        first, stop = one.layers
        table.add_row(
            str(number),
            str(first) if stop == first + 1 else f"{first}-{stop - 1}",
            human(one.weights + one.gradients + one.moments, "bytes"),
            str(one.held),
            human(one.activations, "bytes"),
            human(one.sent["send"], "bytes"),
        )
    return table


def fits(found: Share, machines: Iterable[Roofline], console: Console) -> None:
    for one in machines:
        verdict = "fits" if found.device <= one.memory_bytes else "does not fit"
        console.print(f"One process's share of a training step {verdict} in {one.hardware}.")


def layers(b: Bill) -> Table:
    """One line for each kind of layer: those that cost the same."""
    table = empty(["layers", "parts", "parameters", "state a token", "state", "decode FLOPs"])
    for same in kinds(b):
        one, inside = same[0], ", ".join(dict.fromkeys(same[0].parts.values()))
        active = f" ({human(one.active, '')} active)" if one.active != one.params else ""
        table.add_row(
            ranges([x.name for x in same]),
            f"{one.block}: {inside}" if one.block else inside,
            f"{one.params:,}{active}",
            human(one.state_bytes_per_token, "bytes"),
            human(one.state_bytes, "bytes"),
            human(one.decode_flops, "FLOP"),
        )
    return table


def kinds(b: Bill) -> list[list[LayerBill]]:
    """Layers of one block that cost the same, in the order of their first, and other parts that cost anything."""
    found: dict[Any, list[LayerBill]] = {}
    for x in b.layers:
        if not (x.block or x.params or x.prefill_flops):
            continue
        own = x.name if not x.block else x.block
        key = (own, tuple(x.parts.items()), x.params, x.state_bytes, x.decode_flops, x.prefill_flops)
        found.setdefault(key, []).append(x)
    return list(found.values())


def ranges(names: Sequence[str], most: int = 3) -> str:
    """`blocks.0`, `blocks.1`, `blocks.3` -> `3 blocks: 0-1, 3`; a name alone stays."""
    if not names[0].startswith("blocks."):
        return ", ".join(names)
    runs: list[list[int]] = []
    for number in (int(name.rpartition(".")[2]) for name in names):
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    shown = said if len(said) <= most else [*said[: most - 1], "...", said[-1]]
    return f"{len(names)} {'block' if len(names) == 1 else 'blocks'}: {', '.join(shown)}"


def roofs(accounts: Mapping[str, Account], device: str) -> Table:
    """The least times on one device, a column for each config."""
    found = [a.rooflines[device] for a in accounts.values()]
    memory = human(found[0].memory_bytes, "bytes")
    lines = [
        [("weights and state", human(r.needed_bytes, "bytes")) for r in found],
        [(f"fits in {memory}", "yes" if r.fits else f"no: {r.devices} of these") for r in found],
        [("longest context that fits", "any" if r.longest is None else f"{r.longest:,}") for r in found],
        [("prefill of the batch", span(r.prefill_s)) for r in found],
        [
            (
                "decode, tokens a second",
                f"{human(r.decode_tok_s, '')}, waits for {r.bound}" if r.decode_tok_s else "none",
            )
            for r in found
        ],
        [("training, tokens a second", human(r.train_tok_s, "")) for r in found],
    ]
    return grid([found[0].hardware, *accounts], lines)


def sentence(found: Largest) -> str:
    """`state 62 GiB of 115 GiB: kv_heads 16 -> 4 would save 46.5 GiB`."""
    size, total = human(found.bytes, "bytes"), human(found.of, "bytes")
    inside = ""
    if found.part is not None and found.part_bytes is not None:
        inside = f", {human(found.part_bytes, 'bytes')} of it {PARTS[found.part]}"
    would = [f"{x.change} would save {human(x.saves, 'bytes')}" for x in found.levers[:3]]
    return f"largest: {found.term}, {size} of {total}{inside}" + (f": {'; '.join(would)}" if would else "")


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a tree by dotted path."""
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in flatten(value, f"{path}.{name}".lstrip(".")).items()}
    return {path: tree}


def differences(specs: Mapping[str, ModelSpec]) -> None:
    """The fields in which the configs are not the same, less those that are at their default wherever they stand."""
    from rich.console import Console
    from rich.markup import escape

    from assay.spec.load import canonical

    flat = {name: flatten(spec.model_dump()) for name, spec in specs.items()}
    said = {path for spec in specs.values() for path in flatten(canonical(spec))}
    table = empty(["field", *flat], "what differs")
    for path in dict.fromkeys(p for leaves in flat.values() for p in leaves if p in said):
        values = [leaves.get(path, "") for leaves in flat.values()]
        if any(v != values[0] for v in values):
            table.add_row(escape(path), *("" if v == "" else escape(shortened(str(v))) for v in values))
    Console(highlight=False).print(table)


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def draw(sheets: Mapping[str, Sheet], path: Path, ask: Question, machines: Mapping[str, Hardware]) -> None:
    """A self-contained page: state bytes, FLOPs of a decoded token, and its roofline on each machine, against context.
    Axes are logarithmic; a model's line ends where its positions do."""
    from plotly.subplots import make_subplots

    panels = [f"state bytes (batch {ask.batch}, {ask.kv_dtype})", "FLOPs of a decoded token"]
    panels += [f"decode tok/s at most, {device.name}" for device in machines.values()]
    figure = make_subplots(rows=len(panels), cols=1, subplot_titles=list(map(plain, panels)), vertical_spacing=0.1)
    for number, (name, sheet) in enumerate(sheets.items()):
        contexts = [2**i for i in range(7, 21) if sheet.limit is None or 2**i <= sheet.limit]
        for row, values in enumerate(curves(sheet, contexts, ask, machines.values()), 1):
            line = {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)]}
            what = {"name": plain(name), "legendgroup": name, "showlegend": row == 1, "line": line}
            figure.add_scatter(x=contexts, y=values, mode="lines+markers", row=row, col=1, **what)
    figure.update_xaxes(type="log", title="context (tokens)", tickvals=list(TICKS), ticktext=list(TICKS.values()))
    figure.update_yaxes(type="log", exponentformat="SI")
    figure.update_layout(title="What a context costs", template="plotly_white", height=120 + 360 * len(panels))
    path.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")


def curves(sheet: Sheet, contexts: Sequence[int], ask: Question, machines: Any) -> Iterator[list[float]]:
    from assay.cost.hardware import decode_seconds

    asks = [replace(ask, context=context) for context in contexts]
    yield [sheet.state_bytes(one) for one in asks]
    yield [sheet.decode_flops(one) for one in asks]
    for device in machines:
        yield [ask.batch / decode_seconds(sheet, one, device) for one in asks]


def plain(text: str) -> str:
    """plotly reads labels as markup."""
    return text.replace("<", "&lt;")
