"""The tuner: makes the adapters of a configuration, puts layers of ours in place of the model's, and switches them.

Adapters may share factors over layers, so the tuner holds them: group k of adapter A is ``superlora_k.A``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from superlora_tn.model.joins import bound
from superlora_tn.model.kinds import Held
from superlora_tn.model.site import BeginHook, EndHook
from superlora_tn.model.targets import AttachError, Target, near, places
from superlora_tn.model.weights import check_mergeable
from superlora_tn.network.kernels import lay_out
from superlora_tn.peft.config import NAME, SuperLoraConfig
from superlora_tn.peft.layer import BASE, SuperLoraLayer, wrapped
from superlora_tn.update.base import Adapter
from superlora_tn.update.flat import FlatAdapter
from superlora_tn.update.make import make_adapter
from superlora_tn.update.passes import Passes
from superlora_tn.update.placed import is_empty

PREFIX = f"{NAME}_"
NARROW = (torch.float16, torch.bfloat16)


class SuperLoraModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner for declared adapters; `get_peft_model` makes it.

    Args:
        model: the base.
        config: a `SuperLoraConfig`, or several by adapters' names.
        adapter_name: of the adapter.
        low_cpu_mem_usage: make the adapter on the meta device, as its values are loaded next.
    """

    uses_shared_state = True
    prefix = PREFIX
    tuner_layer_cls = SuperLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: SuperLoraConfig, adapter_name: str) -> None:
        """Before the first adapter: what the layers of one call share begins and ends with the base's call."""
        self._passes = Passes()
        self._hooks = [
            model.register_forward_pre_hook(BeginHook(self._passes)),
            model.register_forward_hook(EndHook(self._passes), always_call=True),
        ]

    def _groups(self) -> list[nn.ModuleDict]:
        """The groups' containers, in order."""
        return [m for name, m in self.named_children() if name.startswith(PREFIX) and isinstance(m, nn.ModuleDict)]

    def _adapters(self, name: str) -> list[Adapter]:
        """The adapters of all groups under this name."""
        found = [group[name] for group in self._groups() if name in group]
        return [adapter for adapter in found if isinstance(adapter, Adapter)]

    def _layers(self) -> list[SuperLoraLayer]:
        return layers_of(self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make the adapters of all groups, then let PEFT put the layers in their places; nothing stays where either fails."""
        if kwargs.get("state_dict") is not None:
            raise ValueError(
                "a SuperLoRA adapter is declared by its config, not by the keys of a state dict; leave state_dict=None and "
                "load the values with set_peft_model_state_dict."
            )
        config = self._prepare_adapter_config(self.peft_config[adapter_name], self.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        trained = [(p, p.requires_grad) for group in self._groups() for p in group.parameters()]
        # The base may carry adapters of another tuner, of this very name.
        before = [(layer, dict(layer.superlora_members), dict(layer.superlora_joins)) for layer in layers_of(model)]
        empty = bool(kwargs.get("low_cpu_mem_usage", args[1] if len(args) > 1 else False))
        try:
            self._targets = self._bound(config, model)
            if self._targets:
                self._make(config, adapter_name, empty)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._drop(adapter_name)
            for layer, members, joins in before:
                layer.superlora_members, layer.superlora_joins = members, joins
            raise
        finally:
            self._targets = {}
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    def _bound(self, config: SuperLoraConfig, model: nn.Module) -> dict[str, Target]:
        """The modules that the config names, each with how its weight is read and written."""
        known = places(model)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SuperLoraLayer)}
        inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
        for entry in () if isinstance(config.target_modules, str) else sorted(config.target_modules or ()):
            if not any(name == entry or name.endswith(f".{entry}") for name in names):
                raise ValueError(
                    f"target_modules names '{entry}', which no module of the model is named; {near(entry, names)}."
                )
        found: dict[str, Target] = {}
        for name in names:
            if not self._check_target_module_exists(config, name):
                continue
            if name in layers:
                layer = layers[name]
                found[name] = Target(name, f"{name}.base_layer", layer.inner(), layer.kind)
                continue
            found[name] = bound(config.adapter_spec.join, name, known[name])
            if isinstance(found[name].kind, Held):
                raise AttachError(
                    f"'{name}' is used by reading its weight (an nn.MultiheadAttention, or a forward of its own), and PEFT "
                    "adapts layers that are called. Leave it out, or use superlora_tn.attach, which adapts it where it is read."
                )
        return found

    def _make(self, config: SuperLoraConfig, adapter_name: str, empty: bool) -> None:
        """Make the adapters that `attach` makes, in its order; groups are numbered as their first weights come in the model."""
        targets = self._targets
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        shapes = {name: target.shape for name, target in targets.items()}
        laid = lay_out(config.adapter_spec, shapes, {name: target.kernel for name, target in targets.items()})
        places, made = list(targets), dict[int, Adapter]()
        for spec, group, graph in laid:
            device, dtype = _device_and_dtype(targets[next(iter(group.members))])
            device = torch.device("meta") if empty else device
            adapter = make_adapter(spec, group, graph, dtype, device, generator, passes=self._passes)
            adapter.rest_on(lambda name: targets[name].weight())
            if not config.init_weights and not empty:
                _wake(adapter, generator)
            made[places.index(next(iter(group.members)))] = adapter
        for k, place in enumerate(sorted(made)):
            container = self._modules.get(f"{PREFIX}{k}")
            if container is None:
                # add_module asks for the attribute, and PEFT looks it up in the base too, which may be such a model itself.
                container = self._modules[f"{PREFIX}{k}"] = nn.ModuleDict()
            assert isinstance(container, nn.ModuleDict)
            container[adapter_name] = made[place]

    def _create_and_replace(
        self,
        peft_config: SuperLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        """Bind a layer to its member of the adapter, in a layer of ours."""
        layer = target if isinstance(target, SuperLoraLayer) else wrapped(target, self._targets[current_key].kind)
        members = (a.members[current_key] for a in self._adapters(adapter_name) if current_key in a.members)
        layer.add_member(adapter_name, next(members))
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)

    def _drop(self, adapter_name: str) -> None:
        for group in self._groups():
            if adapter_name in group:
                del group[adapter_name]
        for name in [n for n, m in self.named_children() if n.startswith(PREFIX) and isinstance(m, nn.ModuleDict) and not m]:
            del self._modules[name]
        for layer in self._layers():
            layer.superlora_members.pop(adapter_name, None)
            layer.superlora_joins.pop(adapter_name, None)

    def _train(self, names: Sequence[str], requires_grad: bool) -> None:
        for name in names:
            for adapter in self._adapters(name):
                adapter.requires_grad_(requires_grad)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; they alone train, unless `inference_mode`."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        active = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name in self.peft_config:
            self._train([name], name in active and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or not."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._train([adapter_names] if isinstance(adapter_names, str) else adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        for name in self.peft_config:
            self._train([name], enabled and name in self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter without a trace.

        Raises:
            ValueError: there is none of that name, or it is merged.
        """
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            raise ValueError(f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first.")
        was_active = adapter_name in self.active_adapters
        if was_active:
            self._hand_over(adapter_name)
        super().delete_adapter(adapter_name)
        self._drop(adapter_name)
        if was_active:
            self._train(self.active_adapters, True)

    def _hand_over(self, adapter_name: str) -> None:
        """Choose what is active without this adapter, for all layers alike, whichever of them have it."""
        others = [name for name in self.active_adapters if name != adapter_name]
        left = [name for name in self.peft_config if name != adapter_name]
        if not others and left:
            others = left[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {others[0]}.", stacklevel=4
            )
        for layer in self._layers():
            layer.set_adapter(others)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Widen the nodes to float32, as PEFT does; and where they were loaded from the meta device, place the rest of them."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for adapter in self._adapters(adapter_name):
            first = adapter.stored()[0]
            dtype = torch.float32 if autocast_adapter_dtype and first.dtype in NARROW else first.dtype
            if is_empty(adapter.stored()):  # not loaded yet: PEFT makes parameters without memory, and frozen nodes with it
                adapter.to(dtype)
                continue
            fixed = adapter.map if isinstance(adapter, FlatAdapter) else None
            if fixed is not None and is_empty(list(fixed.buffers())):
                fixed.reset(first.device)
            adapter.to(first.device, dtype)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        names = {name: m for name, m in self.model.named_modules() if isinstance(m, SuperLoraLayer)}
        targets = [Target(name, f"{name}.base_layer", m.inner(), m.kind) for name, m in names.items() if not m.merged]
        check_mergeable(self.model, targets)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write W + dW into all weights; whatever breaks it off, they are as before.

        Raises:
            ValueError: NaN or infinity, with `safe_merge`.
            AttachError: a weight that cannot hold it: shared with other modules, quantised, sharded or offloaded.
        """
        before = [(layer, list(layer.merged_adapters)) for layer in self._layers()]
        try:
            with self._passes.opened(), torch.no_grad():
                super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except BaseException:
            for layer, names in before:
                layer.keep_merged(names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """All weights are merged before the first layer is put back, so that a failure leaves the model as it was."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        layers = self._layers()
        for layer in layers if not merge else ():
            layer.keep_merged([])
        if merge and any(name in m.superlora_members and name not in m.merged_adapters for m in layers for name in wanted):
            self.merge_adapter(adapter_names, safe_merge)
        model: nn.Module = super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        for hook in self._hooks:
            hook.remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within it each row of a batch meets its own adapter, and what trains beside it: ``model(x, adapter_names=[...])``."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not names:
            raise ValueError("adapter_names is empty; give one name for each row of the batch, or leave it out.")
        unknown = sorted({n for n in names if n != BASE} - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapter_names names {unknown}, which the model does not carry; it has {list(self.peft_config)}.")
        beside = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        hooks = [(_named, layer) for layer in self._layers()] + [(_named_beside, module) for module in beside]
        handles = [m.register_forward_pre_hook(partial(hook, names=names), with_kwargs=True) for hook, m in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Keys of a file as those of the model; PEFT itself only warns of missing keys, and drops others.

        Raises:
            ValueError: nodes that are missing, of another shape, or that the declaration does not have.
        """
        found: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        mark = f".{adapter_name}."
        nodes = {key: value for key, value in model.state_dict().items() if key.startswith(f"base_model.{PREFIX}")}
        own = {key: tuple(value.shape) for key, value in nodes.items() if mark in key}
        given = {key: tuple(value.shape) for key, value in found.items() if key.startswith(f"base_model.{PREFIX}")}
        why = "It was cut, mixed up with another adapter's, saved while convolutions' kernels were split, or the base has other"
        if own.keys() != given.keys():
            missing, strange = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
            raise ValueError(
                f"the file does not fit its config: missing are {missing[:4]} ({len(missing)}), unknown are {strange[:4]} "
                f"({len(strange)}). {why} layers."
            )
        if wrong := [key for key in own if own[key] != given[key]]:
            raise ValueError(
                f"the file does not fit its config: '{wrong[0]}' is of shape {given[wrong[0]]} in it, and {own[wrong[0]]} by "
                f"the config ({len(wrong)} such). {why} layers."
            )
        return found


def layers_of(model: nn.Module) -> list[SuperLoraLayer]:
    """The adapted layers of a model, whichever tuner put them there."""
    return [module for module in model.modules() if isinstance(module, SuperLoraLayer)]


def _named(layer: nn.Module, args: Any, kwargs: dict[str, Any], names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """A layer's arguments with the rows' adapters."""
    return args, {**kwargs, "adapter_names": names}


def _named_beside(
    module: AuxiliaryTrainingWrapper, args: Any, kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """A module of `modules_to_save`: PEFT wants a name for each row, and knows the base alone for who did not save it."""
    each, left = divmod(len(args[0]), len(names)) if args else (1, 0)
    own = [name if name in module._adapters else BASE for name in names for _ in range(1 if left else each)]
    return args, {**kwargs, "adapter_names": own}


def _device_and_dtype(target: Target) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, and in which type, as far as its own tensors tell."""
    own = [*(target.kind.owners(target.layer) or {}).values(), *target.layer.parameters(recurse=False)]
    device = own[0].device if own else torch.device("cpu")
    dtype = own[0].dtype if own and (own[0].dtype in (*NARROW, torch.float64) or own[0].is_complex()) else torch.float32
    return device, dtype


def _wake(adapter: Adapter, generator: torch.Generator | None) -> None:
    """Random values for the nodes that start at zero, of a variance 1 / fan_in."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.device.type != "meta" and not parameter.any():
                drawn = torch.randn(parameter.shape, generator=generator) / adapter.fan_in**0.5
                parameter.copy_(drawn)
