"""First values of an adapter's nodes: dW is exactly zero, and trains from there.

Exactly one node is zero (`graph.lower` sees to it). The others share one rule, which gives plain LoRA its usual
start: with v_n the variance of node n's elements, ``prod v_n = 1 / (3 fan_in)``, all equal, drawn uniformly. For LoRA
that is A ~ U(-1/sqrt(in), 1/sqrt(in)), torch's and PEFT's default; for a network of k such nodes each gets the k-th
root, so dW's first steps are about as large as LoRA's whatever the network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from superlora_tn.network.graph import Graph, GraphNode

SHARING = ("auto", "uniform", "normal")


def first_values(graph: Graph, fan_in: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """First values of all nodes in graph order, float32 on the CPU: the same for a seed on every device.

    Torch's default dtype and default device change nothing.

    Args:
        graph: the network.
        fan_in: length of the rows of the adapted weights.
        generator: source of the random numbers; None takes torch's default.
    """
    deviations = [_deviation(home, fan_in) for home, _ in graph.homes]
    # A tensor that is made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        values = {
            node.name: _fill(node, own, generator)
            for node, own in zip(graph.nodes, deviations, strict=True)
            if node.copies is None
        }
        return [values[node.name] if node.copies is None else values[node.copies].clone() for node in graph.nodes]


def _deviation(graph: Graph, fan_in: int) -> float:
    sharing = sum(n.init in SHARING and (n.map is None or n.map.from_zero) for n in graph.nodes)
    return float((1 / (3 * fan_in)) ** (1 / (2 * max(sharing, 1))))


def _fill(node: GraphNode, deviation: float, generator: torch.Generator | None) -> Tensor:
    shape = node.stored
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    init = node.map.init if node.map is not None and node.init == "auto" else node.init
    if init == "zeros":
        return values.zero_()
    if init == "ones":
        return values.fill_(1.0)
    matrix = values.reshape(math.prod(shape[:-1]), shape[-1] if shape else 1)
    if init == "eye":
        return torch.eye(*matrix.shape, out=matrix, device=matrix.device).reshape(shape)
    if init == "pairs":  # equal neighbours, so that their reflections cancel
        values.normal_(generator=generator)
        even = shape[-1] // 2 * 2
        values[..., 1:even:2] = values[..., 0:even:2]
        return values
    if init == "normal":
        return values.normal_(generator=generator).mul_(deviation)
    if init == "orthogonal":
        return torch.nn.init.orthogonal_(matrix, generator=generator).reshape(shape)
    if init == "square":
        deviation = 1 / math.sqrt(3 * math.sqrt(values.numel()))
    bound = math.sqrt(3) * deviation
    return values.uniform_(-bound, bound, generator=generator)
