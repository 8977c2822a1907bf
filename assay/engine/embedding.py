"""Texts to vectors: the features of a model, pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.data.tokenizers import Tokenizer
from assay.engine.config import position_limit
from assay.engine.runner import Ids, right_padded
from assay.model.lm import LM, head_site
from assay.parts.heads.pooled import Pooled


@dataclass(frozen=True)
class Tokens:
    """The ids of each text, and which texts were cut to fit."""

    ids: tuple[Ids, ...]
    cut: tuple[int, ...]


def tokenised(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> Tokens:
    """Ids with the special tokens that the tokenizer puts around a text, at most `limit` of them in all.

    ValueError for a text without a token.
    """
    if tokenizer.hf.post_processor is None:
        whole = [tokenizer.encode(text).tolist() for text in texts]
        found = Tokens(tuple(ids[:limit] for ids in whole), tuple(i for i, ids in enumerate(whole) if len(ids) > limit))
    else:
        tokenizer.hf.enable_truncation(limit)
        made = tokenizer.hf.encode_batch(list(texts))
        tokenizer.hf.no_truncation()
        found = Tokens(tuple(e.ids for e in made), tuple(i for i, e in enumerate(made) if e.overflowing))
    for number, ids in enumerate(found.ids):
        if not ids:
            raise ValueError(f"text {number + 1} of {len(texts)} has no tokens")
    return found


class Embedder:
    """A model whose head is replaced by a pooled one; the rest is the model's own. Puts it into evaluation mode.

    ValueError for an encoder-decoder: which of its two halves stands for a text is not said.
    """

    def __init__(self, model: LM, pooled: Pooled) -> None:
        if model.spec.encoder is not None:
            raise ValueError("this is an encoder-decoder; accepted: an encoder or a decoder alone")
        self.device = next(model.parameters()).device
        model.spec = model.spec.model_copy(update={"head": pooled})
        model.head = pooled.build(head_site(model.spec))
        self.model = model.eval()

    @property
    def limit(self) -> int:
        """The longest text in tokens: where the positions end, or what the model is meant for."""
        return position_limit(self.model.spec) or self.model.spec.context

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], batch: int = 32) -> Float[Tensor, "B D"]:
        """A vector for each text, in float32 on the CPU. Texts of like length share a batch, to pad little.

        ValueError for ids that the model does not have.
        """
        vocab = self.model.spec.vocab
        for ids in texts:
            if not 0 <= min(ids) <= max(ids) < vocab:
                raise ValueError(f"token {max(ids)}; this model has ids 0 to {vocab - 1}")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.model.spec.d_model)
        for at in range(0, len(order), batch):
            some = order[at : at + batch]
            rows = [texts[i] for i in some]
            step = right_padded(rows, [0] * len(rows), [len(ids) for ids in rows], self.device).with_(emit=None)
            vectors = self.model(step).logits
            assert vectors is not None
            found[some] = vectors.float().cpu()
        return found
