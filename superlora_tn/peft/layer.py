"""What stands in an adapted layer's place: it calls the layer and adds the updates of the active adapters to its output."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from superlora_tn.model.convolutions import TransposedConvolution
from superlora_tn.model.joins import entering, enters, joiner
from superlora_tn.model.kinds import Kind, Linear, Transposed
from superlora_tn.model.recognise import adopt
from superlora_tn.model.weights import Weight
from superlora_tn.update.base import Member
from superlora_tn.update.eager import is_eager
from superlora_tn.update.joined import joined

BASE = "__base__"  # PEFT's word, among adapter_names, for the base alone


class SuperLoraLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer with adapters on it.

    The adapters' parameters are on the tuner, once; a layer holds references to its members of them.

    Attributes:
        base_layer: the layer.
        kind: how its weight is read, written and updated.
        superlora_members: its member of each adapter, by the adapter's name.
        superlora_joins: what gives its output with the update of each.
    """

    adapter_layer_names = ("superlora_adapters",)
    other_param_names = ("superlora_members", "superlora_joins")

    def __init__(self, base_layer: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind
        self.superlora_members: dict[str, Member] = {}
        self.superlora_joins: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._own = Weight(self.inner(), kind)

    @property
    def superlora_adapters(self) -> nn.ModuleDict:
        """Its adapters by name, where PEFT looks for what trains and where it lies; they are registered on the tuner alone."""
        return nn.ModuleDict({name: member.adapter for name, member in self.superlora_members.items()})

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: the tuner places what layers share, once it is loaded (`_cast_adapter_dtype`)."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; what trains is the tuner's to say, as it holds the parameters."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; which ones are active then is the tuner's to say, the same for all layers."""
        self.superlora_members.pop(adapter_name, None)
        self.superlora_joins.pop(adapter_name, None)

    def add_member(self, adapter_name: str, member: Member) -> None:
        """Take an adapter's member."""
        self.kind.ready(self.inner(), member)
        self.superlora_members[adapter_name] = member
        self.superlora_joins[adapter_name] = joiner(self.kind, member)

    def inner(self) -> nn.Module:
        """The layer itself, inside whatever else wraps it."""
        layer: nn.Module = self.get_base_layer()  # type: ignore[operator]
        return layer

    def names(self) -> list[str]:
        """The active adapters."""
        active: str | list[str] = self._active_adapter
        return [active] if isinstance(active, str) else active

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, with the update of each active adapter.

        Args:
            x: the layer's input.
            args, kwargs: what else the layer takes; ``adapter_names`` (one a row of the batch) is taken out.
        """
        rows = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if rows is not None and self.merged:
            raise ValueError("adapter_names was given for a mixed batch while adapters are merged; unmerge_adapter() first.")
        if self.disable_adapters or self.merged:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        layer, active = self.inner(), [name for name in rows or self.names() if name in self.superlora_members]
        members = [self.superlora_members[name] for name in active]
        self._check_alone(members if rows is None else ())
        if any(enters(self.kind, member) for member in members):
            if rows is not None:
                raise ValueError(f"'{members[0].name}' is multiplied from the right, and that is one for all rows of a batch.")
            x = entering(members[0], x, layer.training)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if rows is not None:
            return self._mixed(x, result, rows)
        base = adopt(layer, None, x, result) if is_eager() and layer is self.base_layer else None
        for name, member in zip(active, members, strict=True):
            # Only the first may write to the output: behind it, the output has a graph of an adapter.
            result, base = self.superlora_joins[name](layer, member, x, result, base), None
        return result

    def _check_alone(self, members: Sequence[Member]) -> None:
        """Raise for several adapters at once of which one does not add."""
        wrong = next((m.adapter.spec.join for m in members if m.adapter.spec.join is not None), None)
        if len(members) > 1 and wrong is not None:
            raise ValueError(
                f"{len(members)} adapters are active on one layer, which works where all are added; one is not ({wrong}). "
                "set_adapter() a single one."
            )

    def _mixed(self, x: Tensor, result: Tensor, names: Sequence[str]) -> Tensor:
        """Each row with the update of its own adapter; where the first axis is n times as long, each name is for n rows."""
        each, left = divmod(x.shape[0], len(names))
        if left or result.shape[0] != x.shape[0]:
            raise ValueError(
                f"adapter_names names {len(names)} rows, and a layer was called with a first axis of {x.shape[0]}, which is no "
                "multiple of them; give one name for each row of the batch."
            )
        for name in dict.fromkeys(names):
            member = self.superlora_members.get(name)
            if member is None:
                continue
            index = torch.tensor([k * each + j for k, n in enumerate(names) if n == name for j in range(each)], device=x.device)
            own = x.index_select(0, index), result.index_select(0, index)
            result = result.index_copy(0, index, self.superlora_joins[name](self.inner(), member, *own, None))
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of an adapter in the shape of the layer's weight, as PEFT's own conversions read it."""
        member = self.superlora_members[adapter]
        base = self.kind.read(self.inner()).detach()
        added = member.adapter.spec.join is None
        delta = (member.delta() if added else joined(member, base, member.current()) - base).detach()
        weight: Any = self.inner().weight
        if isinstance(self.kind, TransposedConvolution):
            return self.kind.laid(self.inner(), delta)
        return delta.t() if isinstance(self.kind, Transposed) else delta.reshape(weight.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Linear layers."""
        return isinstance(self.inner(), nn.Linear)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + dW into the weight, rounded once; the weight's own bytes are kept for `unmerge`.

        Args:
            safe_merge: raise, with the weight as it was, where W + dW is not finite.
            adapter_names: which adapters; None takes the active ones.

        Raises:
            ValueError: NaN or infinity, with `safe_merge`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.superlora_members]
        self._check_alone([self.superlora_members[name] for name in [*self.merged_adapters, *names]])
        for name in names:
            member = self.superlora_members[name]
            before = self._deltas(self.merged_adapters)
            self._own.add(member, member.current().detach())
            if safe_merge and not torch.isfinite(self.kind.read(self.inner())).all():
                self._own.restore(before)
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: dW, or W + dW, is not "
                    "finite; nothing was merged."
                )
            self._own.settle()
            self.merged_adapters.append(name)

    def _deltas(self, names: Sequence[str]) -> Mapping[Member, Tensor]:
        return {self.superlora_members[n]: self.superlora_members[n].current().detach() for n in names}

    def unmerge(self) -> None:
        """Put the weight's own bytes back.

        Raises:
            ValueError: the weight was changed while merged.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._own.is_changed:
            raise ValueError(
                "a weight was changed while adapters were merged into it (another base loaded, trained, or cast?); unmerging "
                "would throw that away. Load the base again, or keep the merged weights by merge_and_unload()."
            )
        self.keep_merged([])

    @torch.no_grad()
    def keep_merged(self, names: Sequence[str]) -> None:
        """Take all merged adapters but these out of the weight."""
        if self.merged_adapters != list(names):
            self._own.restore(self._deltas(names))
            self.merged_adapters = list(names)

    def __repr__(self) -> str:
        return f"superlora.{super().__repr__()}"


class SuperLoraLinear(SuperLoraLayer):
    """A linear layer with adapters on it: PEFT finds those of "all-linear" by their class's name."""

    def __init__(self, base_layer: nn.Module, kind: Kind) -> None:
        super().__init__(base_layer, kind)
        self.out_features, self.in_features = kind.shape(self.inner())


def wrapped(base_layer: nn.Module, kind: Kind) -> SuperLoraLayer:
    """The layer that stands in this one's place."""
    return (SuperLoraLinear if isinstance(kind, Linear) else SuperLoraLayer)(base_layer, kind)
