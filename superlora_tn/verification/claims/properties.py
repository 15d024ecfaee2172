"""What holds for every network, whatever it is: each property takes a case and returns its error in units of the bound.

A property returns at most 1 where it holds. It raises `NotApplicable` for a case it says nothing about.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from superlora_tn.contraction.backend import backends, compiled
from superlora_tn.contraction.plan import Plan, make_plan
from superlora_tn.declare.fold import FlatGroup, PhysicalGroup
from superlora_tn.declare.maps import Compose, Fastfood
from superlora_tn.declare.node_maps import Softmax
from superlora_tn.declare.parts import TOKEN
from superlora_tn.model.attach import attach
from superlora_tn.model.recognise import kind_of
from superlora_tn.model.tuned import Tuned
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter
from superlora_tn.verification.cases import (
    DTYPES,
    Case,
    NotApplicable,
    Sized,
    as_array,
    fill,
    has_linear_map,
    is_affine,
    is_linear,
    linear_model,
    ratio,
)
from superlora_tn.verification.claims import counts
from superlora_tn.verification.claims.gauge import gauge_freedom, tangent_space
from superlora_tn.verification.references.mapped import LINEAR
from superlora_tn.verification.references.textbook import Array, Values

Property = Callable[[Case], float]
BF16_UNIT = 2.0**-8
# dtype, unit roundoff, half its smallest number
HALVES = ((torch.bfloat16, BF16_UNIT, 2.0**-134), (torch.float16, 2.0**-11, 2.0**-25))


def exact(holds: bool) -> float:
    """An error in units of the bound, for what is right or wrong."""
    return 0.0 if holds else math.inf


def zero_at_start(case: Case) -> float:
    """Exactly one node is zero at the start, of a sum one of each term, and dW is exactly zero."""
    for sized in case.groups():
        adapter = sized.fresh()
        turned = any(n.map is not None and n.trainable and not n.map.from_zero for n in sized.graph.nodes)
        if turned or any(n.copies for n in sized.graph.nodes):
            raise NotApplicable  # rotations start at the identity, and copies cancel: see "W' = W at the start"
        zeros = {k for k, tensor in enumerate(adapter.tensors()) if not tensor.any()}
        once = all(len(zeros & {*term.nodes}) == 1 for term in sized.graph.networks)
        if not once or any(adapter.delta(t).any() for t in sized.shapes):
            return math.inf
    return 0.0


def learns(case: Case) -> float:
    """Every trainable node gets a gradient within two steps of SGD on a random linear loss."""
    for sized in case.groups():
        if any(n.map is not None and not isinstance(n.map, LINEAR) and n.shape[-1] == 1 for n in sized.graph.nodes):
            raise NotApplicable  # a single number has no direction
        adapter = sized.fresh()
        loss = {t: torch.from_numpy(c) for t, c in cotangents(sized).items()}
        reached: set[str] = set()
        for _ in range(2):
            adapter.zero_grad()
            torch.stack([(adapter.delta(t) * c).sum() for t, c in loss.items()]).sum().backward()  # type: ignore[no-untyped-call]
            reached |= {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
            with torch.no_grad():
                for parameter in adapter.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad)
        if reached != {n for n, _ in adapter.named_parameters()}:
            return math.inf
    return 0.0


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Standard normal values; an array for the empty shape too."""
    return np.asarray(generator.standard_normal(shape))


def cotangents(sized: Sized) -> dict[str, Array]:
    """Seeded weights of a linear loss: one array of dW's shape for each weight."""
    generator = np.random.default_rng(sized.case.seed + 2)
    return {t: generator.standard_normal(shape) for t, shape in sized.shapes.items()}


def node_gradients(sized: Sized, values: Values | None = None) -> dict[str, Array]:
    """Autograd's gradients of the loss ``sum_t <c_t, dW_t>`` (`cotangents`) by the trainable nodes' names."""
    adapter = sized.adapter(values=values)
    loss = [(adapter.delta(t) * torch.from_numpy(c)).sum() for t, c in cotangents(sized).items()]
    torch.stack(loss).sum().backward()  # type: ignore[no-untyped-call]
    grads = {n.removeprefix("node_"): p.grad for n, p in adapter.named_parameters()}
    return {name: as_array(grad) for name, grad in grads.items() if grad is not None}


def routes_agree(case: Case) -> float:
    """x through the network (apply), x times a built dW (delta), and the cheaper of both give the same."""
    worst = 0.0
    for sized in case.groups():
        routes = ("apply", "delta", None) if isinstance(sized.group, PhysicalGroup) else (None,)
        adapters = [sized.adapter(route) for route in routes]  # type: ignore[arg-type]
        for target in sized.shapes:
            x, out, allowed = forward_case(sized, target)
            expected = x @ as_array(adapters[0].delta(target)).T
            tensors = [torch.from_numpy(a).to(DTYPES[case.dtype]) for a in (x, out)]
            for adapter in adapters:
                worst = max(worst, ratio(as_array(adapter(tensors[0], target, tensors[1].clone())), expected, allowed))
    return worst


def forward_case(sized: Sized, target: str) -> tuple[Array, Array, Array]:
    """An activation, a zero output, and the bound of ``x dW^T``: terms x in numbers are summed into an element."""
    d_out, d_in = sized.shapes[target]
    x = sized.case.activation(d_in)
    roundings = sized.roundings + 2 * sized.terms * d_in
    allowed = roundings * sized.unit * (np.abs(x) @ sized.magnitude()[target].T)
    return x, np.zeros((*sized.case.batch, d_out)), allowed


def backends_agree(case: Case) -> float:
    """Every installed backend contracts both routes as `numpy_reference` does, which sums the equation at once."""
    worst = 0.0
    names = [name for name in backends() if name != "numpy_reference"]
    for sized in case.groups():
        for plan, arrays, allowed in _contractions(sized):
            expected = compiled(plan, "numpy_reference")(*arrays, alpha=sized.spec.scale)
            tensors = [torch.from_numpy(a).to(DTYPES[case.dtype]) for a in arrays]
            for name in names:
                got = as_array(compiled(plan, name)(*tensors, alpha=sized.spec.scale))
                worst = max(worst, ratio(got, expected, allowed))
    return worst


def _contractions(sized: Sized) -> Iterator[tuple[Plan, list[Array], Array]]:
    """Plans of each term for each member (or flat group), the operands, and the bound of the result, scale included."""
    group, whole = sized.group, sized.nodes()
    if isinstance(group, FlatGroup):
        places: list[tuple[int, ...]] = [(g,) for g in range(group.groups)] if group.groups > 1 else [()]
    else:
        places = [tuple(p) for p in group.members.values()]
    for graph, place in itertools.product([term.graph for term in sized.graph.networks], places):
        nodes = [np.ascontiguousarray(whole[n.name][s]) for n, s in zip(graph.nodes, graph.select(place), strict=True)]
        plan = make_plan(graph, "delta")
        size = compiled(plan, "numpy_reference")(*[np.abs(n) for n in nodes], alpha=abs(sized.spec.scale))
        yield plan, nodes, sized.roundings * sized.unit * size
        if isinstance(group, PhysicalGroup) and not graph.is_mapped:  # x meets parts of such nodes: see "routes agree"
            d_in = size.shape[1]  # of a term that is cropped, before it is
            x = sized.case.activation(d_in).reshape(-1, d_in)
            roundings = sized.roundings + 2 * sized.terms * d_in
            plan = make_plan(graph, "apply", max(len(x), 1))
            assert dict(plan.sizes)[TOKEN] == max(len(x), 1)
            yield plan, [x, *nodes], roundings * sized.unit * (np.abs(x) @ size.T)


def linear_in_each_node(case: Case) -> float:
    """``dW(.., 2 a + b, ..) = 2 dW(.., a, ..) + dW(.., b, ..)`` for each node; of a sum without the terms it is not in."""
    if not is_affine(case.spec):
        raise NotApplicable
    worst = 0.0
    for sized in case.in_float64().groups():
        generator = np.random.default_rng(case.seed + 3)
        before = sized.delta(sized.values)
        for name, value in sized.values.items():
            if not value.size:  # nothing is stored of the identity
                continue
            other = normal(generator, value.shape)
            moved = sized.delta({**sized.values, name: 2 * value + other})
            alone = sized.delta({**sized.values, name: other})
            rest = None if is_linear(case.spec) else sized.delta({**sized.values, name: 0 * value})
            positive = {**sized.values, name: 2 * np.abs(value) + np.abs(other)}
            for target in sized.shapes:
                expected = 2 * before[target] + alone[target] - (0.0 if rest is None else 2 * rest[target])
                # Of a sum dW(2 a + b), twice dW(a), dW(b) and twice dW(0) are each off by the bound of the positive values.
                times = 2 if rest is None else 6
                worst = max(worst, ratio(moved[target], expected, times * sized.allowed(target, positive, more=4)))
    return worst


def gradients(case: Case) -> float:
    """Gradients equal float64 central differences of dW along a random direction of each node.

    dW is linear in a node, so that the step may be 1 and nothing is truncated. Through a tanh the step is 1e-4, and the
    truncation is at most step^2 / 3 times the sum of ``|c| |du|^3``, since ``|tanh'''| <= 2``.
    """
    worst = 0.0
    if not is_affine(case.spec) and has_linear_map(case.spec):
        raise NotApplicable  # the formula's derivative is exact there, see `checks.gradient_formula`
    for sized in case.in_float64().groups():
        generator = np.random.default_rng(case.seed + 5)
        for name, grad in node_gradients(sized).items():
            worst = max(worst, _gradient_error(sized, name, grad, normal(generator, grad.shape)))
    return worst


def _gradient_error(sized: Sized, name: str, grad: Array, direction: Array) -> float:
    weights = cotangents(sized)
    step = 1.0 if is_affine(sized.spec) else 1e-4
    ends = [sized.delta({**sized.values, name: sized.values[name] + s * step * direction}) for s in (1, -1)]
    slope = sum(float(((ends[0][t] - ends[1][t]) * c).sum()) for t, c in weights.items()) / (2 * step)
    positive = {**sized.values, name: np.abs(sized.values[name]) + step * np.abs(direction)}
    size = sum(float((m * np.abs(weights[t])).sum()) for t, m in sized.magnitude(positive).items())
    elements = sum(c.size for c in weights.values())
    allowed = (sized.roundings + 2 * (elements + grad.size)) * sized.unit * size * 2 / step
    if not is_affine(sized.spec):
        allowed += _truncation(sized, name, direction, step)
    return ratio(np.array((grad * direction).sum()), np.array(slope), allowed)


def _truncation(sized: Sized, name: str, direction: Array, step: float) -> float:
    """Bound of a central difference's truncation through ``scale tanh(u)``."""
    assert isinstance(sized.spec.projection, Fastfood)
    plain = replace(
        sized.case, spec=replace(sized.spec, projection=replace(sized.spec.projection, tanh=False), alpha=None, rslora=False)
    )
    [linear] = [g for g in plain.groups() if list(g.shapes) == list(sized.shapes)]
    slopes = linear.formula({**sized.values, name: direction})
    cubes = sum(float((np.abs(c) * np.abs(slopes[t]) ** 3).sum()) for t, c in cotangents(sized).items())
    return step**2 / 3 * abs(sized.spec.scale) * cubes


def count(case: Case) -> float:
    """`spec.count` is the number of trainable numbers that there are."""
    there = sum(p.numel() for sized in case.groups() for p in sized.fresh().parameters())
    return exact(there == case.spec.count(dict(case.shapes)))


def count_by_formula(case: Case) -> float:
    """`spec.count` is the paper's count."""
    return exact(counts.totals([s.shapes for s in case.groups()], case.spec) == case.spec.count(dict(case.shapes)))


def json_round_trip(case: Case) -> float:
    """A spec survives JSON."""
    return exact(AdapterSpec.from_dict(json.loads(json.dumps(case.spec.to_dict()))) == case.spec)


def extreme_scales(case: Case) -> float:
    """At alpha = 1e30 and 1e-30, dW is finite and what it is at alpha = 1, times alpha."""
    worst = 0.0
    if case.spec.join is not None:
        raise NotApplicable  # R itself has no scale
    plain = replace(case, spec=replace(case.spec, alpha=1.0))
    for alpha in (1e30, 1e-30):
        scaled = replace(plain, spec=replace(case.spec, alpha=alpha))
        for one, other in zip(plain.groups(), scaled.groups(), strict=True):
            base = one.delta(one.values)
            for target, delta in other.delta(other.values).items():
                # Below float32's normal numbers a rounding is at most half its smallest number.
                allowed = other.allowed(target, more=2) + other.roundings * 2.0**-150
                worst = max(worst, ratio(delta, alpha * base[target], allowed))
    return worst


def half_precision(case: Case) -> float:
    """dW from bfloat16 and float16 values is the textbook's for these values, within the dtype's bound.

    For n roundings that is ((1 + u)^n - 1) times the sum of absolute values; where n u > 1 it would say nothing, nor is
    anything said of a fastfood map, whose transforms sum too much. float16 ends at 2^-24: each rounding may also lose
    half of that, times the largest product of nodes (at least 1 each) and scale. What may exceed its 65504 is left out.
    """
    worst = -1.0
    if isinstance(case.spec.projection, Fastfood | Compose):
        raise NotApplicable
    for sized in case.groups():
        if any(isinstance(n.map, Softmax) and n.map.top for n in sized.graph.nodes):
            raise NotApplicable  # of equal numbers, which halves have, either may be among the largest
        for dtype, unit, last in HALVES:
            values = {n: as_array(torch.from_numpy(v.copy()).to(dtype)) for n, v in sized.values.items()}
            weight = max(abs(term.weight) for term in sized.graph.networks)
            reach = max(1.0, abs(case.spec.scale)) * max(1.0, weight) * sized.terms
            reach *= math.prod(max(1.0, float(np.abs(v).max(initial=0.0))) for v in sized.sizes(values).values())
            if sized.roundings * unit > 1 or reach > torch.finfo(dtype).max:
                continue
            adapter, formula, size = sized.adapter(values=values).to(dtype), sized.formula(values), sized.magnitude(values)
            for target in sized.shapes:
                allowed = math.expm1(sized.roundings * math.log1p(unit)) * size[target] + sized.roundings * last * reach
                worst = max(worst, ratio(as_array(adapter.delta(target)), formula[target], allowed))
    if worst < 0:
        raise NotApplicable
    return worst


def deterministic(case: Case) -> float:
    """Equal seeds give equal first values and equal dW, bit for bit."""
    for sized in case.groups():
        pairs = zip(sized.fresh().tensors(), sized.fresh().tensors(), strict=True)
        twice = zip(sized.delta(sized.values).values(), sized.delta(sized.values).values(), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs) or not all(np.array_equal(a, b) for a, b in twice):
            return math.inf
    return 0.0


def as_matrix(layer: torch.nn.Module) -> torch.Tensor:
    """A layer's weight as a matrix (out, in)."""
    return kind_of(layer).read(layer)


def merge_is_forward(case: Case) -> float:
    """An attached layer computes the same before and after `merge`, and `unmerge` brings the weight's bytes back."""
    worst = 0.0
    for sized, model, handle in _attached(case, DTYPES[case.dtype]):
        for target in sized.shapes:
            x, _, update = forward_case(sized, target)
            layer = model.get_submodule(target)
            before, weight = as_array(layer(torch.from_numpy(x).to(DTYPES[case.dtype]))), as_matrix(layer).clone()
            handle.merge()
            after = as_array(layer(torch.from_numpy(x).to(DTYPES[case.dtype])))
            handle.unmerge()
            whole = np.abs(x) @ (np.abs(as_array(weight)) + sized.magnitude()[target]).T
            allowed = update + 2 * (x.shape[-1] + 2) * sized.unit * whole
            worst = max(worst, ratio(after, before, allowed), exact(torch.equal(weight, as_matrix(layer))))
    return worst


def merge_in_bfloat16(case: Case) -> float:
    """Merging into bfloat16 weights rounds once, and `unmerge` brings their bytes back."""
    worst = 0.0
    for sized, model, handle in _attached(replace(case, dtype="float32"), torch.bfloat16):
        for target in sized.shapes:
            weight = as_matrix(model.get_submodule(target)).clone()
            handle.merge()
            merged = as_array(as_matrix(model.get_submodule(target)))
            handle.unmerge()
            whole = as_array(weight) + sized.formula()[target]
            # One rounding to bfloat16 of a sum that float32 has off by dW's own bound and a rounding of its own.
            off = sized.allowed(target) + 2 * sized.unit * np.abs(whole)
            allowed = BF16_UNIT * (np.abs(whole) + off) + off + 2.0**-134
            back = exact(torch.equal(weight, as_matrix(model.get_submodule(target))))
            worst = max(worst, ratio(merged, whole, allowed), back)
    return worst


def _attached(case: Case, dtype: torch.dtype) -> Iterator[tuple[Sized, torch.nn.Module, Tuned]]:
    """Each group with a model of plain layers that carries the whole spec, filled with the case's values."""
    if case.spec.join is not None:
        raise NotApplicable  # what is not added is merged in `claims.joined`
    shapes = dict(case.shapes)
    model = linear_model(shapes, dtype, case.seed)
    case = case.in_order_of(model)
    handle = attach(model, case.spec, list(shapes), dtype=DTYPES[case.dtype], seed=case.seed)
    handle.eval()
    adapters = {tuple(a.group.members): a for a in handle.adapters}  # type: ignore[union-attr, arg-type]
    for sized in case.groups():
        own = adapters[tuple(sized.shapes)]
        assert isinstance(own, Adapter)
        fill(own, sized.values)
        yield sized, model, handle


PROPERTIES: dict[str, Property] = {
    "zero at start, one zero node": zero_at_start,
    "every node learns in two steps": learns,
    "routes agree": routes_agree,
    "backends agree": backends_agree,
    "linear in each node": linear_in_each_node,
    "gauge freedom on every bond": gauge_freedom,
    "gauge keeps the tangent space": tangent_space,
    "gradients = central differences": gradients,
    "count = trainable numbers": count,
    "JSON round trip": json_round_trip,
    "finite at extreme scales": extreme_scales,
    "bf16 and fp16 within their bounds": half_precision,
    "deterministic": deterministic,
    "merge = forward, unmerge restores": merge_is_forward,
    "merge in bf16: one rounding": merge_in_bfloat16,
}
