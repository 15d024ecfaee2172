"""Two worlds for one program: a model with adapters on it, and the same model whose layers write W + dW out anew at each call.

The second world is the oracle: torch in float64, dense, every dW from the nodes by one product of whole tensors, nothing kept
from one call to the next. A program is run in both, and whatever can be seen of it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl
from superlora_tn.declare.fold import FlatGroup, Group
from superlora_tn.declare.parts import Part
from superlora_tn.update.base import Adapter

WIDTH, HIDDEN, TOKENS, DEPTH = 16, 24, 3, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "up", "down"]
Values = Mapping[str, Tensor]

# --- dW, written out ------------------------------------------------------------------------------------------------


def _einsum(operands: Sequence[tuple[Tensor, Sequence[str]]], result: Sequence[str]) -> Tensor:
    letter: dict[str, int] = {}
    given: list[Any] = []
    for tensor, indices in operands:
        given += [tensor, [letter.setdefault(i, len(letter)) for i in indices]]
    return torch.einsum(*given, [letter[i] for i in result])


def _train(cores: Sequence[Tensor]) -> Tensor:
    tensor = cores[0]
    for core in cores[1:]:
        tensor = torch.tensordot(tensor, core, 1)
    return tensor


def tensor_of(part: Part, modes: Sequence[str], values: Values, prefix: str = "") -> Tensor:
    """The tensor of a part over `modes`, from the values of its nodes, differentiable in them."""
    if isinstance(part, sl.Dense) or (isinstance(part, sl.CP) and f"{prefix}weight" in values):
        return values[f"{prefix}weight"]
    if isinstance(part, sl.CP):
        factors = [values[f"{prefix}factor_{m}"] for m in modes]
        return factors[0] if len(modes) == 1 else _einsum([(f, (m, " r")) for f, m in zip(factors, modes, strict=True)], modes)
    if isinstance(part, sl.Tucker):
        factored = list(modes) if part.factors is None else part.factors.split()
        core = (values[f"{prefix}core"], [f" {m}" if m in factored else m for m in modes])
        return _einsum([core, *((values[f"{prefix}factor_{m}"], (m, f" {m}")) for m in factored)], modes)
    if isinstance(part, sl.TensorTrain):
        return _train([values[f"{prefix}core_{m}"] for m in modes])
    if isinstance(part, sl.Kronecker):
        return reduce(torch.kron, [tensor_of(p, modes, values, f"{prefix}k{k + 1}_") for k, p in enumerate(part.parts)])
    if isinstance(part, sl.Hadamard):
        return reduce(torch.mul, [tensor_of(p, modes, values, f"{prefix}h{k + 1}_") for k, p in enumerate(part.parts)])
    assert isinstance(part, sl.Network)
    groups = [group.strip("()").split() for group in _words(part.modes)]
    nodes = [(values[f"{prefix}{name}"], node.indices.split()) for name, node in part.nodes]
    whole = _einsum(nodes, [i for group in groups for i in group])
    size = {i: n for tensor, indices in nodes for i, n in zip(indices, tensor.shape, strict=True)}
    return whole.reshape([math.prod(size[i] for i in group) for group in groups])


def _words(modes: str) -> list[str]:
    """``"(o1 o2) i"`` as ``["(o1 o2)", "i"]``."""
    words: list[str] = []
    for word in modes.split():
        if words and words[-1].startswith("(") and not words[-1].endswith(")"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def deltas_of(spec: sl.AdapterSpec, group: Group, map_: nn.Module | None, values: Values) -> dict[str, Tensor]:
    """dW of every weight of a group."""
    fold, targets = spec.fold, list(group.members)
    if isinstance(fold, sl.PhysicalFold):
        modes = fold.modes.split()
        whole = spec.scale * tensor_of(spec.network, modes, values)
        return {t: _physical(whole, modes, oracle.member_place(modes, t, targets)) for t in targets}
    assert isinstance(group, FlatGroup)
    shapes = {t: (d_out, d_in) for t, (_, d_out, d_in) in group.members.items()}
    total = sum(o * i for o, i in shapes.values())
    ratio = spec.projection.ratio if spec.projection else 1.0
    inner = math.ceil(ratio * total / group.groups - 1e-9)
    modes = [f"m{k + 1}" for k in range(spec.fold.order)]
    runs = []
    for g, length in enumerate(oracle.run_lengths(total, group.groups)):
        own = {n: v[g] for n, v in values.items()} if group.groups > 1 else values
        vector = tensor_of(spec.network, modes, own).reshape(-1)[:inner]
        runs.append((spec.scale * _mapped(spec, map_, vector, math.ceil(total / group.groups)))[:length])
    pieces = torch.cat(runs).split([o * i for o, i in shapes.values()])
    return {t: piece.reshape(shape) for (t, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _physical(whole: Tensor, modes: Sequence[str], place: Mapping[int, int]) -> Tensor:
    left = [m for k, m in enumerate(modes) if k not in place]
    picked = whole[tuple(place.get(k, slice(None)) for k in range(whole.ndim))]
    ordered = picked.permute([left.index(m) for m in ("head", "out", "in") if m in left])
    return ordered.reshape(-1, ordered.shape[-1])


def _mapped(spec: sl.AdapterSpec, map_: nn.Module | None, vector: Tensor, length: int) -> Tensor:
    if map_ is None:
        return vector
    tables = {name: t.double().numpy() for name, t in map_.named_buffers()}
    if isinstance(spec.projection, sl.Shuffle):
        return vector[torch.from_numpy(tables["order"].astype(int))]
    assert isinstance(spec.projection, sl.Fastfood)
    mapped = _fastfood(*(tables[name].tobytes() for name in ("flips", "order", "weights")), length) @ vector
    return torch.tanh(mapped) if spec.projection.tanh else mapped


@lru_cache(maxsize=8)
def _fastfood(flips: bytes, order: bytes, weights: bytes, length: int) -> Tensor:
    """The map's matrix, made once for the same tables."""
    signs, places, factors = (np.frombuffer(data) for data in (flips, order, weights))
    return torch.from_numpy(np.ascontiguousarray(oracle.fastfood_matrix(signs, places.astype(int), factors, length)))


# --- the model, plain ------------------------------------------------------------------------------------------------


class Event:
    """What a program does in the middle of a call: once, at a place; models ask here as they run."""

    place = ""
    act: Callable[[Tensor], None] | None = None

    @classmethod
    def at(cls, place: str, x: Tensor) -> None:
        if cls.act is not None and cls.place == place:
            act, cls.act = cls.act, None
            act(x)


@contextmanager
def event(place: str, act: Callable[[Tensor], None] | None) -> Iterator[None]:
    """Let something happen at a place within this block."""
    Event.place, Event.act = place, act
    try:
        yield
    finally:
        Event.act = None


class Attention(nn.Module):
    """q, k and v of one input, plainly attended."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        Event.at("siblings", x)
        scores = q @ self.k_proj(x).transpose(-1, -2) / WIDTH**0.5
        return scores.softmax(-1) @ self.v_proj(x)


class Block(nn.Module):
    """A transformer block, (tokens, WIDTH) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        Event.at("block", x)
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks and a head, (tokens, WIDTH) -> (tokens, 2).

    Attributes:
        how: how blocks are called: plainly, checkpointed of either kind, or each apart on x ("fork").
        only: let the siblings of the first block be called on x, each with its grad mode; their outputs are the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(DEPTH)), nn.Linear(WIDTH, 2)
        self.how = "plain"
        self.only: tuple[bool, ...] = ()

    def forward(self, x: Tensor) -> Any:
        if self.only:
            return self._siblings(x)
        if self.how == "fork":
            return tuple(layer(x) for layer in self.layers)
        for k, layer in enumerate(self.layers):
            if k:
                Event.at("blocks", x)
            x = layer(x) if self.how == "plain" else checkpoint(layer, x, use_reentrant=self.how == "reentrant")
        return self.head(x)

    def _siblings(self, x: Tensor) -> tuple[Tensor, ...]:
        attention, found = self.layers[0].attn, []
        for k, (layer, grad) in enumerate(zip((attention.q_proj, attention.k_proj, attention.v_proj), self.only, strict=True)):
            if k == 1:
                Event.at("siblings", x)
            with nullcontext() if grad else torch.no_grad():
                found.append(layer(x))
        return tuple(found)


def base() -> Net:
    """The model before it is adapted, with equal weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double()


# --- the worlds ------------------------------------------------------------------------------------------------------


class Ours:
    """The model with adapters."""

    def __init__(self, spec: sl.AdapterSpec, **options: Any) -> None:
        self.spec, self.options, self.model = spec, options, base()
        self.handle = sl.attach(self.model, spec, TARGETS, dtype=torch.float64, seed=0, **options)

    def adapters(self) -> list[Adapter]:
        return list(self.handle.adapters)  # type: ignore[arg-type]

    @property
    def nodes(self) -> list[Tensor]:
        """The trainable nodes, in order."""
        return [t for adapter in self.adapters() for t in adapter.tensors() if isinstance(t, nn.Parameter)]

    def fill(self, seed: int, size: float = 0.4) -> None:
        """Give all trainable nodes values, such that dW is about as large as W."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for adapter in self.adapters():
                own = [t for t in adapter.tensors() if isinstance(t, nn.Parameter)]
                for tensor in own:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                largest = max(float(adapter.delta(name).abs().max()) for name in adapter.group.members)
                for tensor in own:
                    tensor.mul_((size / largest) ** (1 / len(own)))


class _Written(nn.Linear):
    """A layer that writes W + dW out at each call."""

    def forward(self, x: Tensor) -> Tensor:
        delta = self.world.delta(self.name)
        return F.linear(x, self.weight if delta is None else self.weight + delta, self.bias)


class Theirs:
    """The model that writes dW out, of nodes that have the values of `ours`.

    Attributes:
        state: "on", "off" (no dW), or "merged" (dW as it was then, a constant).
    """

    def __init__(self, ours: Ours) -> None:
        self.spec, self.model, self.state = ours.spec, base(), "on"
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                module.__class__ = _Written
                module.__dict__["world"], module.__dict__["name"] = self, name
        self._groups: list[tuple[Group, nn.Module | None, list[str]]] = []
        self.tensors: list[list[Tensor]] = []
        self.follow(ours, fresh=True)
        self._merged: dict[str, Tensor] = {}

    def follow(self, ours: Ours, fresh: bool = False) -> None:
        """Take the values that the nodes have now; `fresh`: as new leaves, without gradients."""
        if fresh:
            self._groups = [(a.group, getattr(a, "map", None), [n.name for n in a.graph.nodes]) for a in ours.adapters()]
            self.tensors = [
                [t.detach().clone().requires_grad_(t.requires_grad) for t in adapter.tensors()] for adapter in ours.adapters()
            ]
            return
        for own, adapter in zip(self.tensors, ours.adapters(), strict=True):
            for tensor, value in zip(own, adapter.tensors(), strict=True):
                tensor.data = value.detach().clone()

    @property
    def nodes(self) -> list[Tensor]:
        """The trainable nodes, in order."""
        return [t for own in self.tensors for t in own if t.requires_grad]

    def delta(self, name: str) -> Tensor | None:
        if self.state == "off":
            return None
        if self.state == "merged":
            return self._merged[name]
        for (group, map_, names), own in zip(self._groups, self.tensors, strict=True):
            if name in group.members:
                return deltas_of(self.spec, group, map_, dict(zip(names, own, strict=True)))[name]
        raise KeyError(name)

    def deltas(self) -> dict[str, Tensor]:
        """dW of all weights, as constants."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for (group, map_, names), own in zip(self._groups, self.tensors, strict=True):
                found |= deltas_of(self.spec, group, map_, dict(zip(names, own, strict=True)))
        return found

    def merge(self) -> None:
        self._merged, self.state = self.deltas(), "merged"


SPECS: dict[str, tuple[sl.AdapterSpec, dict[str, Any]]] = {
    "dense": (sl.dense(), {}),
    "lora": (sl.lora(2, alpha=4), {}),
    "loha": (sl.loha(2), {}),
    "lokr": (sl.lokr(1, factor=4), {}),
    "lotr": (sl.lotr(2), {}),
    "lonkr": (sl.lonkr(1, 2), {}),
    "vera": (sl.vera(3), {}),
    "lorta": (sl.lorta(2, order=3, groups=2), {}),
    "lorta fastfood": (sl.lorta(3, order=3, groups=2, projection=sl.Fastfood(0.5, seed=1)), {}),
    "superlora": (sl.superlora(2), {}),
    "superlora recompute": (sl.superlora(2, groups=2), {"recompute": True}),
    "lorta fastfood recompute": (sl.lorta(2, projection=sl.Fastfood(0.3, tanh=True)), {"recompute": True}),
    "cp over layers and types": (sl.AdapterSpec(sl.CP(3), sl.PhysicalFold("layer type out in"), alpha=3), {"route": "apply"}),
    "tucker over layers and types": (sl.AdapterSpec(sl.Tucker(2), sl.PhysicalFold("layer type out in")), {"route": "apply"}),
    "tensor train over layers": (sl.AdapterSpec(sl.TensorTrain(2), sl.PhysicalFold("layer in type out")), {}),
    "frozen node": (
        sl.AdapterSpec(
            sl.Network(
                "m o i", {"r": 2, "s": 3}, out="o r", core="m r s", fixed=sl.Node("s i", init="orthogonal", trainable=False)
            ),
            sl.PhysicalFold("member out in"),
        ),
        {"route": "apply"},
    ),
    "nested flat": (sl.AdapterSpec(sl.Hadamard(sl.CP(2), sl.Tucker(1)), sl.FlatFold(3, 2), sl.Shuffle(3)), {}),
    "flat weight": (sl.AdapterSpec(sl.Tucker(2), sl.FlatFold(3, groups="weight")), {}),
    "lora at the weight": (sl.lora(2), {"at": "weight"}),
    "lotr at the weight": (sl.lotr(2), {"at": "weight"}),
    "lorta at the weight": (sl.lorta(2, groups=2), {"at": "weight"}),
    "tucker built": (sl.AdapterSpec(sl.Tucker(2), sl.PhysicalFold("layer type out in")), {"route": "delta"}),
}
