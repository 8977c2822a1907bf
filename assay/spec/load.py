"""YAML in, specs out: safe reading, dotted overrides, digests. Every error names the field and what is accepted."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from assay.spec.base import PartSpec, Spec, first_error
from assay.spec.model import ModelSpec

SHELF = Path(__file__).parent.parent / "shelf"
MAX_BYTES, MAX_NODES = 1_000_000, 50_000
MERGE = "tag:yaml.org,2002:merge"  # `<<: *base`: keys beside it override the merged ones
S = TypeVar("S", bound=Spec)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if k.tag != MERGE]
        twice = [k for k in keys if keys.count(k) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 4e-3 as a string; people write learning rates that way.
_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _size(node: yaml.Node, seen: dict[int, int], path: frozenset[int]) -> int:
    """Nodes after aliases are written out: a bomb of nested aliases is small on disk and huge here."""
    if id(node) in path:
        raise ValueError("an alias contains itself")
    if id(node) not in seen:
        inner = path | {id(node)}
        if isinstance(node, yaml.MappingNode):
            seen[id(node)] = 1 + sum(_size(k, seen, inner) + _size(v, seen, inner) for k, v in node.value)
        elif isinstance(node, yaml.SequenceNode):
            seen[id(node)] = 1 + sum(_size(v, seen, inner) for v in node.value)
        else:
            seen[id(node)] = 1
    return seen[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML safely; `where` names the source in errors."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"{where}: {len(text)} characters; at most {MAX_BYTES} are accepted")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise ValueError(f"{where}: empty; a YAML mapping is expected")
            if (size := _size(node, {}, frozenset())) > MAX_NODES:
                raise ValueError(f"{where}: its aliases expand to {size} nodes; at most {MAX_NODES} are accepted")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping with string keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a YAML file is expected") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a YAML mapping is expected, not {type(tree).__name__}")
    return tree


def validate(cls: type[S], tree: Any, where: str) -> S:
    """Build a spec; the first problem is named as `where: path.to.field: message`."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        loc, message = first_error(error)
        dotted = ".".join(str(part) for part in loc)
        raise ValueError(f"{where}: {dotted}: {message}" if dotted else f"{where}: {message}") from None


@cache
def shelf(folder: str) -> dict[str, Path]:
    """Shipped YAML by name: models, recipes, studies, hardware."""
    return {path.stem: path for path in sorted((SHELF / folder).glob("*.yaml"))}


def find(source: str | Path, folder: str) -> Path:
    """A shipped name, a YAML file, or a checkpoint folder (its model.yaml)."""
    known = shelf(folder)
    if str(source) in known:
        return known[str(source)]
    path = Path(source)
    if path.is_dir() and (path / "model.yaml").is_file():
        return path / "model.yaml"
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path
    near = difflib.get_close_matches(str(source), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if path.exists():
        raise ValueError(
            f"{source}: not a YAML file or a checkpoint folder with a model.yaml; shipped {folder}: {', '.join(known)}"
        )
    raise FileNotFoundError(f"{source}: no such file, and no shipped name{hint}; shipped {folder}: {', '.join(known)}")


def load_model(source: str | Path, changes: Mapping[str, Any] | None = None) -> ModelSpec:
    """A model spec from a shipped name, a YAML file or a checkpoint folder, with dotted changes."""
    path = find(source, "models")
    tree = read_mapping(path)
    tree.pop("format", None)
    spec = validate(ModelSpec, tree, str(source))
    return change(spec, changes, str(source)) if changes else spec


def change(spec: S, changes: Mapping[str, Any], where: str = "changes") -> S:
    """The spec with dotted paths set, validated again. A leading `model.` is dropped."""
    tree = dump(spec)
    tree = apply_changes(tree, {path.removeprefix("model."): value for path, value in changes.items()})
    return validate(type(spec), tree, where)


def apply_changes(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted paths in a tree of mappings and lists; `*` is every child. A path that matches nothing raises."""
    tree = json.loads(json.dumps(tree))
    for path, value in changes.items():
        _set(tree, path.split("."), value, path)
    return tree


def _set(node: Any, keys: list[str], value: Any, path: str) -> None:
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        indices = range(len(node)) if key == "*" else [int(key)] if key.isdigit() and int(key) < len(node) else []
        names: list[Any] = list(indices)
    elif isinstance(node, dict):
        names = list(node) if key == "*" else [key] if key in node or not rest else []
    else:
        raise ValueError(f"{path}: {key!r} matches nothing: what it stands in is {node!r}, not a mapping")
    if not names:
        accepted = ", ".join(map(str, node if isinstance(node, dict) else range(len(node))))
        raise ValueError(
            f"{path}: {key!r} matches nothing; " + (f"accepted here: {accepted}, *" if node else "it is empty")
        )
    for name in names:
        if rest:
            _set(node[name], rest, value, path)
        else:
            node[name] = value


def parse_override(text: str) -> tuple[str, Any]:
    """`model.blocks.*.mixer.kv_heads=2` -> (path, value); the value is read as YAML."""
    path, sep, value = text.partition("=")
    if not sep or not path.strip() or not value.strip():
        raise ValueError(f"{text!r}: an override is path=value, such as model.layers=4")
    return path.strip(), parse_yaml(value, f"override {path.strip()}")


def dump(spec: BaseModel) -> dict[str, Any]:
    """Every field, as plain data that `validate` reads back."""
    return json.loads(spec.model_dump_json())


def to_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, width=110)


def canonical(value: Any) -> Any:
    """Non-default fields only (the kind of a part or a task always): what the digest is taken over."""
    if isinstance(value, BaseModel):
        out = {}
        for name, info in type(value).model_fields.items():
            item = getattr(value, name)
            if name == "kind" and hasattr(value, "kind_name"):
                out[name] = item
            elif item != info.get_default(call_default_factory=True) and not _is_default_spec(item, info.default):
                out[name] = canonical(item)
        return out
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    return value


def _is_default_spec(item: Any, default: Any) -> bool:
    """A field whose default is written as data (a kind's name, {}) holds that spec with no field changed."""
    if isinstance(item, PartSpec):
        return isinstance(default, str) and canonical(item) == {"kind": default}
    return isinstance(item, BaseModel) and isinstance(default, dict) and canonical(item) == default


def digest(spec: BaseModel) -> str:
    """16 hex digits over the non-default fields: two spellings of one model have one digest."""
    text = json.dumps(canonical(spec), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
