"""Fill the tables of README.md and docs/learnings/ from the Result lines in docs/results/: a page's own file, or else
those of tour.jsonl.

    python docs/tables.py                   write what is stale
    python docs/tables.py --check           write nothing; exit 1 and name the stale files
    python docs/tables.py --take FILE       first take the lines of a run's results.jsonl, thinned to what a page needs
    python docs/tables.py --take FILE NAME  the same for NAME.jsonl in place of tour.jsonl; of several runs by FILE,FILE

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; everything outside the marks is by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from assay.spec.result import Result, dumps, read_results

DOCS = Path(__file__).resolve().parent
TOUR = "tour"
# The front page's rows: what a reader most wants settled, one line a stage or two.
FRONT = (
    ("baseline", "no-residual"),
    ("baseline", "layernorm"),
    ("baseline", "relu"),
    ("placement", "post"),
    ("positions", "none"),
    ("positions", "learned"),
    ("positions", "alibi"),
    ("kv-sharing", "gqa"),
    ("kv-sharing", "mqa"),
    ("windows", "w16"),
    ("synthesis", "chosen"),
)


def titles(results: list[Result]) -> dict[tuple[str, str], str]:
    """(study, arm) -> the arm's title."""
    studies = [r for r in results if r.kind == "study" and r.values.get("arms")]
    return {(str(r.study), a["name"]): a.get("title") or a["name"] for r in studies for a in r.values["arms"]}


def number(value: Any) -> str:
    return "" if value is None else f"{value:+.3f}"


def row(verdict: Result, names: dict[tuple[str, str], str]) -> str:
    """One verdict as a Markdown row: the arm against its base."""
    v, study = verdict.values, str(verdict.study)
    arm, base = (names.get((study, str(a)), str(a)) for a in (verdict.arm, v["base_arm"]))
    interval = "" if v.get("low") is None else f"{number(v['low'])} to {number(v['high'])}"
    seeds = f"{v.get('seeds', 0)} / {v.get('base_seeds', 0)}"
    return f"| {study} | {arm} | {base} | {number(v.get('delta'))} | {interval} | {seeds} | **{v['verdict']}** |"


def head(verdicts: list[Result]) -> list[str]:
    """The columns; a difference is in nats unless the study asked about something else."""
    metrics = dict.fromkeys(str(r.values["metric"]) for r in verdicts)
    unit = "nats" if all(name == "loss_nats" for name in metrics) else ", ".join(metrics)
    return [
        f"| study | arm | against | difference ({unit}) | interval | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]


def front(results: list[Result]) -> str:
    """The README's table, and how it was made."""
    names = titles(results)
    verdicts = {(r.study, r.arm): r for r in results if r.kind == "verdict"}
    shown = [verdicts[key] for key in FRONT if key in verdicts]
    return "\n".join([*head(shown), *(row(verdict, names) for verdict in shown), "", made(results)])


def command(results: list[Result]) -> str:
    """The commands, the commit and the machine behind a table."""
    frames = [r for r in results if r.kind == "study"]
    commands = " and ".join(f"`{text}`" for text in dict.fromkeys(str(r.values["command"]) for r in frames))
    machine = next((r.values for r in results if r.kind == "environment"), {})
    runs = sum(r.kind == "trial" for r in results)
    where = f"{machine.get('cores')} cores of {machine.get('cpu')}, torch {machine.get('torch')}"
    return f"{commands} at commit `{str(frames[0].commit)[:8]}` ({where}, {machine.get('precision')}): {runs} runs."


def made(results: list[Result]) -> str:
    """How the front page's table was made, and what became of the claims."""
    claims = [str(r.values["outcome"]) for r in results if r.kind == "claim"]
    counts = ", ".join(f"{claims.count(o)} {o}" for o in dict.fromkeys(sorted(claims)))
    return (
        f"Validation loss, arm less base: below zero the arm is better. {command(results)} "
        f"Claims of the literature: {counts}. The lines behind it: [docs/results/tour.jsonl](docs/results/tour.jsonl)."
    )


def study_tables(study: str | None) -> Callable[[list[Result]], str]:
    """Verdicts and claims of one study; null: of all, and how they were made."""

    def write(results: list[Result]) -> str:
        names = titles(results)
        mine = [r for r in results if study in (None, r.study)]
        verdicts = [r for r in mine if r.kind == "verdict"]
        claims = [
            f"| {c['text']} ({c['source']}) | **{c['outcome']}** | {c.get('evidence') or ''} |".replace("\n", " ")
            for c in (r.values for r in mine if r.kind == "claim")
        ]
        told = ["", "| claim | outcome | evidence |", "|---|---|---|", *claims] if claims else []
        how = [] if study is not None else ["", command(results)]
        return "\n".join([*head(verdicts), *(row(r, names) for r in verdicts), *told, *how])

    return write


def tables() -> Iterator[tuple[Path, str, str, Callable[[list[Result]], str]]]:
    """(file, name of the mark, whose results, what stands there)."""
    yield DOCS.parent / "README.md", "results", TOUR, front
    for page in sorted((DOCS / "learnings").glob("*.md")):
        own = stored(page.stem).is_file()
        yield page, "results", page.stem if own else TOUR, study_tables(None if own else page.stem)


def stored(name: str) -> Path:
    return DOCS / "results" / f"{name}.jsonl"


def filled(text: str, name: str, table: str) -> str:
    """The text with what stands between the marks replaced; ValueError without the marks."""
    marks = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"no <!-- {name}:begin --> and <!-- {name}:end --> in the text")
    return marks.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


CURVES = ("curve", "by_position")
DIGITS = 5


def thinned(results: list[Result]) -> list[Result]:
    """Every line, with the curves and what was measured during training of each arm's first seed only, and numbers to
    five digits where no verdict was drawn from them: a text that a repository can hold."""
    first: dict[tuple[str, str | None], int] = {}
    for r in results:
        if r.seed is not None:
            first[r.study, r.arm] = min(first.get((r.study, r.arm), r.seed), r.seed)
    out = []
    for r in results:
        values: dict[str, Any] = dict(r.values)
        later = r.seed is not None and r.seed != first[r.study, r.arm]
        if later and str(values.get("what", "")).startswith("training."):
            continue
        if r.kind == "trial" and later:
            values = {name: value for name, value in values.items() if name not in CURVES}
        out.append(r.model_copy(update={"values": rounded(values) if r.kind == "measure" else values}))
    return out


def rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.{DIGITS}g}") if isinstance(tree, float) else tree


def take(paths: str, name: str = TOUR) -> None:
    """ValueError where the runs are of several commits: a page names one."""
    found = [r for path in paths.split(",") for r in read_results(Path(path))]
    commits = sorted({str(r.commit) for r in found})
    if len(commits) > 1:
        raise ValueError(f"{paths}: runs of commits {', '.join(commits)}; accepted: of one")
    stored(name).write_text("".join(dumps(r) + "\n" for r in thinned(found)), encoding="utf-8")


def main(argv: list[str]) -> int:
    if "--take" in argv:
        source, *name = argv[argv.index("--take") + 1 :]
        try:
            take(source, *name)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    stale = []
    for path, mark, whose, write in tables():
        text = path.read_text(encoding="utf-8")
        wanted = filled(text, mark, write(read_results(stored(whose))))
        if wanted != text:
            stale.append(path)
            if "--check" not in argv:
                path.write_text(wanted, encoding="utf-8")
    for path in stale:
        print(f"{'stale' if '--check' in argv else 'written'}: {path.relative_to(DOCS.parent)}")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
