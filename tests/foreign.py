"""What the tests of other libraries' files share: small models, values for adapters, and dW of what was read, built apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from superlora_tn.files.foreign import Fitted, Parsed
from superlora_tn.files.read import read
from superlora_tn.files.record import tensor_name
from superlora_tn.update.make import make_adapter

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


class Attention(nn.Module):
    """Split projections, as diffusers names them."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Some mixture that every projection takes part in."""
        gate = torch.softmax(self.to_q(x) * self.to_k(x), -1)
        y: Tensor = self.to_out[0](gate * self.to_v(x))
        return y


class Fused(nn.Module):
    """The same with one projection."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """As `Attention`."""
        q, k, v = self.qkv(x).chunk(3, -1)
        y: Tensor = self.proj(torch.softmax(q * k, -1) * v)
        return y


class Net(nn.Module):
    """Linear layers of several shapes, convolutions of 1x1 and 3x3, and attention; names with '_' in them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 12, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.Conv2d(12, 24, 1), nn.Conv2d(24, 24, 3, padding=1)])
        self.attn_1 = Attention()
        self.ff = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, 6, 6) to (n, 10)."""
        y = self.conv_in(x)
        for block in self.down_blocks:
            y = torch.tanh(block(y))
        y = y.flatten(2).transpose(1, 2)
        y = self.ff(y + self.attn_1(y))
        out: Tensor = self.head(y.mean(1))
        return out


LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.0", "ff.2"]
CONVOLUTIONS = ["conv_in", "down_blocks.0", "down_blocks.1"]


def inputs(seed: int = 1) -> Tensor:
    """What `Net` reads."""
    return torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of all linear layers and convolutions; an embedding's table is (in, out)."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return {n: tuple(m.weight.flatten(1).shape) for n, m in model.named_modules() if isinstance(m, kinds)}  # type: ignore[misc]


def shuffle(parameters: Any, seed: int = 0, by: float = 0.3) -> None:
    """Random values for an adapter's parameters, so that nothing of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * by)


def deltas(fitted: Fitted) -> dict[str, np.ndarray]:
    """dW of every target, by the library's own adapters in float64."""
    found, k = {}, 0
    for entry in fitted.entries:
        for group, graph in entry.spec.lay_out(entry.targets):
            adapter = make_adapter(entry.spec, group, graph, torch.float64)
            with torch.no_grad():
                for node, own in zip(graph.nodes, adapter.tensors(), strict=True):
                    own.copy_(fitted.tensors[tensor_name(k, node)])
            k += 1
            found |= {name: adapter.delta(name).detach().numpy() for name in group.members}
    return found


def parsed(path: Path) -> Parsed:
    """Read a file that is not this library's own."""
    found = read(path)
    assert isinstance(found, Parsed)
    return found


def fit(path: Path, model: nn.Module, **more: Any) -> Fitted:
    """Read a file and fit it to a model."""
    parameters = [name for name, _ in model.named_parameters()]
    return parsed(path).fitted(shapes(model), parameters=parameters, **more)


def close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], bound: float) -> None:
    """Both have the same weights, and none is off by more than `bound` of the largest number in it."""
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert delta.any(), f"dW of {name} is zero, so nothing is tested"
        assert np.abs(found[name] - delta).max() <= bound * np.abs(delta).max(), name


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Path:
    """A safetensors file."""
    words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, path, metadata=words or None)
    return path
