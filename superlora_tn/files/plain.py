"""A weight's adapter as a plain LoRA: as it is, exact at the network's own rank, or the nearest of a given rank or error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from superlora_tn.files.anatomy import Method, method_of
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.thin import Filled, Thin, distance, of_weight, thin
from superlora_tn.files.weight import build


@dataclass(frozen=True)
class Wish:
    """How a weight is to be written where its method is not the format's.

    Attributes:
        rank: the largest LoRA's, None for the network's own.
        error: the largest relative error in the Frobenius norm, None for none.
        dtype: of the file's numbers, None keeps those of the nodes; products are float32 at least.
    """

    rank: int | None = None
    error: float | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise CheckpointError(f"the adapter is to be written with rank={self.rank!r}; give a whole number of at least 1.")
        if self.error is not None and not (type(self.error) in (int, float) and 0 <= self.error < 1):
            raise CheckpointError(f"the adapter is to be written with error={self.error!r}; a relative error is from 0 to 1.")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise CheckpointError(f"the adapter is to be written in {self.dtype}; give a floating-point dtype.")

    @property
    def truncates(self) -> bool:
        """Whether a LoRA may lose something."""
        return self.rank is not None or self.error is not None


@dataclass(frozen=True, eq=False)
class Pair:
    """``dW = scale up down``.

    Attributes:
        up, down: (out, r) and (r, in).
        scale: of their product.
        error: of what is written, ``||dW - scale up down|| / ||dW||``.
    """

    up: Tensor
    down: Tensor
    scale: float
    error: float

    @property
    def rank(self) -> int:
        """r."""
        return self.up.shape[1]

    @property
    def alpha(self) -> float:
        """What the rank divides to the scale."""
        return self.scale * self.rank


def pair_of(filled: Filled, method: Method | None, wish: Wish) -> Pair:
    """The LoRA of a weight.

    Args:
        filled: its network.
        method: what `method_of` says of it.
        wish: how large it may be, or how far off.

    Raises:
        CheckpointError: an error that the given rank does not reach, or values that are not finite.
    """
    lora = method.fields if method is not None and _is_lora(filled, method) else None
    if lora is not None and wish.error is None and lora["up"].shape[1] <= (wish.rank or lora["up"].shape[1]):
        up, down = lora["up"], lora["down"]
        if up.dtype == down.dtype == (wish.dtype or up.dtype):
            return Pair(up, down, filled.scale, 0.0)
        return _rounded((up.double(), down.double()), thin(filled), wish.dtype or filled.dtype)
    found = thin(filled)
    return _rounded(_chosen(found, wish), found, wish.dtype or torch.promote_types(filled.dtype, torch.float32))


def _is_lora(filled: Filled, method: Method) -> bool:
    """Whether a network is a LoRA as it stands; where a pointwise core was multiplied in, the product is rounded, too."""
    return method.kind == "lora" and "mid" not in method.fields and len(method.fields) == len(filled.nodes)


def as_method(filled: Filled, dtype: torch.dtype | None) -> tuple[Filled, Method | None, float]:
    """A network as another library's method with its tensors in a dtype, and the relative error that this makes.

    Where nodes are multiplied for the method (a pointwise convolution's core), that is done in float64 and narrowed once.

    Args:
        filled: the network.
        dtype: of the tensors, None for the nodes' own; products are float32 at least.

    Returns:
        The network, its nodes in the dtype where they are the method's tensors; the method, None where there is none; the
            error.

    Raises:
        CheckpointError: a value does not fit.
    """
    method = method_of(filled)
    if method is None:
        return filled, None, 0.0
    if len(method.fields) == len(filled.nodes):
        narrow, off = narrowed(filled, dtype)
        return narrow, method_of(narrow), off
    wide = method_of(replace(filled, nodes=tuple(node.double() for node in filled.nodes)))
    assert wide is not None
    own = dtype or torch.promote_types(filled.dtype, torch.float32)
    fields = {name: tensor.to(own) for name, tensor in wide.fields.items()}
    _check(fields.values(), filled.name, own)
    found, made = thin(filled), of_weight(build(filled.name, fields))
    size = found.norm()
    off = abs(filled.scale) * distance(*thin(made).exact(), *found.exact())
    return filled, replace(wide, fields=fields), off / size if size else 0.0


def narrowed(filled: Filled, dtype: torch.dtype | None) -> tuple[Filled, float]:
    """A network with its values in a dtype, None for their own, and the relative error that this makes.

    Raises:
        CheckpointError: a value does not fit.
    """
    if dtype is None or all(node.dtype == dtype for node in filled.nodes):
        return filled, 0.0
    made = replace(filled, nodes=tuple(node.to(dtype) for node in filled.nodes))
    _check(made.nodes, filled.name, dtype)
    found = thin(filled)
    size = found.norm()
    return made, abs(filled.scale) * distance(*thin(made).exact(), *found.exact()) / size if size else 0.0


def rounded(up: Tensor, down: Tensor, name: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], float]:
    """Two factors in float64 in another dtype, and the relative error that this makes of their product.

    Raises:
        CheckpointError: a value does not fit.
    """
    made = up.to(dtype), down.to(dtype)
    _check(made, name, dtype)
    size = distance(up, down, up[:, :0], down[:0])
    return made, distance(made[0].double(), made[1].double(), up, down) / size if size else 0.0


def _check(values: Iterable[Tensor], name: str, dtype: torch.dtype) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise CheckpointError(f"'{name}' does not fit into {dtype}; write it in a wider one.")


def _chosen(found: Thin, wish: Wish) -> tuple[Tensor, Tensor]:
    rank = min(found.rank, wish.rank or found.rank)
    if wish.error is not None:
        needed = found.rank_for(wish.error)
        if wish.rank is not None and needed > wish.rank:
            raise CheckpointError(
                f"'{found.filled.name}' needs rank {needed} for a relative error of {wish.error:g}, above rank={wish.rank}; "
                "allow a larger rank or a larger error."
            )
        rank = min(rank, needed)
    return found.truncated(rank) if rank < found.rank else found.exact()


def _rounded(pair: tuple[Tensor, Tensor], found: Thin, dtype: torch.dtype) -> Pair:
    """A pair in the file's dtype, and how far it is from the network's own."""
    up, down = (side.to(dtype) for side in pair)
    _check((up, down), found.filled.name, dtype)
    scale, size = found.filled.scale, found.norm()
    off = abs(scale) * distance(up.double(), down.double(), *found.exact())
    return Pair(up, down, scale, off / size if size else 0.0)
