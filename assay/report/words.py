"""Numbers, units and names as a reader wants them: plain text, escaped where it lands (but for `label`, for plotly)."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable
from typing import Any

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
TO = "\N{THIN SPACE}to\N{THIN SPACE}"
_UNITS = (
    ("_gflop_s", "GFLOP/s"),
    ("_gb_s", "GB/s"),
    ("_byte_s", "bytes/s"),
    ("tok_s", "tok/s"),
    ("bits_per_byte", "bits/byte"),
    ("_nats", "nats"),
    ("_bytes_per_token", "bytes/token"),
    ("_bytes", "bytes"),
    ("_ms_p50", "ms"),
    ("_ms_p99", "ms"),
    ("_ms", "ms"),
    ("_s", "s"),
    ("seconds", "s"),
    ("accuracy", ""),
)
_NAMES = {
    "bits_per_byte": "bits per byte",
    "mfu": "MFU",
    "params_total": "parameters",
    "params_active": "active parameters",
    "params_embedding": "embedding parameters",
    "state_bytes_per_token": "state per token",
    "memory_gb_s": "memory bandwidth",
    "train_s": "training time",
    "sink_mass": "attention on the first token",
    "mass": "attention that is kept",
    "loss_delta_nats": "loss added",
    "max_logit": "largest attention logit",
    "in_context_nats": "in-context gain",
    "state_byte_s": "rate of reading state",
    "memory_byte_s": "memory bandwidth",
    "r2": "R²",
    "fitted_s": "fitted",
}
_WORDS = {"ttft": "time to first token", "itl": "time between tokens", "last": "last positions"}
_HIGHER_IS_BETTER = ("tok_s", "accuracy", "mfu", "score", "match", "flop_s", "gb_s", "in_context_nats")
DURING = "training."
"""What the name of a measurement begins with that was made at several points of the training."""
PLACES = (
    "layer", "ratio", "factor", "length", "floor", "distance", "context", "batch", "position", "dim", "head",
    "variant", "tuned", "kind", "phase", "method", "share", "keep",
    "backend", "cache", "cell", "width", "tokens", "samples", "chance", "reason",
)  # fmt: skip
"""Columns of a measurement that say where it was made, or how; the others are what was found."""
_SYMBOLS = {"better": "▲", "worse": "▼", "confirmed": "✓", "contradicted": "✗", "not distinguishable": "≈"}


def number(value: Any) -> float | None:
    """The value as a finite float, or None: booleans, text, NaN and infinities are nothing to plot."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _places(size: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of a number of this size."""
    return 0 if size == 0 else max(0, digits - 1 - math.floor(math.log10(abs(size))))


def significant(value: Any, digits: int = 4) -> str:
    """1.9704 -> '1.970', 51234 -> '51,234'; text as it is; no value is an en dash."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else MINUS + "∞")
    found = number(value)
    if found is None:
        return DASH if value is None else str(value)
    if isinstance(value, int) or found == 0:
        return f"{found:,.0f}".replace("-", MINUS)
    if abs(found) < 1e-4:
        return f"{found:.{digits - 1}e}".replace("-", MINUS)
    return f"{found:,.{_places(found, min(digits, 3) if abs(found) < 1 else digits)}f}".replace("-", MINUS)


def _vanishes(value: float | None, places: int) -> bool:
    """Whether a number reads as zero though it is not: the end of an interval that misses zero must show it."""
    return bool(value) and round(value or 0.0, places) == 0


def interval(delta: Any, low: Any, high: Any) -> tuple[str, str]:
    """('+0.381', '+0.355 to +0.407'), with as many decimals as show two digits of the interval's half width."""
    d, lo, hi = number(delta), number(low), number(high)
    half = (hi - lo) / 2 if lo is not None and hi is not None else abs(d or 0.0) / 10
    places = min(_places(half, 2), 6)
    places += next((more for more in (0, 1, 2) if not any(_vanishes(v, places + more) for v in (lo, hi))), 0)

    def show(value: float | None, raw: Any) -> str:
        if value is None:
            return significant(raw)
        text = f"{value:+,.{places}f}".replace("-", MINUS)
        return text if any(c in "123456789" for c in text) else text[1:]

    return show(d, delta), (DASH if lo is None and hi is None else f"{show(lo, low)}{TO}{show(hi, high)}")


def count(value: Any) -> str:
    """11,243,008 -> '11.2 M'; powers of 1000."""
    return _scaled(value, 1000.0, ("", " k", " M", " G", " T", " P", " E"))


def bytes_(value: Any) -> str:
    """1536 -> '1.50 KiB'; powers of 1024."""
    return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(value: Any, base: float, names: tuple[str, ...]) -> str:
    size = number(value)
    if size is None:
        return significant(value)
    step = 0
    while abs(size) >= base and step < len(names) - 1:
        size, step = size / base, step + 1
    shown = (
        f"{size:.{_places(size, 3) if step else 0}f}" if float(size).is_integer() is False or step else f"{size:.0f}"
    )
    return shown + names[step]


def seconds(value: Any) -> str:
    """0.0123 -> '12.3 ms', 130 -> '2 min 10 s'."""
    size = number(value)
    if size is None:
        return significant(value)
    if abs(size) >= 60:
        minutes, rest = divmod(round(size), 60)
        return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(size) >= scale or name == "µs":
            return f"{size / scale:.{_places(size / scale, 3)}f} {name}"
    return DASH


def unit(metric: str) -> str:
    """The unit that the metric's name carries: 'loss_nats' -> 'nats', 'mfu' -> ''."""
    return next((word for suffix, word in _UNITS if metric.endswith(suffix)), "")


def title_of(metric: str) -> str:
    """'extrapolation.loss_nats' -> 'extrapolation: loss', for headings; the unit is said beside it."""
    if metric in _NAMES:
        return _NAMES[metric]
    suffix, word = next(((end, word) for end, word in _UNITS if metric.endswith(end)), ("", ""))
    if word not in ("", "tok/s") and metric != suffix:
        metric = metric.removesuffix(suffix) + (f" {suffix[-3:]}" if suffix[-3:] in ("p50", "p99") else "")
    words = metric.replace(".", ": ").replace("tok_s", "speed").replace("_", " ").split()
    return " ".join(_WORDS.get(word, word) for word in words)


def shown(metric: str, value: Any) -> str:
    """A value of this metric with its unit, scaled where that reads better."""
    if kind(metric) == "bytes":
        return bytes_(value)
    if metric.startswith(("params", "tokens")) or metric.endswith("flops"):
        return count(value)
    if metric.endswith("_byte_s"):
        return f"{bytes_(value)}/s" if number(value) is not None else significant(value)
    if kind(metric) == "seconds":
        return seconds(value)
    if metric.endswith("tok_s"):
        return f"{significant(value, 3)} tok/s" if number(value) is not None else DASH
    if kind(metric) == "share" and number(value) is not None:
        return f"{100 * float(value):.1f}%"
    word = unit(metric)
    return significant(value) + (f" {word}" if word and number(value) is not None else "")


def kind(metric: str) -> str:
    """How its numbers read on an axis and in a table: 'bytes', 'seconds', 'share' (0 to 1) or '' (plain)."""
    metric = metric.split(".")[-1]
    if metric.endswith(("_slope", "_ratio")):
        return ""
    if metric.endswith(("_bytes", "bytes_per_token")) or "_bytes_" in metric:
        return "bytes"
    if metric.startswith("seconds") or (
        metric.endswith("_s") and not metric.endswith(("tok_s", "flop_s", "gb_s", "byte_s"))
    ):
        return "seconds"
    return "share" if metric in ("mfu", "accuracy", "mass", "share") or metric.endswith(("_share", "_mass")) else ""


def axis(metric: str) -> str:
    """The metric's name with its unit: 'entropy_nats' -> 'entropy (nats)'."""
    return title_of(metric) + (f" ({unit(metric)})" if unit(metric) else "")


def lower_is_better(metric: str) -> bool:
    return not metric.split(".")[-1].endswith(_HIGHER_IS_BETTER)


def symbol(word: str) -> str:
    """A sign beside every verdict, so that colour never carries it alone."""
    return _SYMBOLS.get(word, "○")


def between(items: Iterable[str]) -> str:
    """What stands between these items in a list: a semicolon where one of them has a comma of its own."""
    return "; " if any("," in item for item in items) else ", "


def join(items: list[str]) -> str:
    last = "; and " if between(items) == "; " and len(items) > 2 else " and "
    return items[0] if len(items) == 1 else between(items).join(items[:-1]) + last + items[-1] if items else ""


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def label(text: Any, longest: int = 60) -> str:
    """Text that plotly shows as it is: it reads tags, entities and %{templates} in names, ticks and hovers."""
    flat = " ".join(str(text).split())
    cut = flat if len(flat) <= longest else flat[: longest - 1] + "…"
    return html.escape(cut, quote=False).replace("%", "&#37;")


def wrapped(text: Any, width: int = 22) -> str:
    """A label of two lines at most, for the ticks of an axis."""
    lines = textwrap.wrap(" ".join(str(text).split()), width) or [""]
    return "<br>".join([*map(label, lines[:1]), *([label(" ".join(lines[1:]), width)] if lines[1:] else [])])
