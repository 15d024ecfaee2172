"""What of the base may change beside an adapter: the parameters that train with it, and buffers such as BatchNorm's means.

They are copied when the adapter is attached, saved with it, and put back when it is detached.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

# Larger buffers (masks, quantised weights) are watched but not copied.
LARGEST = 1 << 20


class Snapshot:
    """Copies of a model's persistent buffers and of some of its parameters, and how often each larger buffer was written.

    Args:
        model: the model.
        leave: types of modules whose buffers are none of the base's.
        also: full names of the parameters that train beside the adapter.
    """

    def __init__(
        self, model: nn.Module | None = None, leave: tuple[type[nn.Module], ...] = (), also: Collection[str] = ()
    ) -> None:
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._copies: dict[str, Tensor] = {}
        self._written: dict[str, int] = {}
        self.also = tuple(also)
        # Full names of all of the base's parameters and buffers.
        self.known = () if model is None else _names(model, leave)
        for name, module, own in _held(model, leave, set(also)) if model is not None else ():
            tensor = _tensor(module, own)
            assert tensor is not None
            self._places[name] = (module, own)
            if name not in also and tensor.numel() > LARGEST:
                self._written[name] = tensor._version
            else:
                self._copies[name] = tensor.detach().clone()

    def _now(self, name: str) -> Tensor | None:
        return _tensor(*self._places[name])

    def to_save(self) -> dict[str, Tensor]:
        """The parameters that train beside the adapter, and the buffers that differ from their copies, by full name."""
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
            if now is not None and now.device.type != "meta" and (name in self.also or not _same(self._copies[name], now))
        }

    def restore(self) -> None:
        """Put the copies back."""
        self.put({name: self._copies[name] for name in self.to_save()})

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the parameters and buffers of these names."""
        with torch.no_grad():
            for name, value in values.items():
                now = self._now(name)
                assert now is not None
                now.copy_(value)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept."""
        return {name: tuple(copy.shape) for name, copy in self._copies.items()}


def _names(model: nn.Module, leave: tuple[type[nn.Module], ...]) -> tuple[str, ...]:
    modules = [(home, module) for home, module in model.named_modules() if not isinstance(module, leave)]
    return tuple(f"{home}.{own}".lstrip(".") for home, m in modules for own in (*m._parameters, *m._buffers))


def _tensor(module: nn.Module, own: str) -> Tensor | None:
    return module._parameters.get(own) if own in module._parameters else module._buffers.get(own)


def _same(copy: Tensor, now: Tensor) -> bool:
    return copy.shape == now.shape and torch.equal(copy.to(now.device, now.dtype), now)


def _held(model: nn.Module, leave: tuple[type[nn.Module], ...], also: Collection[str]) -> Iterator[tuple[str, nn.Module, str]]:
    for home, module in model.named_modules():
        if isinstance(module, leave):
            continue
        for own in module._parameters:
            if f"{home}.{own}".lstrip(".") in also:
                yield f"{home}.{own}".lstrip("."), module, own
        for own, buffer in module._buffers.items():
            plain = type(buffer) in (Tensor, nn.Buffer) and buffer is not None and buffer.device.type != "meta"
            if plain and buffer is not None and not buffer.is_quantized and own not in module._non_persistent_buffers_set:
                yield f"{home}.{own}".lstrip("."), module, own
