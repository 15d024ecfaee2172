"""How a layer type is adapted: its weight as a matrix (out, in), and how x dW^T joins its output.

A new layer type registers three functions, by single dispatch on the layer's type (see docs/extending.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Update = Callable[[Any, Tensor, Tensor, Any, str, bool], Tensor]


class Adapts(Protocol):
    """What a layer needs of an adapter."""

    def current(self, target: str) -> Tensor:
        """dW of a target, (out, in), for this forward pass."""
        ...

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the input."""
        ...

    def __call__(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """``out + x dW^T``; base is W, where out is a frozen linear layer's untouched output."""
        ...


class LayerError(TypeError):
    """A layer of a type that is not supported."""


def _unsupported(layer: nn.Module) -> LayerError:
    return LayerError(f"layers of type {type(layer).__name__} cannot be adapted; supported are {', '.join(supported())}.")


@singledispatch
def weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a matrix (out, in)."""
    raise _unsupported(layer)


@singledispatch
def write(layer: nn.Module, matrix: Tensor) -> None:
    """Write a matrix (out, in) into the layer's weight, in place, rounding to its dtype."""
    raise _unsupported(layer)


@singledispatch
def update(layer: nn.Module, x: Tensor, y: Tensor, adapter: Adapts, target: str, untouched: bool) -> Tensor:
    """The layer's output with the adapter's update added.

    Args:
        layer: the adapted layer.
        x: its input.
        y: its output.
        adapter: the adapter.
        target: the layer's name in it.
        untouched: whether y comes straight from the layer, and nobody else has seen it.
    """
    raise _unsupported(layer)


def supported() -> tuple[str, ...]:
    """Names of the layer types that can be adapted."""
    _register_known()
    return tuple(sorted(t.__name__ for t in weight.registry if t is not object))


def is_supported(layer: nn.Module) -> bool:
    """Whether layers of this type can be adapted."""
    _register_known()
    return weight.dispatch(type(layer)) is not weight.dispatch(object)


def update_of(layer: nn.Module) -> Update:
    """The update function of the layer's type, looked up once."""
    return update.dispatch(type(layer))


@weight.register
def linear_weight(layer: nn.Linear) -> Tensor:
    """(out, in) as it is."""
    return layer.weight


@write.register(nn.Linear)
@write.register(nn.Conv1d)
@write.register(nn.Conv2d)
@write.register(nn.Conv3d)
def plain_write(layer: nn.Linear, matrix: Tensor) -> None:
    """The weight's axes behind `out` are `in`, in order; a kernel in channels_last memory stays so."""
    layer.weight.copy_(matrix.reshape(layer.weight.shape))


@update.register
def linear_update(layer: nn.Linear, x: Tensor, y: Tensor, adapter: Adapts, target: str, untouched: bool) -> Tensor:
    """y (..., out) + x (..., in) dW^T."""
    return adapter(x, target, y, layer.weight if untouched and _is_plain_linear(layer, x, y) else None)


def _is_plain_linear(layer: nn.Linear, x: Tensor, y: Tensor) -> bool:
    """Whether y is just ``x W^T + b`` with nothing to train, so that the adapter may write to it and differentiate it.

    A subclass may compute something else, a tensor subclass may hold something else, and autocast casts in between.
    """
    weight, bias = layer.weight, layer.bias
    return (
        type(layer) is nn.Linear
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and type(x) is Tensor
        and x.dtype == y.dtype == weight.dtype
        and y.is_contiguous()
    )


@weight.register(nn.Conv1d)
@weight.register(nn.Conv2d)
@weight.register(nn.Conv3d)
def conv_weight(layer: nn.Conv2d) -> Tensor:
    """(out, in / groups * kernel): the kernel's axes belong to `in`."""
    return layer.weight.flatten(1)


@update.register(nn.Conv1d)
@update.register(nn.Conv2d)
@update.register(nn.Conv3d)
def conv_update(layer: nn.Conv2d, x: Tensor, y: Tensor, adapter: Adapts, target: str, untouched: bool) -> Tensor:
    """y + conv(x, dW), with the layer's own padding, stride, dilation and groups."""
    kernel = adapter.current(target).reshape(layer.weight.shape).to(y.dtype)
    x = adapter.drop(x).to(y.dtype)
    # The layer's own method pads as padding_mode says, and knows its number of dimensions.
    more: Tensor = layer._conv_forward(x, kernel, None)
    return y + more


def transposed_weight(layer: Any) -> Tensor:
    """GPT-2's Conv1D keeps (in, out)."""
    matrix: Tensor = layer.weight
    return matrix.t()


def transposed_write(layer: Any, matrix: Tensor) -> None:
    """GPT-2's Conv1D keeps (in, out)."""
    layer.weight.copy_(matrix.t())


def transposed_update(layer: Any, x: Tensor, y: Tensor, adapter: Adapts, target: str, untouched: bool) -> Tensor:
    """y (..., out) + x (..., in) dW^T."""
    return adapter(x, target, y)


def _register_known() -> None:
    """Register layer types of libraries that are already imported; importing them is the user's choice."""
    module = sys.modules.get("transformers.pytorch_utils")
    if module is not None and module.Conv1D not in weight.registry:
        weight.register(module.Conv1D, transposed_weight)
        write.register(module.Conv1D, transposed_write)
        update.register(module.Conv1D, transposed_update)


def add_to_weight(layer: nn.Module, delta: Tensor) -> None:
    """Add dW (out, in) to the layer's weight in place, rounding once to the weight's dtype."""
    with torch.no_grad():
        write(layer, weight(layer).to(delta.dtype) + delta)
