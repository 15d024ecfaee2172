"""What of the base may change beside an adapter: the parameters that train with it, and buffers such as BatchNorm's means.

They are copied when the adapter is attached, saved with it, and put back when it is detached; while it is switched off, the
copies stand in their place. A parameter trains beside one adapter at a time. Buffers may change beside several: whichever
leaves last puts back what was there before them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from superlora_tn.model.frozen import trains_beside
from superlora_tn.model.targets import AttachError

# Larger buffers (masks, quantised weights) are watched but not copied.
LARGEST = 1 << 20
SLOT = "_superlora_kept"


@dataclass(eq=False)
class Kept:
    """What one handle found in a parameter or buffer of the base; a module's slot has them in the order of attachment.

    Attributes:
        copy: the value then.
        trains: whether it is a parameter that trains beside the adapter.
        hidden: the value since, while the copy stands in its place; None else.
        places: where it stands, as tied parameters stand in several places.
    """

    copy: Tensor
    trains: bool
    hidden: Tensor | None = None
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def hide(self, places: list[tuple[nn.Module, str]], now: Tensor) -> None:
        """Let the copy stand in the value's place."""
        copy = self.copy.to(now.device, now.dtype)
        # Parameters are swapped as objects: a graph that was recorded before, and optimizers, keep the one that trains.
        shown = nn.Parameter(copy, requires_grad=False) if self.trains else copy.clone()
        self.hidden, self.places = now, places
        for place in places:
            _store(*place, shown)

    def reveal(self) -> None:
        """Put the value back in its place, on the device and in the dtype that its place has now."""
        if self.hidden is None:
            return
        shown = _tensor(*self.places[0])
        if shown is not None and (shown.device, shown.dtype) != (self.hidden.device, self.hidden.dtype):
            self.hidden.data = self.hidden.data.to(shown.device, shown.dtype)
        for place in self.places:
            _store(*place, self.hidden)
        self.hidden, self.places = None, []


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
        self._model, self._leave = model, leave
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._kept: dict[str, Kept] = {}
        self._written: dict[str, int] = {}
        self._left: dict[str, Tensor] = {}
        self.also = tuple(also)
        # Full names of all of the base's parameters and buffers.
        self.known = () if model is None else _names(model, leave)

    def enter(self) -> None:
        """Take the copies.

        Raises:
            AttachError: a parameter that trains beside another adapter.
        """
        assert self._model is not None
        found = list(_held(self._model, self._leave, set(self.also)))
        for name, module, own in found:
            now = _tensor(module, own)
            there = _stack(module, own)
            taken = any(kept.trains and kept.hidden is not None for kept in there) or (
                isinstance(now, nn.Parameter) and trains_beside(now)
            )
            if name in self.also and taken:
                raise AttachError(
                    f"'{name}' trains beside another adapter already; detach() or bake() that one first, or leave it out of "
                    "also."
                )
        for name, module, own in found:
            for other in _stack(module, own):
                other.reveal()
            tensor = _tensor(module, own)
            assert tensor is not None
            self._places[name] = (module, own)
            if name not in self.also and tensor.numel() > LARGEST:
                self._written[name] = tensor._version
            else:
                self._kept[name] = Kept(tensor.detach().clone(), name in self.also)
                module.__dict__.setdefault(SLOT, {}).setdefault(own, []).append(self._kept[name])

    def _now(self, name: str) -> Tensor | None:
        hidden = self._kept[name].hidden if name in self._kept else None
        return _tensor(*self._places[name]) if hidden is None else hidden

    def training(self) -> dict[str, Tensor]:
        """The parameters that train beside the adapter, by name."""
        return {name: now for name in self._kept if name in self.also and (now := self._now(name)) is not None}

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
        return self._left or self._changed()

    def _changed(self) -> dict[str, Tensor]:
        found = {name: self._now(name) for name in self._kept}
        return {
            name: now.detach()
            for name, now in found.items()
            if now is not None and now.device.type != "meta" and (name in self.also or not _same(self._kept[name].copy, now))
        }

    def show(self, on: bool) -> None:
        """Let the adapter's values stand in the model, or the base's own."""
        for name, kept in self._kept.items():
            if on:
                kept.reveal()
            elif kept.hidden is None and (kept.trains or len(_stack(*self._places[name])) == 1):
                now = self._now(name)
                if now is not None and now.device.type != "meta" and not _same(kept.copy, now):
                    kept.hide(self._all_places(now) if kept.trains else [self._places[name]], now)

    def _all_places(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        assert self._model is not None
        return [(m, own) for m in self._model.modules() for own, one in m._parameters.items() if one is parameter]

    def leave(self, keep: bool = False) -> None:
        """Put the copies back, or keep what is there now for good; what other handles found before is then of this, too.

        It may be done again where it was broken off.
        """
        if self._model is None:
            return
        self._left = self._left or {name: value.clone() for name, value in self._changed().items()}
        for name, kept in self._kept.items():
            kept.reveal()
            module, own = self._places[name]
            there = _stack(module, own)
            if kept in there:
                self._pass_on(name, there, kept, keep)
                there.remove(kept)
            if not there:
                _clear(module, own)
        self._kept, self._model = {}, None

    def _pass_on(self, name: str, there: list[Kept], kept: Kept, keep: bool) -> None:
        k = there.index(kept)
        above = there[k + 1] if k + 1 < len(there) else None
        if keep and k:
            now = _tensor(*self._places[name])
            if now is not None:
                after = now.detach().clone() if above is None else above.copy
                for below in there[:k]:
                    below.copy = after
        elif not keep and above is not None:
            above.copy = kept.copy
        elif not keep and name in self._left:
            self.put({name: kept.copy})

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the parameters and buffers of these names."""
        with torch.no_grad():
            for name, value in values.items():
                now = self._now(name)
                assert now is not None
                now.copy_(value)

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Write saved values; what is not among them is the base's own again."""
        if self._model is None:  # detached
            self._left = dict(values)
            return
        self.put({name: self._kept[name].copy for name in self._changed() if name not in values})
        self.put(values)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept."""
        kept = {name: one.copy for name, one in self._kept.items()} or self._left
        return {name: tuple(tensor.shape) for name, tensor in kept.items()}


def check_shown(layer: nn.Module, name: str, tensors: Collection[str]) -> None:
    """Raise where the base's own value stands in the place of a weight that trains beside an adapter that is switched off."""
    if any(kept.hidden is not None for own in tensors for kept in _stack(layer, own)):
        raise AttachError(
            f"the weight of '{name}' trains beside an adapter that is switched off, so it is the base's own for a while; "
            "switch that adapter on before dW is merged into it."
        )


def hidden(model: nn.Module) -> set[int]:
    """Ids of the values in whose place the base's own stand, whichever handle switched them off."""
    stacks = (there for module in model.modules() for there in module.__dict__.get(SLOT, {}).values())
    return {id(kept.hidden) for there in stacks for kept in there if kept.hidden is not None}


def _names(model: nn.Module, leave: tuple[type[nn.Module], ...]) -> tuple[str, ...]:
    modules = [(home, module) for home, module in model.named_modules() if not isinstance(module, leave)]
    return tuple(f"{home}.{own}".lstrip(".") for home, m in modules for own in (*m._parameters.keys(), *m._buffers.keys()))


def _tensor(module: nn.Module, own: str) -> Tensor | None:
    # A part of a TorchScript program has views of its tensors that know less than a dict.
    return next((held[own] for held in (module._parameters, module._buffers) if own in held), None)


def _store(module: nn.Module, own: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module._parameters[own] = tensor
    else:
        module._buffers[own] = tensor


def _stack(module: nn.Module, own: str) -> list[Kept]:
    found: list[Kept] = module.__dict__.get(SLOT, {}).get(own, [])
    return found


def _clear(module: nn.Module, own: str) -> None:
    known: dict[str, list[Kept]] = module.__dict__.get(SLOT, {})
    known.pop(own, None)
    if not known:
        module.__dict__.pop(SLOT, None)


def _same(copy: Tensor, now: Tensor) -> bool:
    return copy.shape == now.shape and torch.equal(copy.to(now.device, now.dtype), now)


def _held(model: nn.Module, leave: tuple[type[nn.Module], ...], also: Collection[str]) -> Iterator[tuple[str, nn.Module, str]]:
    for home, module in model.named_modules():
        if isinstance(module, leave):
            continue
        for own in module._parameters.keys():  # noqa: SIM118 (of TorchScript no dict)
            if f"{home}.{own}".lstrip(".") in also:
                yield f"{home}.{own}".lstrip("."), module, own
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set and _is_plain(buffer):
                yield f"{home}.{own}".lstrip("."), module, own


def _is_plain(buffer: Tensor) -> bool:
    """Whether its numbers can be compared and written: torch compares no sparse tensors."""
    known = type(buffer) in (Tensor, nn.Buffer) and buffer.layout is torch.strided
    return known and buffer.device.type != "meta" and not buffer.is_quantized


def by_each_name(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of parameters by all the names that these have in a model: PEFT copies modules whole, those that share one too."""
    every = list(model.named_parameters(remove_duplicate=False))
    known = {id(parameter): values[name] for name, parameter in every if name in values}
    return {**{name: known[id(parameter)] for name, parameter in every if id(parameter) in known}, **values}


def by_one_name(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `by_each_name` was given. Values that differ between the names of one parameter all stay, as none is its value."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    once = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    again = [n for n in values if (f := once.get(n, n)) != n and f in values and torch.equal(values[n], values[f])]
    return {name: value for name, value in values.items() if name not in again}
