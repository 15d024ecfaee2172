"""What does adapting a 405B model on 512 GPUs hold, move and compute? Counted on the meta device, from layouts and plans.

The base has Llama-3.1-405B's shapes in bfloat16, sharded by FSDP2 with a unit a block; adapters are float32 with AdamW.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import attach_large
import harness
import torch
from torch import nn

import superlora_tn as sl
from superlora_tn.contraction.profile import DEVICES
from superlora_tn.update.base import Adapter

GPUS, TOKENS, VOCABULARY, MB, GB = 512, 8192, 128256, 1e6, 1e9
SPECS = {
    "lora": sl.lora(8),
    "lokr": sl.lokr(8),
    "lotr": sl.lotr(8),
    "cp": sl.AdapterSpec(sl.CP(8), sl.PhysicalFold("layer type out in")),
    "lorta": sl.lorta(8, 3, 12),
}


def base() -> nn.Module:
    """All parameters of the model, without its attention's arithmetic."""
    model = attach_large.model(attach_large.LAYERS).bfloat16()
    width = attach_large.D
    with torch.device("meta"):
        for block in model["layers"]:  # type: ignore[index]
            block.update({name: nn.RMSNorm(width, dtype=torch.bfloat16) for name in ("before", "behind")})
        model.update(  # type: ignore[operator]
            {
                "embed_tokens": nn.Embedding(VOCABULARY, width, dtype=torch.bfloat16),
                "norm": nn.RMSNorm(width, dtype=torch.bfloat16),
                "lm_head": nn.Linear(width, VOCABULARY, bias=False, dtype=torch.bfloat16),
            }
        )
    return model


def held(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def base_rows(model: nn.Module) -> list[dict[str, Any]]:
    """The base: what a GPU holds and receives."""
    whole, block = held(model), held(model["layers"][0])  # type: ignore[index]
    rest = whole - attach_large.LAYERS * block
    # Blocks are gathered in forward and in backward, the root unit once (FSDP2 keeps it in between).
    gathered = (2 * (whole - rest) + rest) * (GPUS - 1) / GPUS
    adapted = sum(d_in * d_out for d_in, d_out in attach_large.SHAPES.values()) * attach_large.LAYERS
    return [
        {"counted": "parameters, billions", "figure": sum(p.numel() for p in model.parameters()) / 1e9},
        {"counted": "base in bfloat16, GB", "figure": whole / GB},
        {"counted": "its shard a GPU, GB", "figure": whole / GPUS / GB},
        {"counted": "one block while gathered, GB", "figure": block / GB},
        {"counted": "embedding, head and last norm while gathered, GB", "figure": rest / GB},
        {"counted": "base received a GPU and step, GB", "figure": gathered / GB},
        {"counted": "gradients were all weights trained in bfloat16, GB", "figure": whole / GB},
        {"counted": "dW of all adapted weights in float32, GB", "figure": 4 * adapted / GB},
    ]


def shard(node: torch.Tensor) -> int:
    """Bytes of the largest shard of a node: FSDP2 cuts the first axis, which may be shorter than there are GPUs."""
    return math.ceil(node.shape[0] / GPUS) * math.prod(node.shape[1:]) * node.element_size()


def planned(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Of each weight: FLOPs forward on the cheaper route, bytes of its largest intermediate, whether that is dW."""
    for name in adapter.members:
        d_out, d_in = shapes[name]
        choice = sl.choose(adapter.graph, (d_out, d_in), TOKENS, DEVICES["cuda"], adapter.settings.optimize)
        if choice.route == "apply":
            yield choice.chosen.flops, choice.chosen.peak, 0
        else:
            built = choice.delta.flops if not adapter.graph.is_flat or name == next(iter(adapter.members)) else 0
            yield built + 2 * TOKENS * d_out * d_in, d_out * d_in * 4, 1


def row(name: str, spec: sl.AdapterSpec) -> dict[str, Any]:
    """One declaration on all linear layers of the blocks."""
    model = base()
    start = time.perf_counter()
    tuned = sl.attach(model, spec, list(attach_large.SHAPES), recompute=isinstance(spec.fold, sl.FlatFold))
    attached = time.perf_counter()
    plans = [found for adapter in tuned.modules() if isinstance(adapter, Adapter) for found in planned(adapter, tuned.targets)]
    priced = time.perf_counter()
    frozen = sum(2 * TOKENS * d_out * d_in for d_out, d_in in tuned.targets.values())
    nodes = list(tuned.parameters())
    size = sum(n.numel() * n.element_size() for n in nodes)
    return {
        "variant": name,
        "parameters": sum(n.numel() for n in nodes),
        "gradients all-reduced a step, MB": size / MB,
        "sent a GPU by a ring, MB": 2 * (GPUS - 1) / GPUS * size / MB,
        "held a GPU, whole, MB": 4 * size / MB,
        "held a GPU, sharded, MB": 4 * sum(map(shard, nodes)) / MB,
        "FLOPs over the frozen layers'": sum(flops for flops, _, _ in plans) / frozen,
        "largest intermediate, MB": max(peak for _, peak, _ in plans) / MB,
        "weights by dW": sum(delta for _, _, delta in plans),
        "attach, s": attached - start,
        "plan both routes, s": priced - attached,
    }


def main() -> None:
    """Count and measure."""
    args = harness.arguments(__doc__ or "", repeats=1)
    harness.report("scale_base", args, base_rows(base()))
    harness.report("scale", args, [row(name, spec) for name, spec in SPECS.items()])


if __name__ == "__main__":
    main()
