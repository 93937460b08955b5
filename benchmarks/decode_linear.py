"""Products of a frozen weight with few rows on this machine, by each way that there is: what decoding chooses from.

    python benchmarks/decode_linear.py                          float32, two minutes
    python benchmarks/decode_linear.py --dtype bfloat16 --threads 1 --shapes 576x1536,2048x2048
Microseconds of a product, the best of three turns; weights lie in 200 MB, so that each is read from memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.kernels.decode_linear import BAGS, DecodeLinear, onednn, turned
from inlay.kernels.processor import amd, has_onednn, wide_vectors

SHAPES = "576x192,576x576,576x1536,1536x576,576x49152,2048x2048,2048x8192"
ROWS = "1,2,4,8,16,32,64"
BYTES = 200e6
Way = Callable[[Tensor, DecodeLinear], Tensor | None]


def ways(rows: int) -> dict[str, Way]:
    """What gives W x for x (rows, in), by name; `ours` is what decoding chooses."""
    found: dict[str, Way] = {
        "torch": lambda x, own: F.linear(x, own.layer.weight),
        "W x^T": lambda x, own: turned(x, own.layer.weight),
    }
    if has_onednn():
        found["oneDNN"] = lambda x, own: onednn(x, own.layer.weight, None)
    if rows <= BAGS:
        found["bags"] = lambda x, own: own._bags(x, own.layer.weight)
    found["ours"] = lambda x, own: F.linear(x, own.layer.weight) if (made := own(x)) is None else made
    return found


def best(way: Way, x: Tensor, layers: Sequence[DecodeLinear]) -> float:
    """Microseconds of one product."""
    for own in layers[:2]:
        way(x, own)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        for own in layers:
            way(x, own)
        times.append(time.perf_counter() - begun)
    return 1e6 * min(times) / len(layers)


def line(shape: str, rows: int, found: Mapping[str, float]) -> str:
    return f"{shape:>12} {rows:>3} rows  " + "  ".join(f"{name} {value:.0f}" for name, value in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=SHAPES, help="in x out of the weights")
    parser.add_argument("--rows", default=ROWS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    dtype = getattr(torch, a.dtype)
    print(f"{a.dtype}, {a.threads} threads, AMD {amd()}, AVX-512 {wide_vectors()}")
    for shape in a.shapes.split(","):
        width, out = map(int, shape.split("x"))
        count = max(2, int(BYTES / (width * out * dtype.itemsize)))
        layers = [DecodeLinear(nn.Linear(width, out, bias=False, dtype=dtype), True) for _ in range(count)]
        for rows in map(int, a.rows.split(",")):
            x = torch.randn(rows, width).to(dtype)
            with torch.no_grad():
                print(line(shape, rows, {name: best(way, x, layers) for name, way in ways(rows).items()}), flush=True)


if __name__ == "__main__":
    main()
