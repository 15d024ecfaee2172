"""The weights of a model while adapters are on them: who adapts them, and their own values while dW is merged.

One `Weight` a weight, found again through its layer, whatever handles there are on the model and on its parts; further layers
that are tied to it, and adapted with it, know of it too.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from superlora_tn.declare.rows import Span
from superlora_tn.model.buffers import check_shown
from superlora_tn.model.kinds import Held, Kind
from superlora_tn.model.spans import meet
from superlora_tn.model.targets import AttachError, Target, is_sharded
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Member
from superlora_tn.update.joined import joined

SLOT = "_superlora_weights"
TIED = "_superlora_tied"
CHUNK = 1 << 22


class Weight:
    """A weight of a layer and the adapters on it.

    Attributes:
        layer, kind: where it is and how it is read.
        members: the adapters' members on it, by their handles' names.
        base: its own values as its kind keeps them, while any of them is merged.
        lost: how much of dW's norm was rounded away when it was quantised again.
        merged: the members whose dW is in it now, in order.
    """

    def __init__(self, layer: nn.Module, kind: Kind) -> None:
        self.layer, self.kind = layer, kind
        self.members: list[tuple[str, Member]] = []
        self.base: Any = None
        self.lost = 0.0
        self.merged: list[Member] = []
        self._print: tuple[Any, ...] = ()

    def add(self, member: Member, delta: Tensor) -> None:
        """Write W + dW, or what else the join makes of dW (`Member.current`), rounded once; W is kept."""
        current = self.kind.read(self.layer).detach()
        if self.base is None:
            self.base = self.kind.keep(self.layer)
        self.merged.append(member)
        # In the wider of the two types, so that neither is rounded before the sum is.
        whole = joined(member, current, delta)
        self.kind.write(self.layer, whole)
        if self.kind.rounds:
            norm = float((whole - current).norm())
            self.lost = float((self.kind.read(self.layer).detach() - whole).norm()) / norm if norm else 0.0

    def settle(self) -> None:
        """Remember what the weight is now."""
        self._print = fingerprint(self.kind.read(self.layer))

    @property
    def is_changed(self) -> bool:
        """Whether anybody wrote to the weight since it was merged."""
        return bool(self._print) and self._print != fingerprint(self.kind.read(self.layer))

    def restore(self, deltas: Mapping[Member, Tensor]) -> None:
        """Put the weight's own values back, and then the dW of the members that stay merged."""
        if self.base is None:
            return
        self.kind.put(self.layer, self.base)
        before = self.merged
        staying, self.merged = [m for m in self.merged if m in deltas], []
        if not staying:
            self.base, self._print = None, ()
            return
        try:
            for member in staying:
                self.add(member, deltas[member])
            self.settle()
        except BaseException:
            self.merged = before  # to be restored once more
            raise

    def forget(self) -> None:
        """What is in the weight now is its own from here on."""
        self.base, self.merged, self._print = None, [], ()


def weight_of(target: Target) -> Weight:
    """The record of a target's weight; made where there is none."""
    known: dict[Any, Weight] = target.layer.__dict__.setdefault(SLOT, {})
    return known.setdefault(_key(target.kind), Weight(target.layer, target.kind))


def found(target: Target) -> Weight | None:
    """The record of a target's weight, if there is one."""
    known: dict[Any, Weight] = target.layer.__dict__.get(SLOT, {})
    return known.get(_key(target.kind))


def _key(kind: Kind) -> tuple[str, Span | None, int | None]:
    """What of a layer a kind means: the parameter, which rows, which of a stack."""
    if isinstance(kind, Held):
        return kind.parameter, kind.span, kind.slot
    return "weight", kind.block, None


def overlap(one: Target, other: Target) -> bool:
    """Whether two targets have a row of one weight in common."""
    (first, rows, place), (second, others, slot) = _key(one.kind), _key(other.kind)
    if one.layer is not other.layer or (first, place) != (second, slot):
        return False
    return meet(rows, others)


def check_apart(targets: Sequence[Target]) -> None:
    """Raise where two targets of one adapter have rows of a weight in common."""
    layers: dict[int, list[Target]] = {}
    for side in (side for target in targets for side in target.sides):
        for other in layers.setdefault(id(side.layer), []):
            if overlap(side, other):
                raise AttachError(f"'{other.name}' and '{side.name}' have rows of one weight in common; name one of them.")
        layers[id(side.layer)].append(side)


def check_alone(spec: AdapterSpec, targets: Sequence[Target], name: str) -> None:
    """Raise where a weight has an adapter of this name, or several would be on it of which one does not add."""
    for target in targets:
        there = [one for side in target.sides for one in _members(side)]
        if any(other == name for other, _ in there):
            raise AttachError(
                f"'{target.name}' is adapted already under the name '{name}'; detach() that adapter first, attach under "
                "another name=, or choose other targets."
            )
        for other, member in [*(one for side in target.sides for weight in met(side) for one in weight.members), *there]:
            if (join := spec.join or member.adapter.spec.join) is not None:
                raise AttachError(
                    f"'{target.name}' has the adapter '{other}', and adapters share a weight only where all are added; "
                    f"one of these is not ({join}). detach() '{other}' first, or choose other targets."
                )


def _members(side: Target) -> list[tuple[str, Member]]:
    """The adapters on the weight of one layer, those that came by another layer that it is tied to as well."""
    record = found(side)
    return [*([] if record is None else record.members), *side.layer.__dict__.get(TIED, ())]


def met(target: Target) -> Iterator[Weight]:
    """Records of other weights that have a row in common with a target: of the whole layer, or of blocks of it."""
    parameter, span, slot = _key(target.kind)
    known: dict[Any, Weight] = target.layer.__dict__.get(SLOT, {})
    for (other, rows, place), weight in known.items():
        if (other, place) != (parameter, slot) or rows == span:
            continue
        if meet(rows, span):
            yield weight


def enlist(target: Target, name: str, member: Member) -> None:
    """Note that an adapter of this name is on a weight: in its record, and at the other layers that use it."""
    weight_of(target).members.append((name, member))
    for side in target.tied:
        side.layer.__dict__.setdefault(TIED, []).append((name, member))


def delist(target: Target, member: Member) -> None:
    """Forget that an adapter was on a weight; the record goes with the last."""
    weight = weight_of(target)
    weight.members = [(other, own) for other, own in weight.members if own is not member]
    if not weight.members:
        drop(target)
    for side in target.tied:
        left = [(other, own) for other, own in side.layer.__dict__.get(TIED, ()) if own is not member]
        if left:
            side.layer.__dict__[TIED] = left
        else:
            side.layer.__dict__.pop(TIED, None)


def drop(target: Target) -> None:
    """Forget the record of a weight that nobody adapts any more."""
    known: dict[Any, Weight] = target.layer.__dict__.get(SLOT, {})
    known.pop(_key(target.kind), None)
    if not known:
        target.layer.__dict__.pop(SLOT, None)


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """A few sums over the bits of a tensor, which nearly any change changes."""
    if tensor.device.type == "meta":
        return ("meta",)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size() // (1 + tensor.is_complex())]
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    total = [0, 0]
    for chunk in flat.contiguous().view(width).reshape(-1).split(CHUNK):  # type: ignore[no-untyped-call]
        wide = chunk.to(torch.int64)
        place = torch.arange(1, 2 * len(wide), 2, device=wide.device)
        total[0] += int(wide.sum())
        total[1] = (total[1] * 31 + int((wide * place).sum())) % (1 << 64)
    return (tuple(tensor.shape), tensor.dtype, *total)


def check_mergeable(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise where writing to a weight would not do what it says, naming it.

    A weight that another module uses too would change there; one that is computed anew, sharded or replaced would lose it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    regions = _Regions(modules)
    for target in targets:
        moved = next((side.home for side in target.sides if modules.get(side.home, model) is not side.layer), None)
        if moved is not None:
            raise AttachError(
                f"the module '{moved}' is another one now than the adapter was attached to (tokens added, a layer "
                "replaced?); detach() and attach to the model as it is."
            )
        if any(weight.merged for weight in met(target)):
            raise AttachError(
                f"rows of the weight of '{target.name}' are merged with another adapter's dW already; unmerge() or bake() that "
                "one first."
            )
        _check_writable(target)
        own = target.kind.owners(target.layer)
        if own is None:
            raise AttachError(
                f"the weight of '{target.name}' is computed from others (weight_norm, parametrize); bake that in first."
            )
        check_shown(target.layer, target.name, own)
        for name, tensor in own.items():
            if is_sharded(tensor) or _is_borrowed(model, tensor):
                raise AttachError(
                    f"the weight of '{target.name}' is sharded over processes; what is written to it would be lost at the next "
                    "gathering. Save the adapter, load it on a whole model, and merge there."
                )
            shared = regions.others(tensor, {f"{side.home}.{name}".lstrip(".") for side in target.sides})
            if shared:
                raise AttachError(f"the weight of '{target.name}' is shared with '{shared}', which merging would change too.")


def _check_writable(target: Target) -> None:
    """Raise where the weight is not here to be written, before any other weight is."""
    own = target.kind.owners(target.layer) or {}
    if any(tensor.device.type == "meta" for tensor in own.values()):
        raise AttachError(
            f"the weight of '{target.name}' is on the meta device (offloaded, or not loaded yet); load it before merging."
        )
    if refusal := target.kind.refusal(target.layer):
        raise AttachError(f"the weight of '{target.name}' ({type(target.layer).__name__}) {refusal}")
    if own and not any(map(is_sharded, own.values())) and tuple(target.kind.read(target.layer).shape) != target.shape:
        raise AttachError(
            f"the weight of '{target.name}' has the shape {tuple(target.kind.read(target.layer).shape)} now, where "
            f"{target.shape} was adapted: it is sharded or flattened. Merge within FSDP's summon_full_params, or on a whole "
            "model."
        )


def check_unmerged(model: nn.Module, beside: Mapping[str, Tensor], own: Collection[Member] = ()) -> None:
    """Raise where what trains beside an adapter holds a merged dW, which is no part of its value.

    Args:
        model: where the adapter is.
        beside: what trains beside it, by name.
        own: members whose dW does not count.
    """
    names = {id(tensor): name for name, tensor in beside.items()}
    for module in model.modules() if names else ():
        for weight in module.__dict__.get(SLOT, {}).values():
            if all(member in own for member in weight.merged):
                continue
            held = next((names[id(t)] for t in (weight.kind.owners(module) or {}).values() if id(t) in names), None)
            if held is not None:
                raise AttachError(f"'{held}' trains beside the adapter, and dW is merged into it now; unmerge() that first.")


def check_whole(model: nn.Module, beside: Mapping[str, Tensor]) -> None:
    """Raise where the base's own value could not take the place of what trains beside an adapter: it is sharded."""
    for name, tensor in beside.items():
        if is_sharded(tensor) or _is_borrowed(model, tensor):
            raise AttachError(
                f"'{name}' trains beside the adapter and is sharded over processes, so the base's own value cannot take its "
                "place; compare with a base that has no adapter."
            )


def report_rounding(weights: Mapping[str, Weight]) -> None:
    """Warn of what was rounded away where weights were quantised again."""
    lost = {name: weight.lost for name, weight in weights.items() if weight.kind.rounds}
    if lost:
        most = max(lost, key=lambda name: lost[name])
        warnings.warn(
            f"merge() quantised {len(lost)} weights again: W + dW was rounded by up to {lost[most]:.2g} of dW's norm (at "
            f"'{most}'). Keep the adapter apart, or merge into the unquantised base, to lose nothing.",
            stacklevel=3,
        )


def _is_borrowed(model: nn.Module, tensor: Tensor) -> bool:
    """Whether FSDP2 lent a whole parameter for a while (within unshard()): it would take the shards' values again."""
    return tensor.numel() > 0 and any(
        any(t.__name__ == "FSDPModule" for t in type(module).__mro__) for module in model.modules()
    )


class _Regions:
    """Which bytes of memory the parameters of a model take."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._taken: list[tuple[Any, int, int, str]] = []
        for home, module in modules.items():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                for key, start, end in _region(parameter):
                    self._taken.append((key, start, end, f"{home}.{name}".lstrip(".")))
        self._taken.sort(key=lambda one: (str(one[0]), one[1]))
        self._longest = max((end - start for _, start, end, _ in self._taken), default=0)

    def others(self, tensor: Tensor, own: set[str]) -> str | None:
        """The name of another parameter that shares bytes with this one."""
        for key, start, end in _region(tensor):
            first = bisect_left(self._taken, (str(key), start - self._longest), key=lambda one: (str(one[0]), one[1]))
            for other, begin, stop, name in self._taken[first:]:
                if str(other) != str(key) or begin >= end:
                    break
                if stop > start and name not in own:
                    return name
        return None


def _region(tensor: Tensor) -> Iterator[tuple[Any, int, int]]:
    """(device, first byte, last byte + 1); the meta device has no memory, so there a tensor is itself alone."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta" or tensor.numel() == 0:
        yield (id(tensor), 0, 1)
        return
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    yield (tensor.device, tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size())
