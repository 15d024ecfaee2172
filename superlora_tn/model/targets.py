"""Which weights of a model are meant: PEFT's matching rules, but an entry that matches nothing raises."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import SpecError
from superlora_tn.declare.rows import Rows, Span
from superlora_tn.model.kinds import Held, Kind, LayerError, Linear, RowsOf
from superlora_tn.model.places import (
    PARTS,
    AttachError,
    Place,
    Targets,
    check,
    declared,
    is_beside,
    is_of_peft,
    near,
    output_layers,
    places,
    tied,
)
from superlora_tn.model.recognise import kind_of, known
from superlora_tn.model.tables import Table, TableRows

__all__ = ["AttachError", "Place", "Target", "Targets", "bind", "is_sharded", "match", "near", "places"]

# Modules whose stacks are (which, in, out) and that do not say so themselves, as transformers' do by `is_transposed`.
TRANSPOSED_STACKS = ("Llama4TextExperts",)
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

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of its kernel, which `in` holds behind the channels; () for a matrix."""
        return self.kind.kernel(self.layer)

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding's table, wherever it is adapted; not where an output layer is tied to it."""
        found = known(self.layer)
        return found is not None and isinstance(found.kind, Table)

    def weight(self) -> Tensor:
        """The weight as it is now, (out, in).

        Raises:
            AttachError: it has no values yet.
        """
        found = self.kind.read(self.layer).detach()
        if found.is_meta:
            raise AttachError(
                f"the weight of '{self.name}' is on the meta device, and the adapter needs its values; load the base first."
            )
        return found


def match(model: nn.Module, targets: Targets, exclude: Targets = (), only_layers: Sequence[int] | None = None) -> list[str]:
    """Names of the weights that `targets` names, in the model's order, by PEFT's rules.

    The projections of an `nn.MultiheadAttention` named ``attn`` are ``attn.q_proj``, ``attn.k_proj``, ``attn.v_proj`` and
    ``attn.out_proj``.

    Args:
        model: the model.
        targets: a regular expression for the whole name, ``"all-linear"`` for every linear layer (of an
            `nn.MultiheadAttention` its out_proj alone) but the output layer of a transformers model and the layers of PEFT's
            own adapters, or a list of exact names and of endings behind a dot, and of `Rows`. A fused layer whose model is
            known has its blocks behind its name: ``"attn.qkv.q"``.
        exclude: the same, to leave out; it goes first.
        only_layers: keep names whose first number is one of these.

    Raises:
        AttachError: an entry or a number that matches nothing, or a module that cannot be adapted.
    """
    known = places(model, declared(model, targets) | declared(model, exclude))
    adaptable = [name for name, place in known.items() if place.is_supported]
    named = _named(model, targets, known, adaptable, "targets")
    return _left(model, named, known, f"targets={targets!r}", exclude, only_layers)


def match_ends(
    model: nn.Module,
    pattern: str,
    among: Sequence[str] | None = None,
    targets: Targets = (),
    exclude: Targets = (),
    only_layers: Sequence[int] | None = None,
) -> list[str]:
    """Names of the weights whose ends a pattern matches whole: of one among several declarations.

    Args:
        model, exclude, only_layers: as in `match`.
        pattern: a regular expression such as ``"q_proj|v_proj"``.
        among: names that `match` gave for `targets`, of which it chooses; None means all of the model.

    Raises:
        AttachError: it matches nothing, or a module that cannot be adapted.
    """
    given = f"the pattern '{pattern}'"
    try:
        re.compile(pattern)
        whole = re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (TypeError, re.error) as error:
        raise AttachError(f"{given} is not a regular expression ({error}); give ends of names, 'q_proj|v_proj'.") from error
    known = places(model, declared(model, targets) | declared(model, exclude))
    if among is None:
        if not (named := _fitting(whole, known)):
            adaptable = [name for name, place in known.items() if place.is_supported]
            raise AttachError(f"{given} matches no module's name or the end of one; {near(pattern, adaptable)}.")
        return _left(model, named, known, given, exclude, only_layers)
    found = [name for name in among if all(map(whole.fullmatch, _words(name, known[name]))) or whole.fullmatch(name)]
    if not found:
        raise AttachError(f"{given} matches none of the weights that targets= leaves ({len(among)}); {near(pattern, among)}.")
    return found


def _words(name: str, place: Place) -> list[str]:
    """By which names a weight is meant too: a matrix by its stack's, a block by its layer's, a tied weight by all it has."""
    inside = place.slot is not None or place.span is not None
    return name.split("+") if place.tied else [name.rpartition(".")[0] if inside else name]


def _left(
    model: nn.Module, named: list[str], known: Mapping[str, Place], given: str, exclude: Targets, only: Sequence[int] | None
) -> list[str]:
    """Of names those that are not left out, each once, stacks and tied weights as they are adapted."""
    adaptable = [name for name, place in known.items() if place.is_supported]
    out = set(_each(_named(model, exclude, known, adaptable, "exclude"), known)) if exclude else set()
    found = _together([n for n in _each(named, known) if n not in out], known)
    if only is not None:
        if isinstance(only, str) or not isinstance(only, Collection) or not all(isinstance(n, Integral) for n in only):
            raise AttachError(f"only_layers={only!r} is no list of numbers; give one, such as only_layers=[0, 1].")
        numbers = {n: int(number[1]) for n in [*adaptable, *found] if (number := re.search(r"\.(\d+)\.", f".{n}."))}
        if unknown := sorted(set(only).difference(numbers.values())):
            has = ", ".join(map(str, sorted(set(numbers.values())))) or "none"
            raise AttachError(f"only_layers={only!r}: no layer to adapt has the number {unknown[0]}; there are {has}.")
        found = [n for n in found if numbers.get(n) in only]
    if not found:
        raise AttachError(f"{given} leaves no layer to adapt (exclude={exclude!r}, only_layers={only!r}).")
    for name in found:
        check(name, known[name])
    return found


def _fitting(pattern: re.Pattern[str], found: Mapping[str, Place]) -> list[str]:
    """The names that a pattern matches whole."""
    matched = [n for n in found if pattern.fullmatch(n) and not found[n].tied and not found[n].loose]
    # A pattern that is wide enough for a layer means the layer, not its blocks once more.
    whole = {n for n in matched if found[n].span is None}
    return [n for n in matched if found[n].span is None or n.rpartition(".")[0] not in whole]


def _each(names: list[str], known: Mapping[str, Place]) -> list[str]:
    """The names, stacks as each of their matrices, and none twice."""
    found: dict[str, None] = {}
    for name in names:
        stack = known[name].stack
        found |= dict.fromkeys([f"{name}.{k}" for k in range(stack)] if stack else [name])
    return list(found)


def _together(names: list[str], known: Mapping[str, Place]) -> list[str]:
    """The names, those that use one parameter joined by ``+``: an embedding and the output layer that is tied to it."""
    for one in tied(known):
        some = [name for name in one if name in names]
        if len(some) > 1 and any(isinstance(known[name].module, nn.Embedding) for name in some):
            first = names.index(some[0])
            names = ["+".join(some) if k == first else name for k, name in enumerate(names) if k == first or name not in some]
    return names


def _named(model: nn.Module, targets: Targets, found: Mapping[str, Place], adaptable: list[str], word: str) -> list[str]:
    """The names that the entries of an argument, called `word`, mean."""
    if targets == "all-linear":
        outputs = output_layers(model)
        wrappers = {n for n, place in found.items() if f"{n}.base_layer" in found and is_of_peft(place.module)}
        own = [n for n in adaptable if found[n].is_linear and found[n].module not in outputs and not found[n].tied]
        return [n for n in own if not is_beside(n, wrappers)]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise AttachError(f"{word}={targets!r} is not a regular expression ({error}); a list matches by ending.") from error
        matched = _fitting(pattern, found)
        if not matched:
            ends = f"a list takes endings, {word}=[{targets!r}]" if targets in _endings(found) else near(targets, adaptable)
            raise AttachError(f"{word}={targets!r} matches no module's whole name; {ends}.")
        return matched
    wanted, endings = set[str](), _endings(found)
    for entry in _spelled(targets):
        own = [n for n in endings.get(entry, ()) if n == entry or "+" in entry or not found[n].tied]
        if not own and entry == "all-linear":
            raise AttachError("'all-linear' is no entry of a list; give it alone, targets='all-linear', or name layers.")
        if not own:
            what = "the target" if word == "targets" else f"the entry of {word}="
            raise AttachError(f"{what} '{entry}' matches no module; {near(entry, adaptable)}.")
        wanted |= set(own)
    return [n for n in found if n in wanted]


def _endings(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by each of their endings, the whole ones too: looked up once an entry, where entries may be thousands."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        for k in range(len(words)):
            found.setdefault(".".join(words[k:]), []).append(name)
    return found


def _spelled(targets: Sequence[str | Rows]) -> list[str]:
    """The entries as names and endings."""
    found: list[str] = []
    for entry in targets:
        found += [f"{entry.layer}.{part}" for part in entry.use or entry.parts] if isinstance(entry, Rows) else [entry]
    return found


def bind(name: str, place: Place, at: str | None = None) -> Target:
    """The target of a name, bound to its layer.

    Raises:
        AttachError: it cannot be adapted; the message names it and says why.
    """
    check(name, place)
    try:
        if place.part:
            kind: Kind = _projection(place)
        elif place.parameter:
            kind = _parameter(place, at)
        else:
            kind = _block(kind_of(place.module, at or _reads_weights(place)), place)
        tied = tuple(Target(name, other.home, other.module, _turned(kind_of(other.module, at), place)) for other in place.tied)
        target = Target(name, place.home, place.module, kind, tied)
        _check_whole(target, place)
        for side in target.sides:
            _check_dense(side)
    except (LayerError, SpecError) as error:
        raise AttachError(f"'{name}' {error}") from error
    return target


def targets_of(model: nn.Module, targets: Targets) -> list[Target]:
    """The targets of a model, bound to their layers; see `match`."""
    known = places(model, declared(model, targets))
    return [bind(name, known[name]) for name in match(model, targets)]


def _block(kind: Kind, place: Place) -> Kind:
    """The kind of a place's rows; of layers other than linear ones, a block is adapted where the weight is read."""
    if place.span is None:
        return kind
    if isinstance(kind, Linear):
        return RowsOf(kind, place.span)
    if isinstance(place.module, nn.Embedding):
        return _table_rows(kind, place.module, place.span)
    return replace(kind if isinstance(kind, Held) else Held(), span=place.span)


def _table_rows(kind: Kind, layer: nn.Embedding, span: Span) -> Kind:
    """The kind of some rows of an embedding's table."""
    if type(kind) is not Table or span.period != layer.num_embeddings:
        raise LayerError(
            f"is a block of the rows of a {type(layer).__name__}, which works for plain embeddings at their output and for "
            "rows in one run; name the whole layer."
        )
    return TableRows(factor=kind.factor, span=span)


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
        d_out = attention.embed_dim
        first = d_out * PARTS.index(place.part)
        kind = Held("in_proj_weight", span=Span(first, first + d_out, 3 * d_out))
    else:
        kind = Held(f"{place.part}_weight")
    kind.stored(place.module)
    return kind


def _parameter(place: Place, at: str | None) -> Held:
    """A parameter of a module that is no known layer: (out, in), or of a stack (which, out, in)."""
    module: Any = place.module
    turned = place.slot is not None and (getattr(module, "is_transposed", False) or type(module).__name__ in TRANSPOSED_STACKS)
    kind = Held(place.parameter, transposed=turned, slot=place.slot, built=at == "weight")
    kind.stored(module)
    return kind


def _reads_weights(place: Place) -> str | None:
    """``"weight"`` for the layers of modules that are known to read weights without calling their layers."""
    if place.parent is None:
        return None
    parents = {f"{t.__module__}.{t.__qualname__}" for t in type(place.parent).__mro__}
    child = place.home.rpartition(".")[2]
    return "weight" if any(child in READERS.get(parent, ()) for parent in parents) else None


def _check_whole(target: Target, place: Place) -> None:
    """Raise for a weight that is sharded over processes for good (tensor parallel); FSDP2 makes it whole for its layer."""
    own = target.kind.owners(target.layer) or {}
    if any(is_sharded(tensor) for tensor in own.values()) and not place.under_fsdp:
        raise LayerError(
            "has a weight that is a DTensor (tensor parallel, or sharded apart from its layer); an adapter cannot be added "
            "to a shard. Attach before the model is parallelised, or leave it out."
        )


def _check_dense(target: Target) -> None:
    """Raise for a table of which lookups give a sparse gradient, where they look rows of W + dW up, which is computed."""
    layer: Any = target.layer
    if isinstance(target.kind, Held) and isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
        raise LayerError(
            f"is an {type(layer).__name__} with sparse=True, which would be adapted where its weight is read, and torch takes "
            "no sparse gradient for a computed W + dW. Set its sparse to False, which changes no output; or add dW at its "
            "output (an update without a join, and no at='weight')."
        )


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return any(t.__name__ == "DTensor" for t in type(tensor).__mro__)
