"""What a layer with a forward of its own does, tried on a few numbers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.model.kinds import LayerError


def _sample(layer: Any) -> Tensor | None:
    """Two rows of input, where the layer is that has a place."""
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(t.device.type == "meta" for t in tensors):
        return None
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((t.dtype for t in tensors if t.dtype in (torch.float32, torch.float16, torch.bfloat16)), torch.float32)
    columns = layer.in_features
    return torch.linspace(-1, 1, 2 * columns, device=device).mul(5).sin().reshape(2, columns).to(dtype)


def _ran(layer: Any, x: Tensor) -> Tensor | None:
    """What the layer's own forward gives in evaluation; None where it cannot run here."""
    modes = [(module, module.training) for module in layer.modules()]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        warnings.simplefilter("ignore")
        try:
            y = layer.eval().forward(x)
        except Exception:  # kernels of another device, say
            return None
        finally:
            for module, training in modes:
                module.training = training
    return y if isinstance(y, Tensor) and y.shape[:-1] == x.shape[:-1] else None


def gives_gradient(layer: nn.Module) -> bool:
    """Whether the layer's forward passes a gradient to its input, as far as it can be tried here."""
    with torch.inference_mode(False), torch.enable_grad():
        x = _sample(layer)
        if x is None or (y := _ran(layer, x.requires_grad_())) is None:
            return True
        return y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None


def check_linear(layer: nn.Module) -> None:
    """Raise for a layer that says in_features and out_features and is not linear (with an activation behind it, say)."""
    x = _sample(layer)
    if x is None:
        return
    with torch.no_grad():
        y = _ran(layer, torch.cat([x, -x, 2 * x, torch.zeros_like(x)]))
    if y is None:
        return
    once, back, twice, none = y.float().chunk(4)
    size = float((once - none).norm()) + 1e-6 * float(none.norm())
    # Quantised activations are off by some percent; a nonlinear layer by as much as it computes.
    if float((once + back - 2 * none).norm()) > 0.2 * size or float((twice - 2 * once + none).norm()) > 0.2 * size:
        raise LayerError(
            f"is a {type(layer).__name__}, which has in_features and out_features but is not linear, so that dW x cannot be "
            "added to its output. Name the linear layers inside it."
        )


def computes(layer: Any, weight: Tensor) -> bool:
    """Whether the layer's forward is x W^T + b, as far as it can be tried here."""
    x = _sample(layer)
    if x is None:
        return True
    with torch.no_grad():
        y = _ran(layer, x)
        if y is None:
            return True
        bias = getattr(layer, "bias", None)
        z = functional.linear(x.float(), weight, bias.float() if isinstance(bias, Tensor) else None)
    return y.shape == z.shape and float((y.float() - z).norm()) <= 0.1 * float(z.norm())
