"""Convolutions and transposed convolutions: their weights as matrices, and dW run as thin layers where it comes apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.declare.fold import Shape
from superlora_tn.files.errors import CheckpointError
from superlora_tn.model.kinds import Kind, stored
from superlora_tn.update.base import NOMINAL_TOKENS, Member
from superlora_tn.update.eager import is_recorded
from superlora_tn.update.links import Links

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    3: functional.conv_transpose1d,
    4: functional.conv_transpose2d,
    5: functional.conv_transpose3d,
}
OWN = tuple(kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


class Convolution(Kind):
    """``y = conv(x, W) + b``; the kernel's axes belong to `in`: (out, in / groups * kernel)."""

    def shape(self, layer: Any) -> Shape:
        """(out, in / groups * kernel)."""
        d_in = layer.in_channels // layer.groups
        for side in layer.kernel_size:
            d_in *= side
        return layer.out_channels, d_in

    def kernel(self, layer: Any) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(layer.kernel_size)

    def axis(self, layer: Any) -> int:
        """The channels'."""
        return -1 - len(layer.kernel_size)

    def bias(self, layer: Any) -> Tensor | None:
        """One number a channel."""
        found = super().bias(layer)
        return None if found is None else self.spread(layer, found, found)

    def spread(self, layer: Any, values: Tensor, x: Tensor) -> Tensor:
        """One number a channel."""
        return values.reshape(-1, *(1 for _ in layer.kernel_size))

    def ready(self, layer: Any, member: Member) -> None:
        """Chains are for the positions of its kernel."""
        member.adapter.link_up(math.prod(layer.kernel_size))

    def read(self, layer: Any) -> Tensor:
        """The kernel, flattened behind `out`."""
        return stored(layer).flatten(1)

    def write(self, layer: Any, matrix: Tensor) -> None:
        """A kernel in channels_last memory stays so."""
        weight = stored(layer)
        weight.copy_(matrix.reshape(weight.shape))

    def join(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """y + conv(x, dW), with the layer's own padding, stride, dilation and groups.

        Where dW is a chain of thin layers, or a product of thin matrices, x goes through these one after the other: the kernel
        by the thinnest, all else position by position, as LoRA on convolutions does.
        """
        x = member.drop(x, layer.training).to(y.dtype)
        rows, before = y.numel() // layer.out_channels, x.numel() // layer.in_channels
        if is_recorded():
            rows = before = NOMINAL_TOKENS
        links = member.links(math.prod(layer.kernel_size), rows, before, layer.groups) if self.is_own(layer) else None
        if links is not None:
            batch = x if x.ndim == layer.weight.ndim else x[None]
            more = self._linked(layer, links, batch, y)
            return y + (more if x is batch else more[0])
        found = member.halves(self.passes(rows, before), layer.groups)
        inner = member.current() if found is None else found[1].repeat(layer.groups, 1)
        kernel = inner.reshape(inner.shape[0], -1, *layer.kernel_size).to(y.dtype)
        more = self.convolve(layer, x, kernel, y)
        return y + (more if found is None else _pointwise(layer, more, found[0], layer.groups))

    def passes(self, rows: int, before: int) -> int:
        """How often the kernel is used, of positions of the output and of the input."""
        return rows

    def is_own(self, layer: Any) -> bool:
        """Whether the layer convolves as torch does, so that a kernel of other channels may be run the same way."""
        return getattr(layer._conv_forward, "__func__", None) in OWN

    def convolve(self, layer: Any, x: Tensor, kernel: Tensor, y: Tensor) -> Tensor:
        """x through a kernel (any out, in / groups, sizes) in place of the layer's own; y is its output."""
        # The layer's own method pads as padding_mode says, and knows its number of dimensions.
        return layer._conv_forward(x, kernel, None)  # type: ignore[no-any-return]

    def grouped(self, layer: Any, x: Tensor, kernel: Tensor, groups: int, y: Tensor) -> Tensor:
        """x through a kernel in groups of its own, with the layer's padding, stride and dilation."""
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return CONVOLUTIONS[layer.weight.ndim](x, kernel, None, layer.stride, padding, layer.dilation, groups)

    def _linked(self, layer: Any, links: Links, x: Tensor, y: Tensor) -> Tensor:
        """x (batch, channels, *positions) through a chain of thin layers."""
        blocks, (o1, i1, _, i2) = layer.groups, links.sizes
        batch = x.shape[0]
        # Blocks and the slow digits of the channels go through the chain one beside the other.
        h = x.reshape(batch * blocks * i1, i2, *x.shape[2:])
        if links.before is not None:
            h = _pointwise(layer, h, links.before)
        core = links.core.reshape(links.core.shape[0], -1, *layer.kernel_size).to(x.dtype)
        h = self.grouped(layer, h, core, links.terms, y)
        sides = h.shape[2:]
        if links.left is None:
            h = torch.unflatten(h, 0, (batch, blocks * i1)).flatten(1, 2)
            return h if links.after is None else _pointwise(layer, h, links.after, blocks)
        if links.after is not None:
            h = _pointwise(layer, h, links.after)
        left = links.left.to(x.dtype).reshape(blocks, o1 // blocks, i1)
        h = torch.unflatten(h, 0, (batch, blocks, i1)).flatten(3)
        return torch.matmul(left, h).reshape(batch, layer.out_channels, *sides)


class TransposedConvolution(Convolution):
    """``y = conv_transpose(x, W) + b``, whose weight torch keeps as (in, out / groups, kernel)."""

    def read(self, layer: Any) -> Tensor:
        """As of a convolution, (out, in / groups * kernel): a copy."""
        return _turned(stored(layer), layer.groups).flatten(1)

    def write(self, layer: Any, matrix: Tensor) -> None:
        """As torch keeps it."""
        stored(layer).copy_(self.laid(layer, matrix))

    def laid(self, layer: Any, matrix: Tensor) -> Tensor:
        """A matrix (out, in / groups * kernel) as torch keeps the weight."""
        return _turned(matrix.reshape(matrix.shape[0], -1, *layer.kernel_size), layer.groups)

    def passes(self, rows: int, before: int) -> int:
        """Once for each position of the input."""
        return before

    def is_own(self, layer: Any) -> bool:
        """Always: another forward is refused."""
        return True

    def convolve(self, layer: Any, x: Tensor, kernel: Tensor, y: Tensor) -> Tensor:
        """As of a convolution."""
        return self.grouped(layer, x, kernel, layer.groups, y)

    def grouped(self, layer: Any, x: Tensor, kernel: Tensor, groups: int, y: Tensor) -> Tensor:
        """As of a convolution; what is added at the far ends is told from y, as it may be an argument of the call."""
        count = layer.weight.ndim - 2
        sides = zip(
            y.shape[-count:], x.shape[-count:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
        )
        added = [int(own - (given - 1) * s + 2 * p - d * (k - 1) - 1) for own, given, s, p, d, k in sides]
        weight = _turned(kernel, groups)
        run = TRANSPOSED[layer.weight.ndim]
        return run(x, weight, None, layer.stride, layer.padding, added, groups, layer.dilation)


def _turned(kernel: Tensor, groups: int) -> Tensor:
    """A kernel (a, b / groups, *sizes) as (b, a / groups, *sizes)."""
    apart = kernel.reshape(groups, -1, *kernel.shape[1:]).transpose(1, 2)
    return apart.reshape(-1, *apart.shape[2:])


def _pointwise(layer: Any, x: Tensor, matrix: Tensor, groups: int = 1) -> Tensor:
    """x ([batch,] in, *positions) times a matrix (out, in / groups), position by position."""
    point = matrix.reshape(*matrix.shape, *(1 for _ in layer.kernel_size)).to(x.dtype)
    return CONVOLUTIONS[layer.weight.ndim](x, point, groups=groups)


def kernels_of(targets: Iterable[Any], format: str) -> dict[str, tuple[int, ...]]:
    """The kernels of the targets that are convolutions, by name.

    Raises:
        CheckpointError: a transposed one, in the format of another library.
    """
    own = {target.name: target for target in targets if isinstance(target.kind, Convolution)}
    for name, target in own.items():
        if isinstance(target.kind, TransposedConvolution) and format != "superlora":
            raise CheckpointError(
                f"'{name}' is a {type(target.layer).__name__}, for which the format '{format}' has no method; save as "
                "'superlora', or bake() it into the base."
            )
    return {name: tuple(target.layer.kernel_size) for name, target in own.items()}


CONVOLUTION, TRANSPOSED_CONVOLUTION = Convolution(), TransposedConvolution()
