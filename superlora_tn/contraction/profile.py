"""What a device does, to price a plan: its balance of FLOPs, bytes and calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from superlora_tn.declare.checks import SpecError, check_count, shown

ITEM = 4


@dataclass(frozen=True)
class Device:
    """What a device does, to price a plan.

    Args:
        name: for printing.
        flops: FLOP/s of large matrix products.
        bandwidth: bytes/s of reads and writes.
        latency: seconds an operation costs beside its arithmetic.
        item: seconds that one more product of a batched product costs.
        width: how long the contiguous axis of a product's result has to be for full speed.

    Raises:
        SpecError: a speed that is not above 0, a negative time, or a width below 1.
    """

    name: str
    flops: float
    bandwidth: float
    latency: float
    item: float = 0.0
    width: int = 1

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "latency", "item"):
            value, speed = getattr(self, field), field in ("flops", "bandwidth")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (value > 0 or (value == 0 and not speed)):
                least = "a number above 0, in FLOP or bytes a second" if speed else "seconds, a number of at least 0"
                raise SpecError(f"Device was given {field}={shown(value)}; give {least}.")
        check_count("Device", "width", self.width, 1 << 20)


# Measured on a 2-core AMD EPYC (AVX-512), float32, 2026-11: see benchmarks/route_ranking.py. The GPUs are from data sheets.
CPU = Device("cpu", 1.8e11, 6e10, 8e-6, item=5e-8, width=16)

GPU = Device("gpu", 6e13, 1e12, 6e-6)

H200 = Device("h200", 3e14, 4e12, 6e-6)

DEVICES: Mapping[str, Device] = {"cpu": CPU, "cuda": H200, "mps": GPU}
