"""Tasks of lm-evaluation-harness by name and from files, with no code of a file run unless its user vouches for it.

A file may name code outright (`!function`, `class`), and in ways that are easily missed: a metric that the harness
does not have is looked for as a script, `dataset_path: pandas` reads pickles, and templates run in a jinja2 that
reaches all of Python. The first are refused by name; templates run in jinja2's sandbox.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SUFFIXES = (".yaml", ".yml")
GLOB = frozenset("*?[")
REFUSED = "this is code; --trust-task-code runs it"


def load_tasks(names: Sequence[str], trust: bool = False) -> dict[str, Any]:
    """Tasks, groups and which holds which, as the harness's evaluator takes them.

    names: of the harness's own tasks (with * and ?), or YAML files. trust: run the code that these files name.
    ValueError for an unknown name, a file that cannot be used, code without trust, data that cannot be had.
    """
    files = [name for name in names if name.endswith(SUFFIXES)]
    if not trust:
        refuse_code({name: read(Path(name)) for name in files})
    configs = {name: read(Path(name), trust) for name in files}
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    alone = len(configs) == len(names) and not any("group" in config for config in configs.values())
    manager = TaskManager(include_defaults=not alone)  # reading all of the harness's own takes seconds
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    specs = [
        spec for name in names for spec in ([usable(name, configs[name])] if name in configs else known(name, manager))
    ]
    with plainly(), sandbox(trust):
        loaded = dict(manager.load(specs))
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not trust:
        raise ValueError(f"{unsafe[0]}: runs the code that the model writes; --trust-task-code lets it")
    return loaded


def known(name: str, manager: Any) -> list[str]:
    """The registered names that a name or a pattern stands for."""
    there = manager.all_tasks
    found = manager.match_tasks([name]) if GLOB & set(name) else [name] if name in there else []
    if not found:
        near = ", ".join(difflib.get_close_matches(name, there, 5, 0.5)) or "none is like it"
        raise ValueError(f"--tasks {name!r}: no such task, and not a .yaml file; near: {near}")
    return list(found)


def read(path: Path, trust: bool = False, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file with what it includes; its own keys win. Functions are imported with trust, else refused: also those
    that another key hides, since the harness would import them too."""
    path = path.resolve()
    if path in above:
        raise ValueError(f"{path}: includes itself")
    try:
        config = yaml.load(path.read_text("utf-8"), _loader(path, trust))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not (above or config.keys() & {"task", "group"}):
        raise ValueError(f"{path}: not a task: accepted: a mapping with `task` or `group`")
    includes, merged = config.pop("include", []), dict[str, Any]()
    for other in includes if isinstance(includes, list) else [includes]:
        found = read(path.parent / str(other), trust, (*above, path))
        merged |= {key: value for key, value in found.items() if key != "task_list"}
    return merged | config


def _loader(path: Path, trust: bool) -> type[yaml.SafeLoader]:
    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        if not trust:
            raise ValueError(f"{path}, line {node.start_mark.line + 1}: !function {node.value}: {REFUSED}")
        from lm_eval.utils import import_function

        return import_function(loader, node, path)

    Loader.add_constructor("!function", function)
    return Loader


def refuse_code(configs: Mapping[str, Mapping[str, Any]]) -> None:
    found = [f"{name}: {what}" for name, config in configs.items() for what in code_in(config)]
    if found:
        raise ValueError(f"{'; '.join(found)}: {REFUSED}")


def code_in(config: Any) -> Iterator[str]:
    """What in a configuration would run code that is not the harness's, though its values are plain."""
    if isinstance(config, list):
        for item in config:
            yield from code_in(item)
    elif isinstance(config, Mapping):
        yield from _named(config)
        for value in config.values():
            yield from code_in(value)


def _named(config: Mapping[Any, Any]) -> Iterator[str]:
    from lm_eval.api import metrics  # noqa: F401  the harness's metrics are registered by their import
    from lm_eval.api.registry import metric_registry

    for key in ("class", "unsafe_code", "trust_remote_code", "hf_evaluate"):
        if config.get(key):
            yield f"{key}: {config[key]}"
    data = str(config.get("dataset_path", ""))
    if data == "pandas" or data.endswith(".py"):
        yield f"dataset_path: {data}"
    if ".yaml" in str(config.get("use_prompt", "")):
        yield f"use_prompt: {config['use_prompt']}"
    metric = config.get("metric")
    if isinstance(metric, str) and metric not in metric_registry:
        yield f"metric: {metric}, which the harness does not have itself"


def usable(name: str, config: dict[str, Any]) -> str | dict[str, Any]:
    """What the harness is given for a file: its configuration, with data files beside it found. A group goes by its
    path, since the harness builds no group from a configuration."""
    if "group" in config:
        return name
    given, folder = config.get("dataset_kwargs"), Path(name).resolve().parent
    if isinstance(given, dict):
        config["dataset_kwargs"] = {
            key: beside(folder, value) if key in ("data_files", "data_dir") else value for key, value in given.items()
        }
    return config


def beside(folder: Path, value: Any) -> Any:
    """Relative paths as they are where they exist from here, else from the task file's folder."""
    if isinstance(value, dict):
        return {key: beside(folder, one) for key, one in value.items()}
    if isinstance(value, list):
        return [beside(folder, one) for one in value]
    if not isinstance(value, str) or not value or "://" in value or Path(value).is_absolute():
        return value
    return str(folder / value) if not any(Path().glob(value)) and any(folder.glob(value)) else value


@contextmanager
def plainly() -> Iterator[None]:
    """What the harness and `datasets` raise over a task, as a ValueError that says what to do about it."""
    from datasets.exceptions import DatasetNotFoundError
    from jinja2 import TemplateError

    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ValueError(
            f"a task's data set is not on this machine: {error}. Load it once while online, "
            "or give a task file with data_files of your own"
        ) from error
    except (TemplateError, TypeError, KeyError, AttributeError, IndexError, AssertionError) as error:
        raise ValueError(f"a task cannot be used: {type(error).__name__}: {error}") from error


@contextmanager
def sandbox(trust: bool) -> Iterator[None]:
    """The harness's templates in jinja2's sandbox while it is open; as they are with trust."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    safe = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    safe.filters = plain.filters
    utils.env = plain if trust else safe
    try:
        yield
    finally:
        utils.env = plain
