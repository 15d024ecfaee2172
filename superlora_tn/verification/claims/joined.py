"""Updates that are not added: adapted layers and merged weights by the join's formula, the network's matrix by the textbook."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from superlora_tn.declare.joins import Magnitude, Multiply
from superlora_tn.declare.parts import SpecError
from superlora_tn.model.attach import attach
from superlora_tn.update.base import Adapter
from superlora_tn.verification.cases import DTYPES, Case, NotApplicable, Sized, as_array, fill, linear_model, ratio
from superlora_tn.verification.references.textbook import Array


def joins(case: Case) -> float:
    """Outputs, also where the weight is read, and merged weights are those of W' by its formula.

    The bound: each element of W' is a sum of products whose absolute values are summed likewise; of magnitudes, the norm of a
    row is off by as much as its square's terms, over that square.
    """
    join, shapes = case.spec.join, dict(case.shapes)
    if join is None:
        raise NotApplicable
    case = case.in_order_of(linear_model(shapes, DTYPES[case.dtype], case.seed))
    try:
        groups = case.of_network().groups()
    except SpecError as error:  # sizes of a network that fit the weight, and not (out, out) or (in, in)
        raise NotApplicable from error
    worst, dtype = 0.0, DTYPES[case.dtype]
    places: tuple[Literal["weight"] | None, ...] = (None, "weight")
    for at in places:
        model = linear_model(shapes, dtype, case.seed)
        handle = attach(model, case.spec, list(shapes), dtype=dtype, seed=case.seed, at=at).eval()
        adapters = {tuple(a.group.members): a for a in handle.adapters}  # type: ignore[union-attr, arg-type]
        for sized in groups:
            adapter = adapters[tuple(sized.shapes)]
            assert isinstance(adapter, Adapter)
            fill(adapter, sized.values)
            networks, sizes = sized.formula(), sized.magnitude()
            for target in sized.shapes:
                layer = model.get_submodule(target)
                weight = as_array(layer._parameters["weight"])  # type: ignore[arg-type]
                scales = _magnitudes(case, adapter, target)
                whole, allowed = _formula(join, sized, weight, (networks[target], sizes[target]), scales)
                x = case.activation(weight.shape[1])
                found = layer(torch.from_numpy(x).to(dtype))
                size = np.abs(x) @ (allowed + (x.shape[-1] + 2) * sized.unit * np.abs(whole)).T
                worst = max(worst, ratio(as_array(found), x @ whole.T, size))
                handle.merge()
                merged = as_array(layer._parameters["weight"])  # type: ignore[arg-type]
                handle.unmerge()
                worst = max(worst, ratio(merged, whole, allowed))
    return worst


def _magnitudes(case: Case, adapter: Adapter, target: str) -> Array | None:
    """Drawn magnitudes of a weight's rows, written into the adapter, exact in the case's dtype."""
    if case.spec.join is None or not case.spec.join.has_rows:
        return None
    own = adapter.members[target].magnitude()
    drawn = np.random.default_rng(case.seed + 7).uniform(0.5, 2.0, own.shape).astype(case.dtype)
    with torch.no_grad():
        own.copy_(torch.from_numpy(drawn))
    return drawn.astype(np.float64)


def _formula(
    join: Magnitude | Multiply, sized: Sized, weight: Array, network: tuple[Array, Array], scales: Array | None
) -> tuple[Array, Array]:
    """W' (out, in), and how far each of its elements may be off, from the network's matrix and its terms' absolute values."""
    matrix, size = network
    off = (sized.roundings + 8 * (sum(weight.shape) + 8)) * sized.unit
    if isinstance(join, Magnitude):
        assert scales is not None
        whole, terms = weight + matrix, np.abs(weight) + size
        square = (whole**2).sum(1)
        factor = scales / np.sqrt(square)
        return factor[:, None] * whole, off * factor[:, None] * terms * (1 + (terms**2).sum(1) / square)[:, None]
    turn, terms = (matrix, size) if not join.residual else (np.eye(len(matrix)) + matrix, np.eye(len(matrix)) + size)
    factor = np.ones(len(weight)) if scales is None else scales
    if join.side == "left":
        return factor[:, None] * (turn @ weight), 2 * off * factor[:, None] * (terms @ np.abs(weight))
    return factor[:, None] * (weight @ turn), 2 * off * factor[:, None] * (np.abs(weight) @ terms)
