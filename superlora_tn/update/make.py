"""Makes the adapter of a group: one torch module, of the kind that the group's fold wants."""

from __future__ import annotations

import torch

from superlora_tn.declare.fold import FlatGroup, Group
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter, Settings
from superlora_tn.update.flat import FlatAdapter
from superlora_tn.update.passes import Passes
from superlora_tn.update.physical import PhysicalAdapter
from superlora_tn.update.summed import SumAdapter

DEFAULTS = Settings()


def make_adapter(
    spec: AdapterSpec,
    group: Group,
    graph: Graph,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
    settings: Settings = DEFAULTS,
    passes: Passes | None = None,
    inputs: int | None = None,
) -> Adapter:
    """The adapter of one group, filled with its first values.

    Args:
        spec, group, graph: from `AdapterSpec.lay_out`.
        dtype: of the parameters.
        device: where they live.
        generator: source of the first values.
        settings: backend, route, optimizer, recompute.
        passes: of the handle it belongs to.
        inputs: how many numbers of x are not zero at once, where it is few of them.
    """
    kind = FlatAdapter if isinstance(group, FlatGroup) else SumAdapter if graph.terms else PhysicalAdapter
    adapter = kind(spec, group, graph, settings, passes)
    adapter.inputs = inputs
    adapter.fill(dtype, device or torch.device("cpu"), generator)
    return adapter
