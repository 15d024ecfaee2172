"""What the adapters of all folds share: one torch module a group of weights, holding the nodes' tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.plan import Route, make_plan
from superlora_tn.contraction.profile import CPU, DEVICES, Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.fold import Group, Mode, Shape
from superlora_tn.declare.parts import Dense
from superlora_tn.network.expand import lower
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.eager import is_eager
from superlora_tn.update.initialise import first_values

# Plans are made for these numbers of tokens; a call takes the plan of the largest that is not above its own.
TOKEN_STEPS = (1, 32, 256, 2048, 16384)
NOMINAL_TOKENS = 1024
Run = Callable[..., Tensor]


class Kept:
    """Tensors made from an adapter's nodes, for one pass of the model: its layers take them from here.

    They hold while the nodes are unchanged and until their gradient has come back; without gradients, until then or the
    next pass. They belong to one pass and are neither copied nor pickled.
    """

    def __init__(self) -> None:
        self._tensors: dict[Any, Tensor] = {}
        self._made_from: list[tuple[int, int]] = []
        self._copies: list[Tensor] = []
        self._detached = False

    def keep(
        self, tensors: Mapping[Any, Tensor], nodes: Sequence[Tensor], through: Sequence[Tensor], again: bool = False
    ) -> None:
        """Keep tensors made from the nodes; the gradients of the tensors `through` end their time.

        With `again` they may serve another pass, see `holds`.
        """
        self._tensors, self._made_from, self._detached = dict(tensors), state(nodes), False
        self._copies = [n.detach().clone() for n in nodes] if again and not any(t.requires_grad for t in through) else []
        for tensor in through:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.drop())  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        """Forget them."""
        self._tensors, self._copies = {}, []

    def holds(self, nodes: Sequence[Tensor]) -> bool:
        """Whether what is here can serve another pass: the nodes are as they were, and no gradient has to go through it.

        Values are compared, as a write through ``.data`` leaves no other trace. On a GPU that would wait for it, so there
        only what is made of frozen nodes serves again.
        """
        trained = any(n.requires_grad for n in nodes)
        stale = any(t.is_inference() and not torch.is_inference_mode_enabled() for t in self._tensors.values())
        if not self._copies or stale or (trained and (torch.is_grad_enabled() or nodes[0].device.type != "cpu")):
            return False
        if self._made_from != state(nodes):
            return False
        return nodes[0].device.type != "cpu" or all(map(torch.equal, nodes, self._copies))

    def get(self, key: Any, nodes: Sequence[Tensor]) -> Tensor | None:
        """A tensor, where this pass made it and may differentiate through it.

        Re-entrant checkpointing runs a block first without gradients and again, alone, during backward. Its second
        run may not share a graph with other blocks, so it gets nothing from here.
        """
        tensor = self._tensors.get(key)
        if tensor is None or not is_eager() or self._made_from != state(nodes):
            return None
        if not torch.is_grad_enabled():
            self._detached = tensor.requires_grad
            return tensor.detach()
        return None if self._detached else tensor

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def state(nodes: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Which tensors these are, and how often each was written."""
    return [(id(tensor), tensor._version) for tensor in nodes]


class Adapter(nn.Module, ABC):
    """The trainable network of one group of weights.

    Its parameters and frozen buffers are named ``node_<name>``, in graph order.

    Attributes:
        active: False switches the adapter off (it is disabled, or merged).
    """

    def __init__(
        self,
        spec: AdapterSpec,
        group: Group,
        graph: Graph,
        backend: str,
        route: Route | None,
        optimize: Optimizer,
        profile: Device,
    ) -> None:
        super().__init__()
        self.spec, self.group, self.graph = spec, group, graph
        self.backend, self.optimize, self.profile = backend, optimize, profile
        self.scale = spec.scale
        self.active = True
        self.route = route
        self._names = tuple(f"node_{n.name}" for n in graph.nodes)
        self._kept = Kept()

    @abstractmethod
    def prepare(self) -> None:
        """Plan and compile for the profile; done again where the adapter moves to a device of another type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and the like do to every tensor."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._kept.drop()
        profile = DEVICES.get(self.tensors()[0].device.type, CPU)
        if profile != self.profile:
            self.profile = profile
            self.prepare()
        return self

    def fill(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> None:
        """Make the nodes' tensors with their first values; on the meta device only their shapes."""
        meta = device.type == "meta"
        values = None if meta else first_values(self.graph, self.fan_in, generator)
        for k, (name, node) in enumerate(zip(self._names, self.graph.nodes, strict=True)):
            tensor = torch.empty(node.shape, device="meta") if values is None else values[k]
            tensor = tensor.to(dtype=dtype, device=device)
            if node.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Length of the rows of the members (the longest, where they differ)."""

    def tensors(self) -> list[Tensor]:
        """The nodes' tensors in graph order."""
        # The module's own tables, since getattr and get_parameter cost more than a small matmul.
        parameters, buffers = self._parameters, self._buffers
        return [parameters[name] if name in parameters else buffers[name] for name in self._names]  # type: ignore[misc]

    @abstractmethod
    def delta(self, target: str) -> Tensor:
        """dW of a target, scale included, shape (out, in), in the parameters' dtype."""

    @abstractmethod
    def forward(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """``out + x dW^T`` for a target, in out's dtype.

        Args:
            x: (..., in).
            target: which member.
            out: (..., out).
            base: W, where out is the untouched output ``x W^T + b`` of a frozen linear layer: then out is written to.
        """

    def current(self, target: str) -> Tensor:
        """dW of a target for a layer of this forward pass; a flat fold has built it already."""
        return self.delta(target)

    def halves(self, target: str, rows: int, blocks: int = 1) -> tuple[Tensor, Tensor] | None:
        """dW as a product of two thin matrices, outer (out, bond), scale included, and inner (bond, in); see `factors`.

        None where `rows` rows of x, in so many blocks of inputs, go faster through dW itself.
        """
        return None

    @property
    def shares(self) -> bool:
        """Whether `begin` and `end` have anything to do."""
        return False

    def begin(self) -> None:
        """The model's forward pass begins: make what its layers will share."""

    def end(self) -> None:
        """The model's forward pass is over."""

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the adapter's input, while training."""
        return functional.dropout(x, self.spec.dropout, self.training) if self.spec.dropout else x

    def _dense(self, shape: Shape) -> Run:
        """The delta route's last part: dW as the one node of a dense network, with x."""
        modes = (Mode("out", shape[0], "out"), Mode("in", shape[1], "in"))
        return compiled(make_plan(lower(Dense(), modes), "apply", TOKEN_STEPS[-1], self.profile, self.optimize), self.backend)
