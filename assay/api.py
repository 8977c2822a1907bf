"""The package from Python: `assay.spec`, `assay.bill`, `assay.load`. Each imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.cost.bill import Bill
    from assay.data.tokenizers import Tokenizer
    from assay.model.lm import LM
    from assay.spec.model import ModelSpec


def spec(name: str | Path, /, **changes: Any) -> ModelSpec:
    """A model's spec: a shipped name, a YAML file or a checkpoint folder, with dotted changes.

    `assay.spec("gpt-11m", layers=4, **{"blocks.*.mixer.kv_heads": 2})`.
    ValueError names the field and what is accepted.
    """
    from assay.spec.load import load_model

    return load_model(name, changes)


def bill(model: ModelSpec | str | Path, /, **question: Any) -> Bill:
    """Exact parameters, state bytes and FLOPs of a spec, or of what `spec` accepts; nothing is allocated.

    The question's fields are those of `assay.cost.bill.Question`: context (the model's own if absent), batch, dtype...
    """
    from assay.cost.bill import Question
    from assay.cost.bill import bill as total

    known = spec(model) if isinstance(model, str | Path) else model
    return total(known, Question(**{"context": known.context, **question}))


def load(path: str | Path, /, device: str = "cpu") -> tuple[LM, Tokenizer]:
    """A checkpoint's model (an `nn.Module`, in evaluation mode) and its tokenizer."""
    from assay.train.checkpoint import load_checkpoint

    model, tokenizer, _ = load_checkpoint(path, device)
    return model, tokenizer
