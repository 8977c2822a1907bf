"""The `assay` command: finds the verb that was asked for, imports only that one, and turns errors into exit codes.

How a verb is added: put one file into this folder. Its name is the verb (a trailing underscore is dropped: `import_.py`
is `assay import`), and no list anywhere names it. In the file:

- the module's docstring is the help; its first line is what `assay --help` shows, read without importing the file.
- `def run(...)` is the verb, its parameters annotated for typer. `common` has the options that every verb shares
  (`Device`, `Part`, `Json`, `Overrides`). It returns None, or its exit status.
- a verb with sub-verbs has `app = typer.Typer()` instead, and a function decorated with `@app.command()` for each;
  with `@app.callback(invoke_without_command=True)` it also runs alone.
- torch and everything that imports it is imported inside the functions, so that `--help` answers at once.
- a user's mistake is a ValueError or `common.fail(message)`: exit 2 with that message.
- progress goes to `common.progress()` or `common.console()`, which write to stderr.

Files that begin with an underscore are not verbs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from assay import __version__
from assay.cli.common import debugging, message_of

HERE = Path(__file__).parent
NOT_VERBS = frozenset({"main", "common"})


def verbs() -> dict[str, Path]:
    """Every verb and its file."""
    files = sorted(p for p in HERE.glob("[!_]*.py") if p.stem not in NOT_VERBS)
    return {path.stem.removesuffix("_"): path for path in files}


def help_of(path: Path) -> str:
    """A file's docstring, without importing it."""
    return inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


class Verbs(TyperGroup):
    """A group whose commands are the files beside this one, imported when they are called."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(verbs())

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        path = verbs().get(cmd_name)
        return command(path, self.params) if path else None

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_of(path).partition("\n")[0]) for name, path in verbs().items()])

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args[0] not in verbs():
            raise ValueError(f"unknown verb {args[0]!r}; accepted: {', '.join(verbs())}")
        return super().resolve_command(ctx, args)


def command(path: Path, shared: Sequence[Any]) -> Any:
    """The built command of a verb's file, with the options that stand on every command (`--version`, `--debug`)."""
    module = importlib.import_module(f"assay.cli.{path.stem}")
    app = getattr(module, "app", None)
    if app is None:
        app = _app()
        app.command(help=help_of(path))(module.run)
    else:
        app.info.help = help_of(path)
        app.rich_markup_mode = None
    built = get_command(app)
    for each in (built, *getattr(built, "commands", {}).values()):
        each.params.extend(shared)
    return built


def _app() -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None)


def _version(value: bool) -> None:
    if value:
        print(f"assay {__version__}")
        raise typer.Exit()


def _debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.ensure_object(dict)["debug"] = True


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True, expose_value=False)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks.", callback=_debug, is_eager=True, expose_value=False)
    ] = False,
) -> None:
    """A laboratory for language-model architectures: what every choice costs, what it buys, and whether it is real."""


def group() -> Any:
    """The whole command line as one command."""
    app = _app()
    app.callback(cls=Verbs, no_args_is_help=True)(_root)
    return get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit status."""
    settings: dict[str, Any] = {"debug": debugging()}
    try:
        status = group().main(args=argv, prog_name="assay", standalone_mode=False, obj=settings)
    except Exception as error:
        found = message_of(error)
        if settings["debug"] or found is None:
            raise
        text, status = found
        print(text, file=sys.stderr)
    return status if isinstance(status, int) else 0
