"""How long does it take to plan and attach at Llama-3.1-405B's shapes? On the meta device, 882 targets; linear in them?"""

from __future__ import annotations

import statistics
import sys
import time

import harness
import torch
from torch import nn

import superlora_tn as sl

D, KV, MLP, LAYERS = 16384, 1024, 53248, 126
SHAPES = {
    "q_proj": (D, D), "k_proj": (D, KV), "v_proj": (D, KV), "o_proj": (D, D),
    "gate_proj": (D, MLP), "up_proj": (D, MLP), "down_proj": (MLP, D),
}  # fmt: skip
SPECS = {
    "lora": lambda: sl.lora(8),
    "lokr": lambda: sl.lokr(8),
    "lotr": lambda: sl.lotr(8),
    "lorta": lambda: sl.lorta(8, 3, 12),
}


def model(layers: int) -> nn.Module:
    """The linear layers alone, on the meta device."""
    with torch.device("meta"):
        blocks = [nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (i, o) in SHAPES.items()}) for _ in range(layers)]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def seconds(name: str, layers: int, repeats: int) -> float:
    """Median seconds of attach, planning included: the caches are emptied before."""
    found = []
    for _ in range(repeats):
        own = [module for key, module in sys.modules.items() if key.startswith("superlora_tn")]
        for value in {id(v): v for module in own for v in vars(module).values() if not isinstance(v, type)}.values():
            getattr(value, "cache_clear", int)()
        base = model(layers)
        start = time.perf_counter()
        sl.attach(base, SPECS[name](), "all-linear")
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Measure each variant at a quarter, half and all of the layers."""
    args = harness.arguments(__doc__ or "", repeats=3)
    rows = []
    for name in SPECS:
        times = {layers: seconds(name, layers, args.repeats) for layers in (LAYERS // 4, LAYERS // 2, LAYERS)}
        rows.append({"variant": name, **{f"{7 * n} targets, s": t for n, t in times.items()}})
    harness.report("attach_large", args, rows)


if __name__ == "__main__":
    main()
