"""The language of claims: what the literature predicts, written before the run so that a machine can check it.

    verdict(loss_nats, arm=nope, base=rope) == worse
    mean(extrapolation.loss_nats, arm=alibi, ratio=8) <= 1.1 * mean(extrapolation.loss_nats, arm=alibi, ratio=1)
    equivalent(mean(loss_nats, arm=mqa), mean(loss_nats, arm=mha), within=0.05)
    exact(state_bytes_per_token, arm=mqa) == exact(state_bytes_per_token, arm=mha) / 4
    mean(loss_nats, arm=w64) < mean(loss_nats, arm=full) < mean(loss_nats, arm=w16)      (and joins tests too)
    correlation(loss_nats, diagnostic.accuracy, task=mqar) < -0.5                        (over all arms, by ranks)

`mean` is the mean over seeds, and is tested; `exact` is a quantity that no seed changes (bytes, parameters), and is
decided without a test. A metric is a value of a trial, or `what.column` of a measurement's rows; other keywords choose
rows. What was measured during training is `training.what.column`, with part=0.25 for a quarter of the way. A name that
is no identifier is quoted: arm='5:1'. Python's parser reads the text and nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Filter = str | int | float | bool
Order = Literal["<", "<=", ">", ">=", "==", "!="]
EXPECTED = ("better", "worse", "not distinguishable")
MAX_LENGTH = 500
TRAINING = "training"
"""Before the name of what is measured during training."""


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Term:
    """`mean` or `exact` of one metric of one arm, over the rows that the filters choose."""

    kind: Literal["mean", "exact"]
    metric: str
    arm: str
    filters: tuple[tuple[str, Filter], ...] = ()


@dataclass(frozen=True)
class Binary:
    op: Literal["+", "-", "*", "/"]
    left: Expr
    right: Expr


Expr = Number | Term | Binary


@dataclass(frozen=True)
class Compare:
    op: Order
    left: Expr
    right: Expr
    text: str


@dataclass(frozen=True)
class Equivalent:
    left: Expr
    right: Expr
    within: float
    text: str


@dataclass(frozen=True)
class VerdictIs:
    """The verdict on `arm` against `base` (None: the study's base arm), corrected for all arms of the study."""

    metric: str
    arm: str
    base: str | None
    filters: tuple[tuple[str, Filter], ...]
    expected: str


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two metrics over the study's arms, each arm's mean over its seeds. The filters
    choose rows of whichever is a measurement's."""

    op: Literal["<", ">"]
    metrics: tuple[str, str]
    filters: tuple[tuple[str, Filter], ...]
    bound: float


@dataclass(frozen=True)
class Every:
    tests: tuple[Test, ...]


Test = Compare | Equivalent | VerdictIs | Correlation | Every

_ARITHMETIC: Mapping[type[ast.operator], Literal["+", "-", "*", "/"]] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}
_ORDER: Mapping[type[ast.cmpop], Order] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
COMPARE: Mapping[Order, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def parse(text: str) -> Test:
    """Read a claim's test; ValueError names the piece that is not understood and what is accepted."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a test of {len(text)} characters; at most {MAX_LENGTH} are accepted")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _test(tree)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r}: not a test: {getattr(error, 'msg', 'nested too deeply')}") from None
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def terms(test: Test | Expr) -> Iterator[Term | VerdictIs]:
    """Every place where a test names an arm."""
    if isinstance(test, Every):
        for inner in test.tests:
            yield from terms(inner)
    elif isinstance(test, Term | VerdictIs):
        yield test
    elif not isinstance(test, Number | Correlation):
        yield from terms(test.left)
        yield from terms(test.right)


def metrics(test: Test) -> Iterator[str]:
    """Every metric that a test names."""
    if isinstance(test, Every):
        for inner in test.tests:
            yield from metrics(inner)
    elif isinstance(test, Correlation):
        yield from test.metrics
    else:
        yield from (term.metric for term in terms(test))


def arms(test: Test | Expr) -> set[str]:
    named = list(terms(test))
    return {t.arm for t in named} | {t.base for t in named if isinstance(t, VerdictIs) and t.base}


def _test(node: ast.expr) -> Test:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return Every(tuple(_test(value) for value in node.values))
    if isinstance(node, ast.Compare):
        return _comparisons(node)
    if _calls(node) == "equivalent":
        positional, options = _arguments(node)
        within = options.pop("within", None)
        if len(positional) != 2 or options or not isinstance(within, ast.expr):
            raise ValueError("equivalent takes two expressions and within: equivalent(a, b, within=0.02)")
        bound = _literal(within)
        if isinstance(bound, str | bool) or bound <= 0:
            raise ValueError(f"within={ast.unparse(within)}: a number above zero is accepted")
        return Equivalent(_expr(positional[0]), _expr(positional[1]), float(bound), ast.unparse(node))
    raise ValueError(
        f"{ast.unparse(node)!r} is not a test; accepted: a comparison, equivalent(...), tests joined by and"
    )


def _comparisons(node: ast.Compare) -> Test:
    sides = [node.left, *node.comparators]
    if _calls(node.left) == "verdict":
        return _verdict(node)
    if _calls(node.left) == "correlation":
        return _correlation(node)
    found: list[Test] = []
    for left, op, right in zip(sides, node.ops, sides[1:]):
        if type(op) not in _ORDER:
            raise ValueError(f"{ast.unparse(node)!r}: accepted comparisons: {', '.join(COMPARE)}")
        order, a, b = _ORDER[type(op)], _expr(left), _expr(right)
        if order in ("==", "!=") and any(
            isinstance(t, Term) and t.kind == "mean" for side in (a, b) for t in terms(side)
        ):
            raise ValueError(
                f"{order} compares exact(...) only; a mean is never equal: use equivalent(a, b, within=...)"
            )
        if not arms(a) | arms(b):
            raise ValueError(f"{ast.unparse(node)!r} names no arm; accepted: mean(metric, arm=NAME), exact(...)")
        found.append(Compare(order, a, b, f"{ast.unparse(left)} {order} {ast.unparse(right)}"))
    return found[0] if len(found) == 1 else Every(tuple(found))


def _verdict(node: ast.Compare) -> VerdictIs:
    expected = _literal(node.comparators[0])
    if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq) or expected not in EXPECTED:
        raise ValueError(f"a verdict is compared by == with one of: better, worse, {EXPECTED[2]!r}")
    metric, arm, rest = _selection(node.left)
    base = rest.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base={base!r}: the name of an arm is accepted")
    return VerdictIs(metric, arm, base, tuple(rest.items()), str(expected))


def _correlation(node: ast.Compare) -> Correlation:
    positional, options = _arguments(node.left)
    bound = _literal(node.comparators[0])
    order = _ORDER.get(type(node.ops[0]))
    if len(positional) != 2 or len(node.ops) != 1 or order not in ("<", ">") or isinstance(bound, str | bool):
        raise ValueError(
            f"{ast.unparse(node)!r}: accepted: correlation(metric, metric, column=value, ...) < or > a number"
        )
    if not -1 < bound < 1:
        raise ValueError(f"{ast.unparse(node)!r}: a correlation is compared with a number between -1 and 1")
    first, second = (_metric(one) for one in positional)
    filters = {key: _literal(value) for key, value in options.items()}
    return Correlation("<" if order == "<" else ">", (first, second), tuple(filters.items()), float(bound))


def _expr(node: ast.expr) -> Expr:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return Binary(_ARITHMETIC[type(node.op)], _expr(node.left), _expr(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return Binary("-", Number(0.0), _expr(node.operand))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return Number(float(node.value))
    kind = _calls(node)
    if kind == "mean" or kind == "exact":
        metric, arm, rest = _selection(node)
        return Term("mean" if kind == "mean" else "exact", metric, arm, tuple(rest.items()))
    raise ValueError(
        f"{ast.unparse(node)!r} is not a value; accepted: a number, mean(...), exact(...), + - * / and ( )"
    )


def _selection(node: ast.expr) -> tuple[str, str, dict[str, Filter]]:
    """`f(metric, arm=A, column=value, ...)` -> metric, arm, the other keywords."""
    positional, options = _arguments(node)
    values = {key: _literal(value) for key, value in options.items()}
    arm = values.pop("arm", None)
    if len(positional) != 1 or not isinstance(arm, str):
        raise ValueError(f"{ast.unparse(node)!r}: accepted: {_calls(node)}(metric, arm=NAME, column=value, ...)")
    return _metric(positional[0]), arm, values


def _metric(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        what = node.value
        during = isinstance(what, ast.Attribute) and isinstance(what.value, ast.Name) and what.value.id == TRAINING
        if during or isinstance(what, ast.Name):
            return ast.unparse(node)
    raise ValueError(
        f"{ast.unparse(node)!r} is not a metric; accepted: a name such as loss_nats, extrapolation.loss_nats, or "
        f"{TRAINING}.attention.sink_mass"
    )


def _calls(node: ast.expr) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _arguments(node: ast.expr) -> tuple[list[ast.expr], dict[str, ast.expr]]:
    assert isinstance(node, ast.Call)
    options = {k.arg: k.value for k in node.keywords if k.arg is not None}
    if len(options) < len(node.keywords) or any(isinstance(a, ast.Starred) for a in node.args):
        raise ValueError(f"{ast.unparse(node)!r}: * and ** are not accepted")
    return node.args, options


def _literal(node: ast.expr) -> Filter:
    """A number, a quoted string, or a bare word, which stands for itself."""
    if isinstance(node, ast.Name):
        return node.id
    value: Any = node.value if isinstance(node, ast.Constant) else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _literal(node.operand)
        value = -inner if isinstance(inner, int | float) and not isinstance(inner, bool) else None
    if isinstance(value, str | int | float):
        return value
    raise ValueError(f"{ast.unparse(node)!r}: accepted: a word, a number or a quoted string")
