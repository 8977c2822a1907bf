"""The ratchet: sizes of files, functions, parameter lists and specs; no state in modules; no hidden inputs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.project.source import Source, length, sources

FILE, PART, FUNCTION, PARAMETERS, FIELDS = 350, 450, 50, 7, 12
MAKERS = frozenset({"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "WeakValueDictionary"})
CHANGERS = frozenset(
    {
        "append",
        "extend",
        "insert",
        "remove",
        "pop",
        "popitem",
        "clear",
        "update",
        "setdefault",
        "add",
        "discard",
        "sort",
    }
)


def long_files(source: Source) -> Iterator[str]:
    """A part may be longer, and its oracle is not counted: it is there to be read beside the paper."""
    part = source.path.startswith("assay/parts/")
    oracle = sum(length(f) for f in source.functions() if part and f.name == "reference")
    lines, limit = len(source.text.splitlines()) - oracle, PART if part else FILE
    if lines > limit:
        yield source.at(source.tree, f"{lines} lines; at most {limit}")


def long_functions(source: Source) -> Iterator[str]:
    for function in source.functions():
        if length(function) > FUNCTION and "kernel" not in function.name:
            yield source.at(function, f"{function.name} has {length(function)} lines; at most {FUNCTION}")


def wide_functions(source: Source) -> Iterator[str]:
    """`self`, `cls`, *args and **kwargs are not counted; the verbs of the command line are exempt."""
    for function in source.functions() if source.package != "cli" else ():
        spec = function.args
        names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs) if a.arg not in ("self", "cls")]
        if len(names) > PARAMETERS:
            yield source.at(function, f"{function.name} takes {len(names)} parameters; at most {PARAMETERS}")


def wide_specs(source: Source) -> Iterator[str]:
    """Fields of a class that derives from a Spec or from pydantic's BaseModel; the `kind` tag is not one."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ClassDef):
            continue
        if not any(ast.unparse(base).endswith(("Spec", "BaseModel")) for base in node.bases):
            continue
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and "ClassVar" not in ast.unparse(f.annotation)]
        count = sum(ast.unparse(f.target) != "kind" for f in fields)
        if count > FIELDS:
            yield source.at(node, f"{node.name} has {count} fields; at most {FIELDS}: group options into values")


def assigned(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, ast.expr]]:
    """Names set at the top level of a module, with their values."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((node, target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node, node.target.id, node.value


def mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MAKERS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def changed(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Names whose value is changed in place, anywhere in the file: by a method, by subscript, or by `global`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from ((node, name) for name in node.names)
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.value, ast.Name):
            method = isinstance(node, ast.Attribute) and node.attr in CHANGERS
            if method or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)):
                yield node, node.value.id


def module_state(source: Source) -> Iterator[str]:
    """A list, dict or set at the top of a module is a constant: in capitals, and never changed."""
    constants = set()
    for node, name, value in assigned(source.tree):
        if mutable(value) and name != "__all__":
            constants.add(name)
            if name != name.upper():
                yield source.at(node, f"module-level mutable {name}; a constant is in capitals, state lives in objects")
    for node, name in changed(source.tree):
        if isinstance(node, ast.Global):
            yield source.at(node, f"global {name}: state lives in objects")
        elif name in constants and name == name.upper():
            yield source.at(node, f"the constant {name} is changed")


def environment(source: Source) -> Iterator[str]:
    """What a layer reads is an argument or a field."""
    if source.package not in ("ops", "parts", "model"):
        return
    for node in ast.walk(source.tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
        if name in ("environ", "getenv", "environb"):
            yield source.at(node, f"{name}: a forward reads no environment variable")


RULES = {
    "file": (long_files, ("assay", "tests")),
    "function": (long_functions, ("assay", "tests")),
    "parameters": (wide_functions, ("assay", "tests")),
    "spec": (wide_specs, ("assay",)),
    "state": (module_state, ("assay",)),
    "environment": (environment, ("assay",)),
}


@pytest.mark.parametrize("rule", RULES)
def test_budget(rule: str) -> None:
    check, folders = RULES[rule]
    found = [problem for source in sources(*folders) for problem in check(source)]
    assert not found, "\n".join(found)


MANY = "\n".join(f"    a{i}: int = 0" for i in range(13))


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (long_files, "assay/ops/a.py", "x = 1\n" * 351),
        (long_files, "assay/parts/mixers/a.py", "x = 1\n" * 451),
        (long_functions, "assay/ops/a.py", "def f():\n" + "    x = 1\n" * 50),
        (wide_functions, "assay/ops/a.py", "def f(a, b, c, d, *, e, f, g, h): ..."),
        (wide_specs, "assay/parts/mixers/a.py", f"class A(MixerSpec):\n    kind: int\n{MANY}"),
        (module_state, "assay/ops/a.py", "cache = {}"),
        (module_state, "assay/ops/a.py", "_seen: list[int] = list()"),
        (module_state, "assay/ops/a.py", "SEEN = {}\ndef f(x):\n    SEEN[x] = 1"),
        (module_state, "assay/ops/a.py", "SEEN = []\ndef f(x):\n    SEEN.append(x)"),
        (module_state, "assay/ops/a.py", "count = 0\ndef f():\n    global count\n    count += 1"),
        (environment, "assay/model/a.py", "import os\ndef forward(x):\n    return x if os.environ.get('A') else -x"),
        (environment, "assay/parts/a.py", "from os import getenv"),
    ],
)
def test_a_planted_breach_is_found(check: Callable[[Source], Iterator[str]], path: str, text: str) -> None:
    assert len(list(check(Source.parse(path, text)))) == 1


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (long_files, "assay/parts/mixers/a.py", "x = 1\n" * 440 + "def reference():\n" + "    x = 1\n" * 40),
        (long_functions, "assay/ops/a.py", "def scan_kernel():\n" + "    x = 1\n" * 50),
        (wide_functions, "assay/cli/train.py", "def run(a, b, c, d, e, f, g, h): ..."),
        (wide_functions, "assay/ops/a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, *rest): ..."),
        (
            module_state,
            "assay/ops/a.py",
            "TABLE = {1: 2}\nNAMES = ('a',)\ndef f(seen):\n    seen.append(1)\n    TABLE.get(1)",
        ),
        (environment, "assay/cli/a.py", "import os\nx = os.environ.get('A')"),
    ],
)
def test_what_is_within_the_budget_is_let_through(
    check: Callable[[Source], Iterator[str]], path: str, text: str
) -> None:
    assert list(check(Source.parse(path, text))) == []
