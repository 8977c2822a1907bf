"""The verb `bill`: what it reads, its JSON, what it shows at 80 columns, and its plot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from assay.cli.main import main
from assay.cost.bill import Question, bill
from assay.cost.hardware import load_hardware, roofline
from assay.ops.sees import Sees
from assay.spec.load import load_model
from tests.cost.models import llama3_8b
from tests.cost.published import GEMMA3_27B, PARAMETERS

Capture = pytest.CaptureFixture[str]
GIB = 2**30


def answer(capsys: Capture, *line: str) -> dict[str, Any]:
    assert main(["bill", *line, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) == 1
    return dict(json.loads(out))


def written(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_the_keys_of_the_contract(capsys: Capture) -> None:
    found = answer(capsys, "gpt-11m", "--context", "100", "--batch", "3")
    told = bill(load_model("gpt-11m"), Question(100, 3))
    for key in ("params", "state_bytes_per_token", "state_bytes", "reserved_bytes"):
        assert found[key] == getattr(told, key)
    assert {k: found["flops"][k] for k in told.flops} == told.flops
    assert len(found["layers"]) == len(told.layers) and found["unread"] == [] and found["roofline"] == {}
    training = found["training"]
    assert training["total"] == sum(training[k] for k in ("weights", "gradients", "moments", "activations"))
    assert answer(capsys, "gpt-11m")["question"]["context"] == 256, "the model's own"


def test_a_configuration_needs_no_weights(tmp_path: Path, capsys: Capture) -> None:
    """A config.json, and the folder that holds it, of a model of 140 GB."""
    values, total = PARAMETERS["Llama 3 70B"]
    path = written(tmp_path / "llama", values)
    for source in (str(path), str(path.parent)):
        found = answer(capsys, source, "--context", "8192")
        assert found["params"]["total"] == total
        assert found["state_bytes"] == 8192 * 2 * 80 * 8 * 128 * 2
    less = answer(capsys, str(path), "--context", "64", "model.blocks.*.mixer.kv_heads=1")
    assert less["state_bytes"] == 64 * 2 * 80 * 1 * 128 * 2


def test_a_folder_with_weights_is_read_by_its_names_alone(tmp_path: Path, capsys: Capture) -> None:
    """Tensors of another shape would be refused by an import; their names are all that is looked at."""
    path = written(tmp_path / "gpt2", PARAMETERS["GPT-2"][0])
    save_file({"wte.weight": torch.zeros(1)}, path.parent / "model.safetensors")
    assert answer(capsys, str(path.parent), "--context", "16")["params"]["total"] == PARAMETERS["GPT-2"][1]


def test_keys_that_nothing_reads_are_one_line(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "odd", {**PARAMETERS["Llama 3 8B"][0], "warp_factor": 9, "flux": [1]})
    assert answer(capsys, str(path), "--context", "16")["unread"] == ["flux", "warp_factor"]
    assert main(["bill", str(path), "--context", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "configuration keys that nothing reads: flux, warp_factor" in lines


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "lama"}, "model_type: 'lama' is not known; nearest: llama"),
        ({"hidden_size": 64}, "model_type: missing"),
        ({**PARAMETERS["Llama 3 8B"][0], "hidden_size": "wide"}, "hidden_size: 'wide'; an integer"),
        ({**PARAMETERS["Llama 3 8B"][0], "hidden_act": "sine"}, "hidden_act: 'sine'; one of"),
    ],
)
def test_a_bad_configuration_is_one_line(values: dict[str, Any], says: str, tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "bad", values)
    assert main(["bill", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and "config.json" in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["nowhere/config.json"], "nowhere/config.json: no such file"),
        (["model.layers=3"], "CONFIG: missing"),
        (["gpt-11m", "recipe.tokens=3"], "a bill has no recipe"),
        (["gpt-11m", "--context", "257"], "positions.learned (learned) has 256 positions"),
        (["gpt-11m", "--kv-dtype", "int2"], "kv_dtype: 'int2'; accepted"),
        (["gpt-11m", "--hardware", "h1000"], "h1000: no such file, and no shipped name (did you mean 'h100'?)"),
        (["gpt-11m", "--hardware", "here", "--dtype", "f8"], "dtype: 'f8'; accepted"),
    ],
)
def test_bad_input_is_one_line(line: list[str], says: str, capsys: Capture) -> None:
    assert main(["bill", *line]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


def test_the_largest_term_is_a_sentence_with_numbers(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "gemma", {**GEMMA3_27B, "sliding_window_pattern": 1})
    line = [str(path), "--context", "32768", "--batch", "4"]
    found = answer(capsys, *line)
    assert found["state_bytes"] == 62 * GIB
    assert main(["bill", *line]) == 0
    said = " ".join(capsys.readouterr().out.split("largest: ")[1].split())
    total = (found["weight_bytes"] + 62 * GIB) / GIB
    assert said.startswith(f"state, 62 GiB of {total:.4g} GiB: ")
    assert "kv_heads 16 -> 4 would save 46.5 GiB" in said


def test_named_and_measured_hardware(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "llama", PARAMETERS["Llama 3 8B"][0])
    box = tmp_path / "box.yaml"
    box.write_text("{name: a box, memory_bytes: 8.0e9, memory_byte_s: 1.0e11, flop_s: {f32: 1.0e12, bf16: 1.0e12}}")
    found = answer(capsys, str(path), "--context", "1024", "--hardware", "h100", "--hardware", str(box))["roofline"]
    from assay.cost.bill import Sheet

    sheet = Sheet(llama3_8b())
    expected = roofline(sheet, sheet.bill(Question(1024)), load_hardware("h100")).as_json()
    assert found["h100"] == expected and found["h100"]["fits"] and not found[str(box)]["fits"]
    assert found[str(box)]["devices"] == 3
    measured = answer(capsys, "lab-64", "--dtype", "f32", "--hardware", "here")["roofline"]["here"]
    assert measured["fits"] and 0 < measured["decode_s"] < 1 and measured["hardware"].endswith("threads, f32")


def test_several_side_by_side_fit_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    written(tmp_path / "gemma", GEMMA3_27B)
    monkeypatch.chdir(tmp_path)
    for line in (["gemma/config.json"], ["gemma", "llama-11m", "--hardware", "a100"]):
        assert main(["bill", *line, "--context", "4096"]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        assert "…" not in shown, "nothing is cut off"
    words = " ".join(shown.split())
    assert "A100 SXM 80 GB" in words and "what differs" in words
    assert answer(capsys, "gemma", "llama-11m")["configs"]["llama-11m"]["params"]["total"] == 10_646_400


def test_layers_of_one_kind_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    written(tmp_path / "gemma", GEMMA3_27B)
    monkeypatch.chdir(tmp_path)
    assert main(["bill", "gemma", "--context", "4096"]) == 0
    rows = [re.split(r"\s*│\s*", row)[1:] for row in capsys.readouterr().out.splitlines() if " blocks: " in row]
    assert [(row[0].split(":")[0], row[1].split(":")[0]) for row in rows] == [
        ("52 blocks", "sliding"),
        ("10 blocks", "full"),
    ]
    assert [row[4] for row in rows] == ["8 MiB", "32 MiB"], "1024 and 4096 entries of 2 x 16 x 128 x 2 bytes"


def series(page: str) -> list[dict[str, Any]]:
    """The traces of a plotly page."""
    start = page.index('[{"', page.index("Plotly.newPlot("))
    return list(json.JSONDecoder().raw_decode(page[start:])[0])


def test_the_plot_has_state_and_decode_cost(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "plot.html"
    answer(capsys, "gpt-11m", "llama-11m", "--plot", str(path), "--hardware", "h100", "--batch", "2")
    page = path.read_text(encoding="utf-8").replace(r"\u002f", "/")
    for title in ("state bytes (batch 2, bf16)", "FLOPs of a decoded token", "decode tok/s at most, H100 SXM 80 GB"):
        assert title in page
    traces = series(page)
    assert [t["name"] for t in traces] == ["gpt-11m"] * 3 + ["llama-11m"] * 3
    assert traces[0]["x"] == [128, 256], "learned positions end at 256"
    assert traces[3]["x"][-1] == 1 << 20
    spec = load_model("llama-11m")
    asks = [Question(n, 2) for n in (128, 1024)]
    for trace, key in ((traces[3], "state_bytes"), (traces[4], "decode_per_token")):
        told = [bill(spec, ask) for ask in asks]
        expected = [t.state_bytes if key == "state_bytes" else t.flops[key] for t in told]
        assert [trace["y"][0], trace["y"][3]] == expected


def test_a_prefix_is_not_counted_and_that_is_said(capsys: Capture) -> None:
    """What a prefix adds, by hand: each of its tokens sees those after it in the prefix too."""
    line = ["llama-11m", "model.blocks.*.mixer.sees.prefix=true", "--context", "40"]
    found, causal = answer(capsys, *line), answer(capsys, "llama-11m", "--context", "40")
    layers = len([x for x in found["layers"] if x["block"]])
    assert found["flops"] == causal["flops"] and causal["without_prefix"] == []
    assert found["without_prefix"] == [f"blocks.{i}.mixer" for i in range(layers)]
    seen = sum(j <= i or j < 7 for i in range(40) for j in range(40) if j <= i or i < 7)
    assert Sees(prefix=True).pairs(40, 0, 7) == seen == 40 * 41 // 2 + 7 * 6 // 2
    assert main(["bill", *line]) == 0
    assert f"{layers} mixers are counted without a prefix: one of p tokens adds p (p - 1) / 2" in " ".join(
        capsys.readouterr().out.split()
    )
