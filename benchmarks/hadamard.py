"""What does the fast Walsh-Hadamard transform cost, beside plain copies of the same bytes and a radix-2 loop in torch?

The transform has to move its numbers at least once each way. Its passes are matmuls, so three copies (reading and
writing every byte three times) is a fair yardstick: at most four times that, and at least three times faster than one
addition and one subtraction a bit.
"""

from __future__ import annotations

import statistics

import harness
import torch
from torch import Tensor

from superlora_tn.update.walsh import hadamard

COPIES = 3


def copies(x: Tensor, places: list[Tensor]) -> None:
    """Copy `x` into each place, all of them mapped before."""
    for place in places:
        place.copy_(x)


def radix_2(x: Tensor) -> Tensor:
    """The textbook loop, one pass over memory for every bit: pairs (a, b) at a distance become (a + b, a - b)."""
    size, stride, y = x.shape[-1], 1, x
    while stride < size:
        pairs = y.reshape(-1, 2, stride)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        stride *= 2
    return y.reshape(x.shape)


def main() -> None:
    """Measure one size; a row a contestant."""
    args = harness.arguments(__doc__ or "", repeats=7, bits=24)
    x = torch.randn(1 << args.bits, device=args.device)
    places = [torch.zeros_like(x) for _ in range(COPIES)]
    small = x[: 1 << min(args.bits, 12)]
    torch.testing.assert_close(hadamard(small), radix_2(small), rtol=1e-4, atol=1e-3)
    runs = {"copies": lambda: copies(x, places), "hadamard": lambda: hadamard(x), "radix-2": lambda: radix_2(x)}
    times = harness.interleaved(runs, args.repeats, args.device, warmup=1)
    middle = {name: statistics.median(own) for name, own in times.items()}
    rows = [
        {
            "bits": args.bits,
            "run": name,
            "ms": 1e3 * t,
            "of 3 copies": t / middle["copies"],
            "of radix-2": t / middle["radix-2"],
        }
        for name, t in middle.items()
    ]
    harness.report("hadamard", args, rows)


if __name__ == "__main__":
    main()
