"""Attach adapters to a model, and everything that alters it afterwards. No other module changes a user's model.

Layers get a forward hook and keep their class, their names and their state-dict keys. The adapters of all groups live
once, in one `Tuned` that is registered as a sub-module of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from superlora_tn.contraction.backend import DEFAULT
from superlora_tn.contraction.plan import Route, RouteChoice, choose
from superlora_tn.contraction.profile import CPU, DEVICES
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.fold import Shape
from superlora_tn.files.own import CheckpointError, Entry, read, tensor_name, write
from superlora_tn.model import kinds as layers
from superlora_tn.model.describe import summary
from superlora_tn.model.kinds import Layer, Projection
from superlora_tn.model.site import AttentionHook, BeginHook, EndHook, RevealHook, UpdateHook
from superlora_tn.model.targets import AttachError, Targets, check_mergeable, check_target, match, named_layers, near
from superlora_tn.network.budget import Budget
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter
from superlora_tn.update.make import make_adapter

NAME = "superlora"


class Tuned(nn.Module):
    """The handle `attach` returns: the adapters of a model, and what can be done with them.

    It is a sub-module of the model (so that the adapters move, save and train with it); deepcopy and pickle of the
    model carry it along, and `tuned(model)` finds it again.

    Attributes:
        spec: the declaration.
        adapters: one `Adapter` a group.
        merged: whether dW is in the weights now.
    """

    def __init__(self, spec: AdapterSpec, adapters: Sequence[Adapter], targets: Mapping[str, Layer]) -> None:
        super().__init__()
        self.spec = spec
        self.adapters = nn.ModuleList(adapters)
        self.merged = False
        # Unregistered references, in plain containers: the base's keys stay as they were.
        self._layers = dict(targets)
        self._group_of = {name: adapter for adapter in adapters for name in adapter.group.members}
        self._backup: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._model: tuple[nn.Module, str] | None = None
        self._frozen: list[tuple[nn.Parameter, bool]] = []

    def forward(self, x: Any) -> Any:
        """The identity: an nn.Sequential that carries adapters calls all its sub-modules in turn, this one too."""
        return x

    @property
    def targets(self) -> dict[str, Shape]:
        """Adapted weights: module name -> (out, in)."""
        return _shapes(self._layers)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of all adapters."""
        return sum(a.graph.num_parameters for a in self._adapters())

    def _adapters(self) -> Iterator[Adapter]:
        for adapter in self.adapters:
            assert isinstance(adapter, Adapter)
            yield adapter

    def _adapter_of(self, target: str) -> Adapter:
        if target not in self._group_of:
            raise AttachError(f"'{target}' is not adapted; {near(target, self._group_of)}.")
        return self._group_of[target]

    def delta(self, target: str) -> Tensor:
        """dW of one target as it stands, scale included, shape (out, in).

        Raises:
            AttachError: no such target.
        """
        return self._adapter_of(target).delta(target)

    def plan(self, target: str, tokens: int) -> RouteChoice:
        """Both routes of one target at a number of tokens (rows of x), priced for its device; print it.

        Raises:
            AttachError: no such target.
        """
        adapter = self._adapter_of(target)
        device = layers.weight(self._layers[target]).device.type
        return choose(adapter.graph, self.targets[target], tokens, DEVICES.get(device, CPU), adapter.optimize)

    def _need(self, what: str) -> nn.Module:
        if self._model is None:
            raise AttachError(f"cannot {what}: the adapter is detached; attach it again.")
        return self._model[0]

    def merge(self) -> None:
        """Add dW to the weights, rounding once, and switch the adapters off. The weights' bytes are kept for `unmerge`.

        Raises:
            AttachError: already merged, detached, dW not finite, or a weight that other modules share.
        """
        model = self._need("merge")
        if self.merged:
            raise AttachError("the adapter is merged already; unmerge() first, or leave it.")
        check_mergeable(model, self._layers)
        with torch.no_grad():
            for name, layer in self._layers.items():
                self._backup[name] = layers.weight(layer).detach().clone()
                delta = self.delta(name)
                layers.add_to_weight(layer, delta)
                if not torch.isfinite(layers.weight(layer)).all():
                    self._restore()
                    what = "the merged weight" if torch.isfinite(delta).all() else "dW"
                    raise AttachError(
                        f"{what} of '{name}' holds NaN or infinity; nothing was merged. Look at the training"
                        + (f", or merge into a wider dtype than {layers.weight(layer).dtype}." if what != "dW" else ".")
                    )
        self.merged = True
        self._switch(False)

    def _restore(self) -> None:
        """Put all kept bytes back."""
        with torch.no_grad():
            for name, original in self._backup.items():
                layers.write(self._layers[name], original)
        self._backup.clear()

    def unmerge(self) -> None:
        """Put the weights' own bytes back and switch the adapters on.

        Raises:
            AttachError: not merged.
        """
        if not self.merged:
            raise AttachError("the adapter is not merged, so there is nothing to unmerge.")
        self._restore()
        self.merged = False
        self._switch(True)

    def detach(self) -> nn.Module:
        """Take the adapters off and return the model bit for bit as it was (unmerged, its requires_grad restored)."""
        model = self._need("detach")
        if self.merged:
            self.unmerge()
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            if isinstance(layer, Projection):
                layer.reveal()
        assert self._model is not None
        delattr(model, self._model[1])
        self._thaw([m for m in model.modules() if isinstance(m, Tuned)])
        self._hooks, self._frozen, self._model = [], [], None
        return model

    def _thaw(self, others: Sequence[Tuned]) -> None:
        """Give the base's parameters their requires_grad back, or leave that to another handle that is still attached."""
        if not others:
            for parameter, wanted in self._frozen:
                parameter.requires_grad_(wanted)
            return
        known = {id(p): wanted for p, wanted in self._frozen}
        others[0]._frozen = [(p, wanted or known.get(id(p), False)) for p, wanted in others[0]._frozen]

    def _switch(self, active: bool) -> None:
        for adapter in self._adapters():
            adapter.active = active

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes as its base, also while merged."""
        was_merged = self.merged
        if was_merged:
            self.unmerge()
        before = [a.active for a in self._adapters()]
        self._switch(False)
        try:
            yield
        finally:
            for adapter, active in zip(self._adapters(), before, strict=True):
                adapter.active = active
            if was_merged:
                self.merge()

    def save(self, folder: str | PathLike[str]) -> None:
        """Write ``adapter.json`` and the tensors' file that it names; whatever interrupts it, a loadable adapter remains.

        Args:
            folder: made where it does not exist.
        """
        tensors = {
            tensor_name(k, node): tensor.detach()
            for k, adapter in enumerate(self._adapters())
            for node, tensor in zip(adapter.graph.nodes, adapter.tensors(), strict=True)
        }
        write(folder, [Entry(self.spec, self.targets)], tensors)

    def __str__(self) -> str:
        head = f"{len(self._layers)} weights, {self.num_parameters:,} trainable parameters, scale {self.spec.scale:g}"
        state = "merged" if self.merged else "detached" if self._model is None else "attached"
        return "\n".join([f"{head}, {state}", *summary(list(self._adapters()))])

    __repr__ = __str__


def _shapes(modules: Mapping[str, Layer]) -> dict[str, Shape]:
    """(out, in) of each module's weight."""
    matrices = {name: layers.weight(module) for name, module in modules.items()}
    return {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in matrices.items()}


def attach(
    model: nn.Module,
    spec: AdapterSpec | Budget,
    targets: Targets,
    *,
    exclude: Targets = (),
    only_layers: Sequence[int] | None = None,
    name: str = NAME,
    dtype: torch.dtype = torch.float32,
    route: Route | None = None,
    backend: str = DEFAULT,
    optimize: Optimizer = "dp",
    recompute: bool = False,
    seed: int | None = None,
) -> Tuned:
    """Attach an adapter to a model: freezes it, and leaves only the adapter's parameters trainable.

    Args:
        model: any torch model.
        spec: the declaration, or a budget, which buys one for the targets' shapes (see `variants.superlora`).
        targets, exclude, only_layers: which modules, see `match`.
        name: under which name the handle is registered in the model.
        dtype: of the adapter's parameters, whatever the model's.
        route: force "apply" or "delta"; None takes the cheaper one, call by call.
        backend: the backend's name.
        optimize: "dp" or any opt_einsum optimizer.
        recompute: on linear layers, a flat fold builds each weight's dW in forward and again in backward and keeps none.
        seed: of the adapter's first values; None draws from torch's generator.

    Returns:
        The handle: print it, merge, save, detach.

    Raises:
        AttachError: a target that is not there, cannot be adapted or is adapted already, or a name in use.
        SpecError: the declaration does not fit the targets' shapes.
    """
    if not isinstance(spec, AdapterSpec | Budget):
        raise AttachError(f"attach was given spec={spec!r}; give an AdapterSpec such as superlora_tn.lora(8).")
    names = match(model, targets, exclude, only_layers)
    if isinstance(spec, Budget):
        known = named_layers(model)
        spec = spec.choose(_shapes({n: known[n] for n in names})).spec
    return _attach(model, spec, names, name, dtype, route, backend, optimize, seed, recompute)


def _attach(
    model: nn.Module,
    spec: AdapterSpec,
    names: Sequence[str],
    name: str,
    dtype: torch.dtype,
    route: Route | None,
    backend: str,
    optimize: Optimizer,
    seed: int | None,
    recompute: bool = False,
) -> Tuned:
    """Everything that can fail comes before the first change of the model."""
    if not isinstance(name, str) or not name.isidentifier():
        raise AttachError(f"attach was given name={name!r}; a name is a word such as 'superlora'.")
    if name in dir(model):
        raise AttachError(f"the model has something named '{name}' already; detach() it, or attach under another name=.")
    others = [module for module in model.modules() if isinstance(module, Tuned)]
    taken = {target for other in others for target in other.targets}
    for target in names:
        if target in taken:
            raise AttachError(f"'{target}' is adapted already; detach() that adapter first, or choose other targets.")
    known = named_layers(model)
    targets = {n: known[n] for n in names}
    inside = [n for n, layer in targets.items() if isinstance(layer, Projection)]
    if inside and spec.dropout:
        raise AttachError(
            f"dropout={spec.dropout} drops the adapter's input, which nn.MultiheadAttention does not show; "
            f"leave dropout=0, or leave '{inside[0]}' out."
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    adapters = []
    for group, graph in spec.lay_out(_shapes(targets)):
        device = layers.weight(targets[next(iter(group.members))]).device
        made = make_adapter(spec, group, graph, dtype, device, generator, backend, route, optimize, recompute)
        adapters.append(made)
    tuned = Tuned(spec, adapters, targets)
    kept = {id(p) for other in others for p in other.parameters()}
    tuned._frozen = [(p, p.requires_grad) for p in model.parameters() if id(p) not in kept]
    for parameter, _ in tuned._frozen:
        parameter.requires_grad_(False)
    tuned._hooks = _hook(model, tuned)
    tuned._model = (model, name)
    model.add_module(name, tuned)
    return tuned


def _hook(model: nn.Module, tuned: Tuned) -> list[Any]:
    """Register the hooks of an adapter; returns their handles."""
    handles: list[Any] = []
    if sharing := [a for a in tuned._adapters() if a.shares]:
        handles += [model.register_forward_pre_hook(BeginHook(sharing)), model.register_forward_hook(EndHook(sharing))]
    inside: dict[nn.MultiheadAttention, dict[str, tuple[Projection, Adapter]]] = {}
    for target, layer in tuned._layers.items():
        adapter = tuned._adapter_of(target)
        if isinstance(layer, Projection):
            inside.setdefault(layer.attention, {})[target] = (layer, adapter)
        else:
            handles.append(layer.register_forward_hook(UpdateHook(layer, adapter, target), with_kwargs=True))
    for attention, members in inside.items():
        hook = AttentionHook(members)
        handles.append(attention.register_forward_pre_hook(hook))
        handles.append(attention.register_forward_hook(RevealHook(hook), always_call=True))
    return handles


def tuned(model: nn.Module, name: str = NAME) -> Tuned:
    """The handle of a model, for instance of a copy.

    Raises:
        AttachError: there is none of that name.
    """
    found = dict(model.named_children()).get(name)
    if not isinstance(found, Tuned):
        raise AttachError(f"the model carries no adapter named '{name}'; attach one first.")
    return found


def load(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str = NAME,
    dtype: torch.dtype | None = None,
    route: Route | None = None,
    backend: str = DEFAULT,
) -> Tuned:
    """Attach a saved adapter, strictly: whatever does not fit raises and leaves the model as it was.

    Args:
        model: the base the adapter was trained on.
        folder: what `save` wrote.
        name, route, backend: as in `attach`.
        dtype: of the parameters; None keeps the saved one.

    Raises:
        CheckpointError: files missing, damaged, of a newer schema, or of another base.
    """
    saved = read(folder)
    modules = named_layers(model)
    for target, shape in saved.targets.items():
        if target not in modules:
            raise CheckpointError(
                f"{folder}: this base has no module '{target}', which the adapter needs; {near(target, modules)}."
            )
        try:
            check_target(target, modules)
        except AttachError as error:
            raise CheckpointError(f"{folder}: this base cannot take the adapter: {error}") from error
        found = tuple(layers.weight(modules[target]).shape)
        if found != tuple(shape):
            raise CheckpointError(
                f"{folder}: '{target}' is {found} in this base and {tuple(shape)} in the adapter; it is another base."
            )
    kept = dtype or next(iter(saved.tensors.values())).dtype
    handle = _attach(model, saved.spec, list(saved.targets), name, kept, route, backend, "dp", None)
    with torch.no_grad():
        for k, adapter in enumerate(handle._adapters()):
            for node, own in zip(adapter.graph.nodes, adapter.tensors(), strict=True):
                value = saved.tensors[tensor_name(k, node)]
                if dtype is None:
                    own.data = own.data.to(value.dtype)
                own.copy_(value)
    return handle
