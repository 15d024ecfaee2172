"""What holds of every adapted model, however the update joins the weight: its start, count and files."""

from __future__ import annotations

import math
from collections.abc import Callable
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from superlora_tn.declare.joins import Multiply
from superlora_tn.declare.parts import BASED, Network
from superlora_tn.model.attach import attach, load
from superlora_tn.model.tuned import Tuned
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter
from superlora_tn.verification.cases import DTYPES, Case, NotApplicable, Sized, as_array, fill, linear_model, ratio
from superlora_tn.verification.references.textbook import Array


def _adapted(case: Case) -> tuple[nn.Module, Tuned, list[tuple[Sized, Adapter]]]:
    """A model of plain layers with the whole declaration, and the adapter of each group."""
    shapes, dtype = dict(case.shapes), DTYPES[case.dtype]
    model = linear_model(shapes, dtype, case.seed)
    case = case.in_order_of(model)
    handle = attach(model, case.spec, list(shapes), dtype=dtype, seed=case.seed).eval()
    made = {tuple(one.group.members): one for one in handle.adapters if isinstance(one, Adapter)}
    return model, handle, [(sized, made[tuple(sized.shapes)]) for sized in case.of_network().groups()]


def _outputs(case: Case, model: nn.Module) -> list[Array]:
    with torch.no_grad():
        return [
            as_array(model.get_submodule(name)(torch.from_numpy(case.activation(d_in)).to(DTYPES[case.dtype])))
            for name, (_, d_in) in case.shapes
        ]


def starts_at_the_weight(case: Case) -> float:
    """An adapted layer computes at first what the layer does: exactly, or within the rounding of a multiplied weight.

    Multiplied by itself (`Multiply` with `residual` False) a network may start elsewhere, as an odd number of reflections
    does; of one that the definitions do not start at the identity nothing is said.
    """
    model, _, groups = _adapted(case)
    join, worst = case.spec.join, 0.0
    plain = linear_model(dict(case.shapes), DTYPES[case.dtype], case.seed)
    allowed: dict[str, Array] = {}
    for sized, adapter in groups:
        first = {n.name: as_array(v).reshape(n.stored) for n, v in zip(sized.graph.nodes, adapter.stored(), strict=True)}
        for name, matrix in sized.formula(first).items():
            base = as_array(plain.get_submodule(name).weight)  # type: ignore[arg-type]
            size, off = np.abs(base), 4 * (sum(base.shape) + 8) * sized.unit
            if isinstance(join, Multiply):
                one, terms = np.eye(len(matrix)), np.eye(len(matrix)) + sized.magnitude(first)[name]
                if not np.allclose(matrix, 0.0 if join.residual else one, rtol=0, atol=1e-4):
                    raise NotApplicable
                size, off = (terms @ size if join.side == "left" else size @ terms), off + sized.roundings * sized.unit
            allowed[name] = off * size
            if any(node.copies for node in sized.graph.nodes):  # they cancel, but for the rounding of terms in between
                allowed[name] = allowed[name] + sized.allowed(name, first)
    for (name, (_, d_in)), found, wanted in zip(case.shapes, _outputs(case, model), _outputs(case, plain), strict=True):
        bound = np.abs(case.activation(d_in)) @ allowed[name].T
        worst = max(worst, ratio(found, wanted, bound))
    return worst


def count_of_all(case: Case) -> float:
    """`spec.count` is the number of all that trains on a model, magnitudes too."""
    _, handle, _ = _adapted(case)
    there = sum(p.numel() for p in handle.parameters() if p.requires_grad)
    return 0.0 if there == case.spec.count(dict(case.shapes)) else math.inf


def file_round_trip(case: Case) -> float:
    """An adapter that is saved and loaded on an equal model has the same declaration, the same bits and the same outputs."""
    model, handle, groups = _adapted(case)
    for sized, adapter in groups:
        fill(adapter, sized.values, based=False)
        with torch.no_grad():
            for magnitude in adapter.beside():
                magnitude.mul_(1.5)
    again = linear_model(dict(case.shapes), DTYPES[case.dtype], case.seed)
    with TemporaryDirectory() as folder:
        handle.save(folder)
        loaded = load(again, folder).eval()
    kept, found = handle.state_dict(), loaded.state_dict()
    same = kept.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in kept.items())
    pairs = zip(_outputs(case, model), _outputs(case, again), strict=True)
    same = same and loaded.spec == case.spec and all(np.array_equal(one, other) for one, other in pairs)
    return 0.0 if same else math.inf


def has_based_nodes(spec: AdapterSpec) -> bool:
    """Whether `based_nodes` says something of a declaration."""
    part = spec.network
    plain = isinstance(part, Network) and part.mode_groups == (("o",), ("i",))
    return plain and any(node.init in BASED for _, node in part.nodes)  # type: ignore[union-attr]


def based_nodes(case: Case) -> float:
    """Nodes of the base hold its weight, or its largest singular values with vectors that W maps so, or its columns' norms.

    NumPy's singular values; of vectors ``W v = s u`` and ``u^T W = s v^T``, whatever their signs. Of a network in index
    notation over out and in that splits neither.
    """
    network = case.spec.network
    assert isinstance(network, Network)
    inits = {name: (node.init, node.index_names) for name, node in network.nodes}
    wanted = {init: name for name, (init, _) in inits.items() if init in BASED}
    model, _, groups = _adapted(case)
    worst = 0.0
    for sized, adapter in groups:
        held = dict(zip(inits, map(as_array, adapter.stored()), strict=True))
        for target in sized.shapes:
            layer = model.get_submodule(target)
            weight = as_array(layer.weight)  # type: ignore[arg-type]
            values = np.linalg.svd(weight, compute_uv=False)
            # Backward stable: a rounding of the stored numbers, and of the decomposition's sums.
            allowed = 8 * (sum(weight.shape) + 8) * sized.unit * float(values.sum())
            turned = {n: v if inits[n][1][:1] != ("i",) and inits[n][1][-1:] != ("o",) else v.T for n, v in held.items()}
            if "base" in wanted:
                worst = max(worst, ratio(turned[wanted["base"]], weight, 0.0))
            left, right = (turned.get(wanted.get(side, "")) for side in ("left", "right"))
            if "columns" in wanted:
                worst = max(worst, ratio(turned[wanted["columns"]], np.linalg.norm(weight, axis=0), allowed))
            if "singular" in wanted:
                own = turned[wanted["singular"]]
                worst = max(worst, ratio(own, values[: len(own)], allowed))
            if left is not None and right is not None:
                top, ones = values[: left.shape[1]], np.ones(left.shape[1])
                worst = max(worst, ratio(weight @ right.T, left * top, allowed))
                worst = max(worst, ratio(left.T @ weight, top[:, None] * right, allowed))
                worst = max(worst, ratio((left**2).sum(0), ones, 8 * (sum(weight.shape) + 8) * sized.unit))
    return worst


LIFE: dict[str, Callable[[Case], float]] = {
    "W' = W at the start": starts_at_the_weight,
    "count = all that trains": count_of_all,
    "files: bit for bit": file_round_trip,
}
BASED_NODES = "nodes of the base are its own"
