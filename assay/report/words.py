"""Numbers, units and names as a reader wants them: plain text, escaped where it lands (but for `label`, for plotly)."""

from __future__ import annotations

import html
import math
from typing import Any

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
TO = "\N{THIN SPACE}to\N{THIN SPACE}"
_UNITS = (
    ("_gflop_s", "GFLOP/s"),
    ("_gb_s", "GB/s"),
    ("tok_s", "tok/s"),
    ("bits_per_byte", "bits/byte"),
    ("_nats", "nats"),
    ("_bytes_per_token", "bytes/token"),
    ("_bytes", "bytes"),
    ("_ms_p50", "ms"),
    ("_ms_p99", "ms"),
    ("_ms", "ms"),
    ("_s", "s"),
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
}
_HIGHER_IS_BETTER = ("tok_s", "accuracy", "mfu", "score", "match", "flop_s", "gb_s")
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


def interval(delta: Any, low: Any, high: Any) -> tuple[str, str]:
    """('+0.381', '+0.355 to +0.407'), with as many decimals as show two digits of the interval's half width."""
    d, lo, hi = number(delta), number(low), number(high)
    half = (hi - lo) / 2 if lo is not None and hi is not None else abs(d or 0.0) / 10
    places = min(_places(half, 2), 6)

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
    for suffix, word in _UNITS:
        if metric.endswith(suffix) and word not in ("", "tok/s") and metric != suffix:
            metric = metric.removesuffix(suffix) + (f" {suffix[-3:]}" if suffix[-3:] in ("p50", "p99") else "")
            break
    return metric.replace(".", ": ").replace("tok_s", "speed").replace("_", " ").strip()


def shown(metric: str, value: Any) -> str:
    """A value of this metric with its unit, scaled where that reads better."""
    if metric.endswith(("_bytes", "bytes_per_token")):
        return bytes_(value)
    if metric.startswith(("params", "tokens")) or metric.endswith("flops"):
        return count(value)
    if metric.endswith("_s") and not metric.endswith(("tok_s", "flop_s", "gb_s")):
        return seconds(value)
    if metric.endswith("tok_s"):
        return f"{significant(value, 3)} tok/s" if number(value) is not None else DASH
    if metric in ("mfu", "accuracy") and number(value) is not None:
        return f"{100 * float(value):.1f}%"
    word = unit(metric)
    return significant(value) + (f" {word}" if word and number(value) is not None else "")


def lower_is_better(metric: str) -> bool:
    return not metric.split(".")[-1].endswith(_HIGHER_IS_BETTER)


def symbol(word: str) -> str:
    """A sign beside every verdict, so that colour never carries it alone."""
    return _SYMBOLS.get(word, "○")


def join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def label(text: Any, longest: int = 60) -> str:
    """Text that plotly shows as it is: it reads tags, entities and %{templates} in names, ticks and hovers."""
    flat = " ".join(str(text).split())
    cut = flat if len(flat) <= longest else flat[: longest - 1] + "…"
    return html.escape(cut, quote=False).replace("%", "&#37;")
