"""Scores of tasks: against the harness's own class for transformers on the same weights, and what task files may do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from assay.data.tokenizers import Tokenizer
from assay.hub.load import import_folder
from assay.measure.score import first_fit, packed, score
from assay.model.lm import build
from assay.ops.step import rows_step
from tests.measure.subjects import spec
from tests.model.hf import randomised

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'assay[hf]'")

from lm_eval.api.instance import Instance

from assay.measure.harness import Harness

logging.getLogger("lm_eval").setLevel(logging.ERROR)
WORDS = "the cat sat on a mat and the dog ran to the door, then it was night; who was there? nobody but the moon\n"
CONTEXT = 32


@pytest.fixture(scope="module", params=["first", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that begins texts with <s>, or with one that has an end and no beginning."""
    made = Trained(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>"] if request.param == "first" else ["</s>"]
    alphabet = sorted({"Ġ", "Ċ"} | set(WORDS) - {" ", "\n"})
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS], trainer)
    if request.param == "first":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    said = {"bos_token": "<s>"} if request.param == "first" else {}
    path = tmp_path_factory.mktemp(request.param)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", **said).save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=made.token_to_id("<s>"),
        eos_token_id=made.token_to_id("</s>"),
    )
    randomised(transformers.LlamaForCausalLM(config)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> Harness:
    return Harness(import_folder(folder).model, Tokenizer.load(folder), batch=3)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    pytest.importorskip("accelerate", reason="lm-eval's own class for transformers needs accelerate")
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # Its cache takes the first logits, not the last, where what is read is the same and was split at another place.
    return HFLM(model, tokenizer=tokenizer, batch_size=2, device="cpu", logits_cache=False)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def test_continuations_score_as_under_transformers(ours: Harness, theirs: Any) -> None:
    """Ragged lengths, shared contexts, spaces at the seam, no context, more than the context holds, special tokens."""
    pairs = [("the cat", f" {word}") for word in ("sat", "ran", "moon", "on a mat and the dog")]
    pairs += [("who was there?  ", "nobody"), ("", "the moon"), ("</s>", " it was"), ("hi ☃", " 雪\n\n a")]
    pairs += [(WORDS * 2, " the door"), ("<s>the", " dog"), ("a", WORDS[:60]), ("the</s>the", "<s> cat")]
    greedy = theirs.generate_until(asked("generate_until", ("the cat", {"until": [], "max_gen_toks": 1})))[0]
    pairs += [("the cat", greedy), ("the cat", greedy + " moon")]
    requests = asked("loglikelihood", *pairs)
    mine, reference = ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in mine] == [is_greedy for _, is_greedy in reference]
    assert {is_greedy for _, is_greedy in mine} == {True, False}
    torch.testing.assert_close([s for s, _ in mine], [s for s, _ in reference], rtol=1e-5, atol=1e-4)
    assert ours.cut >= 1


def test_rolling_sums_are_those_under_transformers(ours: Harness, theirs: Any) -> None:
    """One window, one that is full, and several, the last of which looks back."""
    texts = ["the", WORDS, WORDS * 3, WORDS[: len(WORDS) // 2], "</s> and </s>"]
    lengths = [len(ours.tok_encode(text)) for text in texts]
    assert min(lengths) < CONTEXT and max(lengths) > 2 * CONTEXT
    requests = asked("loglikelihood_rolling", *((text,) for text in texts))
    torch.testing.assert_close(
        ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), rtol=1e-5, atol=1e-4
    )


def test_replies_are_those_under_transformers(ours: Harness, theirs: Any) -> None:
    """Prompts of unequal length, one cut from the left; stop texts that come and that do not; a penalty."""
    whole = {"until": [], "max_gen_toks": 12, "do_sample": False}
    prompts = ["the cat", "who was there?", WORDS * 2, "</s>night", "a"]
    plain = theirs.generate_until(asked("generate_until", *((p, whole) for p in prompts)))
    assert all(plain) and ours.generate_until(asked("generate_until", *((p, whole) for p in prompts))) == plain
    stop = {"until": [plain[0][3:5], "never said"], "max_gen_toks": 12, "temperature": 0.0}
    penalty = {"until": "\n", "max_new_tokens": 9, "repetition_penalty": 1.7}
    requests = asked("generate_until", *((p, how) for p in prompts for how in (stop, penalty)))
    mine = ours.generate_until(requests)
    assert mine == theirs.generate_until(requests)
    assert mine[0] == plain[0][: plain[0].find(plain[0][3:5])] and mine != [""] * len(mine)


def test_a_reply_ends_at_every_end_of_the_generation_config(folder: Path, ours: Harness, theirs: Any) -> None:
    whole = asked("generate_until", ("the cat", {"until": [], "max_gen_toks": 12}))
    ids = ours.words.encode(ours.generate_until(whole)[0], False)
    config = theirs.model.generation_config
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ids[4]]}))
    config.eos_token_id, before = [1, ids[4]], config.eos_token_id
    try:
        ended = Harness(ours.model, Tokenizer.load(folder)).generate_until(whole)
        assert ended[0] == ours.words.hf.decode(ids[: ids.index(ids[4])])
        assert theirs.generate_until(whole) == [ended[0] + ours.words.hf.decode([ids[4]])]  # it shows what ended it
    finally:
        config.eos_token_id = before


def test_draws_are_their_requests_own(ours: Harness) -> None:
    """A request drawn again in another batch says the same; the next one, though equal, does not."""
    how = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    first = ours.generate_until(asked("generate_until", *[("the cat", how)] * 4))
    ours.batch = 1
    assert ours.generate_until(asked("generate_until", ("the cat", how))) == first[:1]
    ours.batch = 3
    assert len(set(first)) > 1
    assert ours.request("a", {"do_sample": True}).sampling.temperature == 1.0
    assert ours.request("a", {"temperature": 0.5}).sampling.temperature == 0.5
    assert ours.request("a", {"temperature": 0.5, "do_sample": False}).sampling.temperature == 0.0
    assert ours.request("a", {}).max_new == CONTEXT // 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_gen_toks": CONTEXT}, "max_gen_toks: 32; accepted: 1 to 31"),
        ({"num_beams": 4}, "generation_kwargs: num_beams: 4: accepted: until"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_what_a_task_wants_and_cannot_have(ours: Harness, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.request("the", how)


def test_continuations_that_cannot_be_scored(ours: Harness) -> None:
    with pytest.raises(ValueError, match=r"a continuation of \d+ tokens; the model's context holds 32"):
        ours.loglikelihood(asked("loglikelihood", ("the", WORDS * 3)), disable_tqdm=True)
    with pytest.raises(ValueError, match="0 tokens to score"):
        ours.loglikelihood(asked("loglikelihood", ("the", "")), disable_tqdm=True)
    with pytest.raises(ValueError, match="token 999; this model has ids 0 to"):
        score(ours.model, [((1, 999), (1,))])


@pytest.mark.parametrize(
    "position",
    [
        {"kind": "learned"},
        {"kind": "alibi", "heads": 2},
        {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0, "original": 4}},
    ],
)
def test_sequences_that_share_a_step_score_as_if_alone(position: dict[str, Any]) -> None:
    """In float64, for schemes that count from a sequence's start or plan for its length."""
    model = build(spec(position), seed=2).double().eval()
    g = torch.Generator().manual_seed(1)
    lengths = [3, 16, 1, 7, 9, 2, 5]
    rows = [tuple(torch.randint(0, 256, (n,), generator=g).tolist()) for n in lengths]
    asked = [(ids, tuple(range(i % len(ids) + 1))) for i, ids in enumerate(rows)] + [(rows[1], (7,))]
    told: list[tuple[int, int]] = []
    found = score(model, asked, batch=4, told=lambda done, total: told.append((done, total)))
    assert told[-1] == (8, 8) and len(told) == 2
    for (ids, targets), (nats, _) in zip(asked, found, strict=True):
        logits = model(rows_step(torch.tensor([ids]))).logits.log_softmax(-1)[-len(targets) :]
        want = logits.gather(1, torch.tensor(targets)[:, None]).sum().detach()
        assert nats == pytest.approx(float(want), abs=1e-10)
    best = int(model(rows_step(torch.tensor([rows[1]]))).logits[-1].argmax())
    assert score(model, [(rows[1], (best,)), (rows[1], (best ^ 1,))])[0][1]


def test_the_grid_holds_what_fits() -> None:
    assert first_fit([5, 3, 2, 2, 1], 5) == [[0], [1, 2], [3, 4]]
    step, begins = packed([(1, 2, 3, 4, 5), (6, 7, 8), (9,)])
    assert (step.grid, begins) == ((2, 5), [0, 5, 8])
    assert step.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert step.seq.tolist() == [0] * 5 + [1] * 3 + [2, -1]
    assert step.index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    assert (step.starts.tolist(), step.horizon.tolist()) == ([0, 5, 8, 10], [5, 3, 1])


@pytest.mark.parametrize("config", [{"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}, {}])
def test_special_tokens_are_added_as_transformers_adds_them(
    folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    from assay.measure.harness import Text

    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    said = json.loads((folder / "tokenizer_config.json").read_text()) | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    theirs, mine = transformers.AutoTokenizer.from_pretrained(tmp_path), Text(Tokenizer.load(tmp_path))
    for text in ("the moon", "", "a</s> b", " \n"):
        assert mine.encode(text) == theirs.encode(text)
        assert mine.encode(text, False) == theirs.encode(text, add_special_tokens=False)
