"""Small models and requests for engines that hand over; light to import, since processes of their own do."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from assay.data.corpora import Corpus, Documents
from assay.data.tokenizers import TokenizerSpec, build_tokenizer
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine
from assay.engine.request import Request, SamplingParams
from assay.model.lm import LM, build
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.cache.models import spec, tokens

MIXERS: dict[str, dict[str, Any]] = {
    "mla": {"kind": "mla", "heads": 2, "nope_dim": 4, "rope_dim": 2, "value_dim": 4, "kv_rank": 6, "position": "p"},
    "mamba2": {"kind": "mamba2", "head_dim": 8, "state_size": 4, "chunk": 4},
}
TEXT = build_tokenizer(TokenizerSpec(), Corpus(Documents((), str), Documents((), str)))
WILD = SamplingParams(temperature=1.2, seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)
PAGES = EngineConfig(tokens=64, page=4, border=1, max_running=4)
ROWS = EngineConfig(tokens=64, page=None, max_running=4)


@cache
def lm_of(kind: str, dtype: torch.dtype = torch.float64) -> LM:
    names = kind.split("-")
    tree = spec([name for name in names if name not in MIXERS] or ["full"]).model_dump(mode="json")
    plain = tree["blocks"]
    whole = {name: {"mixer": MIXERS[name], "ffn": {"kind": "gated", "width": 24}} for name in names if name in MIXERS}
    keep = {name: plain[name] for name in names if name in plain}
    tree |= {"blocks": keep | whole, "layers": len(names), "pattern": names}
    return build(validate(ModelSpec, tree, "test"), seed=3).to(dtype).eval()


def asked(length: int = 21, new: int = 9, seed: int = 4, **more: Any) -> Request:
    return Request(prompt=tuple(tokens(1, length, seed)[0].tolist()), max_new=new, **{"sampling": WILD, **more})


@cache
def engine(kind: str, config: EngineConfig = PAGES, dtype: torch.dtype = torch.float32) -> Engine:
    """What every process of a cluster makes for itself."""
    torch.set_num_threads(1)
    return Engine(lm_of(kind, dtype), TEXT, config)
