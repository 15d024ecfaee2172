"""Where an adapter's tensors are: they stay real and the same parameters, whatever is done to a model that has no memory yet.

accelerate offloads a model by putting meta tensors in place of each module's parameters and bringing the values back around the
module's own forward. An adapter is not called as a module, and an optimizer holds its parameters, so it keeps its own: on the
device that accelerate names for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_empty(tensors: list[Tensor]) -> bool:
    """Whether any of them has no memory."""
    return any(t.device.type == "meta" for t in tensors)


def applied(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` may do to the tensors of an adapter in place of `fn`.

    Values that are there stay where `to_empty` would drop them, as it is the base that gets its values later. Tensors without
    memory, from which nothing can be moved, are made on the device that others go to.
    """
    empties = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")

    def apply(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            found = fn(tensor)
            return tensor.to(found.device) if empties else found
        try:
            return fn(tensor)
        except NotImplementedError:
            return torch.empty_like(tensor, device=fn(torch.empty(0)).device)

    return apply


class _Idle:
    """Stands where accelerate looks for its hook on a module, and does nothing."""

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Nothing."""
        return module

    detach_hook = init_hook

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The arguments as they are."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """The output as it is."""
        return output


class Placed(nn.Module):
    """A module whose tensors accelerate may place, but not take away.

    accelerate asks for `_hf_hook` before it puts other tensors in place of a module's own, and sets it right behind that.

    Attributes:
        realise: gives the tensors memory and first values, where they have none.
    """

    realise: Callable[[], Any] | None = None

    @property
    def _hf_hook(self) -> Any:
        own = self.__dict__
        if "_idle" not in own:
            if self.realise is not None and is_empty(list(self.parameters())):
                self.realise()
            own["_before"] = [(m, dict(m._parameters), dict(m._buffers)) for m in self.modules()]
            raise AttributeError("no hook of accelerate's")
        return own["_idle"]

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        for module, parameters, buffers in self.__dict__.pop("_before", ()):
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        self.__dict__["_idle"] = _Idle()
        device = getattr(hook, "execution_device", None)
        if device is not None and torch.device(device).type != "meta":
            self.to(device)

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__["_idle"]
