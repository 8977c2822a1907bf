"""The package from Python: spec, bill, load, study. Each imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.cost.bill import Bill
    from assay.data.tokenizers import Tokenizer
    from assay.model.lm import LM
    from assay.spec.model import ModelSpec
    from assay.spec.result import Result


def spec(name: str | Path, /, **changes: Any) -> ModelSpec:
    """A model's spec: a shipped name, a YAML file or a checkpoint folder, with dotted changes.

    `assay.spec("gpt-11m", layers=4, **{"blocks.*.mixer.kv_heads": 2})`.
    ValueError names the field and what is accepted.
    """
    from assay.spec.load import load_model

    return load_model(name, changes)


def bill(model: ModelSpec | str | Path, /, **question: Any) -> Bill:
    """Exact parameters, state bytes and FLOPs of a spec, of what `spec` accepts, or of a Hugging Face config.json or
    folder; nothing is allocated.

    The question's fields are those of `assay.cost.bill.Question`: context (the model's own if absent), batch, dtype...
    """
    from assay.cost.bill import Question
    from assay.cost.bill import bill as total
    from assay.hub.specs import spec_of

    known = spec_of(model)[0] if isinstance(model, str | Path) else model
    return total(known, Question(**{"context": known.context, **question}))


def load(path: str | Path, /, device: str = "cpu") -> tuple[LM, Tokenizer]:
    """The model (an `nn.Module`, in evaluation mode) and the tokenizer of a checkpoint or a Hugging Face folder."""
    from assay.hub.specs import is_hugging_face
    from assay.train.checkpoint import load_checkpoint

    if is_hugging_face(Path(path)):
        from assay.hub.load import import_folder
        from assay.hub.tokenizer import folder_tokenizer

        return import_folder(Path(path)).model.to(device), folder_tokenizer(Path(path))
    model, tokenizer, _ = load_checkpoint(path, device)
    return model, tokenizer


def study(
    name: str | Path, /, out: str | Path, budget: str = "quick", workers: int = 0, **changes: Any
) -> list[Result]:
    """Run a study into the folder `out`, or go on with it there, write its report, and return its Results.

    name: a shipped study or a YAML file. changes: dotted, from `model.` or `recipe.`: `**{"recipe.tokens": 8192}`.
    workers: 0 is one for each core; they are processes that import the main module again, so a script calls this under
    `if __name__ == "__main__":`. ValueError for what is not accepted; RuntimeError names the runs that failed.
    """
    from assay.measure.machine import environment
    from assay.report import write_report
    from assay.study.materials import materials
    from assay.study.plan import Request
    from assay.study.rate import training_rate
    from assay.study.run import Session, run_study
    from assay.study.runners.local import Pool
    from assay.study.spec import load_study

    if workers < 0:
        raise ValueError(f"workers: {workers}; accepted: 0 (one for each core) or more")
    stem, spec = load_study(name)
    session = Session(materials(rate=training_rate), Pool(workers=workers), environment=environment)
    done = run_study(Request(stem, spec, budget, changes), out, session)
    write_report(Path(out))
    if done.failed:
        raise RuntimeError("; ".join(f"{failed.trial.name}: {failed.why.splitlines()[0]}" for failed in done.failed))
    return list(done.results)
