"""Kinds of weights: how one is read, written and updated, said in one place each. A kind is a value without state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.rows import Span
from superlora_tn.model.spans import cut, joined, put, replaced
from superlora_tn.update.base import Member, Side
from superlora_tn.update.eager import is_eager


class LayerError(TypeError):
    """A layer that cannot be adapted, or cannot do what was asked."""


# Weights of these dtypes hold W itself; others hold it packed or quantised.
WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


class Shows:
    """Marks the classes in which reading a parameter gives W + dW (see `shown`)."""

    _superlora_plain: type


def stored(layer: Any) -> Tensor:
    """The weight that a layer stores, where others show W + dW in its place; of a computed one what is computed."""
    shown = isinstance(layer, Shows)
    own = layer._parameters.get("weight") if shown else None
    return layer.weight if own is None else own  # type: ignore[no-any-return]


class Kind(ABC):
    """How weights of one kind of layer are read, written and updated."""

    @abstractmethod
    def shape(self, layer: Any) -> Shape:
        """(out, in) of the weight."""

    @abstractmethod
    def read(self, layer: Any) -> Tensor:
        """The weight as a matrix (out, in); a view where that is possible."""

    @abstractmethod
    def write(self, layer: Any, matrix: Tensor) -> None:
        """Write a matrix (out, in) into the weight, in place, rounding to its dtype.

        Raises:
            LayerError: the weight cannot hold it.
        """

    def owners(self, layer: Any) -> dict[str, Tensor] | None:
        """The layer's own tensors that hold the weight, by name; None where it is computed from others."""
        parameter = layer._parameters.get("weight")
        return None if parameter is None else {"weight": parameter}

    def keep(self, layer: Any) -> Any:
        """What `put` needs to give the weight back bit by bit, whatever is written to it meanwhile."""
        return self.read(layer).detach().clone()

    def put(self, layer: Any, kept: Any) -> None:
        """Give the weight back as `keep` found it."""
        self.write(layer, kept)

    def refusal(self, layer: Any) -> str:
        """Why the weight cannot hold W + dW, to be read behind its name; empty where it can."""
        return ""

    def kernel(self, layer: Any) -> tuple[int, ...]:
        """The sizes of its kernel, which `in` holds behind the channels; () for a matrix."""
        return ()

    @property
    def rounds(self) -> bool:
        """Whether writing quantises, so that much of a small dW may be lost."""
        return False

    @property
    def block(self) -> Span | None:
        """Which rows of the weight are meant; None means all."""
        return None

    @property
    def inputs(self) -> int | None:
        """How many numbers of the layer's input are not zero at once; None means all."""
        return None

    @property
    def looks_up(self) -> Side | None:
        """On which side of dW `join` looks rows up, where it does."""
        return None

    def ready(self, layer: Any, member: Member) -> None:
        """Let the adapter prepare what `join` asks of it."""
        if self.looks_up is not None:
            member.adapter.look_up(self.looks_up)

    @property
    def takes_all(self) -> bool:
        """Whether `join` takes for x all that the layer was called with, as (arguments, keywords)."""
        return False

    def bias(self, layer: Any) -> Tensor | None:
        """What the layer adds to its output behind the weight, shaped to meet the output."""
        found = getattr(layer, "bias", None)
        return found() if callable(found) else found

    def spread(self, layer: Any, values: Tensor, x: Tensor) -> Tensor:
        """A factor for each row of the weight, shaped to meet the layer's output for x; 1 for what is not meant."""
        return values

    def axis(self, layer: Any) -> int:
        """Which axis of the output counts the rows of the weight, from behind."""
        return -1

    def join(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """The layer's output with the update added.

        Args:
            layer: the layer.
            member: its weight in the adapter.
            x: the layer's input.
            y: its output.
            base: W, where y is proven to be nobody else's ``x W^T + b`` (see `adopt`), so that it may be written to.
        """
        raise LayerError(f"a {type(layer).__name__} is not updated at its output.")


class Linear(Kind):
    """``y = x W^T + b``."""

    def shape(self, layer: Any) -> Shape:
        """(out, in)."""
        return layer.out_features, layer.in_features

    def read(self, layer: Any) -> Tensor:
        """(out, in) as it is."""
        return stored(layer)

    def write(self, layer: Any, matrix: Tensor) -> None:
        """As it is."""
        stored(layer).copy_(matrix)

    def passed(self, layer: Any, member: Member, x: Tensor, y: Tensor) -> Tensor:
        """y, whose gradient reaches x."""
        return y

    def join(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """y (..., out) + x (..., in) dW^T."""
        training = layer.training
        if x.is_nested:  # an nn.TransformerEncoder in eval mode packs padded sequences so, and they have no one shape
            return y + functional.linear(member.drop(x, training), member.current().to(y.dtype))
        return member.update(x, y, base, training)


class Transposed(Linear):
    """GPT-2's Conv1D, which keeps (in, out)."""

    def shape(self, layer: Any) -> Shape:
        """(out, in)."""
        return layer.weight.shape[1], layer.weight.shape[0]

    def read(self, layer: Any) -> Tensor:
        """A transposed view."""
        return stored(layer).t()

    def write(self, layer: Any, matrix: Tensor) -> None:
        """Transposed."""
        stored(layer).copy_(matrix.t())


@dataclass(frozen=True)
class Opaque(Linear):
    """A linear layer whose weight is quantised, packed or kept elsewhere: only its input and output are used.

    Attributes:
        straight: whether the layer's own forward passes no gradient to its input; then that goes through the weight taken
            out of its packing.
    """

    straight: bool = False

    def read(self, layer: Any) -> Tensor:
        """The weight taken out of its packing, where that says how.

        Raises:
            LayerError: it does not say how.
        """
        weight = layer.weight() if callable(getattr(layer, "weight", None)) else getattr(layer, "weight", None)
        unpack = getattr(weight, "dequantize", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == self.shape(layer):
            if callable(unpack) and (weight.is_quantized or type(weight) not in (Tensor, nn.Parameter)):
                return unpack()  # type: ignore[no-any-return]
            if weight.dtype in WIDE:
                return weight
        raise LayerError(f"the weight of a {type(layer).__name__} is quantised or packed, and does not say how to read it.")

    def write(self, layer: Any, matrix: Tensor) -> None:
        """Refused: see `refusal`."""
        raise LayerError(f"the weight of a {type(layer).__name__} {self.refusal(layer)}")

    def refusal(self, layer: Any) -> str:
        """Nothing is known of how to quantise it again."""
        return (
            "is quantised or packed and cannot hold W + dW; merge into the unquantised base and quantise that, or keep the "
            "adapter apart."
        )

    def owners(self, layer: Any) -> dict[str, Tensor] | None:
        """The packed parameter, where it is one."""
        return super().owners(layer) or {}

    def passed(self, layer: Any, member: Member, x: Tensor, y: Tensor) -> Tensor:
        """x gets its gradient through W also where the layer's own forward gives none."""
        if x.is_quantized:
            raise LayerError(
                f"'{member.name}' is a {type(layer).__name__} that was called with a quantised tensor (static quantisation), "
                "and an update is computed from plain numbers; quantise its weights alone, or leave it out."
            )
        if torch.is_grad_enabled() and x.requires_grad and (self.straight or not y.requires_grad):
            y = _through(self, layer, x, y)
        return y

    def join(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """As a linear layer."""
        return super().join(layer, member, x, self.passed(layer, member, x, y), base)


def _through(kind: Kind, layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """y, with the gradient ``grad W`` for x; what y already passes on (to a bias) stays."""
    if is_eager():
        found: Tensor = _Through.apply(kind, layer, x, y)  # type: ignore[no-untyped-call]
        return found
    z = functional.linear(x, kind.read(layer).to(x.dtype))
    return y + (z - z.detach()).to(y.dtype)


class _Through(torch.autograd.Function):
    """The identity of y, with a gradient for x; W is read in backward alone."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.kind, ctx.layer, ctx.dtype = kind, layer, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight = ctx.kind.read(ctx.layer)
        return None, None, (grad.to(weight.dtype) @ weight).to(ctx.dtype), grad


@dataclass(frozen=True)
class RowsOf(Kind):
    """A block of the rows of a linear layer's weight: its columns of the output are updated.

    Attributes:
        kind: of the whole layer.
        span: which rows.
    """

    kind: Linear
    span: Span

    @property
    def block(self) -> Span | None:
        """Its rows."""
        return self.span

    def shape(self, layer: Any) -> Shape:
        """(out, in) of the block."""
        d_out, d_in = self.kind.shape(layer)
        return self.span.count(d_out), d_in

    def read(self, layer: Any) -> Tensor:
        """The block's rows."""
        return cut(self.kind.read(layer), self.span)

    def write(self, layer: Any, matrix: Tensor) -> None:
        """The other rows stay as they are."""
        put(self.kind.read(layer), self.span, matrix)

    def spread(self, layer: Any, values: Tensor, x: Tensor) -> Tensor:
        """1 for the other rows."""
        return replaced(values.new_ones(self.kind.shape(layer)[0], 1), [(self.span, values[:, None])])[:, 0]

    def owners(self, layer: Any) -> dict[str, Tensor] | None:
        """Those of the layer."""
        return self.kind.owners(layer)

    def refusal(self, layer: Any) -> str:
        """Rows of a packed weight are not written apart from the others."""
        if isinstance(self.kind, Opaque):
            return OPAQUE.refusal(layer)
        return self.kind.refusal(layer)

    def join(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """y (..., all rows) with x dW^T added to the block's columns; in place where y is nobody else's (`base` is W)."""
        y = self.kind.passed(layer, member, x, y)
        if x.is_nested:
            delta = functional.pad(member.current(), (0, 0, self.span.start, self.span.period - self.span.stop))
            return y + functional.linear(member.drop(x, layer.training), delta.to(y.dtype))
        update = member.update(x if x.dtype == y.dtype else x.to(y.dtype), None, None, layer.training)
        return joined(y, update, self.span, base is not None)


@dataclass(frozen=True)
class Held(Kind):
    """A weight that is adapted where it is read: reading the parameter gives W + dW (see `shown`).

    Attributes:
        parameter: the parameter's name.
        transposed: whether it is kept as (in, out).
        span: which rows; None means all.
        slot: which matrix of a parameter that holds a stack of them.
        built: whether reading a stack builds W + dW at once (see `stacks`).
    """

    parameter: str = "weight"
    transposed: bool = False
    span: Span | None = None
    slot: int | None = None
    built: bool = False

    @property
    def block(self) -> Span | None:
        """Its rows."""
        return self.span

    def stored(self, layer: Any) -> Tensor:
        """The parameter itself."""
        found = layer._parameters.get(self.parameter)
        if found is None:
            raise LayerError(
                f"is computed from others (weight_norm, parametrize: the {self.parameter} of a {type(layer).__name__}), and "
                "reading it would not see an adapter there; bake that in first."
            )
        return found  # type: ignore[no-any-return]

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as the matrix (out, in) that is meant, all rows, a view."""
        own = tensor if self.slot is None else tensor[self.slot]
        return own.t() if self.transposed else own.flatten(1)

    def shape(self, layer: Any) -> Shape:
        """(out, in) of the rows that are meant."""
        rows, columns = self.matrix(self.stored(layer)).shape
        return rows if self.span is None else self.span.count(rows), columns

    def read(self, layer: Any) -> Tensor:
        """The rows that are meant."""
        return cut(self.matrix(self.stored(layer)), self.span)

    def write(self, layer: Any, matrix: Tensor) -> None:
        """All else stays as it is."""
        put(self.matrix(self.stored(layer)), self.span, matrix)

    def kernel(self, layer: Any) -> tuple[int, ...]:
        """Of a convolution."""
        return tuple(layer.kernel_size) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ()

    def owners(self, layer: Any) -> dict[str, Tensor] | None:
        """The one parameter."""
        found = layer._parameters.get(self.parameter)
        return None if found is None else {self.parameter: found}


LINEAR, TRANSPOSED, OPAQUE = Linear(), Transposed(), Opaque()
