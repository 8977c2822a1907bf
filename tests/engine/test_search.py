"""Beam search against brute force and transformers' beams; contrastive search against recomputing everything."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from assay.cache import Slot
from assay.cli.main import main
from assay.data.tokenizers import Tokenizer
from assay.engine import search as searching
from assay.engine.request import Beams, Contrastive, Grammar, Request, SamplingParams
from assay.engine.search import search
from assay.hub.load import import_folder
from assay.model.lm import LM, build
from assay.ops.step import rows_step
from assay.train.checkpoint import save_checkpoint
from tests.cache.models import logits, model, spec
from tests.engine.test_encoder_decoder import LM_MADE as TWO
from tests.engine.test_text import tokenizer
from tests.hub import tiny
from tests.model.hf import VOCAB

TEXT: Tokenizer = tokenizer()
PROMPT = (3, 1, 0, 1, 2, 2)
SMALL = 4
SHARP = 4.0  # times the logits of random weights, so that replies differ in what they are worth


def small(kind: str) -> LM:
    made = build(spec((kind, "full")).model_copy(update={"vocab": SMALL}), seed=5).double().eval()
    with torch.no_grad():
        made.final_norm.weight.mul_(SHARP)  # type: ignore[union-attr, operator]
    return made


def score(lm: LM, said: tuple[int, ...], penalty: float) -> float:
    """Of a whole reply, by one pass over it."""
    log = logits(lm, torch.tensor([[*PROMPT, *said]])).log_softmax(-1)[0, len(PROMPT) - 1 : -1]
    total = sum(float(log[i, token]) for i, token in enumerate(said))
    return total / len(said) ** penalty


def replies(length: int, ends: frozenset[int]) -> set[tuple[int, ...]]:
    """Every reply: it ends with its first stop token, or at its last token."""
    cut = set()
    for ids in itertools.product(range(SMALL), repeat=length):
        stop = next((i for i, token in enumerate(ids) if token in ends), length)
        cut.add(ids[: stop + 1])
    return cut


@pytest.mark.parametrize(
    ("kind", "penalty", "ends"),
    [("full", 1.0, {2}), ("window", 0.0, {2}), ("linear", -0.5, {1, 2}), ("full", 2.0, set()), ("linear", 1.0, {0})],
)
def test_all_beams_are_brute_force(kind: str, penalty: float, ends: set[int]) -> None:
    lm, stops = small(kind), frozenset(ends)
    request = Request(prompt=PROMPT, max_new=3, stop_tokens=stops, n=8)
    found = search(lm, TEXT, request, Beams(width=SMALL**3, length_penalty=penalty))
    every = sorted(((score(lm, ids, penalty), ids) for ids in replies(3, stops)), reverse=True)[:8]
    assert [one.ids for one in found] == [ids for _, ids in every]
    assert [one.score for one in found] == pytest.approx(
        [value for value, _ in every], abs=1e-7 if kind == "linear" else 1e-12
    )


def test_only_what_is_among_the_likeliest_ends() -> None:
    """Three replies end and are likelier than all that go on: the third is not among the two likeliest of all."""
    request = Request(prompt=PROMPT, max_new=5, stop_tokens=frozenset({0, 1, 2}))
    beam = searching.Beam(Slot(0, 0), searching.Row.of(request, 0, None), (4,), -1.0)
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    going, ended = searching.grown([beam], logits, request, 2)
    assert [one.said for one in ended] == [(4, 0), (4, 1)] and [one.said for one in going] == [(4, 3), (4, 4)]
    log = logits.log_softmax(-1)[0]
    assert [one.total for one in (*ended, *going)] == pytest.approx([-1.0 + float(log[i]) for i in (0, 1, 3, 4)])


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LM]:
    folder = tmp_path_factory.mktemp("llama")
    theirs = tiny.save("llama", folder)
    return theirs, import_folder(folder, dtype=torch.float32).model


@pytest.mark.parametrize(
    ("width", "penalty", "ends"), [(4, 1.0, [7, 30]), (3, 0.0, [7]), (5, -1.0, [7, 9]), (2, 3.0, [8])]
)
def test_beams_are_transformers_own(beside: tuple[Any, LM], width: int, penalty: float, ends: list[int]) -> None:
    theirs, ours = beside
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(width))
    more = {"num_beams": width, "num_return_sequences": width, "length_penalty": penalty, "early_stopping": "never"}
    told = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 9, "eos_token_id": ends}
    said = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=1.3,
        **more,
        **told,
    )
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.3)
    request = Request(
        prompt=tuple(ids[0].tolist()),
        max_new=9,
        stop_tokens=frozenset(ends),
        n=width,
        sampling=sampling,
    )
    found = search(ours, TEXT, request, Beams(width=width, length_penalty=penalty))
    assert [one.score for one in found] == pytest.approx(said.sequences_scores.tolist(), abs=2e-4)
    for one, row in zip(found, said.sequences[:, 40:].tolist(), strict=True):
        assert list(one.ids) == row[: len(one.ids)]
        assert (one.finish == "stop") == (one.ids[-1] in ends)


def test_one_beam_is_greedy_and_an_encoder_is_read_once() -> None:
    request = Request(prompt=(2,), source=(5, 3, 8, 1), max_new=6, sampling=SamplingParams(temperature=0.0))
    ids = [2]
    for _ in range(6):
        step = rows_step(torch.tensor([ids])).with_(encode=rows_step(torch.tensor([[5, 3, 8, 1]])))
        out = TWO(step).logits
        assert out is not None
        ids.append(int(out[-1].argmax()))
    assert list(search(TWO, TEXT, request, Beams(width=1))[0].ids) == ids[1:]
    assert search(TWO, TEXT, request, Beams(width=4))[0].score >= search(TWO, TEXT, request, Beams(width=1))[0].score


def test_the_prompt_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages in use with eight beams: those of the prompt, and of what each says itself."""
    most, step = [], searching.Runner.step

    def watched(self: Any, work: Any) -> Any:
        out = step(self, work)
        most.append((len(work), self.cache.report()["groups"][0]["used"]))
        self.cache.check_integrity()
        return out

    monkeypatch.setattr(searching.Runner, "step", watched)
    prompt = tuple(i % VOCAB % 19 for i in range(50 * searching.PAGE))
    made = build(spec(("full",)).model_copy(update={"context": 1000}), seed=3).eval()
    search(made, TEXT, Request(prompt=prompt, max_new=4), Beams(width=8))
    beams, pages = max(most)
    assert beams == 8 and pages <= 50 + 8


def by_hand(lm: LM, request: Request, how: Contrastive) -> list[int]:
    """Contrastive search without a cache: a full pass for every candidate."""

    @torch.no_grad()
    def states(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        out = lm(rows_step(torch.tensor([ids]), listen=frozenset({"final"})))
        assert out.logits is not None
        return out.logits[-1].softmax(-1), out.taps["final"]

    ids = list(request.prompt)
    while len(ids) - len(request.prompt) < request.max_new:
        p, _ = states(ids)
        worth = {}
        for token in p.argsort(descending=True)[: how.candidates].tolist():
            h = states([*ids, token])[1]
            similar = max(float(torch.cosine_similarity(h[-1], earlier, dim=0)) for earlier in h[:-1])
            worth[token] = (1 - how.penalty) * float(p[token]) - how.penalty * similar
        ids.append(max(worth, key=lambda token: worth[token]))
        if ids[-1] in request.stop_tokens:
            break
    return ids[len(request.prompt) :]


@pytest.mark.parametrize("kind", ["window", "linear"])
@pytest.mark.parametrize(("candidates", "penalty"), [(4, 0.6), (2, 0.2), (3, 1.0)])
def test_contrastive_search_by_hand(kind: str, candidates: int, penalty: float) -> None:
    lm, how = model((kind, "full")), Contrastive(candidates=candidates, penalty=penalty)
    request = Request(prompt=PROMPT * 3, max_new=6, stop_tokens=frozenset({11}))
    assert list(search(lm, TEXT, request, how)[0].ids) == by_hand(lm, request, how)


def test_grammars_hold_in_every_beam() -> None:
    lm = build(spec(("full",)).model_copy(update={"vocab": 256}), seed=1).eval()
    request = Request(prompt=(65, 66), max_new=12, n=4, grammar=Grammar(choice=("one", "two", "three", "ten")))
    found = search(lm, TEXT, request, Beams(width=4, length_penalty=0.0))
    assert {one.text for one in found} == {"one", "two", "three", "ten"}
    request = request.model_copy(update={"n": 1})
    assert search(lm, TEXT, request, Contrastive())[0].text in {"one", "two", "three", "ten"}


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"sampling": SamplingParams(top_p=0.5)}, Beams(), "top_p: 0.5; beam search does not draw"),
        ({"sampling": SamplingParams(temperature=0.7)}, Contrastive(), "temperature: 0.7; contrastive search"),
        ({"n": 5}, Beams(width=4), "n: 5; beam search finds 4"),
        ({"n": 2}, Contrastive(), "n: 2; contrastive search finds 1"),
        ({"logprobs": 1}, Beams(), "logprobs: 1"),
        ({"stop": ("x",)}, Beams(), "stop: 'x'; beams end at tokens"),
        ({"prompt": (99,)}, Beams(), "prompt token 99; this model has ids 0 to 18"),
    ],
)
def test_what_a_search_does_not_do_is_refused(changes: dict[str, Any], how: Beams | Contrastive, message: str) -> None:
    request = Request(prompt=PROMPT, max_new=4).model_copy(update=changes)
    with pytest.raises(ValueError, match=message):
        search(model(("full",)), TEXT, request, how)


def test_the_verb_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = build(spec(("full",)).model_copy(update={"vocab": 256}), seed=1).eval()
    save_checkpoint(tmp_path, lm, TEXT)
    line = ["generate", str(tmp_path), "--prompt", "to be", "--max-new", "6", "--json"]
    for options, how in (
        (["--beams", "3", "--length-penalty", "0.5"], Beams(width=3, length_penalty=0.5)),
        (["--penalty-alpha", "0.4", "--top-k", "5"], Contrastive(candidates=5, penalty=0.4)),
    ):
        assert main([*line, *options]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        request = Request(prompt=tuple(b"to be"), max_new=6, stop_tokens=TEXT.ends)
        assert told["tokens"] == list(search(lm, TEXT, request, how)[0].ids)
    for options, message in (
        (["--beams", "0"], "width"),
        (["--beams", "2", "--penalty-alpha", "0.5"], "give one of them"),
        (["--length-penalty", "2"], "goes with --beams"),
        (["--beams", "2", "--top-p", "0.5"], "top_p"),
    ):
        assert main([*line, *options]) == 2
        assert message in capsys.readouterr().err
