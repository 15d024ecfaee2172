"""`AdapterSpec`: an adapter as one frozen value: a network, a fold, a fixed map and a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any

from superlora_tn.declare.bounds import (
    MAX_SCALE,
    MAX_SHAPES,
    MAX_SIDE,
    MAX_SPLITTING,
    NODES_SPARE,
    NODES_TIMES,
    TABLES_SPARE,
    TABLES_TIMES,
)
from superlora_tn.declare.codec import check_fields, decode, encode
from superlora_tn.declare.fold import FlatFold, FlatGroup, Fold, Group, Mode, PhysicalFold, Shape
from superlora_tn.declare.joins import JOINS, Join, Multiply
from superlora_tn.declare.maps import PROJECTIONS, Projection
from superlora_tn.declare.parts import (
    BASED,
    PARTS,
    Kronecker,
    Network,
    Part,
    SpecError,
    check_flag,
    check_number,
    inner_parts,
    reference_rank,
    shown,
)
from superlora_tn.network.expand import lower_group
from superlora_tn.network.graph import Graph

PER_WEIGHT = PhysicalFold()


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is: ``dW_g = scale * F(network_g)``, laid out by the fold (SuperLoRA, equation 4).

    Args:
        network: `Dense`, `Base`, `CP`, `Tucker`, `TensorTrain`, `Kronecker`, `Hadamard`, `Sum` or `Network`, nested at will.
        fold: which weights share the network, and how they become its modes.
        projection: a fixed map from the network's vector to the group's; only with a `FlatFold`.
        alpha: dW is scaled by alpha / rank, the largest that the parts declare; None scales by 1. Of a network without a
            declared rank (`Dense`, `Base`, `Network`) alpha is the scale itself.
        dropout: probability of dropping an element of the adapter's input while training, as LoRA's.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023); only where there is an alpha and a declared rank.
        join: how dW joins the weight: None adds it; `Magnitude` is DoRA, `Multiply` multiplies from a side.

    Raises:
        SpecError: any of these is not what it has to be.
    """

    network: Part
    fold: Fold = PER_WEIGHT
    projection: Projection | None = None
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    join: Join | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.network, PARTS):
            raise SpecError(f"AdapterSpec was given network={shown(self.network)}; give a part such as CP(8) or Network(...).")
        if isinstance(self.fold, FlatFold) and self.fold.splits is None:
            parts = len(self.network.parts) if isinstance(self.network, Kronecker) and not self.fold.stacked else 1
            object.__setattr__(self, "fold", replace(self.fold, splits=parts))
        if not isinstance(self.fold, PhysicalFold | FlatFold):
            raise SpecError(f"AdapterSpec was given fold={shown(self.fold)}; give PhysicalFold(...) or FlatFold(...).")
        if self.projection is not None and not isinstance(self.projection, PROJECTIONS):
            raise SpecError(
                f"AdapterSpec was given projection={shown(self.projection)}; give Fastfood(...), Shuffle(...), Compose(...) "
                "or None."
            )
        if self.projection is not None and isinstance(self.fold, PhysicalFold):
            raise SpecError("a projection maps a flat vector, but the fold is physical; use FlatFold(...), or no projection.")
        if self.alpha is not None:
            check_number("AdapterSpec", "alpha", self.alpha, MAX_SCALE)
        check_number("AdapterSpec", "dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(
                f"AdapterSpec was given dropout={shown(self.dropout)}; a probability from 0 up to, not including, 1."
            )
        check_flag("AdapterSpec", "rslora", self.rslora)
        if self.rslora:
            self._check_rslora()
        self._check_join()

    def _check_rslora(self) -> None:
        if reference_rank(self.network) is None:
            raise SpecError(
                f"rslora=True divides alpha by the root of a rank, and {type(self.network).__name__} declares none: its scale "
                "is alpha itself. Leave rslora out, and give as alpha what dW is to be scaled by."
            )
        if self.alpha is None:
            raise SpecError(
                "rslora=True divides alpha by the root of the rank, but alpha=None scales by 1; give alpha, or no rslora."
            )

    def _check_join(self) -> None:
        if self.join is not None and not isinstance(self.join, JOINS):
            raise SpecError(f"AdapterSpec was given join={shown(self.join)}; give Magnitude(), Multiply('left') or None.")
        if not isinstance(self.join, Multiply):
            return
        if isinstance(self.fold, PhysicalFold) and self.fold.kernel_modes:
            raise SpecError("a network that multiplies has no modes of a kernel: it is over (out, out) or (in, in).")
        if not self.join.residual and self.alpha is not None:
            raise SpecError(f"alpha={self.alpha} would scale R itself, which starts at the identity; leave alpha=None.")

    @property
    def is_mapped(self) -> bool:
        """Whether a node of the network is a function of what is stored."""
        return _is_mapped(self.network)

    @property
    def scale(self) -> float:
        """The factor of dW: alpha / rank, or alpha / sqrt(rank) with rslora; 1 without alpha."""
        if self.alpha is None:
            return 1.0
        rank = reference_rank(self.network) or 1
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def lay_out(self, shapes: Mapping[str, Shape]) -> tuple[tuple[Group, Graph], ...]:
        """Groups of the given targets (name -> (out, in)), each with its graph.

        Raises:
            SpecError: it does not fit the targets, or would cost more than `declare.bounds` allows: what it builds is priced
                here, before anything is.
        """
        if not shapes:
            raise SpecError("the adapter was given no target; give at least one weight.")
        check_shapes(shapes)
        elements = sum(d_out * d_in for d_out, d_in in shapes.values())
        given, ratio = shapes, self.projection.ratio if self.projection else 1.0
        if isinstance(self.join, Multiply):
            shapes = {name: self.join.sides(shape) for name, shape in shapes.items()}
        groups: Sequence[Group] = self.fold.lay_out(shapes, ratio)
        if given is not shapes:
            groups = [replace(group, rows={name: given[name][0] for name in group.members}) for group in groups]
        alike = {group.modes: group for group in groups}
        _check_modes(list(alike))
        self._check_tables(groups, elements)
        graphs = {modes: lower_group(self.network, group) for modes, group in alike.items()}
        laid = tuple((group, graphs[group.modes]) for group in groups)
        _check_nodes([graph for _, graph in laid], elements)
        if isinstance(self.join, Multiply) and any(n.init in BASED for graph in graphs.values() for n in graph.nodes):
            raise SpecError("a network that multiplies has no nodes of the base's values, whose sides are the weight's.")
        if not (isinstance(self.join, Multiply) and not self.join.residual):
            for graph in graphs.values():
                copied = {n.copies for n in graph.nodes}  # with their copies these cancel at the start
                begun = [t.graph for t in graph.networks if not any(n.copies or n.name in copied for n in t.graph.nodes)]
                if any(one.is_mapped and not any(n.starts_at_zero for n in one.nodes) for one in begun):
                    raise SpecError(
                        "no node of the network can start at zero, so dW would not: their maps give no zero. Add a node "
                        "without a map, or multiply by the network (join=Multiply('left', residual=False))."
                    )
        return laid

    def check_added(self, what: str) -> None:
        """Raise where dW is not added to the weight, or a node is a function of what is stored.

        Args:
            what: who needs it to be: the beginning of the message.
        """
        if self.join is not None:
            raise SpecError(
                f"{what} for updates that are added, W + dW; this one joins otherwise ({self.join}). Bake it into the base "
                "(tuned.bake()), or declare it with join=None."
            )
        if self.is_mapped:
            raise SpecError(
                f"{what} for nodes that are stored themselves; a node of this network has a map. Bake it into the base "
                "(tuned.bake()), or declare it without."
            )

    def magnitudes(self, group: Group) -> int:
        """How many numbers train beside the nodes of a group: one for each row of its weights, where the join has such."""
        return sum(map(group.rows_of, group.members)) if self.join is not None and self.join.has_rows else 0

    def _check_tables(self, groups: Sequence[Group], elements: int) -> None:
        """Refuse fixed maps whose tables are far longer than the weights."""
        if self.projection is None:
            return
        numbers = sum(self.projection.table_numbers(group.length) for group in groups if isinstance(group, FlatGroup))
        most = TABLES_TIMES * (elements + TABLES_SPARE)
        if numbers > most:
            raise SpecError(
                f"the fixed map needs tables of {numbers:,} numbers for {elements:,} elements of the weights, above {most:,}; "
                "choose fewer maps, or fewer of B, P and G in them."
            )

    def count(self, shapes: Mapping[str, Shape] | Sequence[Shape]) -> int:
        """Trainable parameters for weights of the given shapes, from the declaration alone.

        Args:
            shapes: (out, in) of each target, by module name, or as a list taken as one weight a layer, in order.
        """
        laid = self.lay_out(named_shapes(shapes))
        return sum(graph.num_parameters + self.magnitudes(group) for group, graph in laid)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data, for JSON; without `join` where dW is added, so that earlier releases read it too."""
        found = {f.name: encode(getattr(self, f.name)) for f in fields(self)}
        return {name: value for name, value in found.items() if name != "join" or value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterSpec:
        """The spec that `to_dict` wrote; unknown or missing fields raise."""
        if not isinstance(data, Mapping):
            raise SpecError(f"a spec is a dict of its fields; it was given as {type(data).__name__}.")
        check_fields("a spec", data, {f.name for f in fields(cls)}, {"join"})
        return cls(**{name: decode(value) for name, value in data.items()})


def check_shapes(shapes: Mapping[str, Shape]) -> None:
    """Raise unless each weight's shape is (out, in)."""
    for name, shape in shapes.items():
        pair = isinstance(shape, Sequence) and len(shape) == 2
        if not pair or not all(isinstance(s, int) and 1 <= s <= MAX_SIDE for s in shape):
            raise SpecError(
                f"target '{name!s:.80}' has the shape {shown(shape)}; a weight is (out, in), whole numbers of at least 1."
            )


def named_shapes(shapes: Mapping[str, Shape] | Sequence[Shape]) -> Mapping[str, Shape]:
    """Shapes (out, in) by name; a list is taken as one weight a layer, in order.

    Raises:
        SpecError: what is given are no such shapes.
    """
    if isinstance(shapes, Mapping):
        return shapes
    try:
        return {f"layer.{k}.weight": (index(d_out), index(d_in)) for k, (d_out, d_in) in enumerate(shapes)}
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"the weights' shapes were given as {shown(shapes)}; give (out, in) of each, as [(768, 768)] or "
            "{'q_proj': (768, 768)}. in of a convolution counts its kernel: (64, 64 * 9)."
        ) from error


def _is_mapped(part: Part) -> bool:
    if own := inner_parts(part):
        return any(map(_is_mapped, own))
    return isinstance(part, Network) and any(node.map is not None for _, node in part.nodes)


def _check_modes(modes: Sequence[tuple[Mode, ...]]) -> None:
    """Refuse too many different shapes, and sizes whose divisors would take too long to find."""
    if len(modes) > MAX_SHAPES:
        raise SpecError(
            f"the targets have {len(modes):,} different shapes, of which each gets a network of its own; at most "
            f"{MAX_SHAPES:,} are taken. Adapt them in several parts."
        )
    steps = sum(math.isqrt(math.isqrt(mode.size)) for own in modes for mode in own)
    if steps > MAX_SPLITTING:
        largest = max(mode.size for own in modes for mode in own)
        raise SpecError(
            f"the targets have sizes up to {largest:,}; to find their divisors may take {steps:,} steps, above "
            f"{MAX_SPLITTING:,}. Adapt fewer weights of that size."
        )


def _check_nodes(graphs: Sequence[Graph], elements: int) -> None:
    """Refuse nodes that hold far more numbers than the weights they adapt."""
    numbers, most = sum(graph.num_numbers for graph in graphs), NODES_TIMES * elements + NODES_SPARE
    if numbers > most:
        largest = max((node for graph in graphs for node in graph.nodes), key=lambda node: math.prod(node.shape))
        raise SpecError(
            f"the network's nodes hold {numbers:,} numbers for {elements:,} elements of the weights, above {most:,}; the "
            f"largest is '{largest.name}' of shape {shown(largest.shape)}. Choose lower ranks."
        )
