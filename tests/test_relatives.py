"""Relatives of the presets: dW by the formula of the paper, written out in numpy, counts by its rule, zero at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np
import pytest
import torch
from models import TARGETS, Tiny, noise, perturb, seeded
from strategies import Case, node_tensors

import superlora_tn as sl
from superlora_tn.network import relatives
from superlora_tn.network.relatives import RELATIVES

OUT, IN, R, HEADS = 12, 16, 3, 4
NAMES = [f"layers.{k}.{t}" for k in range(2) for t in "qv"]
SHAPES = dict.fromkeys(NAMES, (OUT, IN))
Array = np.ndarray
Values = Mapping[str, Array]
M, L, T = 4, 2, 2


def train(cores: list[Array]) -> Array:
    """The full tensor of a tensor train."""
    return reduce(lambda a, b: np.tensordot(a, b, axes=1), cores)


def circuit(values: Values, term: str, axes: tuple[int, ...]) -> Array:
    """QuanTA's circuit on x in so many axes, as its code runs it: the last two meet first, by a gate (out, out, in, in)."""
    x = np.eye(int(np.prod(axes))).reshape(-1, *axes)
    for b in range(len(axes), 1, -1):
        for a in range(b - 1, 0, -1):
            x = np.moveaxis(np.tensordot(x, values[f"{term}G{a}{b}"], axes=((a, b), (2, 3))), (-2, -1), (a, b))
    return x.reshape(len(x), -1).T


def khatri_rao(slow: Array, fast: Array) -> Array:
    """Column by column the Kronecker product."""
    return np.stack([np.kron(*columns) for columns in zip(slow.T, fast.T, strict=True)], 1)


# name -> (declaration, dW of weight number m from the nodes' values, trainable numbers of the four weights)
FORMULAS: Mapping[str, tuple[sl.AdapterSpec, Callable[[Values, int], Array], int]] = {
    "adalora": (relatives.adalora(R), lambda v, m: v["P"] @ np.diag(v["lam"]) @ v["Q"], M * R * (OUT + IN + 1)),
    "lora_fa": (relatives.lora_fa(R), lambda v, m: v["B"] @ v["A"], M * R * OUT),
    "krona": (relatives.krona(), lambda v, m: np.kron(v["k1_weight"], v["k2_weight"]), M * (3 * 4 + 4 * 4)),
    "fact_tt": (relatives.fact_tt(R), lambda v, m: v["U"] @ v["G"][m] @ v["V"].T, R * (OUT + IN) + M * R * R),
    "fact_tk": (
        relatives.fact_tk(R, 2),
        lambda v, m: v["U"] @ np.tensordot(v["P"][m], v["C"], axes=1) @ v["V"].T,
        R * (OUT + IN) + M * 2 + 2 * R * R,
    ),
    "lorta_cp": (
        relatives.lorta_cp(R),
        lambda v, m: (v["factor_out"] * v["factor_layer"][m // 2] * v["factor_type"][m % 2]) @ v["factor_in"].T,
        R * (L + T + OUT + IN),
    ),
    "lorta_cp with heads": (
        relatives.lorta_cp(R, HEADS),
        lambda v, m: np.concatenate(
            [
                (v["factor_out"] * h * v["factor_layer"][m // 2] * v["factor_type"][m % 2]) @ v["factor_in"].T
                for h in v["factor_head"]
            ]
        ),
        R * (L + T + HEADS + OUT // HEADS + IN),
    ),
    "cara": (
        relatives.cara(R, HEADS),
        lambda v, m: np.concatenate([(v["B"] * v["lam"] * v["M"][m] * h) @ v["A"].T for h in v["H"]]),
        R * (1 + M + HEADS + OUT // HEADS + IN),
    ),
    "tenslora": (
        relatives.tenslora((2, 2, 3, 4)),
        lambda v, m: (
            v["factor_out"]
            @ np.einsum("abrs,a,b->rs", v["core"], v["factor_layer"][m // 2], v["factor_type"][m % 2])
            @ v["factor_in"].T
        ),
        2 * 2 * 3 * 4 + 2 * L + 2 * T + 3 * OUT + 4 * IN,
    ),
    "metatt": (
        relatives.metatt(R),
        lambda v, m: (v["core_in"] @ v["core_layer"][:, m // 2] @ v["core_type"][:, m % 2] @ v["core_out"]).T,
        R * (IN + OUT) + R * R * (L + T),
    ),
    "metatt with heads": (
        relatives.metatt(R, HEADS),
        lambda v, m: np.concatenate(
            [
                (v["core_in"] @ v["core_layer"][:, m // 2] @ v["core_type"][:, m % 2] @ v["core_head"][:, h] @ v["core_out"]).T
                for h in range(HEADS)
            ]
        ),
        R * (IN + OUT // HEADS) + R * R * (L + T + HEADS),
    ),
    "tt_lora": (
        relatives.tt_lora(R, 2),
        lambda v, m: train([v[f"G{k}"] for k in range(1, 5)]).reshape(OUT, IN),
        M * (3 * R + R * 4 * R + R * 4 * R + R * 4),
    ),
    "loretta": (
        relatives.loretta(R, 2, 2),
        lambda v, m: train([v["B1"], v["B2"]]).reshape(OUT, R) @ train([v["A1"], v["A2"]]).reshape(IN, R).T,
        M * (3 * 2 + 2 * 4 * R + 4 * 2 + 2 * 4 * R),
    ),
    "tied_lora": (
        relatives.tied_lora(R),
        lambda v, m: np.diag(v["v"][m]) @ v["B"] @ np.diag(v["u"][m]) @ v["A"],
        R * (OUT + IN) + M * (OUT + R),
    ),
    "share_lora": (relatives.share_lora(R), lambda v, m: v["B"][m] @ v["A"], R * (M * OUT + IN)),
    "compacter": (
        relatives.compacter(R, 2),
        lambda v, m: sum(np.kron(v["A"][n], v["S"][m, n] @ v["T"][m, n]) for n in range(2)),
        2**3 + M * R * (OUT + IN),
    ),
    "gralora": (
        relatives.gralora(R, 2),
        lambda v, m: np.block([[v["B"][a, b] @ v["A"][a, b] for b in range(2)] for a in range(2)]),
        M * R * 2 * (OUT + IN),
    ),
    "gralora with its hybrid part": (
        relatives.gralora(R, 2, 5),
        lambda v, m: (
            np.block([[v["t1_B"][a, b] @ v["t1_A"][a, b] for b in range(2)] for a in range(2)]) + v["t2_H"] @ v["t2_G"]
        ),
        M * (R * 2 + 5) * (OUT + IN),
    ),
    "kradapter": (
        relatives.kradapter(5),  # 12 outputs in 3 x 5
        lambda v, m: khatri_rao(v["V"], v["U"])[:OUT],
        M * IN * (5 + 3),
    ),
    "kradapter with its even split": (  # the root of 12 rounded down, and what it takes
        relatives.kradapter(),
        lambda v, m: khatri_rao(v["V"].reshape(4, IN), v["U"].reshape(3, IN)),
        M * IN * (3 + 4),
    ),
    "kradapter with its inputs split": (
        relatives.kradapter(3, side="in"),
        lambda v, m: khatri_rao(v["V"].T, v["U"].T)[:IN].T,
        M * OUT * (3 + 6),
    ),
    "quan_ta": (  # out in 2 x 2 x 3, in in 2 x 2 x 4
        relatives.quan_ta(),
        lambda v, m: circuit(v, "t1_", (2, 2, 4)) - circuit(v, "t2_", (2, 2, 4)),
        M * (2 * 4 * 2 * 4 + 2 * 3 * 2 * 4 + 2 * 2 * 2 * 2),
    ),
    "quan_ta with four axes": (  # out in 1 x 2 x 2 x 3
        relatives.quan_ta(4),
        lambda v, m: circuit(v, "t1_", (2, 2, 2, 2)) - circuit(v, "t2_", (2, 2, 2, 2)),
        M * 4 * (2 * 2 + 2 * 2 + 2 * 3 + 2 * 2 + 2 * 2 + 1 * 2),
    ),
    "quan_ta with given axes": (  # 24 positions, of which 12 and 16 are kept
        relatives.quan_ta((2, 3, 4)),
        lambda v, m: (circuit(v, "t1_", (2, 3, 4)) - circuit(v, "t2_", (2, 3, 4)))[:OUT, :IN],
        M * (12**2 + 8**2 + 6**2),
    ),
    "miss with a cropped repetition": (
        relatives.miss(5),
        lambda v, m: (np.tile(v["D"], (1, 4)) * np.repeat(v["repeat"], 5))[:, :IN],
        M * 5 * OUT,
    ),
    "miss": (relatives.miss(4), lambda v, m: np.tile(v["D"], (1, IN // 4)) * np.repeat(v["repeat"], 4), M * 4 * OUT),
    "randlora": (
        relatives.randlora(R, 2),
        lambda v, m: sum(v["B"][n] @ np.diag(v["lam"][m, n]) @ v["A"] @ np.diag(v["gam"][m, n]) for n in range(2)),
        M * 2 * (R + IN),
    ),
    "tera": (
        relatives.tera(R),
        lambda v, m: reduce(
            lambda whole, k: np.moveaxis(np.tensordot(v[f"U{k}"] * v[f"d{k}"][m], whole, axes=(1, k - 1)), 0, k - 1),
            (1, 2, 3, 4),
            v["G"],
        ).reshape(OUT, IN),
        2 * M * 2 * R,
    ),
    "abba": (
        relatives.abba(2, R),
        lambda v, m: (v["h1_factor_out"] @ v["h1_factor_in"].T) * (v["h2_factor_out"] @ v["h2_factor_in"].T),
        M * (2 + R) * (OUT + IN),
    ),
    "hira": (relatives.hira(R), lambda v, m: v["W"] * (v["B"] @ v["A"]), M * R * (OUT + IN)),
    "lora_xs": (relatives.lora_xs(R), lambda v, m: v["U"] @ np.diag(v["S"]) @ v["R"] @ v["V"], M * R * R),
    "svft": (relatives.svft(R), lambda v, m: v["U"] @ np.diag(v["m"]) @ v["V"], M * R),
}


def test_every_relative_is_written_out_here() -> None:
    assert {name.split(" with")[0] for name in FORMULAS} == set(RELATIVES)


@pytest.mark.parametrize("name", FORMULAS)
def test_dw_is_the_papers_formula_and_the_count_its_rule(name: str) -> None:
    spec, formula, count = FORMULAS[name]
    assert spec.count(SHAPES) == count
    for bound in Case(spec, SHAPES).bound():
        values = {node: tensor.detach().numpy() for node, tensor in node_tensors(bound.adapter).items()}
        for target in bound.targets:
            expected = formula(values, NAMES.index(target))
            # float64 sums of at most 64 products of normal numbers, in another order.
            np.testing.assert_allclose(bound.adapter.delta(target).detach().numpy(), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_relative_starts_at_zero_and_trains_saves_and_merges(name: str, tmp_path: object) -> None:
    spec = FORMULAS[name][0]
    targets = ["q_proj", "v_proj"] if "layer" in getattr(spec.fold, "modes", "") else TARGETS
    model = seeded(0, Tiny).double()
    x = noise(2, 3, 12, dtype=torch.float64)
    before = model(x)
    tuned = sl.attach(model, spec, targets, dtype=torch.float64, seed=0)
    # A circuit and its frozen copy cancel but for the order of a few sums; a node of zeros leaves nothing at all.
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-14 if "quan_ta" in name else 0)
    model(x).pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in tuned.parameters())
    perturb(tuned)
    y = model(x)
    tuned.save(tmp_path)  # type: ignore[arg-type]
    other = seeded(0, Tiny).double()
    sl.load(other, tmp_path)  # type: ignore[arg-type]
    assert torch.equal(other(x), y)
    tuned.merge()
    torch.testing.assert_close(model(x), y)
