"""The base's buffers as they were when an adapter was attached: training changes some of them beside it (BatchNorm's)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# Larger buffers (masks, quantised weights) are watched but not copied.
LARGEST = 1 << 20


class Snapshot:
    """Copies of a model's persistent buffers, and how often each larger one had been written."""

    def __init__(self, model: nn.Module | None = None, leave: tuple[type[nn.Module], ...] = ()) -> None:
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._copies: dict[str, Tensor] = {}
        self._written: dict[str, int] = {}
        for name, module, own in _persistent(model, leave) if model is not None else ():
            buffer = module._buffers[own]
            assert buffer is not None
            self._places[name] = (module, own)
            if buffer.numel() > LARGEST:
                self._written[name] = buffer._version
            else:
                self._copies[name] = buffer.detach().clone()

    def _now(self, name: str) -> Tensor | None:
        module, own = self._places[name]
        return module._buffers.get(own)

    def changed(self) -> dict[str, Tensor]:
        """The buffers that differ from their copies, by full name."""
        for name, count in self._written.items():
            now = self._now(name)
            if now is not None and not now.is_inference() and now._version != count:
                warnings.warn(
                    f"the buffer '{name}' of the base was written since the adapter was attached; with {now.numel():,} "
                    "numbers it is too large to be kept beside the adapter. Save the model whole if it matters.",
                    stacklevel=3,
                )
        found = {name: self._now(name) for name in self._copies}
        return {
            name: now.detach()
            for name, now in found.items()
            if now is not None and now.device.type != "meta" and not _same(self._copies[name], now)
        }

    def restore(self) -> None:
        """Put the copies back."""
        with torch.no_grad():
            for name in self.changed():
                now = self._now(name)
                assert now is not None
                now.copy_(self._copies[name])

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Write values of `changed` of another model into this one's buffers."""
        with torch.no_grad():
            for name, value in values.items():
                now = self._now(name)
                assert now is not None
                now.copy_(value)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the buffers that are kept."""
        return {name: tuple(copy.shape) for name, copy in self._copies.items()}


def _same(copy: Tensor, now: Tensor) -> bool:
    return copy.shape == now.shape and torch.equal(copy.to(now.device, now.dtype), now)


def _persistent(model: nn.Module, leave: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module, str]]:
    for home, module in model.named_modules():
        if isinstance(module, leave):
            continue
        for own, buffer in module._buffers.items():
            plain = type(buffer) in (Tensor, nn.Buffer) and buffer is not None and buffer.device.type != "meta"
            if plain and buffer is not None and not buffer.is_quantized and own not in module._non_persistent_buffers_set:
                yield f"{home}.{own}".lstrip("."), module, own
