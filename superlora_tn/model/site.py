"""Where an adapter meets a model: the hooks on layers, on their parents and on the model itself.

They are objects, so that copies of the model hold copies of the adapters.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from superlora_tn.model.joins import entering, joiner
from superlora_tn.model.kinds import LayerError, Linear, RowsOf
from superlora_tn.model.recognise import adopt, writable
from superlora_tn.model.rowwise import in_one
from superlora_tn.model.targets import Target, is_sharded
from superlora_tn.update.base import Member
from superlora_tn.update.eager import is_eager
from superlora_tn.update.passes import Passes
from superlora_tn.update.placed import is_empty
from superlora_tn.update.together import alike

NONE: dict[str, Any] = {}


class UpdateHook:
    """The forward hook of one layer: adds the update to the layer's output while the adapter is active.

    Attributes:
        target: the layer's weight.
        member: its place in the adapter.
        ran: whether the layer was ever called.
    """

    def __init__(self, target: Target, member: Member) -> None:
        self.target, self.member = target, member
        self.ran = False
        self._prove = writable if isinstance(target.kind, RowsOf) else adopt
        self._takes_all = target.kind.takes_all
        self._join = joiner(target.kind, member)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """Some libraries copy hooks to another module and forget that this one takes keyword arguments."""
        output = rest[-1]
        eager = is_eager()
        if not self.member.active:
            self.ran = self.ran or eager
            return output
        kwargs = rest[0] if len(rest) > 1 else {}
        x = args[0] if args else self._input(kwargs)
        if eager and not self.ran:
            self._check_real(x)
            self.ran = True
        if not isinstance(output, Tensor):
            raise LayerError(
                f"'{self.target.name}' returned a {type(output).__name__}, and an update is added to one tensor; adapt it "
                "where its weight is read (at='weight'), or leave it out."
            )
        rows = self.member.adapter.passes.rows if eager else None
        if type(output) is not Tensor and is_sharded(output):
            return self._on_shards(layer, x, output, rows is not None)
        if rows is not None:
            if self._takes_all:
                raise LayerError(f"the rows of a batch cannot be told in what '{self.target.name}' is called with (bags).")
            return self._on_rows(layer, x, output, *rows)
        base = self._prove(layer, self, x, output) if eager else None
        given: Any = (args, kwargs) if self._takes_all else x
        return self._join(layer, self.member, given, output, base)

    def _on_rows(self, layer: nn.Module, x: Tensor, output: Tensor, rows: tuple[int, ...], count: int) -> Tensor:
        """The output with the update added to some rows of the batch."""
        each, left = divmod(x.shape[0], count)
        if left or output.shape[0] != x.shape[0]:
            raise LayerError(
                f"'{self.target.name}' was called with a first axis of {x.shape[0]}, and {count} rows of a batch were named; "
                "its first axis has to be a multiple of them."
            )
        if not rows:
            return output
        others = self._others(layer)
        if others[0] is not self:  # the first of them sees to all
            return output
        whole = in_one([(hook.member, hook.rows) for hook in others], x, output, count)
        if whole is not None:
            return whole
        for hook in others:
            output = hook._on_own_rows(layer, x, output, each)
        return output

    def _on_own_rows(self, layer: nn.Module, x: Tensor, output: Tensor, each: int) -> Tensor:
        index = torch.tensor([row * each + k for row in self.rows for k in range(each)], dtype=torch.long, device=x.device)
        updated = self._join(layer, self.member, x.index_select(0, index), output.index_select(0, index), None)
        return output.index_copy(0, index, updated)

    @property
    def rows(self) -> tuple[int, ...]:
        """Of the batch, for which its adapter is."""
        found = self.member.adapter.passes.rows
        return () if found is None else found[0]

    def _others(self, layer: nn.Module) -> list[UpdateHook]:
        """The hooks of the layer, in their order, whose networks are like this one's; itself alone, where it drops inputs."""
        if not isinstance(self.target.kind, Linear) or (self.member.adapter.spec.dropout and layer.training):
            return [self]
        hooks = [hook for hook in layer._forward_hooks.values() if isinstance(hook, UpdateHook) and hook.member.active]
        return [
            hook
            for hook in hooks
            if hook is self or (hook.rows and hook.target.kind == self.target.kind and alike(self.member, hook.member))
        ]

    def _on_shards(self, layer: nn.Module, x: Any, output: Any, by_rows: bool) -> Any:
        """Tensor parallel: each process computes the whole update, from all of x, and keeps the part that is its own."""
        from torch.distributed.tensor import DTensor, Replicate  # here, as importing it takes longer than this library

        adapter = self.member.adapter
        added = type(self.target.kind) is Linear and adapter.spec.join is None
        if not added or by_rows or (adapter.spec.dropout and layer.training):
            raise LayerError(
                f"'{self.target.name}' is tensor parallel; there dW is added to linear layers, without dropout, and all rows "
                "of a batch alike. Leave it out."
            )
        update = self.member.update(x.full_tensor() if is_sharded(x) else x, None, None, layer.training)
        return output + DTensor.from_local(update, output.device_mesh, [Replicate()] * output.device_mesh.ndim, run_check=False)

    def _check_real(self, x: Tensor) -> None:
        if x.device.type != "meta" and is_empty(self.member.adapter.stored()):
            raise LayerError(
                f"the adapter of '{self.target.name}' has no values yet: it was attached on the meta device. Call "
                "tuned.to_empty(device=...), which gives it its first values, or load a saved one."
            )

    def _input(self, kwargs: dict[str, Any]) -> Tensor:
        """The layer's input among keywords: the one called input, or the only tensor."""
        tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
        found = kwargs.get("input", tensors[0] if len(tensors) == 1 else None)
        if not isinstance(found, Tensor):
            raise LayerError(
                f"'{self.target.name}' was called with {sorted(kwargs)}, among which its input cannot be told; "
                "call it with the input first, or leave it out."
            )
        return found


class EnterHook:
    """The forward pre-hook of a layer whose input is multiplied (`Multiply("right")`), while the adapter is active."""

    def __init__(self, site: UpdateHook) -> None:
        self.site = site

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] = NONE) -> Any:
        """The layer's arguments with another input."""
        site, member = self.site, self.site.member
        if not member.active:
            return None
        x = args[0] if args else site._input(kwargs)
        rows = member.adapter.passes.rows if is_eager() else None
        if rows is not None and not rows[0]:
            return None
        if is_sharded(x) or (rows is not None and len(rows[0]) < rows[1]):
            raise LayerError(
                f"'{site.target.name}' is multiplied from the right, at its input, which is whole and the same for all rows of "
                "a batch; name its adapter for all rows or for none."
            )
        if is_eager():
            site._check_real(x)
        turned = entering(member, x, layer.training)
        return ((turned, *args[1:]), kwargs) if args else (args, {n: turned if v is x else v for n, v in kwargs.items()})


def _call() -> FrameType:
    """The frame of the module call that runs a hook."""
    frame = sys._getframe(2)
    return frame.f_back if frame.f_code.co_name == "inner" and frame.f_back is not None else frame


class BeginHook:
    """The model's forward pre-hook: a pass begins."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if is_eager():
            self.passes.open(_call())
            self.passes.ddp = _inside_ddp()


class EndHook:
    """The model's forward hook, also where the call raised: the pass is over."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if is_eager():
            self.passes.close(_call())


class WatchHook:
    """The forward hook of a module that has adapted layers: after its first call it names those that were not called."""

    def __init__(self, sites: Sequence[UpdateHook]) -> None:
        self.sites = tuple(sites)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if not is_eager():
            return
        for key, hook in list(module._forward_hooks.items()):
            if hook is self:
                del module._forward_hooks[key]
        # A layer that is compiled by itself has no eager call to be seen.
        if missed := [s.target.name for s in self.sites if not s.ran and s.target.layer._compiled_call_impl is None]:
            warnings.warn(
                f"{', '.join(map(repr, missed))}: not called in a call of {type(module).__name__}, which may read the weight "
                "without calling the layer; then the adapter has no effect and no gradient there, but merge() would change "
                "the model. Attach with at='weight', or leave it out.",
                stacklevel=2,
            )


def watchers(model: nn.Module, sites: Sequence[UpdateHook]) -> list[Any]:
    """Register a `WatchHook` on the nearest module around each site that is called itself; returns the handles."""
    around: dict[nn.Module, list[UpdateHook]] = {}
    modules = dict(model.named_modules())
    for site in sites:
        name = site.target.home.rpartition(".")[0]
        while name and isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            name = name.rpartition(".")[0]
        parent = modules[name]
        if parent is not site.target.layer and type(parent).__name__ != "OptimizedModule":
            around.setdefault(parent, []).append(site)
    return [parent.register_forward_hook(WatchHook(own)) for parent, own in around.items()]


def _inside_ddp() -> bool:
    """Whether a DistributedDataParallel module is calling, one whose parameters may get their gradients at any time."""
    active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return active is not None and not active.static_graph
