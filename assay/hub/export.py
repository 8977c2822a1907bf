"""A model as a folder that transformers loads: of a family that it has, or with modelling code of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from assay import __version__
from assay.data.settings import STARTS
from assay.data.tokenizers import Tokenizer
from assay.hub.card import KNOWN, Origin, card, own_code
from assay.hub.config import Tree
from assay.hub.express import Expressed, express
from assay.hub.family import copies
from assay.hub.live import AUTO, task
from assay.model.lm import LM
from assay.spec.base import PartSpec
from assay.spec.load import digest, dump
from assay.spec.model import ModelSpec

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}
TOKENS = ("bos", "eos", "pad")
CODE = "modeling_assay"


@dataclass(frozen=True)
class Exported:
    """What was written. family: whose architecture the files are, null for code of their own. why_not: the families
    that were asked before, and the fields in which the model is not theirs. bytes: by file."""

    family: str | None
    why_not: dict[str, str]
    bytes: dict[str, int] = field(default_factory=dict)


def export_hf(
    model: LM, tokenizer: Tokenizer, out: Path, dtype: str | None = None, origin: Origin | None = None
) -> Exported:
    """Write `out`, which must not exist or be empty. dtype: f32 or bf16; null keeps each tensor's own.

    Raises ValueError for a model that neither a family nor a decoder with modelling code of its own expresses.
    """
    origin = origin or Origin(out.name)
    found, why = express(model.spec)
    tensors = own(model) if found is None else theirs(model, found)
    config = own_config(model.spec) if found is None else found.config
    wanted = None if dtype is None else DTYPES[dtype]
    kept = next(model.parameters()).dtype if wanted is None else wanted
    tokens = token_ids(tokenizer) | ({} if model.spec.encoder is None else begins(tokenizer))
    config = {**tokens, **config, "dtype": str(kept)[6:], "torch_dtype": str(kept)[6:]}
    with new_folder(out) as folder:
        save_torch_state_dict(
            {name: alone(t, wanted) for name, t in tensors.items()}, folder, metadata={"format": "pt"}
        )
        tokenizer.save(folder)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
        if found is None:
            shutil.copyfile(Path(__file__).with_name("remote_code.py"), folder / f"{CODE}.py")
        (folder / "README.md").write_text(described(model.spec, found, why, origin), "utf-8")
    return Exported(found.name if found is not None else None, why, sizes(out))


def described(spec: ModelSpec, found: Expressed | None, why: Mapping[str, str], origin: Origin) -> str:
    made = f"Written by assay {__version__}"
    if found is None:
        return card(spec, f"{made}, with modelling code of its own.", origin, own_code(why))
    family = f"{made} as a model of the family `{found.config['model_type']}`, which computes exactly this spec."
    return card(spec, family, origin, KNOWN.format(auto=AUTO[task(spec)]))


def theirs(model: LM, found: Expressed) -> dict[str, Tensor]:
    """Every tensor of the family's files from our parameters."""
    ours = {found.names[name]: p for name, p in model.named_parameters()}
    table: dict[str, Tensor] = {}
    with torch.no_grad():
        for copy in copies(found.family, found.spec):
            written = copy.rule.write([ours[name] for name in copy.place.names], copy.place)
            table |= dict(zip(copy.theirs, written, strict=True))
    return table


def own(model: LM) -> dict[str, Tensor]:
    """The parameters as the modelling code names them; layers that share theirs have a copy each."""
    check_own(model.spec)
    once = {name for name, _ in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {f"model.{name}": p.detach() if name in once else p.detach().clone() for name, p in named}


def check_own(spec: ModelSpec) -> None:
    """ValueError for what the modelling code does not carry."""
    if spec.encoder is not None or spec.head is None or spec.head.kind_name() != "lm":
        raise ValueError("encoder, head: the modelling code is for decoders with a head of kind lm and no encoder")
    for site, part in spec.parts():
        if (reason := part.refusals().get("causal")) is not None:
            raise ValueError(f"{site.name}: the modelling code is for decoders: {reason}")
        if not all(type(p).__module__.startswith("assay.") for p in parts_of(part)):
            raise ValueError(f"{site.name}: {part.kind_name()!r} is not part of the package, which the code relies on")


def parts_of(value: Any) -> Iterator[PartSpec]:
    """A part and the parts in its fields."""
    if isinstance(value, PartSpec):
        yield value
    for name in type(value).model_fields if hasattr(type(value), "model_fields") else ():
        yield from parts_of(getattr(value, name))


def own_config(spec: ModelSpec) -> Tree:
    return {
        "model_type": "assay",
        "architectures": ["AssayForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE}.AssayConfig", "AutoModelForCausalLM": f"{CODE}.AssayForCausalLM"},
        "vocab_size": spec.vocab,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.layers,
        "max_position_embeddings": spec.context,
        # A tied head reads the table itself; by this transformers knows that layers share weights.
        "tie_word_embeddings": spec.sources != tuple(range(spec.layers)),
        "use_cache": True,
        "assay_version": __version__,
        "spec_digest": digest(spec),
        "assay": dump(spec),
    }


def token_ids(tokenizer: Tokenizer) -> Tree:
    """The ids of the special tokens: all named, so that no library puts its own."""
    found = {f"{name}_token_id": tokenizer.special(f"{name}_token") for name in TOKENS}
    return found | {"eos_token_id": sorted(tokenizer.ends) if tokenizer.also_end else tokenizer.eos_id}


def begins(tokenizer: Tokenizer) -> Tree:
    """What a decoder that an encoder stands beside begins with, and nothing that it must end with."""
    starts = dict(zip(STARTS, tokenizer.starts, strict=False))
    return {**dict.fromkeys(STARTS), **starts, "forced_eos_token_id": None}


def alone(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, with memory that nothing else shares: what a rule cut out of another is copied."""
    found = tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
    return found.clone() if found.untyped_storage().nbytes() != found.nbytes else found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(spelled(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def spelled(value: Any) -> Any:
    """Infinity as transformers writes it, for which JSON has no number."""
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: spelled(inner) for key, inner in value.items()}
    return [spelled(inner) for inner in value] if isinstance(value, list | tuple) else value


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when all is written, and is removed when anything fails.

    ValueError where `out` holds something: nothing is written over.
    """
    check_new(out)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if out.is_dir():
            out.rmdir()
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there and not empty; choose another folder")
