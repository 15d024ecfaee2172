"""How a layer type is adapted: its weight as a matrix (out, in), and how x dW^T joins its output.

A new layer type registers three functions, by single dispatch on the layer's type (see docs/extending.md). The projections
of an `nn.MultiheadAttention`, which uses its weights without calling a layer, stand as values of type `Projection`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from superlora_tn.update.base import NOMINAL_TOKENS

Update = Callable[[Any, Tensor, Tensor, Any, str, bool], Tensor]


class Adapts(Protocol):
    """What a layer needs of an adapter."""

    def current(self, target: str) -> Tensor:
        """dW of a target, (out, in), for this forward pass."""
        ...

    def halves(self, target: str, rows: int, blocks: int = 1) -> tuple[Tensor, Tensor] | None:
        """dW as outer (out, bond) times inner (bond, in), where `rows` rows of x go faster through these."""
        ...

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the input."""
        ...

    def __call__(self, x: Tensor, target: str, out: Tensor, base: Tensor | None = None) -> Tensor:
        """``out + x dW^T``; base is W, where out is a frozen linear layer's untouched output."""
        ...


class LayerError(TypeError):
    """A layer of a type that is not supported."""


CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Projection:
    """One projection of an `nn.MultiheadAttention`: it stands where a layer does, but nobody calls it.

    Attributes:
        attention: the module.
        part: one of `PARTS`.
    """

    attention: nn.MultiheadAttention
    part: str

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module and the name of its parameter that holds the weight."""
        if self.part == "out_proj":
            return self.attention.out_proj, "weight"
        return self.attention, "in_proj_weight" if self.attention._qkv_same_embed_dim else f"{self.part}_weight"

    @property
    def block(self) -> tuple[int, int]:
        """Which of how many equal blocks of rows of that parameter is the weight."""
        return (PARTS.index(self.part), 3) if self.place[1] == "in_proj_weight" else (0, 1)

    @property
    def is_computed(self) -> bool:
        """Whether that parameter was replaced by one that is computed from others (weight_norm, parametrize)."""
        module, name = self.place
        return module._parameters.get(name) is None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        module, name = self.place
        found = module._parameters.get(name)
        if found is None:
            raise LayerError(f"the {self.part} of an nn.MultiheadAttention is computed from others; bake that in first.")
        return found

    def current(self) -> Tensor:
        """The parameter, or what hides it now."""
        module, name = self.place
        tensor: Tensor = module.__dict__.get(name, self.parameter)
        return tensor

    def hide(self, tensor: Tensor) -> None:
        """Show the attention a tensor instead of the parameter, which stays where it is: a plain attribute goes first."""
        module, name = self.place
        module.__dict__[name] = tensor

    def reveal(self) -> None:
        """Show the parameter again."""
        module, name = self.place
        module.__dict__.pop(name, None)


Layer = nn.Module | Projection


def _unsupported(layer: Layer) -> LayerError:
    return LayerError(f"layers of type {type(layer).__name__} cannot be adapted; supported are {', '.join(supported())}.")


@singledispatch
def weight(layer: Layer) -> Tensor:
    """The layer's weight as a matrix (out, in)."""
    raise _unsupported(layer)


@singledispatch
def write(layer: Layer, matrix: Tensor) -> None:
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


@singledispatch
def stored(layer: Layer, name: str) -> dict[str, Tensor] | None:
    """The parameters that hold the weight of the layer of this name, by their full names; None where it is computed."""
    raise _unsupported(layer)


@stored.register
def module_stored(layer: nn.Module, name: str) -> dict[str, Tensor] | None:
    """The layer's own matrices and kernels."""
    own = dict(layer.named_parameters(recurse=False))
    if is_parametrized(layer) or ("weight" not in own and any(n.startswith("weight_") for n in own)):
        return None
    return {f"{name}.{n}": parameter for n, parameter in own.items() if parameter.ndim > 1}


def supported() -> tuple[str, ...]:
    """Names of the layer types that can be adapted."""
    _register_known()
    return tuple(sorted(t.__name__ for t in weight.registry if t is not object))


def is_supported(layer: Layer) -> bool:
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
    if x.is_nested:  # an nn.TransformerEncoder in eval mode packs padded sequences so, and they have no one shape
        return y + functional.linear(adapter.drop(x), adapter.current(target).to(y.dtype))
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
    """y + conv(x, dW), with the layer's own padding, stride, dilation and groups.

    Where dW is a product of thin matrices, x goes through the inner one as a kernel, then through the outer one, position by
    position, as LoRA on convolutions does.
    """
    x = adapter.drop(x).to(y.dtype)
    rows = NOMINAL_TOKENS if torch.compiler.is_compiling() else y.numel() // layer.out_channels
    found = adapter.halves(target, rows, layer.groups)
    inner = adapter.current(target) if found is None else found[1].repeat(layer.groups, 1)
    # The layer's own method pads as padding_mode says, and knows its number of dimensions.
    more: Tensor = layer._conv_forward(x, inner.reshape(-1, *layer.weight.shape[1:]).to(y.dtype), None)
    if found is not None:
        point = found[0].reshape(*found[0].shape, *(1 for _ in layer.weight.shape[2:]))
        more = CONVOLUTIONS[layer.weight.ndim](more, point.to(y.dtype), groups=layer.groups)
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


@weight.register
def projection_weight(layer: Projection) -> Tensor:
    """The rows of the attention's parameter, a view."""
    k, count = layer.block
    return layer.parameter.chunk(count)[k]


@write.register
def projection_write(layer: Projection, matrix: Tensor) -> None:
    """The other rows stay as they are."""
    weight(layer).copy_(matrix)


@stored.register
def projection_stored(layer: Projection, name: str) -> dict[str, Tensor] | None:
    """The attention's one parameter."""
    home = name if layer.part == "out_proj" else name.rpartition(".")[0]
    return None if layer.is_computed else {f"{home}.{layer.place[1]}".lstrip("."): layer.parameter}


def _register_known() -> None:
    """Register layer types of libraries that are already imported; importing them is the user's choice."""
    module = sys.modules.get("transformers.pytorch_utils")
    if module is not None and module.Conv1D not in weight.registry:
        weight.register(module.Conv1D, transposed_weight)
        write.register(module.Conv1D, transposed_write)
        update.register(module.Conv1D, transposed_update)


def add_to_weight(layer: Layer, delta: Tensor) -> None:
    """Add dW (out, in) to the layer's weight in place, rounding once to the weight's dtype."""
    with torch.no_grad():
        write(layer, weight(layer).to(delta.dtype) + delta)
