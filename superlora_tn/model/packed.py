"""Weights that are quantised or packed, library by library: how they are read, and quantised again.

Forward and training need none of this (`Opaque`); it is for merging, for dW beside W, and for layers whose own forward passes
no gradient to its input. No library is imported here that the model's own layers have not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.model.kinds import OPAQUE, WIDE, LayerError, Opaque
from superlora_tn.model.tried import check_linear, computes, gives_gradient

# Names of the scales that stand beside a weight of 8 bits; W is the weight times its scale.
SCALES = ("weight_scale_inv", "weight_scale", "scale_weight")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
NOT_YET = "is not quantised yet; move the model to its device first."


@dataclass(frozen=True)
class _Written(Opaque):
    """A packed weight that its library quantises again."""

    def refusal(self, layer: Any) -> str:
        """It can."""
        return ""

    @property
    def rounds(self) -> bool:
        """It does."""
        return True


@dataclass(frozen=True)
class Torchao(_Written):
    """torchao's tensors: an `nn.Linear` whose weight is a tensor subclass that says how to take it apart."""

    def read(self, layer: Any) -> Tensor:
        """`dequantize`, in the dtype that the weight stands for."""
        return layer.weight.dequantize()  # type: ignore[no-any-return]

    def refusal(self, layer: Any) -> str:
        """Where torchao has no public way to quantise with the same settings, that is said."""
        name = type(layer.weight).__name__
        refused = f"is torchao's {name}, which is not quantised again here; merge into the unquantised base."
        return "" if name in AGAIN else refused

    def write(self, layer: Any, matrix: Tensor) -> None:
        """Quantise with the weight's own settings, into its own tensors."""
        weight = layer.weight
        weight.detach().copy_(AGAIN[type(weight).__name__](weight, matrix.to(weight.dtype)))

    def put(self, layer: Any, kept: Any) -> None:
        """`keep` cloned the packed tensors."""
        layer.weight.detach().copy_(kept)

    def keep(self, layer: Any) -> Any:
        """The packed tensors."""
        return layer.weight.detach().clone()


def _again_int8(weight: Any, matrix: Tensor) -> Tensor:
    quantization = sys.modules["torchao.quantization"]
    primitives = sys.modules["torchao.quantization.quant_primitives"].MappingType
    shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    found: Tensor = type(weight).from_hp(
        matrix,
        quantization.PerBlock(tuple(weight.block_size)),
        mapping_type=primitives.ASYMMETRIC if shifted else primitives.SYMMETRIC,
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        act_pre_scale=weight.act_pre_scale,
        reduce_range=weight.reduce_range,
    )
    return found


def _again_float8(weight: Any, matrix: Tensor) -> Tensor:
    found: Tensor = type(weight).from_hp(
        matrix,
        weight.qdata.dtype,
        sys.modules["torchao.quantization"].PerBlock(tuple(weight.block_size)),
        weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )
    return found


def _again_intx(weight: Any, matrix: Tensor) -> Tensor:
    primitives = sys.modules["torchao.quantization.quant_primitives"].MappingType
    found: Tensor = type(weight).from_hp(
        matrix,
        weight.block_size,
        weight.target_dtype,
        mapping_type=primitives.ASYMMETRIC if bool(weight.zero_point.any()) else primitives.SYMMETRIC,
        activation_quantization=weight.activation_quantization,
    )
    return found


AGAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _again_int8,
    "Float8Tensor": _again_float8,
    "IntxUnpackedToInt8Tensor": _again_intx,
}


@dataclass(frozen=True)
class FourBit(_Written):
    """bitsandbytes' `Linear4bit`: (out in / 2, 1) bytes and a `quant_state`."""

    def read(self, layer: Any) -> Tensor:
        """In the dtype that was quantised."""
        weight, state = self._plain(layer)
        found: Tensor = sys.modules["bitsandbytes.functional"].dequantize_4bit(weight.data, state)
        return found.reshape(self.shape(layer))

    def _plain(self, layer: Any) -> tuple[Any, Any]:
        """The weight and its state, in the order of storage that all devices share."""
        weight = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            layer.state_dict()  # bitsandbytes' way back from the order that its processor kernels want
        if weight.quant_state is None:
            raise LayerError(f"the weight of a {type(layer).__name__} {NOT_YET}")
        return weight, weight.quant_state

    def write(self, layer: Any, matrix: Tensor) -> None:
        """Quantise with the same type, block and storage, into the same bytes."""
        weight, state = self._plain(layer)
        data, new = sys.modules["bitsandbytes.functional"].quantize_4bit(
            matrix.to(state.dtype),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.quant_storage,
        )
        self._set(layer, data, new)

    def _set(self, layer: Any, data: Tensor, state: Any) -> None:
        layer.weight.detach().copy_(data)
        layer.weight.quant_state = layer.quant_state = state

    def keep(self, layer: Any) -> Any:
        """The bytes, and their state, which nothing writes to."""
        weight, state = self._plain(layer)
        return weight.detach().clone(), state

    def put(self, layer: Any, kept: Any) -> None:
        """As they were."""
        self._plain(layer)
        self._set(layer, *kept)


@dataclass(frozen=True)
class EightBit(_Written):
    """bitsandbytes' `Linear8bitLt`: whole numbers CB (out, in), and the largest number of each row, SCB (out,)."""

    def read(self, layer: Any) -> Tensor:
        """In float32."""
        whole, largest = self._parts(layer)
        found: Tensor = sys.modules["bitsandbytes.functional"].int8_vectorwise_dequant(whole, largest)
        return found

    def _parts(self, layer: Any) -> tuple[Tensor, Tensor]:
        """CB and SCB; the latter moves from the weight to the layer's state at the first call."""
        largest = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        if largest is None:
            raise LayerError(f"the weight of a {type(layer).__name__} {NOT_YET}")
        return layer.weight.detach(), largest

    def write(self, layer: Any, matrix: Tensor) -> None:
        """By rows, as the layer did it."""
        whole, largest, _ = sys.modules["bitsandbytes.functional"].int8_vectorwise_quant(matrix.to(torch.float16))
        self.put(layer, (whole, largest))

    def keep(self, layer: Any) -> Any:
        """CB and SCB."""
        return tuple(part.clone() for part in self._parts(layer))

    def put(self, layer: Any, kept: Any) -> None:
        """Into the layer's own tensors."""
        for own, value in zip(self._parts(layer), kept, strict=True):
            own.copy_(value)
        for copy in (layer.weight.CB, layer.state.CB):
            if copy is not None and copy.data_ptr() != layer.weight.data_ptr():
                copy.copy_(kept[0])


@dataclass(frozen=True)
class Dynamic(_Written):
    """torch's own dynamic `nn.quantized.dynamic.Linear`: W and b in one packed object."""

    straight: bool = True

    def read(self, layer: Any) -> Tensor:
        """In float32."""
        weight = layer.weight()
        return weight.dequantize() if weight.is_quantized else weight  # type: ignore[no-any-return]

    def write(self, layer: Any, matrix: Tensor) -> None:
        """Symmetric, for the whole weight or row by row as it was; float16 layers round to that."""
        weight, matrix = layer.weight(), matrix.to(torch.float32)
        if not weight.is_quantized:
            self.put(layer, matrix)
        elif weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scale = float(matrix.abs().max()) / 127.5 or 1.0
            self.put(layer, torch.quantize_per_tensor(matrix, scale, 0, weight.dtype))
        else:
            scales = (matrix.abs().amax(1) / 127.5).double()
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            self.put(layer, torch.quantize_per_channel(matrix, torch.where(scales > 0, scales, 1.0), zeros, 0, weight.dtype))

    def keep(self, layer: Any) -> Any:
        """The quantised tensor, which is unpacked into memory of its own."""
        return layer.weight()

    def put(self, layer: Any, kept: Any) -> None:
        """Packed anew, with the layer's bias."""
        layer.set_weight_bias(kept, layer.bias())

    def passed(self, layer: Any, member: Any, x: Tensor, y: Tensor) -> Tensor:
        """torch records its operation as one that has no derivative, which warns when it is asked for one."""
        return super().passed(layer, member, x, y.detach())


@dataclass(frozen=True)
class Scaled(_Written):
    """A weight of 8 bits with scales beside it (a checkpoint's fp8): ``W = weight * scale``, by tensor, row or block."""

    def _scale(self, layer: Any) -> Tensor | None:
        found = (getattr(layer, name, None) for name in SCALES)
        return next((scale for scale in found if isinstance(scale, Tensor)), None)

    def _blocks(self, layer: Any, scale: Tensor) -> tuple[int, int]:
        """How many rows and columns have one scale."""
        rows, columns = self.shape(layer)
        if scale.numel() == 1:
            return rows, columns
        said = getattr(layer, "block_size", None)
        if scale.ndim == 2 and isinstance(said, list | tuple) and len(said) == 2:
            return int(said[0]), int(said[1])
        return -(-rows // scale.shape[0]), columns if scale.ndim == 1 else -(-columns // scale.shape[1])

    def _spread(self, layer: Any, scale: Tensor) -> Tensor:
        """The scales, one for each element."""
        rows, columns = self.shape(layer)
        down, across = self._blocks(layer, scale)
        grid = scale.detach().to(torch.float32).reshape(-(-rows // down), -1)
        return grid.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]

    def read(self, layer: Any) -> Tensor:
        """In float32."""
        weight: Tensor = layer.weight.detach().to(torch.float32)
        scale = self._scale(layer)
        return weight if scale is None else weight * self._spread(layer, scale)

    def refusal(self, layer: Any) -> str:
        """Refused where the layer computes something else than its weight times its scales says."""
        if computes(layer, self.read(layer)):
            return ""
        return (
            f"is kept in {layer.weight.dtype}, and what the {type(layer).__name__} computes is not x (weight * scale)^T; merge "
            "into the unquantised base."
        )

    def write(self, layer: Any, matrix: Tensor) -> None:
        """The largest number of each tensor, row or block becomes the largest that the dtype holds."""
        scale, matrix, dtype = self._scale(layer), matrix.to(torch.float32), layer.weight.dtype
        if scale is not None:
            largest = self._largest(layer, matrix, scale) / (127 if dtype == torch.int8 else torch.finfo(dtype).max)
            exact = largest if scale.dtype in WIDE else torch.exp2(torch.ceil(torch.log2(largest)))
            scale.detach().copy_(torch.where(largest > 0, exact, 1.0))
            matrix = matrix / self._spread(layer, scale)
        layer.weight.detach().copy_(matrix.round() if dtype == torch.int8 else matrix)

    def _largest(self, layer: Any, matrix: Tensor, scale: Tensor) -> Tensor:
        """Of each part that has a scale, in the scales' shape."""
        down, across = self._blocks(layer, scale)
        rows, columns = -(-matrix.shape[0] // down), -(-matrix.shape[1] // across)
        padded = functional.pad(matrix.abs(), (0, columns * across - matrix.shape[1], 0, rows * down - matrix.shape[0]))
        return padded.reshape(rows, down, columns, across).amax((1, 3)).reshape(scale.shape)

    def keep(self, layer: Any) -> Any:
        """Weight and scales."""
        scale = self._scale(layer)
        return layer.weight.detach().clone(), None if scale is None else scale.detach().clone()

    def put(self, layer: Any, kept: Any) -> None:
        """Into the layer's own tensors."""
        layer.weight.detach().copy_(kept[0])
        if (scale := self._scale(layer)) is not None:
            scale.detach().copy_(kept[1])


BY_TYPE: dict[str, Opaque] = {
    "bitsandbytes.nn.modules.Linear4bit": FourBit(),
    "bitsandbytes.nn.modules.Linear8bitLt": EightBit(),
    "torch.ao.nn.quantized.dynamic.modules.linear.Linear": Dynamic(),
}


def packed_kind(layer: nn.Module) -> Opaque:
    """The kind of a layer whose weight is packed.

    Raises:
        LayerError: it does not compute anything linear.
    """
    names = [f"{t.__module__}.{t.__qualname__}" for t in type(layer).__mro__]
    if (named := next((BY_TYPE[name] for name in names if name in BY_TYPE), None)) is not None:
        return named
    weight = layer._parameters.get("weight")
    if weight is not None and type(weight).__module__.partition(".")[0] == "torchao":
        return Torchao(straight=not gives_gradient(layer))
    if not isinstance(layer, nn.Linear):
        check_linear(layer)
    if weight is None or tuple(weight.shape) != OPAQUE.shape(layer):
        return OPAQUE
    scaled = weight.dtype == torch.int8 and any(isinstance(getattr(layer, name, None), Tensor) for name in SCALES)
    return Scaled() if scaled or weight.dtype in FLOAT8 else OPAQUE
