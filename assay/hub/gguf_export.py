"""A model as a GGUF file, for llama.cpp: the way of `gguf_names` back, proven by going it again.

Only architectures whose computation in llama.cpp is known for certain are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from torch import Tensor

from assay import __version__
from assay.data.tokenizers import Tokenizer
from assay.hub.card import GGUF, Origin, card
from assay.hub.config import Tree
from assay.hub.export import Exported, new_folder, sizes, theirs
from assay.hub.express import Expressed, agree, as_family
from assay.hub.family import families
from assay.hub.gguf import Entry, Gguf
from assay.hub.gguf_config import source_of
from assay.hub.gguf_names import ARCHITECTURES, EXPERT_LLAMA, LAYER, OUTER, USUAL, Architecture
from assay.hub.gguf_vocab import vocabulary
from assay.model.lm import LM
from assay.parts.positions._scaling import inverse
from assay.spec.model import ModelSpec

CERTAIN = (
    ("llama", ARCHITECTURES["llama"]),
    ("llama", EXPERT_LLAMA),
    *((name, ARCHITECTURES[name]) for name in ("qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "granite", "olmo2")),
)
KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
FILE = "model.gguf"


def export_gguf(
    model: LM, tokenizer: Tokenizer, out: Path, dtype: str | None = None, origin: Origin | None = None
) -> Exported:
    """Write model.gguf and README.md into `out`, which must not exist or be empty. dtype: of the matrices (KINDS);
    null is bf16 for a model in bfloat16, else f32. Vectors stay in float32.

    ValueError for a model or a tokenizer that llama.cpp does not have.
    """
    origin, spec = origin or Origin(out.name), model.spec
    wanted = dtype or ("bf16" if next(model.parameters()).dtype == torch.bfloat16 else "f32")
    name, known, found, values, why = architecture(spec)
    words = vocabulary(tokenizer, spec.vocab)
    tensors = converted(theirs(model, found), known, found.config)
    values = {"general.name": origin.name, "general.file_type": int(KINDS[wanted][1]), **values, **words}
    values |= {"general.quantization_version": 2} if wanted.startswith("q") else {}
    with new_folder(out) as folder:
        write(folder / FILE, name, values, factors(spec) | tensors, wanted)
        made = f"Written by assay {__version__} for llama.cpp, as its architecture `{name}`; matrices in {wanted}."
        (folder / "README.md").write_text(card(spec, made, origin, GGUF), "utf-8")
    return Exported(name, why, sizes(out))


def architecture(spec: ModelSpec) -> tuple[str, Architecture, Expressed, Tree, dict[str, str]]:
    """llama.cpp's name for a model, how it is read, the family behind it, the file's values, and why others are not
    it."""
    why: dict[str, str] = {}
    for name, known in CERTAIN:
        try:
            found = as_family(spec, families()[known.model_type])
            values = described(spec, found.config, name, known)
            agree(spec, source_of(header(spec, found, known, values)).spec)
            return name, known, found, values, why
        except ValueError as error:
            why[known.model_type] = str(error)
    told = "; ".join(f"{name}: {reason}" for name, reason in why.items())
    raise ValueError(f"--format gguf: no architecture of llama.cpp is this model ({told})")


def described(spec: ModelSpec, config: Tree, name: str, known: Architecture) -> Tree:
    """The file's values about the model."""
    head_dim, rules = config["head_dim"], config["rope_parameters"]
    rules = rules.get("full_attention", rules)  # Gemma 3 has one for each kind of layer
    flat = {**config, "rope_theta": rules["rope_theta"]}
    keys = {**USUAL, **known.keys}
    found = {ours: flat[hf] for ours, hf in keys.items() if flat.get(hf) is not None}
    found |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_dim)
    found["vocab_size"] = spec.vocab
    if rules["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": rules["rope_type"], "rope.scaling.factor": rules["factor"]}
    if rules["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rules["original_max_position_embeddings"]
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in found.items()}}


def header(spec: ModelSpec, found: Expressed, known: Architecture, values: Mapping[str, Any]) -> Gguf:
    """The file as its reader will see it, with nothing in its tensors but what a configuration is read from."""
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in together(theirs(LM(spec), found), known).items()}
    entries = {key: Entry(key, shape, GGMLQuantizationType.F32, 0, 4 * shape[-1]) for key, shape in shapes.items()}
    data = np.zeros(0, np.uint8)
    for key, array in factors(spec).items():
        entries[key] = Entry(key, array.shape, GGMLQuantizationType.F32, 0, array.nbytes)
        data = array.view(np.uint8)
    told = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in values.items()}
    return Gguf("--format gguf", told, entries, data)


def factors(spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """Llama 3's scaling is a tensor: by how much each frequency is divided."""
    schemes: list[Any] = [
        s for s in spec.positions.values() if getattr(getattr(s, "scaling", None), "kind", "") == "llama3"
    ]
    if not schemes:
        return {}
    mixer: Any = next(b.part for _, _, b in spec.branches(0) if b.mixer is not None)
    plain = inverse(schemes[0].theta, mixer.size(spec.site(0)))
    scaled = schemes[0].scaling.frequencies(schemes[0].theta, plain, torch.zeros(1, dtype=torch.long))
    return {"rope_freqs.weight": (plain / scaled).float().numpy()}


def together(tensors: Mapping[str, Tensor], known: Architecture) -> dict[str, Tensor]:
    """Tensors under the file's names; those of single experts one above the other, in the order that they have."""
    found: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        found.setdefault(renamed(key, known), []).append(tensor.detach())
    return {new: torch.stack(parts) if "_exps." in new else parts[0] for new, parts in found.items()}


def renamed(name: str, known: Architecture) -> str:
    """A tensor's name in the file."""
    stem, _, leaf = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    if stem in outer:
        return f"{outer[stem]}.{leaf}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    inner = {theirs: ours for ours, theirs in {**LAYER, **known.names}.items()}
    return f"blk.{layer}.{inner[re.sub(r'[.][0-9]+[.]', '.#.', rest)]}.{leaf}"


def converted(tensors: Mapping[str, Tensor], known: Architecture, config: Tree) -> dict[str, NDArray[np.float32]]:
    """Tensors in float32 under the file's names: queries and keys in neighbouring pairs, norms complete, as the
    architecture has them."""
    found = {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for new, tensor in together(tensors, known).items():
        value, stem = tensor.float(), new.split(".")[-2]
        if known.turned and stem in heads:
            value = value.unflatten(0, (heads[stem], 2, -1)).transpose(1, 2).flatten(0, 2)
        if stem.endswith("norm"):
            value = value + known.less
        found[new] = value.contiguous().numpy()
    return found


def kind_of(name: str, shape: tuple[int, ...], wanted: str) -> GGMLQuantizationType:
    """Vectors and routers in float32; with q4_0 the embedding and the head in q8_0, as llama.cpp spares them; rows that
    are no whole blocks in float16."""
    kind = KINDS[wanted][0]
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    if wanted == "q4_0" and name in ("token_embd.weight", "output.weight"):
        kind = GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16 if wanted.startswith("q") and shape[-1] % 32 else kind


def write(path: Path, name: str, values: Tree, tensors: Mapping[str, NDArray[np.float32]], wanted: str) -> None:
    """The file, one tensor quantised at a time."""
    writer = GGUFWriter(path, name)
    for key, value in values.items():
        if key != "general.architecture":  # which the writer has put there itself
            put(writer, key, value)
    kinds = {key: kind_of(key, array.shape, wanted) for key, array in tensors.items()}
    for key, array in tensors.items():
        shape = quant_shape_to_byte_shape(array.shape, kinds[key])
        writer.add_tensor_info(key, shape, np.dtype(np.uint8), prod(shape), raw_dtype=kinds[key])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, array in tensors.items():
            writer.write_tensor_data(quantize(array, kinds[key]))
    finally:
        writer.close()


def put(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    writer.add_key_value(key, value, kinds.get(type(value), GGUFValueType.STRING))
