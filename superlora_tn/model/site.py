"""The forward hooks of an adapted model. They are objects, so that copies of the model hold copies of the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from superlora_tn.model import kinds as layers
from superlora_tn.model.kinds import Projection
from superlora_tn.update.base import Adapter
from superlora_tn.update.eager import is_eager


class UpdateHook:
    """The forward hook of one layer: adds the adapter's update to the layer's output while the adapter is active."""

    def __init__(self, layer: nn.Module, adapter: Adapter, target: str) -> None:
        self.adapter, self.target = adapter, target
        self._update = layers.update_of(layer)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not self.adapter.active:
            return output
        untouched = is_eager() and self._is_first(layer)
        return self._update(layer, args[0] if args else kwargs["input"], output, self.adapter, self.target, untouched)

    def _is_first(self, layer: nn.Module) -> bool:
        """Whether no other hook has seen the output yet."""
        return next(iter(layer._forward_hooks.values())) is self and not _global_forward_hooks


class AttentionHook:
    """The forward pre-hook of an nn.MultiheadAttention: for this one call its weights are W + dW.

    The attention's own code runs as ever, its fused kernels too, and reads its weights as attributes of modules.
    """

    def __init__(self, members: Mapping[str, tuple[Projection, Adapter]]) -> None:
        self.members = dict(members)

    def __call__(self, attention: nn.Module, args: tuple[Any, ...]) -> None:
        hooks = [hook for hook in attention._forward_pre_hooks.values() if isinstance(hook, AttentionHook)]
        if hooks[0] is self:
            # A call that Ctrl-C broke off has left its W + dW there; the hooks of further adapters add to the first one's.
            for hook in hooks:
                hook.reveal()
        blocks: dict[str, list[Tensor]] = {}
        for target, (projection, adapter) in self.members.items():
            if adapter.active:
                k, count = projection.block
                rows = blocks.setdefault(projection.place[1], list(projection.current().chunk(count)))
                rows[k] = rows[k] + adapter.current(target).to(rows[k].dtype)
        for projection, _ in self.members.values():
            if rows := blocks.pop(projection.place[1], []):
                projection.hide(torch.cat(rows) if len(rows) > 1 else rows[0])

    def reveal(self) -> None:
        """Show the parameters again."""
        for projection, _ in self.members.values():
            projection.reveal()


class RevealHook:
    """The forward hook of an nn.MultiheadAttention, also where the call raised: takes W + dW away again."""

    def __init__(self, hook: AttentionHook) -> None:
        self.hook = hook

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.hook.reveal()


class BeginHook:
    """The model's forward pre-hook: adapters make what their layers will share in this pass."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        for adapter in self.adapters:
            adapter.begin()


class EndHook(BeginHook):
    """The model's forward hook: adapters let go of what nothing needs any more."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        for adapter in self.adapters:
            adapter.end()
