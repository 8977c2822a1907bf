"""Forward and backward of the norms beside torch's functions and the formulas written out.

python benchmarks/norms.py [--tokens 512 4096] [--widths 64 384] [--kinds layernorm rmsnorm] [--seconds 5] [--threads 1]

Medians of interleaved rounds in float32; ratios are to the part `layernorm`.
"""

from __future__ import annotations

import argparse

import torch

from assay.measure.norms import BASE, functions, parts, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 384])
    parser.add_argument("--kinds", nargs="+", default=["rmsnorm"])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each size")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{'tokens':>7} {'width':>6} {'kind':>18} {'forward us':>11} {'backward us':>12} {'ratio':>6} {'forward':>8}")
    for tokens in given.tokens:
        for width in given.widths:
            x, upstream = (torch.randn(tokens, width) for _ in range(2))
            times = timed(parts((BASE, *given.kinds), x) | functions(x), x, upstream, given.seconds)
            for kind, (forward, backward) in times.items():
                ratio, alone = (forward + backward) / sum(times[BASE]), forward / times[BASE][0]
                print(
                    f"{tokens:>7} {width:>6} {kind:>18} {forward * 1e6:>11.0f} {backward * 1e6:>12.0f}"
                    f" {ratio:>6.2f} {alone:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
