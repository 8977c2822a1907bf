"""Write docs/mechanisms/<slot>/<kind>.md: one page a mechanism, made from the part itself.

    python docs/generate.py            write what is missing or stale, remove what no part stands behind
    python docs/generate.py --check    write nothing; exit 1 and name the stale pages

What a page cannot know stands in <kind>.notes.md beside it, by hand, and is included. README.md of a slot is by hand.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from assay.conform.cases import MEMORY, site_of
from assay.spec import registry
from assay.spec.base import SLOTS, Fan, Init, LinearSpec, PartSpec, Site, StateField, Weight
from assay.spec.load import canonical, to_yaml

ROOT = Path(__file__).resolve().parent
MECHANISMS = ROOT / "mechanisms"
MARK = "<!-- Made by docs/generate.py from the part; notes by hand belong into {kind}.notes.md. -->"
NEW = 128


def pages() -> dict[Path, str]:
    """Every generated page by path."""
    made = {MECHANISMS / "README.md": index()}
    for slot in SLOTS:
        for kind, part in sorted(registry.table(slot).items()):
            made[MECHANISMS / slot / f"{kind}.md"] = page(part)
    return made


def stale() -> list[Path]:
    """Pages that differ from what the parts say, are missing, or have no part any more."""
    made = pages()
    wrong = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return sorted(wrong) + orphans(set(made))


def orphans(known: set[Path]) -> list[Path]:
    """Generated pages, and notes, whose part is gone."""
    found = sorted(MECHANISMS.glob("*/*.md"))
    return [p for p in found if p.name != "README.md" and p.with_name(p.name.replace(".notes", "")) not in known]


def index() -> str:
    lines = [MARK.format(kind="<slot>/<kind>"), "", "# Mechanisms", ""]
    lines += [
        "Every part, by slot. `assay parts` prints the same list; `assay parts --matrix` shows which laws each obeys."
    ]
    for slot in SLOTS:
        table = sorted(registry.table(slot).items())
        rows = [[f"[`{kind}`]({slot}/{kind}.md)", escaped(about(part)[0])] for kind, part in table]
        by_hand = MECHANISMS / slot / "README.md"
        more = ["", f"[About {slot}]({slot}/README.md)"] if by_hand.is_file() else []
        lines += ["", f"## {slot}", "", *grid(["kind", "what it is"], rows), *more]
    return "\n".join(lines) + "\n"


def page(part: type[PartSpec]) -> str:
    kind, spec = part.kind_name(), next(iter(part.tiny()))
    title, rest = about(part)
    lines = [MARK.format(kind=kind), "", f"# `{kind}` ({part.slot})", "", escaped(title)]
    lines += ["", escaped(rest)] if rest else []
    lines += ["", f"One file: [`{source(part)}`](../../../{source(part)})."]
    for heading, body in (
        ("Fields", field_table(part)),
        ("As YAML", examples(part)),
        ("Weights", weights(spec)),
        ("State", state(spec)),
        ("Cost", cost(spec)),
        ("Refuses", refusals(part)),
        ("Notes", notes(part)),
    ):
        lines += ["", f"## {heading}", "", *body] if body else []
    return "\n".join(lines) + "\n"


def about(part: type[PartSpec]) -> tuple[str, str]:
    """First line of the docstring, and the paragraphs below."""
    title, _, rest = inspect.cleandoc(part.__doc__ or "").partition("\n")
    return title, rest.strip()


def source(part: type[PartSpec]) -> str:
    return part.__module__.replace(".", "/") + ".py"


def escaped(text: str) -> str:
    """Text of a docstring as Markdown: what stands in backquotes stays, the rest is taken literally."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>|])", r"\\\1", p) for p in pieces)


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; a bar inside a cell is escaped."""
    cells = [head, ["---"] * len(head), *([re.sub(r"(?<!\\)\|", r"\\|", c) for c in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def field_table(part: type[PartSpec]) -> list[str]:
    rows = [[f"`{name}`", type_name(info.annotation, info) + of, default(info)] for name, info, of in leaves(part, "")]
    return grid(["field", "accepts", "default"], rows) if rows else ["None."]


def leaves(cls: type[BaseModel], path: str, of: str = "") -> Iterator[tuple[str, FieldInfo, str]]:
    """Fields but `kind`, those of a nested value after it; `of` names the value where a field holds one of several."""
    for name, info in cls.model_fields.items():
        if name == "kind":
            continue
        yield path + name, info, of
        values = nested(info.annotation)
        for inner in values:
            yield from leaves(inner, f"{path}{name}.", f" (of {kind_of(inner).strip()})" if len(values) > 1 else of)


def nested(annotation: Any) -> list[type[BaseModel]]:
    """The classes of the values that a field may hold, parts apart: these have pages of their own."""
    if get_origin(annotation) is typing.Annotated:
        return nested(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [value for option in get_args(annotation) for value in nested(option)]
    is_value = (
        inspect.isclass(annotation) and issubclass(annotation, BaseModel) and not issubclass(annotation, PartSpec)
    )
    return [annotation] if is_value else []


def type_name(annotation: Any, info: FieldInfo | None = None) -> str:
    """`16, 32 or null` in words a YAML author uses."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return type_name(args[0], info)
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a, info) for a in args)
    if origin is tuple:
        inner = [a for a in args if a is not Ellipsis]
        return f"list of {type_name(inner[0])}" if Ellipsis in args else f"{len(inner)} of {type_name(inner[0])}"
    if annotation is type(None):
        return "null"
    if inspect.isclass(annotation) and issubclass(annotation, PartSpec):
        return f"a part of [{annotation.slot}](../README.md#{annotation.slot})"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"{kind_of(annotation)}mapping"
    plain = {int: "whole number", float: "number", bool: "true, false", str: "text"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation))) + bounds(info)


def kind_of(value: type[BaseModel]) -> str:
    """`linear` for a nested value that names its kind."""
    info = value.model_fields.get("kind")
    return f"`{get_args(info.annotation)[0]}` " if info is not None and get_args(info.annotation) else ""


def bounds(info: FieldInfo | None) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(m, key)}"
        for m in (info.metadata if info else [])
        for key, sign in signs.items()
        if hasattr(m, key)
    ]
    return f" {' and '.join(found)}" if found else ""


def default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = canonical(value)
        return f"`{changed}`" if changed else "its own defaults"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value]}`" if value is None or isinstance(value, bool) else f"`{value}`"


def examples(part: type[PartSpec]) -> list[str]:
    """The sizes that the conformance suite tries."""
    trees = [canonical(spec) for spec in part.tiny()]
    return ["The sizes that the conformance suite tries:", "", "```yml", to_yaml(trees).rstrip(), "```"]


def weights(spec: PartSpec) -> list[str]:
    site = site_of(spec)
    table = declared(spec, site)
    if not table:
        return ["None."]
    rows = [
        [f"`{n}`", str(list(w.shape)), w.role, drawn(w.init), "" if w.split is None else str(w.split), f"{w.flops:,}"]
        for n, w in table.items()
    ]
    head = ["name", "shape", "role", "drawn", "cut along", "FLOPs a token"]
    return [f"The first of these sizes, {where(site)}:", "", *grid(head, rows)]


def declared(spec: PartSpec, site: Site) -> dict[str, Weight]:
    if isinstance(spec, LinearSpec):
        return spec.fan(Fan(site.d_in, site.d_out, bias=True), site)
    return spec.weights(site)


def where(site: Site) -> str:
    width = f"{site.d_in} wide" if site.d_in == site.d_out else f"from {site.d_in} to {site.d_out}"
    return f"{width}, in a model of {site.layers} layers and context {site.context}"


def drawn(init: Init) -> str:
    return f"all {init.value:g}" if init.kind == "constant" else f"{init.kind}, {init.std:.4g}"


def state(spec: PartSpec) -> list[str]:
    if spec.slot not in ("mixers", "ffns"):
        return []
    rows = [
        [f"`{f.name}`", f"one a {f.per}", str(list(f.shape)), f.dtype, kept(f), f"{f.bytes(NEW, 'bfloat16', MEMORY):,}"]
        for f in spec.state(site_of(spec))
    ]
    head = ["field", "entries", "shape", "dtype", "kept", f"bytes after {NEW} tokens (bfloat16)"]
    return grid(head, rows) if rows else ["None: nothing is remembered between steps."]


def kept(field: StateField) -> str:
    if field.per == "sequence":
        return "the latest"
    return "all" if field.keep is None else f"the last {field.keep}"


def cost(spec: PartSpec) -> list[str]:
    """FLOPs beyond those of the weights, for a prefill and for one more token."""
    if spec.slot not in ("mixers", "ffns", "heads"):
        return []
    site = site_of(spec)
    linear = sum(w.flops for w in spec.weights(site).values())
    uses_memory = any(f.per == "memory" for f in spec.state(site))
    memory = MEMORY if uses_memory else 0
    rows = []
    for name, new, seen in ((f"{NEW} tokens from empty", NEW, 0), (f"one token after {NEW - 1}", 1, NEW - 1)):
        found = spec.cost(site, new, seen, memory)
        rows.append([name, f"{linear * new:,}", f"{found.flops:,}", f"{linear * new + found.executed:,}"])
    said = inspect.cleandoc(type(spec).cost.__doc__ or "") if type(spec).cost is not PartSpec.cost else ""
    about_memory = f" The memory has {memory} tokens." if memory else ""
    head = ["step", "FLOPs of the weights", "FLOPs beside them", "executed in all"]
    return [*([escaped(said) + about_memory, ""] if said else []), *grid(head, rows)]


def refusals(part: type[PartSpec]) -> list[str]:
    found = {law: why for spec in part.tiny() for law, why in spec.refusals().items()}
    always = [law for law in found if all(law in spec.refusals() for spec in part.tiny())]
    rows = [
        [f"`{law}`", "always" if law in always else "for some sizes", escaped(why)]
        for law, why in sorted(found.items())
    ]
    return grid(["law", "when", "why"], rows) if rows else ["Nothing: every law holds at every size."]


def notes(part: type[PartSpec]) -> list[str]:
    path = MECHANISMS / part.slot / f"{part.kind_name()}.notes.md"
    return path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else []


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    wrong = stale()
    if arguments:
        for path in wrong:
            print(f"stale: {path.relative_to(ROOT.parent)}", file=sys.stderr)
        return 1 if wrong else 0
    made = pages()
    for path in wrong:
        if path in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path], encoding="utf-8")
        elif not path.name.endswith(".notes.md"):
            path.unlink()
        print(path.relative_to(ROOT.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
