"""A model of ours under EleutherAI's lm-evaluation-harness (extra `hf`), as its own class for transformers has it.

How a text is cut into tokens and windows, and what counts, agrees with `lm_eval.models.huggingface.HFLM`, so that
scores can be compared with published ones. Where a tokenizer adds a first token, its rolling sums predict that token
too, after another one of its kind, and so do ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers as hf
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from assay.data.tokenizers import Tokenizer
from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.engine.runner import check_continues
from assay.measure.score import Ids, Row, score
from assay.model.lm import LM

Told = Callable[[str, int, int], None]
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NEUTRAL: Mapping[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}
MAX_GEN_TOKS = 256


class Harness(TemplateLM):
    """A decoder and its tokenizer. context: tokens that it may read, its own context where null. batch: sequences at
    once. told(what, done, all) hears of the progress.

    ValueError for a model that cannot continue a text.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        context: int | None = None,
        batch: int = 16,
        told: Told | None = None,
    ) -> None:
        super().__init__()
        check_continues(model.spec)
        self.model, self.words, self.batch, self.told = model.eval(), Text(tokenizer), batch, told
        self.max_length = context or model.spec.context
        self.ends = tokenizer.ends
        self.cut = 0  # requests that were longer than the context

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self.words.tokenizer.eos_id is None else self.words.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing precedes."""
        if self.words.first is None:
            raise ValueError("tokenizer_config.json: names no bos_token and no eos_token: a text cannot begin with one")
        return self.words.first

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a reply where the task does not say; half of a short context."""
        return min(MAX_GEN_TOKS, self.max_length // 2)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        return self.words.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = score(self.model, rows, self.batch, self._progress("scoring"))
        for (asked, _, _), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def _row(self, context: Ids, continuation: Ids) -> Row:
        """Cut from the left where it is longer than the context; the last token is predicted and never read."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens; the model's context holds {self.max_length}"
            )
        whole = context + continuation
        self.cut += len(whole) > self.max_length + 1
        return whole[-(self.max_length + 1) :][:-1], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts: windows of the context's length, each token predicted once, with all the context that
        fits; each text by itself."""
        windows = [self._windows(request.args[0]) for request in requests]
        asked = [(None, *window) for text in windows for window in text]
        scores = iter(self._loglikelihood_tokens(asked))
        found = [sum((next(scores)[0] for _ in text), 0.0) for text in windows]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        given = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in given]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies up to a stop text. A draw depends on its request's place and on nothing beside it in the batch."""
        asked = [self.request(context, how, i) for i, (context, how) in enumerate(r.args for r in requests)]
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt), reverse=True)
        replies, told = [""] * len(asked), self._progress("generating")
        for first in range(0, len(order), self.batch):
            piece = order[first : first + self.batch]
            for i, reply in zip(piece, self._replies([asked[i] for i in piece]), strict=True):
                replies[i] = reply
                self.cache_hook.add_partial("generate_until", requests[i].args, reply)
            told(first + len(piece), len(order))
        return replies

    def request(self, context: str, wanted: Mapping[str, Any], number: int = 0) -> Request:
        """A prompt that leaves room for the reply, cut from the left, and how the task wants it continued."""
        how: dict[str, Any] = dict(normalize_gen_kwargs(dict(wanted), self.max_gen_toks))
        end = self.words.named(self.words.tokenizer.eos_id)
        stop = tuple(text for text in handle_stop_sequences(how.pop("until"), end) if text)
        new = how.pop("max_gen_toks")
        how["temperature"] = how.get("temperature", 1.0) if how.pop("do_sample") else 0.0
        if not 1 <= new < self.max_length:
            raise ValueError(f"max_gen_toks: {new}; accepted: 1 to {self.max_length - 1}, by the model's context")
        if strange := {k: v for k, v in how.items() if k not in SAMPLING and NEUTRAL.get(k) != v}:
            told = ", ".join(f"{key}: {value}" for key, value in strange.items())
            raise ValueError(
                f"generation_kwargs: {told}: accepted: until, max_gen_toks, do_sample, {', '.join(SAMPLING)}"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(prompt) > self.max_length - new
        return Request(
            prompt=tuple(prompt[new - self.max_length :]),
            sampling=SamplingParams(seed=number, **{k: how[k] for k in SAMPLING if k in how}),
            max_new=new,
            stop_tokens=self.ends,
            stop=stop,
        )

    def _replies(self, requests: Sequence[Request]) -> Iterator[str]:
        said: list[list[int]] = [[] for _ in requests]
        for token in generate(self.model, self.words.tokenizer, requests):
            if token.id is not None and token.id not in self.ends:
                said[token.request].append(token.id)
        for ids, request in zip(said, requests, strict=True):
            yield postprocess_generated_text(self.words.tokenizer.decode(ids), list(request.stop), None)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        told = self.told
        return lambda done, total: None if told is None else told(what, done, total)


class Text:
    """A tokenizer as transformers uses one: special tokens are added as tokenizer.json says (whatever `add_bos_token`
    of tokenizer_config.json says beside it), and a text that spells one gets its id, unless `split_special_tokens` is
    set. The engine's own does neither."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.hf = hf.Tokenizer.from_str(tokenizer.hf.to_str())
        self.hf.encode_special_tokens = bool(tokenizer.config.get("split_special_tokens", False))
        self.hf.no_padding()
        self.hf.no_truncation()
        self.first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        alone = self.hf.encode_special_tokens or not tokenizer.hf.get_added_tokens_decoder()
        self._plain = alone and self.hf.num_special_tokens_to_add(False) == 0

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """special: whether special tokens are added; null adds them unless the text begins with the first one."""
        if self._plain:  # the tokenizer itself reads bytes and characters faster
            return [int(i) for i in self.tokenizer.encode(text)]
        first = self.named(self.first)
        add = special if special is not None else not (first and text.startswith(first))
        return list(self.hf.encode(text, add_special_tokens=add).ids)

    def named(self, token: int | None) -> str | None:
        """How a text spells a token."""
        return None if token is None else self.hf.decode([token], skip_special_tokens=False)


def evaluate(
    lm: Harness, tasks: Mapping[str, Any], limit: int | None = None, fewshot: int | None = None, trust: bool = False
) -> dict[str, Any]:
    """The harness's results on tasks that `assay.measure.taskfiles.load_tasks` made.

    limit: the first so many documents of each. fewshot: examples before each; a task that says 0 keeps it.
    trust: templates run outside of the sandbox, and a task may run the code that the model writes.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate as run

    from assay.measure.taskfiles import sandbox

    for task in tasks["tasks"].values():
        said = task.get_config("num_fewshot")
        if said is None or (fewshot is not None and said != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with sandbox(trust):
        found = run(
            lm=lm,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            confirm_run_unsafe_code=trust,
        )
    return dict(found or {})


BOOTSTRAP = 1000
"""Draws for the errors that have no closed form. The harness's own 100 000 take minutes and change the second digit."""
