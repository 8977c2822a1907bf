"""Loss of a trained model whose keys and values are stored quantised: 8, 4 and 2 bits, keys or values, both axes.

python benchmarks/kv_formats.py CHECKPOINT --text FILE [--tokens 512] [--page 32] [--residual 32] [--context 512]

The text is read in windows of `context` tokens from empty, in steps of `page` tokens, so that each token is predicted
from pages that were quantised before it came. One line of JSON a format: nats a token, the difference to no format, the
standard error of that difference over tokens, and bits a stored value with scales and zeros.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import assay
from assay.cache import PageSize
from assay.cache.coded import Quantised
from assay.cache.formats import Format, Formats
from assay.model.lm import LM, state_table
from assay.ops.step import rows_step


def formats() -> dict[str, dict[str, str]]:
    """Names to rules: one of keys and values at a time, then both as KIVI has them and the other way round."""
    out: dict[str, dict[str, str]] = {"none": {}}
    for bits in (8, 4, 2):
        for field in "kv":
            for axis in ("channel", "token"):
                out[f"{field} int{bits}/{axis}"] = {f"*.{field}": f"int{bits}/{axis}"}
        out[f"k channel, v token, int{bits}"] = {"*.k": f"int{bits}/channel", "*.v": f"int{bits}/token"}
        out[f"k token, v channel, int{bits}"] = {"*.k": f"int{bits}/token", "*.v": f"int{bits}/channel"}
    return out


@torch.inference_mode()
def losses(model: LM, ids: Tensor, size: PageSize, chosen: Formats) -> Tensor:
    """Nats of every token of [W, T] but the first of each window; a window is a sequence."""
    weight = next(model.parameters())
    store = Quantised(state_table(model.spec), size, weight.dtype, weight.device, chosen)
    slots, found = [store.open() for _ in ids], []
    for piece in ids.split(size.page, 1):
        step = rows_step(piece, store.length(slots[0]), ids.shape[1])
        logits = model(step, store.begin(slots, step)).logits
        assert logits is not None
        store.settle(slots)
        found.append(logits.view(*piece.shape, -1).float())
    together = torch.cat(found, 1)[:, :-1]
    return F.cross_entropy(together.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def bits(model: LM, size: PageSize, rules: Mapping[str, str]) -> float:
    """Of a stored value in a full page, scales and zeros included; of the fields that have a format."""
    fields, total, values = state_table(model.spec), 0, 0
    for (part, name), form in Formats(rules).resolve(fields, size).items():
        shape = (size.page, *next(f.shape for f in fields[part] if f.name == name))
        assert isinstance(form, Format)
        total, values = total + 8 * form.bytes(shape), values + torch.Size(shape).numel()
    return total / values if values else 8.0 * next(model.parameters()).element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    for name, default in (("tokens", 512), ("page", 32), ("residual", 32), ("context", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    model, tokenizer = assay.load(given.checkpoint)
    text = given.text.read_text()
    if given.text.suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.splitlines())
    windows = given.tokens // given.context
    ids = torch.tensor(tokenizer.encode(text[: 20 * given.tokens])[: windows * given.context]).view(windows, -1)
    size = PageSize(windows, given.page, windows * -(-given.context // given.page), given.page)
    base = None
    for name, rules in formats().items():
        found = losses(model, ids, size, Formats(rules, given.residual))
        base = found if base is None else base
        delta = found - base
        error = float(delta.std() / delta.numel() ** 0.5)
        row = {"nats": float(found.mean()), "delta": float(delta.mean()), "standard_error": error}
        print(json.dumps({"formats": name, "bits": bits(model, size, rules), **row}), flush=True)


if __name__ == "__main__":
    main()
