"""What Muon's step costs on this processor: PyTorch's, in bfloat16, and ours, over the bundled model's matrices.

Where the processor has bfloat16 the two are the same; where it has none, ours computes in float32. The rate of either
matrix product stands beside it, since it is the reason.

    python -m benchmarks.muon [--repeats 5]             # writes benchmarks/results/muon.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.record import begin, publish
from moss.optim import Muon, has_bfloat16
from moss.resolve import load


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """The time of each repeat, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return times[1:]


def steps(kind: type[torch.optim.Muon], repeats: int) -> list[float]:
    """Seconds of each step of an optimizer over fresh copies of the blocks' matrices."""
    torch.manual_seed(0)
    model, _ = load()
    matrices = [nn.Parameter(weight.detach().float()) for weight in model.blocks.parameters() if weight.dim() == 2]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return seconds(kind(matrices, lr=0.02).step, repeats)


def rate(dtype: torch.dtype, repeats: int) -> float:
    """GFLOP a second of a matrix product such as the iteration has."""
    a, b = (torch.randn(shape).to(dtype) for shape in ((256, 1024), (1024, 256)))
    return 2 * 256 * 1024 * 256 / statistics.median(seconds(lambda: a @ b, 4 * repeats)) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    theirs, ours = steps(torch.optim.Muon, args.repeats), steps(Muon, args.repeats)
    result = begin("muon") | {
        "bfloat16_in_hardware": has_bfloat16(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "pytorch_step_s": [round(each, 4) for each in theirs],
        "our_step_s": [round(each, 4) for each in ours],
        "ratio": round(statistics.median(theirs) / statistics.median(ours), 1),
        "bfloat16_gflops": round(rate(torch.bfloat16, args.repeats), 1),
        "float32_gflops": round(rate(torch.float32, args.repeats), 1),
    }
    print(f"a step: PyTorch's {statistics.median(theirs):.3f} s, ours {statistics.median(ours):.3f} s")
    print(publish(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
