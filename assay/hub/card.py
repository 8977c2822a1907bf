"""The README.md of an exported model: what it is, how it was made, how well it did, and what loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from assay import __version__
from assay.model.lm import weight_table
from assay.spec.load import canonical, digest, to_yaml
from assay.spec.model import ModelSpec


@dataclass(frozen=True)
class Origin:
    """Where the weights come from. name: of the model. recipe: YAML text and digest of a training run's; null without
    one. scores: the last measurements by name."""

    name: str = "model"
    recipe: str | None = None
    recipe_digest: str | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)


HEAD = """---
library_name: {library}
pipeline_tag: {pipeline}
tags:
- assay
---

# {name}

{family}

| | |
|---|---|
| parameters | {params:,} |
| context | {context:,} tokens |
| vocabulary | {vocab:,} |
| spec digest | `{digest}` |
"""

KNOWN = """## Use

transformers:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Servers that have this architecture: `vllm serve FOLDER`, or `python -m sglang.launch_server --model-path FOLDER`.
"""

OWN = """## Use

The modelling code is in this folder and needs the package `assay` (the model was written by version {version}):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
```

`generate` works, with the package's cache. vLLM and SGLang do not load it: they have no implementation of this
architecture, and what follows says where it parts from those they have.

| family | why not |
|---|---|
{why}
"""

GGUF = """## Use

`llama-cli -m model.gguf -p TEXT`, or `llama-server -m model.gguf`, of llama.cpp.
"""


PIPELINES = {
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModel": "feature-extraction",
}
"""What a class of transformers is for, where it is not to go on with a text."""


def card(spec: ModelSpec, family: str, origin: Origin, use: str) -> str:
    """The whole text. family: a sentence on what the files hold; use: KNOWN or OWN (filled in), or GGUF."""
    params = sum(weight.numel for weight in weight_table(spec).values())
    library = "gguf" if use is GGUF else "transformers"
    facts = {"params": params, "context": spec.context, "vocab": spec.vocab, "digest": digest(spec)}
    pipeline = next((use_for for name, use_for in PIPELINES.items() if f"import {name}," in use), "text-generation")
    text = HEAD.format(library=library, pipeline=pipeline, name=origin.name, family=family, **facts)
    if origin.recipe_digest is not None:
        text += f"| recipe digest | `{origin.recipe_digest}` |\n"
    if origin.scores:
        text += "\n## Scores\n\n| measure | value |\n|---|---|\n"
        text += "".join(f"| {name} | {shown(value)} |\n" for name, value in origin.scores.items())
    text += f"\n{use}\n## Architecture\n\n```yaml\n{to_yaml(canonical(spec))}```\n"
    if origin.recipe is not None:
        text += f"\n## Training\n\n```yaml\n{origin.recipe.rstrip()}\n```\n"
    return text


def own_code(why: Mapping[str, str]) -> str:
    """OWN with the table of families. The bars in a reason would cut its cell."""
    rows = (f"| {name} | {reason.replace('|', '/')} |" for name, reason in why.items())
    return OWN.format(version=__version__, why="\n".join(rows))


def shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
