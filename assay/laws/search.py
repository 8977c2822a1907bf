"""Search over a model's and a recipe's fields with Optuna: real runs of the one loop, pruned early, kept in a database.

The database is Optuna's own, so its dashboard reads it, and any number of processes and machines that are given the
same storage work on one search.
"""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from assay.spec.load import change, digest, dump, parse_yaml, to_yaml
from assay.spec.model import ModelSpec
from assay.train.recipe import Recipe, change_recipe

if TYPE_CHECKING:
    import optuna

Pruner = Literal["asha", "hyperband", "none"]
PRUNERS: tuple[Pruner, ...] = ("asha", "hyperband", "none")
FACTOR = 3
"""Of the runs at a rung, one in so many goes on (Li et al. 2018, arXiv 1810.05934, use 4; Hyperband's paper 3)."""
HEARTBEAT_S, GRACE_S = 30, 120
RETRIES = 2
_RANGE = re.compile(r"^(?P<log>log:)?(?P<low>[^.,][^,]*?)\.\.(?P<high>[^,]+)$")


@dataclass(frozen=True)
class Axis:
    """One field: choices, or a range from low to high, whole where both ends are, in the logarithm where `log`."""

    path: str
    low: float | int = 0
    high: float | int = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: optuna.Trial) -> Any:
        if self.choices:
            # Optuna stores choices of plain values only; others travel as JSON.
            return json.loads(trial.suggest_categorical(self.path, [json.dumps(choice) for choice in self.choices]))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.path, self.low, self.high, log=self.log)
        return trial.suggest_float(self.path, self.low, self.high, log=self.log)


def parse_axis(text: str) -> Axis:
    """`recipe.optimizer.lr=log:1e-4..1e-1`, `model.layers=2..6`, `model.d_model=32,64,128`."""
    path, _, values = (part.strip() for part in text.partition("="))
    if path.partition(".")[0] not in ("model", "recipe") or "." not in path or not values:
        raise ValueError(f"{text!r}: accepted: model.PATH= or recipe.PATH= with low..high, log:low..high, or a,b,c")
    if (found := _RANGE.match(values)) is None:
        choices = parse_yaml(f"[{values}]", path)
        if len(choices) < 2:
            raise ValueError(f"{text!r}: one value is no search; accepted: low..high, log:low..high, or a,b,c")
        return Axis(path, choices=tuple(choices))
    low, high = (parse_yaml(found[end], path) for end in ("low", "high"))
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or low >= high or (found["log"] and low <= 0):
        raise ValueError(f"{text!r}: accepted: two rising numbers, above 0 for log:")
    return Axis(path, low, high, bool(found["log"]))


@dataclass(frozen=True)
class Search:
    """What is searched. storage: a URL of SQLAlchemy's; `password` is put into it when it is opened, and only then.

    trials: how many are wanted in all, finished or pruned. points: validations of a run, at which it may be pruned.
    """

    name: str
    model: ModelSpec
    recipe: Recipe
    axes: tuple[Axis, ...]
    storage: str
    trials: int = 20
    pruner: Pruner = "asha"
    points: int = 9
    seed: int = 0
    password: str | None = None

    def __post_init__(self) -> None:
        paths = [axis.path for axis in self.axes]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"{twice[0]}: searched twice; accepted: a path once")

    def __repr__(self) -> str:
        """Without the password."""
        return f"Search({self.name!r}, {hidden(self.storage)!r}, {self.trials} trials)"

    @property
    def about(self) -> dict[str, Any]:
        """What two processes must agree on to work on one search."""
        axes = [f"{a.path}: {list(a.choices) or [a.low, a.high, a.log]}" for a in self.axes]
        recipe = change_recipe(self.recipe, {"evaluation.points": self.points})
        return {"model": digest(self.model), "recipe": recipe.digest, "axes": axes, "pruner": self.pruner}

    def run_of(self, chosen: Mapping[str, Any]) -> tuple[ModelSpec, Recipe]:
        """The model and recipe with these values. ValueError where they cannot be."""
        own = {root: {p: v for p, v in chosen.items() if p.startswith(f"{root}.")} for root in ("model", "recipe")}
        spec = change(self.model, own["model"], "model") if own["model"] else self.model
        changes = {"recipe.evaluation.points": self.points, "recipe.seed": self.seed, **own["recipe"]}
        return spec, change_recipe(self.recipe, changes)


def hidden(url: str) -> str:
    """A storage's URL as it may be shown: without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        raise ValueError("storage: not a URL; accepted: sqlite:///search.db, postgresql://me@host/db, ...") from None


def open_study(search: Search, worker: int = 0) -> optuna.Study:
    """The search in its storage, begun or taken up. ValueError where the storage holds another one by this name, or
    cannot be opened; no message has the password."""
    import optuna
    from sqlalchemy.engine import make_url

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Heartbeats and samplers for parallel trials are called experimental: their interface may change, not the tables.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    shown = hidden(search.storage)
    url = make_url(search.storage)
    if search.password is not None:
        url = url.set(password=search.password)
    kwargs = {"connect_args": {"timeout": 60}} if url.get_backend_name() == "sqlite" else {}
    try:
        storage = optuna.storages.RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs=kwargs,
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
        )
    except Exception as error:
        raise ValueError(f"storage {shown}: {_why(error, url.password)}") from None
    found = optuna.create_study(
        storage=storage,
        study_name=search.name,
        load_if_exists=True,
        pruner=_pruner(search),
    )
    # Taken up again, or by another process or machine, it must not suggest what was suggested before.
    place = [search.seed, worker, len(found.get_trials(deepcopy=False)), zlib.crc32(platform.node().encode())]
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    found.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    held = found.user_attrs.get("assay")
    if held is None:
        found.set_user_attr("assay", search.about)
    elif held != search.about:
        differ = [key for key in search.about if held.get(key) != search.about[key]]
        raise ValueError(f"storage {shown} holds another search {search.name!r} ({', '.join(differ)} differ)")
    return found


def _why(error: Exception, password: str | None) -> str:
    """One line, the password blotted out, and what installs a driver that is missing."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) or "Failed to import DB access module" in text:
        text = "its driver is missing: pip install psycopg2-binary (postgresql) or pymysql (mysql+pymysql://)"
    return text.replace(password, "***") if password else text


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    """Rungs are validations: after 1, 3, 9, ... of them one run in three goes on."""
    import optuna

    if search.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(1, search.points, FACTOR)
    return optuna.pruners.NopPruner()


def search_on(search: Search, workers: int = 1, told: Callable[[str], None] | None = None) -> optuna.Study:
    """Go on until the storage has as many trials as wanted. Each of several workers is a process with one thread; with
    one, it is this process. Where several end at once there may be as many trials more."""
    if workers == 1:
        work(search, 0, told)
    else:
        open_study(search)  # the tables are made once, before the workers race for it
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for done in [pool.submit(work, search, number) for number in range(workers)]:
                done.result()
    return open_study(search)


def work(search: Search, worker: int, told: Callable[[str], None] | None = None) -> None:
    """Take trials until there are enough."""
    import optuna

    if worker:
        import torch

        torch.set_num_threads(1)
    counted = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    study = open_study(search, worker)
    if len(study.get_trials(deepcopy=False, states=counted)) >= search.trials:
        return

    def show(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if told is not None:
            loss = "" if trial.value is None else f" {trial.value:.4f}"
            told(f"trial {trial.number}: {trial.state.name.lower()}{loss} {trial.params}")

    enough = optuna.study.MaxTrialsCallback(search.trials, counted)
    study.optimize(lambda trial: objective(search, trial), callbacks=[enough, show])


def objective(search: Search, trial: optuna.Trial) -> float:
    """Train what is suggested; the loss on validation text in nats. Pruned where it diverges, or where its choices
    cannot be built together: the reason stands in the trial's `why`."""
    import optuna

    from assay.train.loop import Options, train
    from assay.train.outcome import Diverged, Status, TrainResult

    chosen = {axis.path: axis.suggest(trial) for axis in search.axes}
    seen = 0

    def look(_: Status, found: TrainResult) -> None:
        nonlocal seen
        seen += 1
        assert found.evaluation is not None
        trial.report(found.evaluation.loss_nats, seen)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        spec, recipe = search.run_of(chosen)
        trained = train(spec, recipe, options=Options(on_validation=look))
    except Diverged as error:
        trial.set_user_attr("why", f"diverged at step {error.step}")
        raise optuna.TrialPruned from None
    except ValueError as error:
        trial.set_user_attr("why", str(error))
        raise optuna.TrialPruned from None
    assert trained.evaluation is not None
    trial.set_user_attr("params_total", sum(p.numel() for p in trained.model.parameters()))
    trial.set_user_attr("tokens", trained.tokens)
    trial.set_user_attr("train_s", trained.train_s)
    return trained.evaluation.loss_nats


def best(search: Search, study: optuna.Study) -> dict[str, Any] | None:
    """The lowest loss and its choices; None before a trial is complete."""
    done = [t for t in study.get_trials(deepcopy=False) if t.value is not None and t.state.name == "COMPLETE"]
    if not done:
        return None
    found = min(done, key=lambda trial: float(trial.value or 0.0))
    chosen = {axis.path: _value(axis, found.params[axis.path]) for axis in search.axes}
    return {"number": found.number, "loss_nats": found.value, "changes": chosen, **found.user_attrs}


def _value(axis: Axis, stored: Any) -> Any:
    return json.loads(stored) if axis.choices else stored


def write_best(search: Search, found: Mapping[str, Any], out: Path) -> tuple[Path, Path]:
    """The best model and recipe as files for `assay train`."""
    spec, recipe = search.run_of(found["changes"])
    paths = out / "best-model.yaml", out / "best-recipe.yaml"
    points = {"recipe.evaluation.points": search.recipe.evaluation.points}
    for path, tree in zip(paths, (dump(spec), dump(change_recipe(recipe, points)))):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_yaml(tree), "utf-8")
        os.replace(temporary, path)
    return paths
