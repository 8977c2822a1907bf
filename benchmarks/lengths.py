"""Attention by length, forward and with backward: seconds, bytes held and bytes moved, and the powers they grow with.

python benchmarks/lengths.py [--lengths 1024 2048 4096 8192] [--backends naive tiled] [--threads 1]

One head of 64 in float32. At 8192 the naive square takes 0.8 GB, and watching `tiled` takes half a minute.
"""

from __future__ import annotations

import argparse

import torch

from assay.measure.kernels import DEFAULT, NAIVE, TILED, Work, slopes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--backends", nargs="+", default=[NAIVE, TILED], choices=DEFAULT)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each number")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    print(f"{'backend':>8} {'length':>7} {'passes':>9} {'seconds':>9} {'peak MB':>9} {'traffic MB':>11}")
    for length in given.lengths:
        work = Work.of(length, 1, 64, torch.device("cpu"))
        for backend in given.backends:
            for backward, passes in ((False, "forward"), (True, "both")):
                cost = work.cost(backend, backward, given.seconds)
                traffic = "" if cost["traffic_bytes"] is None else f"{cost['traffic_bytes'] / 1e6:.1f}"
                values = f"{cost['seconds']:>9.4f} {cost['peak_bytes'] / 1e6:>9.2f} {traffic:>11}"
                print(f"{backend:>8} {length:>7} {passes:>9} {values}", flush=True)
                rows.append({"backend": f"{backend}, {passes}", "length": length} | cost)
    for row in slopes(rows, min(given.lengths)):
        fits = {name: value for name, value in row.items() if name.endswith("_slope")}
        print(row["backend"], *(f"{name} {value:.2f}" for name, value in fits.items()))


if __name__ == "__main__":
    main()
