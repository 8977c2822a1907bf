"""Search a model's and a recipe's fields for the lowest loss, with Optuna: real runs, pruned early, resumable.

`assay search lab-64 --over recipe.optimizer.lr=log:1e-4..1e-1 --over model.d_model=32,64 --out DIR` keeps its trials
in DIR/search.db and writes the best as DIR/best-model.yaml and DIR/best-recipe.yaml. Run again it goes on until there
are --trials of them. Any number of machines that name the same --storage and --name work on one search; the tables are
Optuna's own, so `optuna-dashboard sqlite:///DIR/search.db` shows them while it runs.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.common import Json, Overrides, console, emit_json, fail, parse_overrides

if TYPE_CHECKING:
    from assay.laws.search import Search


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The best, and the trials; run again to resume.")],
    over: Annotated[
        list[str], typer.Option("--over", metavar="PATH=RANGE", help="low..high, log:low..high, or a,b,c.")
    ],
    changes: Overrides = None,
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a YAML file.")] = "smoke",
    trials: Annotated[int, typer.Option(help="How many in all.")] = 20,
    workers: Annotated[int, typer.Option(help="Trials side by side, one thread each.")] = 1,
    pruner: Annotated[str, typer.Option(help="asha, hyperband or none.")] = "asha",
    points: Annotated[int, typer.Option(help="Validations of a run, at which it may be pruned.")] = 9,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database of SQLAlchemy's; DIR/search.db if absent.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the password of --storage, which is kept nowhere.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the search in its storage; the model's if absent.")] = None,
    seed: Annotated[int, typer.Option(help="Of every run and of what is suggested.")] = 0,
    json: Json = False,
) -> None:
    for option, value in (("--trials", trials), ("--workers", workers), ("--points", points)):
        if value < 1:
            fail(f"{option} {value}; accepted: 1 or more")
    import_module("optuna")  # or it is named, with what installs it
    from assay.laws.search import PRUNERS, Search, parse_axis
    from assay.spec.load import load_model
    from assay.train.precision import resolve
    from assay.train.recipe import load_recipe

    if pruner not in PRUNERS:
        fail(f"--pruner {pruner!r}; accepted: {', '.join(PRUNERS)}")
    axes = tuple(parse_axis(text) for text in over)
    own = parse_overrides(changes)
    roots = {root: {p: v for p, v in own.items() if p.startswith(root)} for root in ("model.", "recipe.")}
    out.mkdir(parents=True, exist_ok=True)
    search = Search(
        name or Path(model).stem,
        load_model(model, roots["model."]),
        resolve(load_recipe(recipe, roots["recipe."]), "cpu"),
        axes,
        storage or f"sqlite:///{(out / 'search.db').resolve()}",
        trials,
        pruner,
        points,
        seed,
        password_file.read_text("utf-8").strip() if password_file else None,
    )
    search_and_tell(search, out, workers, json)


def search_and_tell(search: Search, out: Path, workers: int, json: bool) -> None:
    from assay.laws.search import best, hidden, search_on, write_best

    about = console()
    about.print(f"search {search.name!r} in {hidden(search.storage)}", markup=False, soft_wrap=True)
    study = search_on(search, workers, lambda text: about.print(text, markup=False, soft_wrap=True))
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    counts = {state: states.count(state) for state in sorted(set(states))}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    found = best(search, study)
    if found is not None:
        paths = write_best(search, found, out)
        print(f"best: trial {found['number']}, {found['loss_nats']:.4f} nats: {found['changes']}")
        print(f"assay train {paths[0]} --recipe {paths[1]} --out RUN")
    if json:
        emit_json({"trials": counts, "best": found, "storage": hidden(search.storage), "name": search.name})
    if found is None:
        raise typer.Exit(1)
