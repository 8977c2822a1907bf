"""The frame of the command line: verbs found by their files, imported late, errors as one message and exit 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import assay.cli
from assay import __version__
from assay.cli import main as frame
from assay.cli.main import help_of, main, verbs

Write = Callable[[str, str], None]

ECHO = '''"""Says its word.

More about it.
"""
from assay.cli.common import Device, Json, Overrides, Part, emit_json, parse_overrides

def run(word: str, pairs: Overrides = None, times: int = 1, json: Json = False):
    values = {"word": word * times, "changes": parse_overrides(pairs)}
    emit_json(values) if json else print(values["word"])
'''

GROUP = '''"""Two things."""
import typer

app = typer.Typer()

@app.command()
def left(status: int = 0) -> int:
    """Go left."""
    return status

@app.command("import")
def right(n: int) -> None:
    raise ValueError(f"n is {n}; accepted: 1 to 4")
'''


@pytest.fixture
def verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a verb's file into a folder that stands in for assay/cli."""
    monkeypatch.setattr(frame, "HERE", tmp_path)
    monkeypatch.setattr(assay.cli, "__path__", [str(tmp_path)])

    def write(name: str, text: str) -> None:
        monkeypatch.delitem(sys.modules, f"assay.cli.{name}", raising=False)
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(f"assay.cli.{path.stem}", None)


def loaded(*command: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """The modules that a command line imported, in a process of its own."""
    script = f"import sys, assay.cli.main as m; c = m.main({list(command)!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{script}; sys.exit(c)"], capture_output=True, text=True, timeout=60)
    return set(done.stderr.split()), done


HEAVY = {"torch", "scipy", "plotly", "transformers", "tokenizers"}
LIGHT = [
    ("--help",),
    ("--version",),
    ("parts", "--help"),
    ("study", "list"),
    ("study", "--help"),
    ("train", "--help"),
    ("bench", "--help"),
]


@pytest.mark.parametrize("command", [c for c in LIGHT if c[0].startswith("-") or c[0] in verbs()], ids=" ".join)
def test_light_commands_import_nothing_heavy(command: tuple[str, ...]) -> None:
    modules, done = loaded(*command)
    assert done.returncode == 0 and done.stdout, done.stderr[-500:]
    assert not modules & HEAVY


def test_help_names_every_verb_with_the_first_line_of_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert verbs()
    for name, path in verbs().items():
        first = help_of(path).splitlines()[0]
        assert f"{name} {first}"[:40] in shown


def test_every_verb_shows_its_own_help_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for name in verbs():
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: assay {name}")
        assert main([name, "--version"]) == 0
        assert capsys.readouterr().out == f"assay {__version__}\n"


def test_a_file_is_a_verb(verb: Write, capsys: pytest.CaptureFixture[str]) -> None:
    verb("echo_", ECHO)
    verb("_helper", "raise RuntimeError('not a verb')")
    assert list(verbs()) == ["echo"]
    assert main(["echo", "ab", "--times", "2"]) == 0
    assert capsys.readouterr().out == "abab\n"
    assert main(["echo", "--help"]) == 0
    assert "More about it." in capsys.readouterr().out


def test_help_does_not_import_the_verbs(verb: Write, capsys: pytest.CaptureFixture[str]) -> None:
    verb("broken", '"""Cannot be imported."""\nraise RuntimeError("imported")')
    assert main(["--help"]) == 0
    assert "broken  Cannot be imported." in capsys.readouterr().out


def test_json_is_one_strict_line_at_the_end(verb: Write, capsys: pytest.CaptureFixture[str]) -> None:
    verb("echo", ECHO)
    assert main(["echo", "é", "recipe.lr=4e-3", "model.blocks.*.mixer.kv_heads=2", "model.x=.nan", "--json"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    changes = {"recipe.lr": 0.004, "model.blocks.*.mixer.kv_heads": 2, "model.x": None}
    assert json.loads(last, parse_constant=lambda name: pytest.fail(name)) == {"word": "é", "changes": changes}


def test_sub_verbs_and_exit_statuses(verb: Write, capsys: pytest.CaptureFixture[str]) -> None:
    verb("go", GROUP)
    assert main(["go", "left"]) == 0
    assert main(["go", "left", "--status", "1"]) == 1
    assert main(["go", "import", "7"]) == 2
    assert capsys.readouterr().err == "error: n is 7; accepted: 1 to 4\n"
    assert main(["go", "left", "--version"]) == 0


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["nosuch"], ["nosuch", "accepted: echo"]),
        (["echo"], ["Missing argument", "word", "assay echo --help"]),
        (["echo", "a", "--tims", "2"], ["--tims", "--times"]),
        (["echo", "a", "--times", "two"], ["--times", "valid integer", "'two'"]),
        (["echo", "a", "--times"], ["--times", "argument"]),
        (["echo", "a", "lr=3"], ["lr=3", "model.", "recipe."]),
        (["echo", "a", "recipe.lr"], ["recipe.lr", "path=value"]),
        (["echo", "a", "recipe.lr=1", "recipe.lr=2"], ["recipe.lr", "twice"]),
        (["--nosuch", "echo"], ["--nosuch", "assay --help"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_a_mistake_is_one_line_and_exit_2(
    command: list[str], named: list[str], verb: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    verb("echo", ECHO)
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in named)


RAISE = '''"""Raises."""
def run(what: str):
    import errno, pydantic
    class Size(pydantic.BaseModel):
        width: int
    if what == "validation": Size(width="wide")
    if what == "missing": open("nowhere/at.all")
    if what == "disk": raise OSError(errno.ENOSPC, "No space left on device", "runs/results.jsonl")
    if what == "interrupt": raise KeyboardInterrupt
    if what == "extra": raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
    if what == "defect": raise AttributeError("ours")
'''


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("validation", 2, "Size: width: Input should be a valid integer"),
        ("missing", 2, "No such file or directory: nowhere/at.all"),
        ("disk", 2, "the disk is full"),
        ("interrupt", 130, ""),
    ],
)
def test_errors_become_a_message_and_a_status(
    what: str, status: int, message: str, verb: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    verb("raises", RAISE)
    assert main(["raises", what]) == status
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_tracebacks_are_kept_for_defects_and_for_debug(verb: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    verb("raises", RAISE)
    with pytest.raises(AttributeError, match="ours"):
        main(["raises", "defect"])
    with pytest.raises(FileNotFoundError):
        main(["raises", "missing", "--debug"])
    monkeypatch.setenv("ASSAY_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["raises", "missing"])


def test_python_m_assay() -> None:
    done = subprocess.run([sys.executable, "-m", "assay", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"assay {__version__}\n")
