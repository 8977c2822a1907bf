"""The options that `generate` and `chat` share: one declaration, every option of it honoured by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from assay.cli import chat, generate
from assay.cli._engine import Reply, replies
from assay.cli.main import main

GIVEN: dict[str, Any] = {
    "max_new": 7,
    "min_new": 5,
    "temperature": 0.25,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "seed": 11,
    "dtype": "bf16",
    "device": "cpu",
    "part": [Path("mine.py")],
}


def command(run: Any) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(run)
    return get_command(app)


def test_every_option_reaches_the_verb_under_its_own_name() -> None:
    seen: list[Any] = []

    @replies(top_p=0.75)
    def run(word: str, reply: Reply, times: int = 1) -> None:
        seen.append((word, reply, times))

    line = ["w", "--times", "2"]
    for name, value in GIVEN.items():
        line += [f"--{name.replace('_', '-')}", str(value[0] if isinstance(value, list) else value)]
    command(run).main(args=line, standalone_mode=False)
    command(run).main(args=["w"], standalone_mode=False)
    assert seen[0] == ("w", Reply(**GIVEN), 2)
    assert seen[1] == ("w", Reply(top_p=0.75), 1)


@pytest.mark.parametrize(("verb", "temperature", "top_p"), [(generate, 1.0, 1.0), (chat, 0.8, 0.95)])
def test_the_verbs_keep_their_own_defaults(verb: Any, temperature: float, top_p: float) -> None:
    defaults = {p.name: p.default for p in command(verb.run).params}
    assert (defaults["temperature"], defaults["top_p"]) == (temperature, top_p)
    assert set(GIVEN) <= set(defaults)
    assert defaults["seed"] is None and defaults["top_k"] == 0 and defaults["device"] == "auto"


@pytest.mark.parametrize("verb", [["generate", "nowhere", "--prompt", "a"], ["chat", "nowhere"]])
def test_a_bad_share_is_named_before_the_model_is_read(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--top-p", "2"]) == 2
    assert "top_p" in capsys.readouterr().err
    assert main([*verb, "--top-p", "0.5"]) == 2
    assert "nowhere" in capsys.readouterr().err
