"""What a target of a model may name: modules, projections of attentions, blocks of fused layers, tied modules together."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from superlora_tn.declare.checks import is_seed
from superlora_tn.declare.parts import SpecError, shown
from superlora_tn.declare.rows import Rows, Span
from superlora_tn.model.blocks import blocks_in
from superlora_tn.model.kinds import LayerError
from superlora_tn.model.recognise import is_closed, is_fusable, is_supported, kind_of, supported
from superlora_tn.update.base import Adapter

Targets = str | Sequence[str | Rows]
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
MOST_TIED = 6
HEADS = ("score", "classifier")


class AttachError(ValueError):
    """A model and an adapter that do not go together; the model is left as it was."""


def check_model(model: object) -> None:
    """Raise unless it is a module."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"the model was given as {shown(model)}; give a torch module.")


def check_seed(seed: object) -> None:
    """Raise unless torch's generators take it, or it is None."""
    if seed is not None and not is_seed(seed):
        raise AttachError(f"seed={seed!r} is no whole number of 64 bits; give one, or None to draw from torch's generator.")


def near(given: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """Words that point at names near the given one."""
    ends = list(dict.fromkeys([*(n.rsplit(".", 1)[-1] for n in names), *names]))
    close = difflib.get_close_matches(given, ends, n=4, cutoff=0.4) or ends[:4]
    return f"near names are {', '.join(repr(c) for c in close)}" if close else "the model has no layer to adapt"


@dataclass(frozen=True)
class Place:
    """Something that a target may name: a module, or a projection of an `nn.MultiheadAttention`.

    Attributes:
        module: the module that holds the weight.
        home: its name.
        part: the projection, of `PARTS`; empty for a module.
        parent: the module in which it is.
        under_fsdp: whether FSDP2 shards it.
        tied: further modules whose weight is the same parameter, meant together with this one.
        span: which rows of the module's weight are meant; None means all.
        parameter: the name of a parameter that is no known layer's weight; empty for the module's own weight.
        slot: which matrix of a parameter that holds a stack of them.
        stack: how many matrices the parameter holds, where all of them are meant.
        loose: whether only its name, or an ending of it, means it, and no pattern.
    """

    module: nn.Module
    home: str
    part: str = ""
    parent: nn.Module | None = None
    under_fsdp: bool = False
    tied: tuple[Place, ...] = ()
    span: Span | None = None
    parameter: str = ""
    slot: int | None = None
    stack: int = 0
    loose: bool = False

    @property
    def is_supported(self) -> bool:
        """Whether it can be adapted, as far as its type tells."""
        return bool(self.part or self.parameter) or is_supported(self.module)

    @property
    def is_linear(self) -> bool:
        """Whether it counts as a linear layer; of an attention its out_proj alone."""
        if self.part:
            return self.part == "out_proj"
        if self.tied or self.span is not None or self.parameter:
            return False
        return isinstance(self.module, nn.Linear) or type(self.module).__name__ == "Conv1D"


def places(model: nn.Module, rows: Mapping[str, Span] | None = None) -> dict[str, Place]:
    """The modules of a model by name, and what else a target may name.

    That is: behind each `nn.MultiheadAttention` its projections, behind a fused layer that is known its blocks, behind modules
    that are no known layers their parameters and, of a stack of matrices, each of these, and modules that are tied to one
    another, joined by ``+``.

    Args:
        model: the model.
        rows: further blocks, by their names behind their layers.
    """
    found: dict[str, Place] = {}
    declared_rows: dict[str, dict[str, Span]] = {}
    for block, span in (rows or {}).items():
        declared_rows.setdefault(block.rpartition(".")[0], {})[block] = span
    modules = dict(model.named_modules())
    sharding = [name for name, m in modules.items() if any(t.__name__ == "FSDPModule" for t in type(m).__mro__)]
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0])
        under_fsdp = any(f"{name}.".startswith(f"{s}." if s else "") for s in sharding)
        computes = isinstance(parent, ParametrizationList) and not is_supported(module)  # a weight, and is no layer's name
        if name and not isinstance(module, Adapter) and not computes:
            found.setdefault(name, Place(module, name, parent=parent, under_fsdp=under_fsdp))
        if isinstance(module, nn.MultiheadAttention):
            for part in PARTS:
                held, home = (module.out_proj, f"{name}.out_proj") if part == "out_proj" else (module, name)
                found[f"{name}.{part}".lstrip(".")] = Place(held, home.lstrip("."), part, module, under_fsdp)
        elif not isinstance(module, Adapter) and not is_supported(module) and not is_closed(module):
            found |= _parameters(found.get(name) or Place(module, name))
        blocks = declared_rows.get(name, {})
        if not blocks and is_fusable(module) and (known := blocks_in(parent, name.rpartition(".")[2])) is not None:
            blocks = _spans(name, module, known)
        for block, span in blocks.items():
            found[block] = replace(found[name], span=span)
    for names in tied(found):
        for count in range(2, len(names) + 1):
            found |= {"+".join(some): _joined([found[name] for name in some]) for some in combinations(names, count)}
    return found


def _parameters(place: Place) -> dict[str, Place]:
    """The parameters of a module that are matrices or stacks of them; those of experts are meant by patterns, too."""
    found: dict[str, Place] = {}
    for own, parameter in place.module._parameters.items():
        if parameter is None or parameter.ndim not in (2, 3) or not parameter.is_floating_point():
            continue
        name = f"{place.home}.{own}".lstrip(".")
        if parameter.ndim == 2:
            found[name] = replace(place, parameter=own, loose=True)
        elif len(parameter) > 1:
            loose = not is_experts(place.module, len(parameter))
            found[name] = replace(place, parameter=own, stack=len(parameter), loose=loose)
            found |= {f"{name}.{k}": replace(place, parameter=own, slot=k, loose=loose) for k in range(len(parameter))}
    return found


def is_experts(module: nn.Module, count: int) -> bool:
    """Whether a module holds so many experts, as far as it says."""
    said = [module.__dict__.get(name) for name in ("num_experts", "num_local_experts", "n_experts")]
    return count in said or type(module).__name__.endswith(("Experts", "Expert", "ExpertGLU"))


def _spans(name: str, module: Any, blocks: Rows) -> dict[str, Span]:
    """The blocks of a layer by their full names; none where its rows do not divide so."""
    try:
        spans = blocks.spans(module.nf if type(module).__name__ == "Conv1D" else module.out_features)
    except SpecError:
        return {}
    return {f"{name}.{part}": span for part, span in spans.items()}


def declared(model: nn.Module, targets: Targets | None) -> dict[str, Span]:
    """The blocks that `Rows` among targets declare, by their full names.

    Raises:
        AttachError: no model, entries that are no names, or a layer that is not there or does not divide so.
    """
    check_model(model)
    found: dict[str, Span] = {}
    modules = {name: m for name, m in model.named_modules() if name}
    entries = () if targets is None or isinstance(targets, str) else targets
    if not isinstance(entries, Collection) or not all(isinstance(entry, str | Rows) for entry in entries):
        raise AttachError(
            f"targets were given as {shown(targets)}; give a list of names or of their endings, such as ['q_proj', 'v_proj'], "
            "or a pattern of whole names."
        )
    for entry in entries:
        if not isinstance(entry, Rows):
            continue
        homes = [name for name in modules if name == entry.layer or name.endswith(f".{entry.layer}")]
        if not homes:
            raise AttachError(f"the layer '{entry.layer}' of {entry} is no module; {near(entry.layer, list(modules))}.")
        for home in homes:
            try:
                spans = entry.spans(_rows(modules[home]))
            except (LayerError, SpecError) as error:
                raise AttachError(f"'{home}' {error}") from error
            found |= {f"{home}.{part}": span for part, span in spans.items()}
    return found


def _rows(layer: Any) -> int:
    """How many rows a layer's weight has: its outputs, or the entries of a table."""
    if isinstance(layer, nn.Embedding):
        return int(layer.num_embeddings)
    return kind_of(layer).shape(layer)[0]


def tied(found: Mapping[str, Place]) -> list[list[str]]:
    """Names of embeddings and linear layers whose weight is one parameter; no more than `MOST_TIED` of each."""
    users: dict[int, list[str]] = {}
    for name, place in found.items():
        if place.part or place.tied or not isinstance(place.module, nn.Linear | nn.Embedding):
            continue
        if (weight := place.module._parameters.get("weight")) is not None:
            users.setdefault(id(weight), []).append(name)
    tied = [names[:MOST_TIED] for names in users.values() if len(names) > 1]
    return [names for names in tied if any(isinstance(found[name].module, nn.Embedding) for name in names)]


def _joined(some: Sequence[Place]) -> Place:
    """The place of modules that use one parameter: that of a linear layer among them, whose (out, in) is the parameter's."""
    first, *others = sorted(some, key=lambda place: isinstance(place.module, nn.Embedding))
    return replace(first, tied=tuple(others))


def check(name: str, place: Place) -> None:
    """Raise where what a target names cannot be adapted, as far as its type tells."""
    if not place.is_supported and is_of_peft(place.module):
        raise AttachError(
            f"'{name}' is PEFT's wrapper of a layer ({type(place.module).__name__}), with an adapter in it. Merge it and take "
            "PEFT off first, model.merge_and_unload(), or make a declaration a method of PEFT: superlora_tn.peft."
        )
    if is_closed(place.module):
        raise AttachError(
            f"'{name}' is part of a TorchScript program, which is closed; adapt the model before torch.jit.script or "
            "torch.jit.trace, or leave that part out."
        )
    if not place.is_supported:
        own = [n for n, parameter in place.module._parameters.items() if parameter is not None and parameter.ndim in (2, 3)]
        inside = f"its weights ({', '.join(f'{name}.{o}' for o in own[:4])})" if own else "the layers inside it"
        inside = f"its {', '.join(PARTS)}" if isinstance(place.module, nn.MultiheadAttention) else inside
        raise AttachError(
            f"'{name}' is a {type(place.module).__name__}, which cannot be adapted; supported are {', '.join(supported())}. "
            f"Name {inside}."
        )


def check_shaped(model: nn.Module) -> None:
    """Raise where a parameter has no shape yet: what torch says it is then cannot be frozen, nor thawed again."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise AttachError(f"'{name}' has no shape yet, as of a lazy module; run the model once before it is adapted.")


def is_of_peft(module: nn.Module) -> bool:
    """Whether it is PEFT's, or inherits from PEFT's."""
    return any(t.__module__.partition(".")[0] == "peft" for t in type(module).__mro__)


def is_beside(name: str, wrappers: set[str]) -> bool:
    """Whether a layer is part of an adapter that PEFT has put beside the layer it wraps, its `base_layer`."""
    words = name.split(".")
    around = [k for k in range(1, len(words)) if ".".join(words[:k]) in wrappers]
    return bool(around) and "base_layer" not in words[around[-1] :]


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that "all-linear" leaves out, as PEFT does: a transformers model's output layer or classification head."""
    outputs: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    if not callable(outputs):
        return []
    head = outputs()
    if isinstance(head, nn.Module):
        return [head]
    named = type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    return [module for name, module in model.named_children() if named and name in HEADS]
