"""Which weights of a model are meant: PEFT's matching rules, but an entry that matches nothing raises."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from torch import nn

from superlora_tn.declare.fold import Shape
from superlora_tn.model.kinds import Held, Kind, LayerError
from superlora_tn.model.recognise import is_supported, kind_of, supported
from superlora_tn.model.tables import Table
from superlora_tn.update.base import Adapter

Targets = str | Sequence[str]
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
HEADS = ("score", "classifier")
MOST_TIED = 6
# Modules that read a layer's weight without calling the layer: the names of those layers, by the module's full class name.
READERS: Mapping[str, tuple[str, ...]] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": (),
    "transformers.models.mamba.modeling_mamba.MambaMixer": ("dt_proj", "out_proj"),
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": ("dt_proj", "out_proj"),
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": ("dt_proj", "out_proj"),
}


class AttachError(ValueError):
    """A model and an adapter that do not go together; the model is left as it was."""


@dataclass(frozen=True, eq=False)
class Target:
    """One weight of a model that is adapted: its layer, and how that is read and written.

    Attributes:
        name: under which the adapter knows it.
        home: the name of the module that holds the weight.
        layer: that module.
        kind: how its weight is read, written and updated.
        tied: other layers that use the same parameter, adapted with it.
        shape: (out, in).
    """

    name: str
    home: str
    layer: nn.Module
    kind: Kind
    tied: tuple[Target, ...] = ()
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        d_out, d_in = self.kind.shape(self.layer)
        object.__setattr__(self, "shape", (int(d_out), int(d_in)))

    @property
    def sides(self) -> tuple[Target, ...]:
        """All layers that use the weight, this one first."""
        return (self, *self.tied)


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
    """

    module: nn.Module
    home: str
    part: str = ""
    parent: nn.Module | None = None
    under_fsdp: bool = False
    tied: tuple[Place, ...] = ()

    @property
    def is_supported(self) -> bool:
        """Whether it can be adapted, as far as its type tells."""
        return bool(self.part) or is_supported(self.module)

    @property
    def is_linear(self) -> bool:
        """Whether it counts as a linear layer; of an attention its out_proj alone."""
        if self.part:
            return self.part == "out_proj"
        return isinstance(self.module, nn.Linear) or type(self.module).__name__ == "Conv1D"


def places(model: nn.Module) -> dict[str, Place]:
    """The modules of a model by name, and behind each `nn.MultiheadAttention` its projections."""
    found: dict[str, Place] = {}
    modules = dict(model.named_modules())
    sharding = [name for name, m in modules.items() if any(t.__name__ == "FSDPModule" for t in type(m).__mro__)]
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0])
        under_fsdp = any(f"{name}.".startswith(f"{s}." if s else "") for s in sharding)
        if name and not isinstance(module, Adapter):
            found.setdefault(name, Place(module, name, parent=parent, under_fsdp=under_fsdp))
        if isinstance(module, nn.MultiheadAttention):
            for part in PARTS:
                held, home = (module.out_proj, f"{name}.out_proj") if part == "out_proj" else (module, name)
                found[f"{name}.{part}".lstrip(".")] = Place(held, home.lstrip("."), part, module, under_fsdp)
    for names in _tied(found):
        for count in range(2, len(names) + 1):
            found |= {"+".join(some): _joined([found[name] for name in some]) for some in combinations(names, count)}
    return found


def _tied(found: Mapping[str, Place]) -> list[list[str]]:
    """Names of embeddings and linear layers whose weight is one parameter; no more than `MOST_TIED` of each."""
    users: dict[int, list[str]] = {}
    for name, place in found.items():
        weight = place.module._parameters.get("weight")
        if weight is not None and not place.part and not place.tied and isinstance(place.module, nn.Linear | nn.Embedding):
            users.setdefault(id(weight), []).append(name)
    tied = [names[:MOST_TIED] for names in users.values() if len(names) > 1]
    return [names for names in tied if any(isinstance(found[name].module, nn.Embedding) for name in names)]


def _joined(some: Sequence[Place]) -> Place:
    """The place of modules that use one parameter: that of a linear layer among them, whose (out, in) is the parameter's."""
    first, *others = sorted(some, key=lambda place: isinstance(place.module, nn.Embedding))
    return replace(first, tied=tuple(others))


def match(model: nn.Module, targets: Targets, exclude: Targets = (), only_layers: Sequence[int] | None = None) -> list[str]:
    """Names of the weights that `targets` names, in the model's order, by PEFT's rules.

    The projections of an `nn.MultiheadAttention` named ``attn`` are ``attn.q_proj``, ``attn.k_proj``, ``attn.v_proj`` and
    ``attn.out_proj``.

    Args:
        model: the model.
        targets: a regular expression for the whole name, ``"all-linear"`` for every linear layer (of an
            `nn.MultiheadAttention` its out_proj alone) but the output layer of a transformers model, or a list of exact
            names and of endings behind a dot.
        exclude: the same, to leave out; it goes first.
        only_layers: keep names whose first number is one of these.

    Raises:
        AttachError: an entry that matches nothing, or a module that cannot be adapted.
    """
    known_places = places(model)
    adaptable = [name for name, place in known_places.items() if place.is_supported]
    out = set(_named(model, exclude, known_places, adaptable)) if exclude else set()
    found = _together([n for n in _named(model, targets, known_places, adaptable) if n not in out], known_places)
    if only_layers is not None:
        found = [n for n in found if (number := re.search(r"\.(\d+)\.", f".{n}.")) and int(number[1]) in only_layers]
    if not found:
        raise AttachError(f"targets={targets!r} leaves no layer to adapt (exclude={exclude!r}, only_layers={only_layers!r}).")
    for name in found:
        _check(name, known_places[name])
    return found


def _together(names: list[str], known: Mapping[str, Place]) -> list[str]:
    """The names, those that use one parameter joined by ``+``: an embedding and the output layer that is tied to it."""
    for tied in _tied(known):
        some = [name for name in tied if name in names]
        if len(some) > 1 and any(isinstance(known[name].module, nn.Embedding) for name in some):
            first = names.index(some[0])
            names = ["+".join(some) if k == first else name for k, name in enumerate(names) if k == first or name not in some]
    return names


def _named(model: nn.Module, targets: Targets, found: Mapping[str, Place], adaptable: list[str]) -> list[str]:
    if targets == "all-linear":
        outputs = _output_layers(model)
        return [n for n in adaptable if found[n].is_linear and found[n].module not in outputs and not found[n].tied]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise AttachError(
                f"targets={targets!r} is not a regular expression ({error}); a list matches by ending."
            ) from error
        matched = [n for n in found if pattern.fullmatch(n) and not found[n].tied]
        if not matched:
            raise AttachError(f"targets={targets!r} matches no module's whole name; {near(targets, adaptable)}.")
        return matched
    wanted = set[str]()
    for entry in targets:
        own = [n for n in found if n == entry or (n.endswith(f".{entry}") and ("+" in entry or not found[n].tied))]
        if not own:
            raise AttachError(f"the target '{entry}' matches no module; {near(entry, adaptable)}.")
        wanted |= set(own)
    return [n for n in found if n in wanted]


def _output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that "all-linear" leaves out, as PEFT does: a transformers model's output layer or classification head."""
    outputs: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    if not callable(outputs):
        return []
    head = outputs()
    if isinstance(head, nn.Module):
        return [head]
    named = type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    return [module for name, module in model.named_children() if named and name in HEADS]


def _check(name: str, place: Place) -> None:
    if not place.is_supported:
        inside = f"its {', '.join(PARTS)}" if isinstance(place.module, nn.MultiheadAttention) else "the layers inside it"
        raise AttachError(
            f"'{name}' is a {type(place.module).__name__}, which cannot be adapted; supported are {', '.join(supported())}. "
            f"Name {inside}."
        )


def bind(name: str, place: Place, at: str | None = None) -> Target:
    """The target of a name, bound to its layer.

    Raises:
        AttachError: it cannot be adapted; the message names it and says why.
    """
    _check(name, place)
    try:
        if place.part:
            kind: Kind = _projection(place)
        else:
            kind = kind_of(place.module, at or _reads_weights(name, place))
        tied = tuple(Target(name, other.home, other.module, _turned(kind_of(other.module, at), place)) for other in place.tied)
        target = Target(name, place.home, place.module, kind, tied)
        _check_whole(target, place)
    except LayerError as error:
        raise AttachError(f"'{name}' {error}") from error
    return target


def _turned(kind: Kind, place: Place) -> Kind:
    """The kind of an embedding whose table is the weight (num, dim) of a linear layer that it is tied to."""
    if isinstance(place.module, nn.Embedding):
        return kind
    if isinstance(kind, Table):
        return replace(kind, side="out")
    return replace(kind, transposed=False) if isinstance(kind, Held) else kind


def _projection(place: Place) -> Held:
    """A projection of an `nn.MultiheadAttention`, by the parameter that holds it."""
    attention = place.parent
    assert isinstance(attention, nn.MultiheadAttention)
    if place.part == "out_proj":
        kind = Held()
    elif attention._qkv_same_embed_dim:
        kind = Held("in_proj_weight", (PARTS.index(place.part), 3))
    else:
        kind = Held(f"{place.part}_weight")
    kind.stored(place.module)
    return kind


def _reads_weights(name: str, place: Place) -> str | None:
    """``"weight"`` for the layers of modules that are known to read weights without calling their layers."""
    if place.parent is None:
        return None
    parents = {f"{t.__module__}.{t.__qualname__}" for t in type(place.parent).__mro__}
    child = name.rpartition(".")[2]
    return "weight" if any(child in READERS.get(parent, ()) for parent in parents) else None


def _check_whole(target: Target, place: Place) -> None:
    """Raise for a weight that is sharded over processes for good (tensor parallel); FSDP2 makes it whole for its layer."""
    own = target.kind.owners(target.layer) or {}
    if any(is_sharded(tensor) for tensor in own.values()) and not place.under_fsdp:
        raise LayerError(
            "has a weight that is a DTensor (tensor parallel, or sharded apart from its layer); an adapter cannot be added "
            "to a shard. Attach before the model is parallelised, or leave it out."
        )


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return any(t.__name__ == "DTensor" for t in type(tensor).__mro__)
