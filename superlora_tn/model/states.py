"""What a handle is at the moment, also in state dicts and copies of a model: whether it acts, how strongly, what it froze."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from superlora_tn.declare.parts import check_number
from superlora_tn.model.buffers import Snapshot, hidden
from superlora_tn.model.frozen import Holder, followed, hold_on
from superlora_tn.model.targets import AttachError
from superlora_tn.model.weights import check_unmerged, check_whole
from superlora_tn.update.base import Adapter, Member
from superlora_tn.update.passes import Passes
from superlora_tn.update.placed import Placed


def alike(values: Sequence[Tensor], count: int) -> list[Tensor]:
    """Saved values of an adapter, its `count` nodes first, these all of their widest dtype.

    A contraction takes one dtype, and files of other libraries may have several. Magnitudes may have another.
    """
    widest = reduce(torch.promote_types, [value.dtype for value in values[:count]])
    return [*(value.to(widest) for value in values[:count]), *values[count:]]


class Stated(Placed):
    """A handle's state beside its nodes.

    Attributes:
        adapters: one `Adapter` a group.
        merged: whether dW is in the weights now.
    """

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        self.merged = False
        self._passes = passes
        self._strength = 1.0
        self._disabled = 0
        self._enabled = True
        self._holder = Holder()
        self._base = Snapshot()
        self._model: tuple[nn.Module, str] | None = None
        self._frozen: list[tuple[str, nn.Parameter, bool]] = []

    @property
    def _acts(self) -> bool:
        """Whether dW is added to what the model computes, beside what is in the weights."""
        return self._model is not None and self._enabled and not (self.merged or self._disabled)

    def _check_beside(self, own: Collection[Member] = (), switched: bool = False) -> None:
        """Raise where what trains beside the adapter cannot be read, written or switched: dW but `own` is merged into it."""
        if self._model is not None:
            check_unmerged(self._model[0], self._base.training(), own)
            if switched:
                check_whole(self._model[0], self._base.training())

    def _adapters(self) -> Iterator[Adapter]:
        for adapter in self.adapters:
            assert isinstance(adapter, Adapter)
            yield adapter

    @property
    def name(self) -> str | None:
        """Under which name the model carries it; None where it is detached."""
        return None if self._model is None else self._model[1]

    @property
    def strength(self) -> float:
        """A factor of dW beside the declaration's scale; see also `use`. It is not saved.

        Raises:
            AttachError: set while merged.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        check_number("strength", "strength", value)
        self._set(self._enabled, float(value))

    def _set(self, enabled: bool, strength: float) -> None:
        """Switch the adapter on or off for good, and give it a strength; as before where that breaks off."""
        if self.merged and (enabled, strength) != (self._enabled, self._strength):
            raise AttachError(f"the adapter '{self.name}' is merged, so its strength is in the weights; unmerge() first.")
        if enabled != self._enabled:
            self._check_beside(switched=True)
        before = self._enabled, self._strength
        self._enabled, self._strength = enabled, strength
        try:
            self._switch()
        except BaseException:
            self._enabled, self._strength = before
            self._switch()
            raise

    def _switch(self) -> None:
        """Let the adapters act as the handle says; an interrupt finds it done."""
        finish(self._act)

    def _act(self) -> None:
        for adapter in self._adapters():
            adapter.active = self._acts
            adapter.strengthen(self._strength)
        self._base.show(self._enabled and not self._disabled)
        self._passes.changed(self.merged)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The nodes; nothing while merged, as dW is in the weights then and must not count twice."""
        if not self.merged:
            return super().state_dict(*args, **kwargs)
        return kwargs.get("destination", args[0] if args else {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Also where it was taken while merged."""
        own = [key for key in state_dict if key.startswith(f"{prefix}adapters.")]
        if self.merged and own:
            raise AttachError(
                "the adapter is merged, so its nodes in a state dict would count beside the dW that is in the weights; "
                "unmerge() first, then load."
            )
        if self.merged:  # its own nodes stay, and none is missed
            state_dict.update(super().state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: it holds what it froze, and what a context switched off at the time can be switched on."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        hold_on(self._frozen, self._holder, self._base.also)
        self._enabled, self._disabled = self._enabled and not self._disabled, 0


def finish(act: Callable[[], None]) -> None:
    """Do what may be done twice, and once more before an interrupt of it goes on."""
    try:
        act()
    except BaseException:
        act()
        raise


def follow(model: nn.Module) -> None:
    """Let every handle of a model hold what stands now in the place of the parameters that it froze."""
    apart = hidden(model)
    for handle in [module for module in model.modules() if isinstance(module, Stated)]:
        if handle._model is not None:
            handle._frozen = followed(handle._model[0], handle._frozen, apart)
