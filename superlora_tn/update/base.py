"""What the adapters of all folds share: one torch module a group of weights, holding the nodes' tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.contraction.backend import DEFAULT
from superlora_tn.contraction.plan import Route
from superlora_tn.contraction.profile import CPU, DEVICES, Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.fold import Group, PhysicalGroup, Shape
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.sums import Block, blocks
from superlora_tn.update.based import Read, base_values
from superlora_tn.update.initialise import first_values
from superlora_tn.update.links import Links
from superlora_tn.update.magnitudes import Magnitudes
from superlora_tn.update.node_maps import NodeMaps
from superlora_tn.update.passes import Passes

# Plans are made for these numbers of tokens; a call takes the plan of the largest that is not above its own.
TOKEN_STEPS = (1, 32, 256, 2048, 16384)
NOMINAL_TOKENS = 1024
Run = Callable[..., Tensor]
Side = Literal["out", "in"]


@dataclass(frozen=True)
class Settings:
    """How an adapter computes, whatever it is.

    Attributes:
        backend: the backend's name.
        route: force "apply" or "delta"; None takes the cheaper one, call by call.
        optimize: "dp" or any opt_einsum optimizer.
        recompute: a flat fold builds each weight's dW in forward and again in backward and keeps none.
    """

    backend: str = DEFAULT
    route: Route | None = None
    optimize: Optimizer = "dp"
    recompute: bool = False


class Adapter(Magnitudes, ABC):
    """The trainable network of one group of weights.

    Its parameters and frozen buffers are named ``node_<name>``, in graph order.

    Attributes:
        active: False switches the adapter off (it is disabled, or merged).
        members: the group's weights, each bound to its place in the network.
        passes: what the layers of one call of the model share; all adapters of a handle have the same.
        inputs: how many numbers of x are not zero at once, by which first values are scaled; None means all.
    """

    inputs: int | None = None

    def __init__(self, spec: AdapterSpec, group: Group, graph: Graph, settings: Settings, passes: Passes | None = None) -> None:
        super().__init__()
        self.spec, self.group, self.graph, self.settings = spec, group, graph, settings
        self.profile: Device = CPU
        self._scale = spec.scale
        self.active = True
        self.passes = Passes() if passes is None else passes
        self._names = tuple(f"node_{n.name}" for n in graph.nodes)
        # Of an adapter that departs from values: how each node is padded to the graph's, and where the values lie.
        self._pads: list[list[int]] | None = None
        self._ends: tuple[Block, ...] = ()
        self._maps = NodeMaps(graph) if graph.is_mapped else None
        self.members = {name: Member(self, name) for name in group.members}

    def strengthen(self, strength: float) -> None:
        """Scale dW by the declaration's scale and this factor."""
        self._scale = self.spec.scale * strength

    @property
    def scale(self) -> float:
        """By what dW is multiplied: the declaration's scale and the strength, that of the first time where it runs again."""
        return self.passes.first((self, "scale"), self._scale)

    @abstractmethod
    def prepare(self) -> None:
        """Plan and compile for the profile, and bind the members; done again on another type of device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and the like do to every tensor."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.stored()[0].device
        if self._maps is not None:
            self._maps.place(device)
        profile = DEVICES.get(device.type, CPU)
        if profile != self.profile:
            self.profile = profile
            self.prepare()
        return self

    def fill(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> None:
        """Make the nodes' tensors with their first values; on the meta device only their shapes."""
        self.profile = DEVICES.get(device.type, CPU)
        if self._maps is not None:
            self._maps.place(device)
        with torch.inference_mode(False):  # what is made in inference mode could never be trained
            for name, node, value in zip(self._names, self.graph.nodes, self._first(device, generator), strict=True):
                tensor = value.to(dtype=dtype, device=device)
                if node.trainable:
                    self.register_parameter(name, nn.Parameter(tensor))
                else:
                    self.register_buffer(name, tensor)
            self._add_magnitudes(dtype, device)
        self.prepare()

    def refill(self, generator: torch.Generator | None) -> None:
        """Write first values into the tensors that are there; an adapter that departs from values gets these again."""
        nodes = self._own()
        first = self._departure() if self._pads is not None else self._first(nodes[0].device, generator)
        with torch.no_grad():
            for own, value in zip(nodes, first, strict=True):
                own.copy_(value.to(device=own.device, dtype=own.dtype))

    def rest_on(self, read: Read) -> None:
        """Write what frozen nodes and magnitudes hold of the base's weights; nothing where the nodes have no memory.

        Args:
            read: W of a member, (out, in), by its name.
        """
        own = self._own()
        if own[0].is_meta:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._measure(read)
            # The values that an adapter departs from have the base's among them.
            physical = self.group.members if isinstance(self.group, PhysicalGroup) and self._pads is None else {}
            for k, place, value in base_values(self.graph, physical, read):
                own[k][place].copy_(value)

    def write(self, values: Sequence[Tensor], keep_dtype: bool = True) -> None:
        """Write values into the tensors that are there (see `whole`), in their dtype or in that of the values."""
        for k, (own, value) in enumerate(zip([*self._own(), *self.beside()], values, strict=True)):
            if not keep_dtype and own.dtype != value.dtype:
                own.data = own.data.to(value.dtype)
            if self._pads is None:
                own.copy_(value)
                continue
            corner = tuple(slice(0, size) for size in own.shape)
            own.copy_(value[corner])
            name = f"origin_{self.graph.nodes[k].name}"
            rest = self._buffers[name]
            assert rest is not None
            if not keep_dtype and rest.dtype != value.dtype:
                rest = self._buffers[name] = rest.to(value.dtype)
            rest.copy_(value)[corner] = 0

    def depart(self, spec: AdapterSpec, graph: Graph, values: Sequence[Tensor]) -> None:
        """From now on dW is the network at its nodes less the network at these values, at which the nodes start.

        Both are one network of larger bonds (see `network.sums`), of which a block trains and the other keeps the values.

        Args:
            spec: declares the sum of two such adapters.
            graph: of the sum.
            values: of all nodes, in graph order.

        Raises:
            SpecError: the sum is no network of this form.
        """
        nodes = self._own()
        shapes = [tuple(node.shape) for node in nodes]
        _, self._ends = blocks(graph, [shapes, shapes])
        with torch.inference_mode(False), torch.no_grad():
            for k, (node, own, value, end) in enumerate(zip(graph.nodes, nodes, values, self._ends, strict=True)):
                own.copy_(value)
                origin = torch.zeros(node.shape, dtype=own.dtype, device=own.device)
                origin[end] = -own if k == 0 else own
                self.register_buffer(f"origin_{node.name}", origin)
        self._pads = [
            [side for size, small in zip(reversed(node.shape), reversed(shape), strict=True) for side in (0, size - small)]
            for node, shape in zip(graph.nodes, shapes, strict=True)
        ]
        self.spec, self.graph = spec, graph
        self.prepare()

    def _departure(self) -> list[Tensor]:
        """The values that the nodes started at."""
        found = [self._buffers[f"origin_{node.name}"] for node in self.graph.nodes]
        cut = [origin[end] for origin, end in zip(found, self._ends, strict=True) if origin is not None]
        return [-cut[0], *cut[1:]]

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        if self._pads is None:
            return self.graph.num_parameters + self.spec.magnitudes(self.group)
        return sum(own.numel() for own, node in zip(self._own(), self.graph.nodes, strict=True) if node.trainable)

    def _first(self, device: torch.device, generator: torch.Generator | None) -> Sequence[Tensor]:
        if device.type == "meta":
            return [torch.empty(node.stored, device="meta") for node in self.graph.nodes]
        return first_values(self.graph, self.inputs or self.fan_in, generator)

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Length of the rows of the members (the longest, where they differ)."""

    def tensors(self) -> list[Tensor]:
        """The nodes' tensors in graph order: functions of what is stored where they have maps."""
        return self.stored() if self._maps is None else self._maps(self.stored(), self.passes)

    def applied(self) -> list[Tensor]:
        """The tensors of the graph that x goes through, see `network.applied`."""
        return self.stored() if self._maps is None else self._maps(self.stored(), self.passes, x=True)

    def stored(self) -> list[Tensor]:
        """What is stored of the nodes, in graph order."""
        own = self._own()
        if self._pads is None:
            return own
        buffers = self._buffers
        return [
            functional.pad(node, pad) + cast(Tensor, buffers[f"origin_{name[5:]}"])
            for node, pad, name in zip(own, self._pads, self._names, strict=True)
        ]

    def _own(self) -> list[Tensor]:
        """The parameters and frozen nodes themselves."""
        # The module's own tables, since getattr and get_parameter cost more than a small matmul.
        parameters, buffers = self._parameters, self._buffers
        try:
            return [parameters[name] if name in parameters else buffers[name] for name in self._names]  # type: ignore[misc]
        except KeyError:
            return [self._viewed(name) for name in self._names]

    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, (out, in), in the parameters' dtype, from the nodes alone."""
        return self.delta_of(self.members[target])

    def forward(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """`update` for the target of this name."""
        return self.update(self.members[target], x, out, base, self.training)

    @abstractmethod
    def delta_of(self, member: Member) -> Tensor:
        """dW of a member, see `delta`."""

    def more(self, member: Member, weight: Tensor) -> Tensor | None:
        """What dW adds to the squared norms of W's rows, (out,), float32 or wider, unbuilt; None where dW built is cheaper."""
        return None

    def whole(self) -> list[Tensor]:
        """All that the adapted weights are made of beside W: what is stored of the nodes, then what is beside them."""
        return [*self.stored(), *self.beside()]

    @abstractmethod
    def update(
        self, member: Member, x: Tensor, out: Tensor | None, base: Tensor | None = None, training: bool = True
    ) -> Tensor:
        """``out + x dW^T`` for a member, in out's dtype.

        Args:
            member: which weight.
            x: (..., in).
            out: (..., out); None gives ``x dW^T`` alone, in x's dtype.
            base: W, where out is the untouched output ``x W^T + b`` of a frozen linear layer: then out is written to.
            training: whether dropout drops.
        """

    def current(self, member: Member) -> Tensor:
        """dW of a member for a layer of this pass; a flat fold builds all of it once."""
        return self.delta_of(member)

    def stack_up(self) -> None:
        """Prepare for `together`."""

    def together(self, members: Sequence[Member]) -> Tensor | None:
        """dW of all members of the group in their order, (members, out, in), built at once; None where that is not possible."""
        return None

    def halves(self, member: Member, rows: int, blocks: int = 1) -> tuple[Tensor, Tensor] | None:
        """dW as a product of two thin matrices, outer (out, bond), scale included, and inner (bond, in); see `contraction.cut`.

        None where `rows` rows of x, in so many blocks of inputs, go faster through dW itself.
        """
        return None

    def link_up(self, kernel: int) -> None:
        """Prepare for `links` of so many positions of a kernel."""

    def links(self, member: Member, kernel: int, rows: int, before: int, blocks: int = 1) -> Links | None:
        """dW of a convolution as a chain of thin layers.

        None where its network holds no kernel apart, or the call goes faster through two halves or dW itself.

        Args:
            member: which weight.
            kernel: positions of its kernel.
            rows: positions of the output.
            before: positions of the input.
            blocks: groups of the layer's channels.
        """
        return None

    def look_up(self, side: Side) -> None:
        """Prepare for `lookup` on a side."""

    def lookup(self, member: Member, numbers: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
        """Rows (side out) or columns (side in) of dW, scale included, in a dtype.

        Args:
            member: which weight.
            numbers: (tokens,), which rows or columns.
            side: what they count.
            dtype: of the result, (tokens, in) or (tokens, out).
        """
        delta = self.current(member)
        return functional.embedding(numbers, delta if side == "out" else delta.t()).to(dtype)

    @property
    def applies(self) -> bool:
        """Whether x may go through the network without dW."""
        return False

    @property
    def shares(self) -> bool:
        """Whether the layers of a pass share anything."""
        return False

    def drop(self, x: Tensor, training: bool) -> Tensor:
        """Dropout of the adapter's input, while training."""
        return functional.dropout(x, self.spec.dropout, training) if self.spec.dropout else x


class Member:
    """One weight of a group, bound to its adapter: what a layer calls.

    Attributes:
        adapter: the group's.
        name: the target's name.
        shape: (out, in).
        place: what the adapter has prepared for it.
    """

    __slots__ = ("adapter", "name", "place", "shape")

    def __init__(self, adapter: Adapter, name: str) -> None:
        self.adapter, self.name = adapter, name
        self.shape: Shape = (0, 0)
        self.place: Any = None

    @property
    def active(self) -> bool:
        """Whether the adapter is on, or was the first time, where a checkpointed region is computed again."""
        adapter = self.adapter
        return adapter.passes.first((adapter, "active"), adapter.active)

    def magnitude(self) -> Tensor:
        """The magnitudes of its rows, (out,)."""
        return self.adapter.magnitude_of(self.name)

    def delta(self) -> Tensor:
        """dW, see `Adapter.delta`."""
        return self.adapter.delta_of(self)

    def current(self) -> Tensor:
        """dW for a layer of this pass, see `Adapter.current`."""
        return self.adapter.current(self)

    def halves(self, rows: int, blocks: int = 1) -> tuple[Tensor, Tensor] | None:
        """dW as two thin matrices, see `Adapter.halves`."""
        return self.adapter.halves(self, rows, blocks)

    def links(self, kernel: int, rows: int, before: int, blocks: int = 1) -> Links | None:
        """dW as a chain of thin layers, see `Adapter.links`."""
        return self.adapter.links(self, kernel, rows, before, blocks)

    def update(self, x: Tensor, out: Tensor | None, base: Tensor | None = None, training: bool = True) -> Tensor:
        """``out + x dW^T``, see `Adapter.update`."""
        return self.adapter.update(self, x, out, base, training)

    def lookup(self, numbers: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
        """Rows or columns of dW, see `Adapter.lookup`."""
        return self.adapter.lookup(self, numbers, side, dtype)

    def drop(self, x: Tensor, training: bool) -> Tensor:
        """Dropout of x, see `Adapter.drop`."""
        return self.adapter.drop(x, training)
