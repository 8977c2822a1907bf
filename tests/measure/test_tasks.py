"""Task files under `assay eval`: scores counted from the model's own answers, and code that nobody vouched for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from assay.cli.main import main
from assay.data.corpora import CorpusSpec, open_corpus
from assay.data.tokenizers import TokenizerSpec, build_tokenizer
from assay.model.lm import build
from assay.train.checkpoint import save_checkpoint
from tests.measure.subjects import spec

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'assay[hf]'")

from lm_eval.api.model import LM

from assay.measure.harness import Harness
from assay.measure.taskfiles import load_tasks, read

DOCUMENTS = [{"q": f"{i}+1=", "choices": [str(i + 1), str(i)], "gold": 0, "text": "so" * (i + 1)} for i in range(5)]
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}"}
CHOICE |= {"doc_to_target": "gold", "target_delimiter": ""}
REPLY = {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{choices[0]}}"}
REPLY |= {"generation_kwargs": {"until": ["="], "max_gen_toks": 3}}
REPLY |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
ROLL = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
ROLL |= {"metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a task file beside its data, and says where."""
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))

    def task(name: str, config: dict[str, Any], text: str = "") -> str:
        data = {"data_files": {"test": "docs.jsonl"}, "cache_dir": str(tmp_path / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **config}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole) + text)
        return str(tmp_path / f"{name}.yaml")

    return task


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    save_checkpoint(tmp_path / "model", build(spec(), seed=4).eval(), tokenizer())
    return str(tmp_path / "model")


def tokenizer() -> Any:
    return build_tokenizer(TokenizerSpec(kind="byte"), open_corpus(CorpusSpec(kind="generated")))


class Known(LM):
    """Answers from a table: what a task asks, and how its metric counts, without a model of ours."""

    def __init__(self, harness: Harness) -> None:
        super().__init__()
        self.harness, self.asked = harness, list[tuple[str, str]]()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [r.args for r in requests]
        return self.harness.loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self.harness.loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self.harness.generate_until(requests)


def test_the_verb_scores_every_kind_of_task(write: Write, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy, exact match and bits a byte counted by hand from the model's own answers."""
    files = [write("choice", CHOICE), write("reply", REPLY), write("roll", ROLL)]
    words = ["eval", checkpoint, "--tasks", ",".join(files), "--limit", "4", "--batch", "3", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    table, last = said.out.rstrip().rsplit("\n", 1)
    found = json.loads(last)
    assert "|choice" in table and "exact_match" in table and "bootstrapping" not in said.out
    lm = Harness(build(spec(), seed=4), tokenizer())
    docs = DOCUMENTS[:4]
    scores = [
        [lm._loglikelihood_tokens([(None, list(d["q"].encode()), list(c.encode()))])[0][0] for c in d["choices"]]
        for d in docs
    ]
    results = found["results"]
    assert results["choice"]["acc,none"] == sum(a > b for a, b in scores) / 4
    bits = -sum(lm._loglikelihood_tokens([(None, [0], list(d["text"].encode()))])[0][0] for d in docs)
    size = sum(len(d["text"]) for d in docs)
    assert results["roll"]["bits_per_byte,none"] == pytest.approx(bits / size / 0.6931471805599453, rel=1e-5)
    assert results["reply"]["exact_match,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found["n_samples"]["choice"] == {"original": 5, "effective": 4}
    assert (found["length"], found["cut"], found["versions"]["roll"]) == (16, 0, "Yaml")


def test_examples_stand_before_a_document(write: Write, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--num-fewshot changes what is asked; a context that is too short for it loses its beginning and says so."""
    file = write("shots", {**CHOICE, "fewshot_split": "test", "fewshot_delimiter": ";"})
    assert main(["eval", checkpoint, "--tasks", file, "--num-fewshot", "3", "--limit", "2", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.rstrip().rsplit("\n", 1)[1])
    assert (found["n_shot"]["shots"], found["cut"]) == (3, 4)
    assert "4 requests were longer than 16 tokens" in said.err


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("process_docs: !function touch.docs\n", "!function touch.docs"),
        ("class: !function touch.Task\n", "!function touch.Task"),
        ("doc_to_text: !function touch.text\n", "!function touch.text"),
        ("include: shared.yaml\n", "shared.yaml, line 1: !function touch.text: "),
        ("dataset_path: pandas\n", "dataset_path: pandas"),
        ("dataset_path: ./touch.py\n", "dataset_path: ./touch.py"),
        ("metric_list: [{metric: ./touch}]\n", "metric: ./touch, which the harness does not have"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate: True"),
        ("metric_list: [{metric: !function touch.m}]\n", "!function touch.m"),
        ("unsafe_code: true\n", "unsafe_code: True"),
        ("use_prompt: prompts.yaml:a\n", "use_prompt: prompts.yaml:a"),
        ("doc_to_target: !function touch.text\ndoc_to_target: gold\n", "!function touch.text"),
        ("group: g\ntask: [{task: inner, process_docs: !function touch.docs}]\n", "!function touch.docs"),
    ],
)
def test_code_is_refused_by_name_before_it_runs(extra: str, named: str, write: Write, tmp_path: Path) -> None:
    (tmp_path / "touch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "shared.yaml").write_text("doc_to_text: !function touch.text\n")
    file = write("bad", {k: v for k, v in CHOICE.items() if not extra.startswith(k)}, extra)
    with pytest.raises(ValueError) as error:
        load_tasks([write("good", CHOICE), file])
    assert named in str(error.value) and str(tmp_path) in str(error.value)
    assert "--trust-task-code" in str(error.value) and not (tmp_path / "ran").exists()


def test_code_runs_with_trust(write: Write, tmp_path: Path, checkpoint: str) -> None:
    (tmp_path / "mine.py").write_text("def text(doc):\n    return 'what is ' + doc['q']\n")
    file = write(
        "trusted", {k: v for k, v in CHOICE.items() if k != "doc_to_text"}, "doc_to_text: !function mine.text\n"
    )
    assert main(["eval", checkpoint, "--tasks", file, "--limit", "1"]) == 2
    task = load_tasks([file], trust=True)["tasks"]["trusted"]
    assert task.doc_to_text(DOCUMENTS[0]) == "what is 0+1="


def test_templates_stay_in_the_sandbox(write: Write, tmp_path: Path) -> None:
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}"
    file = write("escape", {**CHOICE, "doc_to_text": escape})
    with pytest.raises(ValueError, match="SecurityError"):
        load_tasks([file])
    assert not (tmp_path / "ran").exists()
    load_tasks([file], trust=True)
    assert (tmp_path / "ran").exists()


def test_includes_give_what_a_file_does_not_say(write: Write, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("include: deeper.yaml\ntest_split: other\nnum_fewshot: 2\ntask_list: [x]\n")
    (tmp_path / "deeper.yaml").write_text("num_fewshot: 7\ndescription: from below\n")
    found = read(Path(write("child", CHOICE, "include: base.yaml\n")))
    assert (found["test_split"], found["num_fewshot"], found["description"]) == ("test", 2, "from below")
    assert "task_list" not in found
    (tmp_path / "deeper.yaml").write_text("include: base.yaml\n")
    with pytest.raises(ValueError, match=r"base\.yaml: includes itself"):
        read(tmp_path / "child.yaml")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset_path": "nobody/no-such-data", "dataset_kwargs": {}}, "data set is not on this machine: "),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "gone.jsonl"),
        ({"doc_to_text": "{{nothing}}"}, "a task cannot be used: UndefinedError: 'nothing' is undefined"),
        ({"docs": 3}, "unexpected keyword argument 'docs'"),
    ],
)
def test_tasks_that_cannot_be_used(
    config: dict[str, Any],
    message: str,
    write: Write,
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # answers at once, as without a network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["eval", checkpoint, "--tasks", write("bad", {**CHOICE, **config})]) == 2
    assert message in capsys.readouterr().err.rstrip().rsplit("\n", 1)[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "t.yaml", "--data", "t.yaml"], "--tasks: not with --data"),
        (["--data", "t.yaml", "--limit", "3"], "--limit: not with --data"),
        (["--tasks", "t.yaml", "--rows", "3"], "--rows: not with --tasks"),
        (["--tasks", ","], "--tasks ',': names no task"),
        (["--tasks", "gone.yaml"], "No such file or directory: "),
        (["--tasks", "list.yaml"], "list.yaml: not a task: accepted: a mapping with `task` or `group`"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- a\n")
    assert main(["eval", "RUN", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
