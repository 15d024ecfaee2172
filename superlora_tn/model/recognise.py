"""The kind of a layer by what the layer does, not by its type alone.

A subclass or an instance with a forward of its own is tried on a few numbers, and adapted at its weight where it does
something else than its kind (`Held`), so that what the layer computes is always what it would with the merged weight.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from superlora_tn.model.convolutions import CONVOLUTION, TRANSPOSED_CONVOLUTION, Convolution, TransposedConvolution
from superlora_tn.model.kinds import (
    LINEAR,
    TRANSPOSED,
    WIDE,
    Held,
    Kind,
    LayerError,
    Linear,
    Transposed,
)
from superlora_tn.model.packed import packed_kind
from superlora_tn.model.tables import BAG, PACKED_TABLE, TABLE, Table, is_linear
from superlora_tn.update.regions import saved_tensor_hooks


@dataclass(frozen=True)
class _Known:
    """A registered type: its kind, and the forward and other methods that the kind stands for."""

    kind: Kind
    methods: tuple[tuple[str, Any], ...]


_KNOWN: dict[type, _Known] = {}


def register_layer(layer: type[nn.Module], kind: Kind, *methods: str) -> None:
    """Say that layers of a type are of a kind; a layer whose `forward` (or other named methods) is another is tried first.

    Args:
        layer: the type; subclasses are found through it.
        kind: how its weight is read, written and updated.
        methods: further methods that the kind relies on.

    Raises:
        LayerError: these are no type of layers and no kind.
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module) and isinstance(kind, Kind)):
        raise LayerError(
            f"register_layer was given {layer!r} and {kind!r}; give a subclass of nn.Module, and a kind: a value of a subclass "
            "of superlora_tn.Kind."
        )
    _KNOWN[layer] = _Known(kind, tuple((name, getattr(layer, name)) for name in ("forward", *methods)))


register_layer(nn.Linear, LINEAR)
for _convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(_convolution, CONVOLUTION, "_conv_forward")
for _turned in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_turned, TRANSPOSED_CONVOLUTION)
register_layer(nn.Bilinear, Held())
register_layer(nn.Embedding, TABLE)
register_layer(nn.EmbeddingBag, BAG)


def _register_imported() -> None:
    """Types of libraries that are already imported; importing them is the user's choice."""
    module = sys.modules.get("transformers.pytorch_utils")
    if module is not None and module.Conv1D not in _KNOWN:
        register_layer(module.Conv1D, TRANSPOSED)


def known(layer: nn.Module) -> _Known | None:
    """What is registered for the layer's type or the nearest type that it comes from."""
    _register_imported()
    return next((_KNOWN[t] for t in type(layer).__mro__ if t in _KNOWN), None)


def supported() -> tuple[str, ...]:
    """Names of the types of layers that are known."""
    _register_imported()
    return tuple(sorted(t.__name__ for t in _KNOWN))


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer runs the very methods that its kind stands for, on the instance and on the class."""
    found = known(layer)
    return found is not None and all(
        getattr(type(layer), name) is method and name not in layer.__dict__ for name, method in found.methods
    )


def is_fusable(layer: nn.Module) -> bool:
    """Whether it may be a fused layer: a linear one, as far as the type tells."""
    found = known(layer)
    return _has_features(layer) if found is None else isinstance(found.kind, Linear)


def is_supported(layer: nn.Module) -> bool:
    """Whether layers of this type can be adapted, as far as the type tells."""
    return known(layer) is not None or _has_features(layer)


def is_closed(layer: nn.Module) -> bool:
    """Whether it is part of a TorchScript program, which calls no hook and lets no weight be replaced."""
    return isinstance(layer, torch.jit.ScriptModule)


def _has_features(layer: nn.Module) -> bool:
    """Whether it says in_features and out_features, and is no house of other layers."""
    if is_closed(layer):
        return False
    says = all(isinstance(getattr(layer, n, None), int) for n in ("in_features", "out_features"))
    return says and not any(p is not None for child in layer.children() for p in (*child.parameters(), *child.buffers()))


def kind_of(layer: nn.Module, at: str | None = None) -> Kind:
    """The kind of a layer, by what it does.

    Args:
        layer: the layer.
        at: ``"weight"`` adapts it where its weight is read, ``"output"`` at its output; None lets the layer decide.

    Raises:
        LayerError: it cannot be adapted; the message says why, to be read behind the layer's name.
    """
    found = known(layer)
    if found is None and not _has_features(layer):
        raise LayerError(f"is a {type(layer).__name__}, which cannot be adapted; supported are {', '.join(supported())}.")
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        raise LayerError(f"is a {type(layer).__name__} that has no shape yet; run the model once before it is adapted.")
    if found is None or _is_packed(layer, found.kind):
        return _opaque(layer, at, None if found is None else found.kind)
    if isinstance(found.kind, TransposedConvolution) and (at == "weight" or not _runs_own(layer)):
        raise LayerError(
            f"is a {type(layer).__name__}, which is adapted at its output and with torch's own forward alone; leave out "
            "at='weight', or leave it out."
        )
    held = Held(transposed=isinstance(found.kind, Transposed | Table))
    if at == "weight" or not is_linear(layer):
        held.stored(layer)
        return held
    if _runs_own(layer):
        return found.kind
    if type(found.kind) is Table:
        return _scaled_table(layer, found.kind) or (found.kind if at == "output" else held)
    if at == "output":
        return found.kind
    return found.kind if _tried(layer, found.kind) else held


def _runs_own(layer: nn.Module) -> bool:
    """Whether it runs what its kind stands for, as it is or through accelerate's hooks, which move weights in and out."""
    return is_plain(layer) or "_hf_hook" in layer.__dict__


def _scaled_table(layer: Any, kind: Table) -> Table | None:
    """The kind of an embedding with a forward of its own that looks rows up and multiplies them by one number; else None."""
    weight: Tensor = layer.weight
    if weight.device.type == "meta" or not len(weight):
        return None
    x = torch.arange(min(len(weight), 16), device=weight.device)
    with torch.no_grad():
        try:
            found = layer.forward(x)
        except Exception:  # other arguments, say
            return None
        rows = functional.embedding(x, weight)
    if not isinstance(found, Tensor) or found.shape != rows.shape or found.dtype != rows.dtype:
        return None
    wide, rows = found.double(), rows.double()
    square = float(rows.square().sum())
    if not square:
        return None
    factor = float((wide * rows).sum()) / square
    loose = 1e-5 if found.dtype in (torch.float32, torch.float64) else 3e-2
    if not torch.allclose(wide, factor * rows, rtol=loose, atol=loose * float(wide.abs().max())):
        return None
    # In half precision the quotient is off by a rounding, so what the layer says of itself goes first.
    said = getattr(layer, "embed_scale", None)
    said = float(said) if isinstance(said, float | int) or (isinstance(said, Tensor) and said.numel() == 1) else factor
    return replace(kind, factor=said if math.isclose(said, factor, rel_tol=3e-2) else factor)


def _is_packed(layer: nn.Module, kind: Kind) -> bool:
    """Whether the weight is not W itself; raises where it is not there at all."""
    weight = layer._parameters.get("weight")
    if weight is None or is_parametrized(layer):
        return False
    if weight.dtype not in WIDE or (type(weight) is not nn.Parameter and _unpacks(weight)):
        return True
    shape = kind.shape(layer)
    if type(weight) in (Tensor, nn.Parameter) and weight.numel() != shape[0] * shape[1]:
        raise LayerError(
            f"is a {type(layer).__name__} of {shape[0]} x {shape[1]} whose weight has the shape {tuple(weight.shape)}: it is "
            "sharded, packed or emptied. Attach before it is sharded, or gather it first."
        )
    return False


def _unpacks(weight: Tensor) -> bool:
    """Whether a tensor subclass is one of quantised weights (torchao's)."""
    return type(weight).__module__.partition(".")[0] == "torchao"


def _opaque(layer: nn.Module, at: str | None, plain: Kind | None) -> Kind:
    """The kind of a layer that is known by its input and output alone."""
    if not _has_features(layer) and type(plain) is not Table:
        raise LayerError(
            f"is a {type(layer).__name__} whose weight is quantised or packed; that works for embeddings and linear layers, "
            "which say in_features and out_features. Adapt the unquantised model, or leave it out."
        )
    if at == "weight":
        raise LayerError(
            f"is a {type(layer).__name__} whose weight is quantised or packed, so that reading it cannot give W + dW; adapt it "
            "at its output, or leave it out."
        )
    return PACKED_TABLE if type(plain) is Table else packed_kind(layer)


def _tried(layer: Any, kind: Kind) -> bool:
    """Whether a layer with a forward of its own gives, on a few numbers, what its kind would.

    Raises:
        LayerError: it does not return one tensor.
    """
    weight = layer._parameters.get("weight")
    weight = kind.read(layer) if weight is None else weight
    if weight.device.type == "meta":
        return False
    x = _sample(layer, kind, weight)
    with torch.no_grad(), torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        try:
            found = layer.forward(x)
        except Exception:  # other arguments, say; then only the weight is known
            return False
        if not isinstance(found, Tensor):
            raise LayerError(
                f"is a {type(layer).__name__} that returns a {type(found).__name__}, and an update is added to one tensor; "
                "adapt it by at='weight' or leave it out."
            )
        bias = getattr(layer, "bias", None)
        plain = (
            layer._conv_forward(x, layer.weight, bias)
            if isinstance(kind, Convolution)
            else functional.linear(x, layer.weight.t() if isinstance(kind, Transposed) else layer.weight, bias)
        )
    # Two orders of the same sum, in the weight's dtype.
    loose = 1e-9 if plain.dtype in (torch.float64, torch.complex128) else 1e-4 if plain.dtype == torch.float32 else 3e-2
    return found.shape == plain.shape and torch.allclose(found.to(plain.dtype), plain, rtol=loose, atol=loose, equal_nan=True)


def _sample(layer: Any, kind: Kind, weight: Tensor) -> Tensor:
    """A small input: two rows, or one small image."""
    shape: tuple[int, ...] = (2, kind.shape(layer)[1])
    if isinstance(kind, Convolution):
        sides = [(k - 1) * d + 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape = (1, layer.in_channels, *sides)
    return (
        torch.linspace(-1, 1, math.prod(shape), dtype=torch.float32, device=weight.device).sin().reshape(shape).to(weight.dtype)
    )


def adopt(layer: Any, hook: object, x: Tensor, y: Tensor) -> Tensor | None:
    """W, where y is proven to be nobody else's ``x W^T + b``, so that it may be written to and its graph left behind.

    That is: torch's own `nn.Linear.forward` ran, on the instance and on the class; no other hook has seen x or y, nor has a
    checkpointed region that keeps outputs; W and b are real, whole, local and frozen; and nothing was cast in between.
    """
    hooks = layer._forward_hooks
    if len(hooks) > 1 and next(iter(hooks.values())) is not hook:
        return None
    return _untouched(layer, x, y)


def writable(layer: Any, hook: object, x: Tensor, y: Tensor) -> Tensor | None:
    """W, where y may be written to, whose graph stays: as `adopt`, but behind hooks of the same kind, which keep nothing."""
    for other in layer._forward_hooks.values():
        if other is hook:
            return _untouched(layer, x, y)
        if type(other) is not type(hook):
            break
    return None


def _untouched(layer: Any, x: Tensor, y: Tensor) -> Tensor | None:
    """W of a plain layer of which nobody else has seen x or y."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or nn.Linear.forward is not _FORWARD:
        return None
    if functional.linear is not _LINEAR or _keeps_outputs():
        return None
    if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks or _global_hooks():
        return None
    own = layer._parameters
    if "weight" not in own or "bias" not in own:  # FSDP1 takes them away in backward, where checkpointing computes again
        return None
    weight: Any = own["weight"]
    bias = own["bias"]
    untrained = type(weight) is nn.Parameter and not weight.requires_grad
    whole = untrained and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
    alike = whole and type(x) is Tensor and type(y) is Tensor and x.dtype == y.dtype == weight.dtype
    return weight if alike and y.is_contiguous() and not y.is_complex() else None


# nn.Linear.forward looks it up at each call, and some libraries put their own in its place.
_LINEAR = torch._C._nn.linear
_FORWARD = nn.Linear.forward


def _keeps_outputs() -> bool:
    """Whether selective checkpointing may have kept y: by a dispatch mode, within its region's hooks on saved tensors."""
    return torch._C._len_torch_dispatch_stack() > 0 and saved_tensor_hooks() is not None


def _global_hooks() -> bool:
    module = torch.nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )
