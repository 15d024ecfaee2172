"""Where an adapter meets its weights, where nobody says so: at the outputs, or at the weights where that is cheaper.

A dW that is built in any case (one scatter, one Fourier transform) costs less where the weight is read: x goes once through
W + dW in place of through both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from superlora_tn.contraction.plan import choose, weight_price
from superlora_tn.contraction.profile import CPU, DEVICES, Device
from superlora_tn.declare.fold import PhysicalFold, Shape
from superlora_tn.model.kinds import Linear
from superlora_tn.model.recognise import is_plain
from superlora_tn.model.saved import At
from superlora_tn.model.targets import Place, Target, bind, is_sharded
from superlora_tn.network.applied import applied
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import NOMINAL_TOKENS, Settings


def placed(
    spec: AdapterSpec,
    targets: Sequence[Target],
    known: Mapping[str, Place],
    at: At | None,
    dtype: torch.dtype,
    settings: Settings,
) -> list[Target]:
    """The targets, those of a group at their weights where all of them can be and it is cheaper there.

    What was said in words (`at`, a route) stays, and so does what needs the layer's input (dropout, other joins). Where several
    processes run, weights may be cut or replaced by what shards them, and all stays at the outputs.

    Args:
        spec: the declaration.
        targets: its weights, bound as their layers say.
        known: the places of the model.
        at, dtype, settings: as given to `attach`.
    """
    asked = at is not None or settings.route is not None or _are_several()
    if asked or spec.dropout or spec.join is not None or not isinstance(spec.fold, PhysicalFold):
        return list(targets)
    own, read = {target.name: target for target in targets}, set[str]()
    for group, graph in spec.lay_out({name: target.shape for name, target in own.items()}):
        members = [own[name] for name in group.members]
        if is_built(graph) and all(_may_be_read(target, known[target.name], dtype) for target in members):
            device = DEVICES.get(members[0].weight().device.type, CPU)
            if pays(graph, members[0].shape, NOMINAL_TOKENS, device, settings):
                read.update(group.members)
    return [bind(t.name, known[t.name], "weight") if t.name in read else t for t in targets]


def is_built(graph: Graph) -> bool:
    """Whether dW is a node of its own that is made of what is stored, so that it is built whatever x is."""
    return len(graph.nodes) == 1 and graph.is_mapped and not graph.terms and applied(graph).graph is graph


def pays(graph: Graph, shape: Shape, tokens: int, device: Device, settings: Settings) -> bool:
    """Whether x through W + dW costs less than x through the network beside the layer, for so many rows of x."""
    choice = choose(graph, shape, tokens, device, settings.optimize)
    return weight_price(choice) < (choice.delta_price if choice.apply is None else min(choice.apply.price, choice.delta_price))


def _are_several() -> bool:
    """Whether this is one of several processes, as far as is known."""
    distributed = torch.distributed
    return distributed.is_available() and (distributed.is_initialized() or distributed.is_torchelastic_launched())


def _may_be_read(target: Target, place: Place, dtype: torch.dtype) -> bool:
    """Whether reading the weight gives it in the adapter's dtype, of a plain linear layer that nothing else sees to."""
    weight = target.layer._parameters.get("weight")
    plain = type(target.kind) is Linear and not target.tied and place.span is None and is_plain(target.layer)
    whole = type(weight) is nn.Parameter and not weight.is_meta and not is_sharded(weight)
    return plain and whole and weight is not None and weight.dtype == dtype
