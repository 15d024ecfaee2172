"""Tiny models to adapt, and the declarations that the tests attach to them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from superlora_tn import (
    CP,
    AdapterSpec,
    Fastfood,
    FlatFold,
    Hadamard,
    Kronecker,
    Network,
    Node,
    PhysicalFold,
    Shuffle,
    TensorTrain,
    Tucker,
    Tuned,
    dense,
    loha,
    lokr,
    lonkr,
    lora,
    lorta,
    lotr,
    superlora,
    vera,
)

DIM, HIDDEN, CLASSES = 12, 20, 5
TARGETS = ["q_proj", "v_proj", "up", "down"]


class Attention(nn.Module):
    """Four projections and plain attention, (batch, tokens, DIM) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.v_proj, self.o_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).transpose(-1, -2) / DIM**0.5
        return self.o_proj(scores.softmax(-1) @ self.v_proj(x))


class Block(nn.Module):
    """A transformer block whose MLP has unlike shapes, (batch, tokens, DIM) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.down(torch.tanh(self.up(x)))


class Tiny(nn.Module):
    """Blocks and a head, (batch, tokens, DIM) -> (batch, tokens, CLASSES); the targets are TARGETS in every block."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ConvNet(nn.Module):
    """A plain, a grouped and a strided convolution, (batch, 4, 8, 8) -> (batch, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1, padding_mode="circular")
        self.strided = nn.Conv2d(8, 6, 3, stride=2, dilation=2)
        self.line = nn.Conv1d(6, 6, 2, groups=2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.first(x))))
        return self.head(self.line(torch.tanh(self.strided(x)).flatten(2)).mean(-1))


class Tied(nn.Module):
    """An embedding and an output layer that are one weight, (batch, tokens) whole numbers -> (batch, tokens, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, DIM)
        self.body = nn.Linear(DIM, DIM)
        self.lm_head = nn.Linear(DIM, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.body(self.embed(tokens))))


# One declaration a way of saying it: every part, physical and flat folds, every map, both routes.
VARIANTS: Mapping[str, AdapterSpec] = {
    "dense": dense(),
    "lora": lora(2, alpha=4),
    "rslora": lora(3, alpha=4, rslora=True),
    "loha": loha(2),
    "lokr": lokr(1),
    "lokr factor": lokr(1, factor=4, decompose_both=True, alpha=2),
    "lotr": lotr(2),
    "lonkr": lonkr(1, 3),
    "vera": vera(3),
    "lorta": lorta(2, order=3),
    "lorta groups": lorta(2, order=4, groups=3, alpha=4),
    "lorta fastfood": lorta(3, order=3, groups=2, projection=Fastfood(0.5, seed=1)),
    "lorta tanh": lorta(3, projection=Fastfood(0.3, tanh=True)),
    "superlora": superlora(2),
    "superlora weight": superlora(2, groups="weight", splits=2),
    "superlora vector": superlora(1, order=1, groups=4, projection=Fastfood(0.1)),
    "superlora splits": superlora(2, order=3, groups=2, splits=2),
    "stacked": AdapterSpec(CP(2), FlatFold(2, groups=2, stacked=True), Shuffle(3)),
    "flat weight": AdapterSpec(Tucker(2), FlatFold(3, groups="weight")),
    "nested": AdapterSpec(Kronecker(Tucker(2), Hadamard(CP(2), CP(1))), FlatFold(3, 2, splits=2), Fastfood(0.5)),
    "cp layers": AdapterSpec(CP(3), PhysicalFold("layer type out in"), alpha=3),
    "train heads": AdapterSpec(TensorTrain(2), PhysicalFold("layer in head out", heads=4)),
    "tucker ranks": AdapterSpec(Tucker((2, 3), factors="in out"), PhysicalFold("layer out in")),
    "notation": AdapterSpec(
        Network("(o1 o2) (i1 i2)", {"r": 2, "o1": 2}, left="o1 i1", up=Node("o2 r", init="zeros"), down="r i2")
    ),
    "frozen": AdapterSpec(
        Network("m o i", {"r": 2, "s": 3}, out="o r", core="m r s", fixed=Node("s i", init="orthogonal", trainable=False)),
        PhysicalFold("member out in"),
    ),
}


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def seeded(seed: int, make: type[nn.Module]) -> nn.Module:
    """A model with the weights of a seed; torch's own generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def perturb(handle: Tuned, seed: int = 0, size: float = 0.3) -> None:
    """Give every trainable number of an adapter a value, as training would, such that dW's largest is about `size`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in handle.adapters:
            parameters = list(adapter.parameters())
            for parameter in parameters:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            largest = max(float(adapter.delta(name).abs().max()) for name in adapter.group.members)
            for parameter in parameters:
                # dW is of first degree in every node, so each takes an equal share of the correction.
                parameter.mul_((size / largest) ** (1 / len(parameters)))


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, bool], dict[str, int]]:
    """All that may not change when something is refused: values, requires_grad and the number of hooks."""
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    values = {k: v.clone() for k, v in model.state_dict().items()}
    return values, {n: p.requires_grad for n, p in model.named_parameters()}, hooks


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_state(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Equal keys in order, dtypes and bytes."""
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and _bytes(left[k]) == _bytes(right[k]) for k in left
    )


def assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], dict[str, bool], dict[str, int]]) -> None:
    """The model is as `snapshot` saw it."""
    values, grads, hooks = snapshot(model)
    assert same_state(values, before[0])
    assert grads == before[1]
    assert hooks == before[2]


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Fail where the block makes more than so many calls: the same count on every machine, unlike seconds."""
    count = 0

    def tick(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tick)
    try:
        yield
    finally:
        sys.setprofile(None)
        assert count <= most, f"{count:,} calls"
