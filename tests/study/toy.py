"""Materials without a model: trees, digests, sizes and a rate."""

from collections.abc import Callable, Mapping
from typing import Any

from assay.spec.load import apply_changes
from assay.study.trials import Materials
from tests.study.toy_trials import Tree, digest, sizes

BASE: Tree = {"width": 8, "position": "none", "kv": 4, "layers": [{"ffn": {"width": 32}}, {"ffn": {"width": 32}}]}
RECIPE: Tree = {"tokens": 65536, "rate": 0.004, "optimizer": {"lr": 0.004}}


def _tree(root: str, fallback: Tree) -> Callable[[Any, Mapping[str, Any]], tuple[Tree, str]]:
    def load(source: Any, changes: Mapping[str, Any]) -> tuple[Tree, str]:
        base = source if isinstance(source, dict) else fallback
        tree = apply_changes(base, {path.removeprefix(root): value for path, value in changes.items()})
        return tree, digest(tree)

    return load


MATERIALS = Materials(_tree("model.", BASE), _tree("recipe.", RECIPE), sizes, lambda model, recipe: 32768.0)
