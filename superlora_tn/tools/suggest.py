"""Which adapters a number of parameters buys, and what each would cost: counted and planned, nothing is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from superlora_tn.contraction.plan import Route, choose, make_plan, table
from superlora_tn.contraction.profile import CPU, ITEM, Device
from superlora_tn.contraction.search import PlanError
from superlora_tn.contraction.summed import choose_all
from superlora_tn.declare.fold import PhysicalGroup, Shape
from superlora_tn.declare.node_maps import Same
from superlora_tn.declare.parts import SpecError, check_count, shown
from superlora_tn.model.targets import Targets, targets_of
from superlora_tn.network.applied import applied
from superlora_tn.network.budget import words
from superlora_tn.network.catalogue import VARIANTS, bought, check_variants
from superlora_tn.network.graph import Graph
from superlora_tn.network.kernels import Kernels, check_kernels, lay_out
from superlora_tn.network.spec import AdapterSpec, check_shapes, named_shapes


@dataclass(frozen=True)
class Cost:
    """What a step of training costs beside the frozen model.

    Attributes:
        seconds: forward and backward of all updates, by the plans' prices, each weight for itself: what layers share makes it
            less, and a fixed map's own time is not in it.
        state: bytes of what is stored of the nodes, and of magnitudes, in float32, with gradients and Adam's two moments of
            what trains.
        peak: bytes of the largest single tensor that is made on the way: an intermediate, a node that a map makes, dW where a
            layer builds it, and of a flat fold the vector of all its groups, with their surplus or as a fixed map pads it.
    """

    seconds: float
    state: int
    peak: int


@dataclass(frozen=True)
class Suggestion:
    """One variant at the setting that the budget buys.

    Attributes:
        variant: its name.
        spec: the declaration, for `attach`.
        count: trainable parameters.
        cost: of a step.
    """

    variant: str
    spec: AdapterSpec
    count: int
    cost: Cost


@dataclass(frozen=True)
class Suggestions:
    """What a budget buys, cheapest step first; print it.

    Attributes:
        budget: the most parameters that were allowed.
        found: those that fit.
        refused: why others are left out, by variant: none so small fits, or what fits is more than dense fine-tuning.
        tokens: rows of x that were planned for.
        device: the profile that was priced for, by name.
    """

    budget: int
    found: tuple[Suggestion, ...]
    refused: Mapping[str, str]
    tokens: int
    device: str

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("variant", "parameters", "ms", "state", "peak", "declared as")]
        for one in self.found:
            sizes = (f"{size / 1024:,.0f} KiB" for size in (one.cost.state, one.cost.peak))
            rows.append((one.variant, f"{one.count:,}", f"{1e3 * one.cost.seconds:.3g}", *sizes, words(one.spec)))
        lines = table([(*row[:-1], row[-1][:80]) for row in rows], "parameters ms state peak")
        lines.append(f"at most {self.budget:,} parameters; a step of {self.tokens:,} tokens on {self.device}, predicted")
        if self.refused:
            lines.append(f"left out: {', '.join(self.refused)}")
        return "\n".join(lines)


def suggest(
    where: nn.Module | Mapping[str, Shape] | Sequence[Shape],
    budget: int,
    targets: Targets | None = None,
    *,
    tokens: int = 1024,
    device: Device = CPU,
    variants: Sequence[str] = tuple(VARIANTS),
    kernels: Kernels | None = None,
) -> Suggestions:
    """Every variant at the rank that a number of parameters buys, with what a step is predicted to cost.

    It says what fits, not what learns best: `probe` looks at a dW, and only training tells.

    Args:
        where: a model, or the weights' shapes: (out, in) by module name, or a list taken as one weight a layer.
        budget: the most trainable parameters.
        targets: which weights of a model, see `match`.
        tokens: rows of x in a step.
        device: what to price for.
        variants: which to look at, by name; all by default.
        kernels: beside shapes, the sizes of the kernels of those that are convolutions, by name; a model shows its own.

    Returns:
        Suggestions, the cheapest step first.

    Raises:
        SpecError: an unknown variant, no weights, or targets that do not go with what was given.
        AttachError: targets that are not there or cannot be adapted.
    """
    check_count("suggest", "budget", budget, 1 << 62)
    check_count("suggest", "tokens", tokens, 1 << 40)
    check_variants("suggest", variants)
    if not isinstance(device, Device):
        raise SpecError(f"suggest was given device={shown(device)}; give a Device, as calibrate() measures it.")
    shapes, kernels = _weights(where, targets, kernels)
    whole = sum(d_out * d_in for d_out, d_in in shapes.values())
    found, refused = list[Suggestion](), dict[str, str]()
    for name in variants:
        try:
            choice = bought(name, budget, shapes, kernels)
            if choice.count > whole:
                raise SpecError(
                    f"{choice.count:,} parameters are more than the {whole:,} of dense fine-tuning, which can do all that they "
                    "can; lower the budget."
                )
            found.append(Suggestion(name, choice.spec, choice.count, cost(choice.spec, shapes, tokens, device, kernels)))
        except (SpecError, PlanError) as error:
            refused[name] = str(error)
    found.sort(key=lambda one: one.cost.seconds)
    return Suggestions(budget, tuple(found), refused, tokens, device.name)


def _weights(
    where: nn.Module | Mapping[str, Shape] | Sequence[Shape], targets: Targets | None, kernels: Kernels | None
) -> tuple[dict[str, Shape], Kernels | None]:
    """The weights' shapes, and what is known of their kernels."""
    if isinstance(where, nn.Module):
        if kernels is not None:
            raise SpecError("suggest was given a model and kernels; the model shows its own, so leave kernels=None.")
        if targets is None:
            raise SpecError("suggest was given a model without targets; name the layers, such as targets=['q_proj', 'v_proj'].")
        bound = targets_of(where, targets)
        return {target.name: target.shape for target in bound}, {target.name: target.kernel for target in bound}
    if targets is not None:
        raise SpecError("suggest was given shapes and targets; targets choose of a model, so give the shapes of those alone.")
    named = named_shapes(where)
    if not named:
        raise SpecError("suggest was given no weight; give at least one shape (out, in).")
    check_shapes(named)
    check_kernels(kernels, named)
    return dict(named), kernels


def cost(
    spec: AdapterSpec, shapes: Mapping[str, Shape], tokens: int, device: Device = CPU, kernels: Kernels | None = None
) -> Cost:
    """What a step costs, from plans alone.

    Args:
        spec: the declaration.
        shapes: (out, in) by module name.
        tokens: rows of x.
        device: what to price for.
        kernels: of the weights, where they are known.

    Raises:
        SpecError: the declaration does not fit the shapes.
        PlanError: dW has no affordable path.
    """
    seconds, state, peak = 0.0, 0, 0
    for declared, group, graph in lay_out(spec, shapes, kernels):
        trained = graph.num_parameters + declared.magnitudes(group)
        state += ITEM * (4 * trained + sum(math.prod(node.stored) for node in graph.nodes if not node.trainable))
        if isinstance(group, PhysicalGroup):
            found = choose_all(graph, group.shape, tokens, device)
            seconds += len(group.members) * found.price
            for term, chosen in found.each:
                built = chosen.shape[0] * chosen.shape[1] if chosen.route == "delta" else 0
                peak = max(peak, chosen.chosen.peak, ITEM * built, ITEM * _largest_made(term.graph, chosen.route))
            continue
        # A flat fold's groups are built together once a step, of each term of a sum, and each of its weights multiplied once.
        sides = [(d_out, d_in) for _, d_out, d_in in group.members.values()]
        terms = [make_plan(term.graph, "delta", 1, device, fixed=False) for term in graph.networks]
        single = [choose(graph.networks[0].graph, shape, tokens, device) for shape in sides]
        seconds += sum(term.price for term in terms) + sum(one.delta_price - one.delta.price for one in single)
        padded = 0 if declared.projection is None else declared.projection.padded(group.length)
        whole = max(group.groups * max(group.volume, padded), sum(d_out * d_in for d_out, d_in in sides))
        made = max(_largest_made(term.graph, "delta") for term in graph.networks)
        peak = max(peak, *(term.peak for term in terms), ITEM * whole, ITEM * made)
    return Cost(seconds, state, peak)


def _largest_made(graph: Graph, route: Route) -> int:
    """Numbers of the largest node on a route that a map makes of what is stored; a `Same` is what is stored."""
    made = [(node.shape, node.map) for node in graph.nodes]
    if route == "apply":
        through = applied(graph)
        made = [(n.shape, graph.nodes[k].map) for n, (k, _) in zip(through.graph.nodes, through.sources, strict=True)]
    return max((math.prod(shape) for shape, own in made if own is not None and not isinstance(own, Same)), default=0)
