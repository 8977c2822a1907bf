"""What a decode step costs beside streaming its weights: microseconds a layer over the model's linears alone.

python benchmarks/decode.py [MODEL] [--batch 1] [--context 192] [--threads N]
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
import torch.nn.functional as F

from assay.measure.machine import seconds
from assay.measure.serving import Load, Serving, roofline
from assay.model.lm import build, weight_table
from assay.spec.load import load_model

NEW = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="gpt-11m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    spec = load_model(given.model)
    model, device = build(spec).eval(), torch.device("cpu")
    load = Load(given.batch, given.context, NEW)
    table, tied = weight_table(spec), spec.head is not None and "head.out.weight" not in weight_table(spec)
    streamed = {name for name, w in table.items() if w.flops or (tied and name == "embed.weight")}
    matrices = [p.detach() for name, p in model.named_parameters() if name in streamed]
    inputs = {w.shape[1]: torch.randn(given.batch, w.shape[1]) for w in matrices}

    def linears() -> None:
        with torch.inference_mode():
            for weight in matrices:
                F.linear(inputs[weight.shape[1]], weight)

    # In turns, so that a busy machine slows both.
    steps, alone = [], []
    for _ in range(3):
        gaps = Serving(model, load).measure(0.6).gaps
        steps.append(median(gaps))
        alone.append(median(seconds(linears, device) for _ in range(NEW)))
    whole, floor, roof = min(steps), min(alone), roofline(model, load)
    print(
        f"decode {1e3 * whole:.2f} ms a step, its linears alone {1e3 * floor:.2f}, roofline {1e3 * roof.decode_s:.2f}"
    )
    print(f"{1e6 * (whole - floor) / spec.layers:.0f} microseconds a layer beyond the linears ({spec.layers} layers)")


if __name__ == "__main__":
    main()
