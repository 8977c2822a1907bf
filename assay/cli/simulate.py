"""Serve a trace of requests in simulation: latencies, goodput and memory, by policy, before there is a machine.

TRACE is a CSV file in the shape of Azure's traces (TIMESTAMP, ContextTokens, GeneratedTokens), a JSON lines file in the
shape of Mooncake's (timestamp, input_length, output_length, hash_ids), or one that is drawn: code, conversation,
sessions. Batches are made by the scheduler that the engine uses; a step takes as long as --cost says, or as a model
would take on a device. --compare runs several policies on the same requests. --goodput looks for the largest rate at
which enough requests keep the limits. --check replays a log of the engine, and says how far off the simulation is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli import _simulate as options
from assay.cli.common import Json, Part, emit_json, fail, load_parts, progress

if TYPE_CHECKING:
    from assay.simulate.cost import Machine
    from assay.simulate.fleet import Fleet
    from assay.simulate.goodput import Slo
    from assay.simulate.run import Run, Served
    from assay.simulate.trace import Trace

CAPACITIES = (100, 300, 1000, 3000, 10_000, 30_000, None)


@options.grouped
def run(
    trace: Annotated[str | None, typer.Argument(metavar="[TRACE]", help="A file, or what to draw.")] = None,
    *,
    load: options.Load,
    service: options.Service,
    device: options.Device,
    limits: options.Limits,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="Look for the largest rate that keeps the limits.")
    ] = False,
    check: Annotated[Path | None, typer.Option(metavar="LOG.jsonl", help="Compare with an engine's log.")] = None,
    save_cost: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="With --check: where to put the fitted costs.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Distributions of latency, goodput.")] = None,
    part: Part = None,
    json: Json = False,
) -> None:
    load_parts(part)
    arms = service.arms()
    if check is not None:
        if trace is not None or goodput or plot is not None or len(arms) > 1:
            fail("--check: accepted: no TRACE, no --goodput, no --plot and one policy; the log says what arrived")
        against(check, next(iter(arms.values())), device, save_cost, json)
        return
    if trace is None or save_cost is not None:
        fail(
            "TRACE: missing; a file, code, conversation or sessions" if trace is None else "--save-cost: needs --check"
        )
    slo, asked, machine = limits.read(), load.read(trace), device.read()
    if goodput and not slo.limits:
        fail("--goodput: no limit; accepted: one of --slo-ttft, --slo-tbt and --slo-tpot, or more")
    runs = {name: serve(name, asked, machine, fleet) for name, fleet in arms.items()}
    found = report(trace, asked, machine, runs, slo)
    for name in arms if goodput else ():
        found["arms"][name]["goodput_req_s"] = best(name, asked, machine, arms[name], slo)
    tell(found, runs, plot, json)


def tell(found: dict[str, Any], runs: dict[str, Run], plot: Path | None, json: bool) -> None:
    from assay.cli._simulate_show import draw, show

    if plot is not None:
        draw(found, runs, plot)
    if json:
        emit_json(found)
    else:
        show(found)


def serve(name: str, trace: Trace, machine: Machine, fleet: Fleet) -> Run:
    from assay.simulate.run import simulate

    with progress() as bar:
        line = bar.add_task(name, total=len(trace))

        def watch(one: Served) -> bool:
            bar.advance(line)
            return False

        return simulate(trace, machine, fleet, watch)


def best(name: str, trace: Trace, machine: Machine, fleet: Fleet, slo: Slo) -> float:
    from assay.simulate.goodput import goodput

    with progress() as bar:
        line = bar.add_task(f"goodput of {name}", total=None)
        return goodput(trace, machine, fleet, slo, lambda: bar.advance(line))


def report(source: str, trace: Trace, machine: Machine, runs: dict[str, Run], slo: Slo) -> dict[str, Any]:
    """What --json prints: see docs/simulate.md."""
    from dataclasses import asdict

    from assay.simulate.goodput import summary
    from assay.simulate.prefix import EVICT, hit_rate
    from assay.simulate.trace import rate_of
    from assay.simulate.waste import wastes

    hits = [{"blocks": n, **{evict: hit_rate(trace, n, evict) for evict in EVICT}} for n in CAPACITIES]
    return {
        "trace": source,
        "requests": len(trace),
        "rate": rate_of(trace),
        "machine": machine.model_dump(),
        "slo": asdict(slo),
        "arms": {name: summary(one, slo) for name, one in runs.items()},
        "waste": [asdict(one) for one in wastes(trace)],
        "hit_rates": hits if any(one.blocks for one in trace) else [],
    }


def against(log: Path, fleet: Fleet, device: options.Device, save: Path | None, json: bool) -> None:
    """With costs that are given, else with those fitted to the log's own steps."""
    from assay.cli._simulate_show import show_check
    from assay.simulate.check import check, read_log
    from assay.simulate.cost import Machine

    found = check(read_log(log), fleet, device.read() if device.named else None)
    if save is not None:
        if not found["fitted"]:
            fail("--save-cost: the costs were given; accepted: without --cost, --hardware and --model")
        Machine.model_validate({"name": log.stem, "step": found["steps"]["cost"], "capacity": device.capacity}).save(
            save
        )
    if json:
        emit_json(found)
    else:
        show_check(found)
