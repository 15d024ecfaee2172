"""Several adapters as one: exact sums, merges that settle conflicts, and what PEFT's `add_weighted_adapter` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import noise, perturb
from optional import library
from safetensors.torch import save_file
from torch import Tensor, nn

import superlora_tn as sl

# Of the sums: rounding of float64 alone, over at most 32 terms of a few units.
EXACT = 1e-12


def train(ranks: tuple[int, ...]) -> sl.AdapterSpec:
    return sl.AdapterSpec(sl.TensorTrain(ranks, over="cap"), sl.PhysicalFold("member out in"))


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(10, 12), "b": nn.Linear(10, 12), "c": nn.Linear(6, 8)}).double()


def carrying(first: sl.AdapterSpec, second: sl.AdapterSpec, targets: tuple[Any, Any] = ("[abc]", "[abc]")) -> nn.ModuleDict:
    model = net()
    for k, (name, spec) in enumerate((("style", first), ("subject", second))):
        perturb(sl.attach(model, spec, targets[k], name=name, dtype=torch.float64, seed=k), seed=k)
    return model


def wanted(model: nn.Module, weights: dict[str, float]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        handle = sl.tuned(model, name)
        for target in handle.targets:
            delta = weight * handle.delta(target).detach().numpy()
            found[target] = found.get(target, 0) + delta
    return found


SAME = {
    "lora": (sl.lora(2, alpha=3), sl.lora(3, alpha=1, rslora=True), {"rank": 5}),
    "lotr": (sl.lotr(2), sl.lotr(3, alpha=2), {"rank": 5}),
    "cp": (sl.lorta_cp(2), sl.lorta_cp(4), {"rank": 6}),
    "train": (train((2, 3)), train((1, 2)), {"rank": (3, 5)}),
    "flat": (sl.lorta(2, groups=2), sl.lorta(2, groups=2, alpha=4), {"rank": 4}),
    "dense": (sl.dense(), sl.dense(alpha=2), {}),
    "fact": (sl.fact_tt(2), sl.fact_tt(1), {}),
    "share": (sl.share_lora(2), sl.share_lora(2), {}),
}
WEIGHTS = {"style": 0.7, "subject": -1.3}


@pytest.mark.parametrize("case", SAME)
def test_the_sum_of_one_structure_is_exact_and_of_that_structure(case: str, tmp_path: Path) -> None:
    first, second, more = SAME[case]
    model = carrying(first, second)
    expected = wanted(model, WEIGHTS)
    found = sl.combine(WEIGHTS, model=model)
    assert found.error < EXACT
    assert {type(e.spec.network) for e in found.entries} == {type(first.network)}
    assert all(e.spec.fold == first.fold for e in found.entries)
    for name, value in more.items():
        assert getattr(found.entries[0].spec.network, name) == value
    for name, delta in found.deltas().items():
        np.testing.assert_allclose(delta.numpy(), expected[name], atol=1e-12)

    handle = found.attach(model, "both", dtype=torch.float64)
    x = noise(4, 10, dtype=torch.float64)
    with sl.use(model, WEIGHTS):
        before = model["a"](x)
    with sl.use(model, "both"):
        torch.testing.assert_close(model["a"](x), before, rtol=1e-5, atol=1e-5)  # attached from float64, through the file
    assert set(handle.targets) == set("abc")

    for name in WEIGHTS:
        sl.tuned(model, name).save(tmp_path / name)
    again = sl.combine({str(tmp_path / name): weight for name, weight in WEIGHTS.items()})
    for name, delta in again.deltas().items():
        np.testing.assert_allclose(delta.numpy(), expected[name], atol=1e-12)


OTHERS = {
    "lora and loha": (sl.lora(2), sl.loha(1), ("[abc]", "[abc]")),
    "lora and lokr": (sl.lora(2, alpha=3), sl.lokr(2), ("[abc]", "[bc]")),
    "other targets": (sl.lora(2), sl.lora(2), ("[ab]", "[bc]")),
    "vera": (sl.vera(2), sl.vera(2), ("[abc]", "[abc]")),
    "flat and lotr": (sl.lorta(2), sl.lotr(2), ("[abc]", "[ab]")),
    "loha": (sl.loha(1), sl.loha(2), ("[abc]", "[abc]")),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_sum_of_others_is_exact_through_thin_factors(case: str) -> None:
    model = carrying(*OTHERS[case])
    found = sl.combine(WEIGHTS, model=model)
    expected = wanted(model, WEIGHTS)
    assert found.error < EXACT
    assert set(found.errors) == set(expected)
    for name, delta in found.deltas().items():
        np.testing.assert_allclose(delta.numpy(), expected[name], atol=1e-12)


def test_ranks_add_where_structures_differ() -> None:
    model = carrying(sl.lora(1), sl.loha(1), ("a", "[ab]"))
    found = sl.combine(WEIGHTS, model=model)
    assert {tuple(e.targets): e.spec.network.rank for e in found.entries} == {("a",): 2, ("b",): 1}


def svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def test_svd_is_the_nearest_of_a_rank_and_says_how_near() -> None:
    model = carrying(sl.lora(2), sl.lora(3))
    expected = wanted(model, WEIGHTS)
    for rank in (None, 2):
        found = sl.combine(WEIGHTS, "svd", model=model, rank=rank)
        for name, delta in found.deltas().items():
            best = svd(expected[name], rank or 3)
            np.testing.assert_allclose(delta.numpy(), best, atol=1e-9)
            missed = np.linalg.norm(best - expected[name]) / np.linalg.norm(expected[name])
            assert found.errors[name] == pytest.approx(missed, rel=1e-6)
    other = sl.combine(WEIGHTS, "svd", model=model, to=sl.lotr(4))
    assert 0 < other.error < 1
    assert other.entries[0].spec == sl.lotr(4)


def large(delta: np.ndarray, density: float) -> np.ndarray:
    kept = np.zeros(delta.size)
    kept[np.argsort(-np.abs(delta), axis=None)[: int(density * delta.size)]] = 1
    return delta * kept.reshape(delta.shape)


@pytest.mark.parametrize("how", ["ties", "magnitude"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_pruned_merges_are_their_papers(how: Any, density: float) -> None:
    model = carrying(sl.lora(2), sl.lora(3))
    found = sl.combine(WEIGHTS, how, model=model, to=sl.dense(), density=density)
    assert found.error < EXACT
    for name, delta in found.deltas().items():
        parts = [large(sl.tuned(model, n).delta(name).detach().numpy(), density) for n in WEIGHTS]
        total = parts[0] + parts[1]
        if how == "ties":
            winner = np.where(total >= 0, 1, -1)
            expected = np.zeros_like(total)
            for k in np.ndindex(total.shape):
                own = [w * p[k] for w, p in zip(WEIGHTS.values(), parts, strict=True) if np.sign(p[k]) == winner[k]]
                expected[k] = sum(own) / max(len(own), 1)
        else:
            expected = sum(w * p for w, p in zip(WEIGHTS.values(), parts, strict=True))
        np.testing.assert_allclose(delta.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("how", ["dare", "dare_ties"])
def test_dare_drops_by_chance_and_keeps_the_mean(how: Any) -> None:
    model = carrying(sl.lora(2), sl.lora(3), ("a", "a"))
    dare = [sl.combine({"style": 1.0}, how, model=model, to=sl.dense(), density=0.4, seed=k).deltas()["a"] for k in range(400)]
    delta = sl.tuned(model, "style").delta("a").detach()
    for one in dare[:5]:
        kept = one != 0
        torch.testing.assert_close(one[kept], (delta / 0.4)[kept])
    assert not torch.equal(dare[0], dare[1])
    again = sl.combine({"style": 1.0}, how, model=model, to=sl.dense(), density=0.4, seed=0).deltas()["a"]
    assert torch.equal(again, dare[0])
    # A kept number's variance is delta^2 (1/0.4 - 1); six standard deviations of the mean of 400, for 120 numbers.
    assert bool(((torch.stack(dare).mean(0) - delta).abs() < 6 * delta.abs() * (1.5 / 400) ** 0.5).all())


@pytest.mark.parametrize(
    ("how", "theirs", "density", "on"),
    [
        ("cat", "cat", 1.0, "delta"),
        ("svd", "svd", 1.0, "delta"),
        ("ties", "ties_svd", 0.4, "delta"),
        ("magnitude", "magnitude_prune_svd", 0.4, "delta"),
        ("dare", "dare_linear_svd", 1.0, "delta"),
        ("dare_ties", "dare_ties_svd", 1.0, "delta"),
        ("linear", "linear", 1.0, "nodes"),
        ("ties", "ties", 0.4, "nodes"),
        ("magnitude", "magnitude_prune", 0.4, "nodes"),
        ("dare", "dare_linear", 1.0, "nodes"),
        ("dare_ties", "dare_ties", 1.0, "nodes"),
    ],
)
@pytest.mark.filterwarnings("ignore:The density")
def test_combinations_are_pefts(how: Any, theirs: str, density: float, on: Any) -> None:
    ranks = (3, 3) if on == "nodes" else (2, 3)
    peft = library("peft")
    model = net()
    wrapped = peft.get_peft_model(
        net(), peft.LoraConfig(r=ranks[0], lora_alpha=3, target_modules=["a", "b"]), adapter_name="style"
    )
    wrapped.add_adapter("subject", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["a", "b"]))
    own = wrapped.base_model.model
    for seed, (name, rank) in enumerate(zip(("style", "subject"), ranks, strict=True)):
        handle = sl.attach(model, sl.lora(rank, alpha=3), ["a", "b"], name=name, dtype=torch.float64)
        perturb(handle, seed=seed)
        nodes = [p.detach() for p in handle.parameters()]
        with torch.no_grad():
            for k, target in enumerate("ab"):
                own[target].lora_B[name].weight.data = nodes[2 * k].clone()
                own[target].lora_A[name].weight.data = nodes[2 * k + 1].T.clone()
    more: dict[str, Any] = {} if how in ("cat", "svd", "linear") else {"density": density}
    wrapped.add_weighted_adapter(["style", "subject"], [0.7, -0.3], "both", combination_type=theirs, **more)
    found = sl.combine({"style": 0.7, "subject": -0.3}, how, model=model, density=density, on=on)
    for target, delta in found.deltas().items():
        # PEFT keeps the new nodes in float32.
        expected: Tensor = own[target].get_delta_weight("both").detach().double()
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_combined_says_why(tmp_path: Path) -> None:
    model = carrying(sl.lora(2), sl.dense())
    for weights, how, more, error, said in (
        ({"style": 1.0}, "sum", {}, sl.SpecError, "choose of cat, svd"),
        ({}, "cat", {}, sl.SpecError, r"given {}; give weights by name"),
        ({"styl": 1.0}, "cat", {}, sl.AttachError, "carries no adapter named 'styl'"),
        ({"style": float("nan")}, "cat", {}, sl.SpecError, "weight of 'style'"),
        ({"style": 1.0}, "ties", {"density": 0.0}, sl.SpecError, "above 0 and at most 1"),
        ({"style": 1.0}, "linear", {}, sl.SpecError, "say on='nodes'"),
        ({"style": 1.0}, "cat", {"on": "nodes"}, sl.SpecError, "merges nodes as they are"),
        ({"style": 1.0, "subject": 1.0}, "ties", {"on": "nodes"}, sl.SpecError, "of one declaration"),
        ({"style": 1.0}, "cat", {"rank": 2}, sl.SpecError, "choose how='svd'"),
        ({"subject": 1.0}, "svd", {}, sl.SpecError, "without a declared rank"),
        ({"style": 1.0}, "svd", {"to": "lora"}, sl.SpecError, "to='lora'; give a declaration"),
        ({"style": 1.0}, "svd", {"to": sl.lora(3), "rank": 2}, sl.SpecError, "rank=2; a declaration has ranks of its own"),
        ({"style": 1.0}, "dare", {"rank": 2, "seed": "a"}, sl.SpecError, "seed='a'"),
    ):
        with pytest.raises(error, match=said):
            sl.combine(weights, how, model=model, **more)
    beside = sl.attach(net(), sl.lora(2), ["a"], also=["b.bias"])
    beside.save(tmp_path / "beside")
    with pytest.raises(sl.SpecError, match=r"combine was given \['style', 'subject'\]; give weights by name"):
        sl.combine(["style", "subject"], model=model)
    with pytest.raises(sl.CheckpointError, match="beside it"):
        sl.combine({str(tmp_path / "beside"): 1.0})
    beside.detach()
    other = nn.ModuleDict({"a": nn.Linear(4, 4)})
    sl.attach(other, sl.lora(2), ["a"]).save(tmp_path / "other")
    sl.tuned(model, "style").save(tmp_path / "style")
    with pytest.raises(sl.AttachError, match="they are of two bases"):
        sl.combine({str(tmp_path / "other"): 1.0, str(tmp_path / "style"): 1.0})


def test_a_started_adapter_is_combined_with_what_it_departs_from() -> None:
    model = net()
    handle = sl.start(sl.attach(model, sl.lora(2), ["a", "b"], name="style", dtype=torch.float64), sl.pissa())
    perturb(handle)
    found = sl.combine({"style": 2.0}, model=model)
    for name, delta in found.deltas().items():
        np.testing.assert_allclose(delta.numpy(), 2 * handle.delta(name).detach().numpy(), atol=1e-12)
    assert "2 weights" in str(found)


def peft_folder(folder: Path, seed: int, rank: int = 2) -> dict[str, np.ndarray]:
    """Written by PEFT, and dW as its own `get_delta_weight` has it."""
    peft = library("peft")
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(
        net(), peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["a", "b"], init_lora_weights=False)
    )
    wrapped.save_pretrained(str(folder))
    wrapped.double()
    return {n: wrapped.base_model.model[n].get_delta_weight("default").detach().numpy() for n in "ab"}


def lycoris_file(file: Path) -> dict[str, np.ndarray]:
    """A LoKr by LyCORIS' keys, its layers in another order, and dW by its formula: alpha / rank w1 (x) (w2_a w2_b)."""
    generator, tensors, found = torch.Generator().manual_seed(5), {}, {}
    for name, (rows, columns) in {"b": (6, 5), "c": (4, 3)}.items():
        shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (rows, 2), "lokr_w2_b": (2, columns)}
        own = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
        tensors |= {f"lycoris_{name}.{k}": t for k, t in own.items()} | {f"lycoris_{name}.alpha": torch.tensor(3.0)}
        w1, a, b = (t.double().numpy() for t in own.values())
        found[name] = 1.5 * np.kron(w1, a @ b)
    save_file(dict(reversed(tensors.items())), file)
    return found


def added(*terms: tuple[float, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for weight, own in terms:
        for name, delta in own.items():
            found[name] = found.get(name, 0) + weight * delta
    return found


def test_files_of_other_libraries_are_combined(tmp_path: Path) -> None:
    """By path, without a model: the sum of two LoRAs is one of their ranks' sum."""
    first, second = peft_folder(tmp_path / "first", 1), peft_folder(tmp_path / "second", 2, rank=3)
    found = sl.combine({tmp_path / "first": 0.7, tmp_path / "second": -0.3})
    assert found.error < EXACT
    assert {tuple(t.shape) for t in found.tensors.values()} == {(12, 5), (5, 10)}
    for name, wanted_ in added((0.7, first), (-0.3, second)).items():
        np.testing.assert_allclose(found.deltas()[name].numpy(), wanted_, atol=1e-12)
    cut = sl.combine({tmp_path / "first": 0.7, tmp_path / "second": -0.3}, "svd", rank=2)
    for name, wanted_ in added((0.7, first), (-0.3, second)).items():
        np.testing.assert_allclose(cut.deltas()[name].numpy(), svd(wanted_, 2), atol=1e-9)


def test_files_are_mixed_with_what_a_model_carries(tmp_path: Path) -> None:
    """Three origins: PEFT's folder, a file whose names only the model tells, and a live adapter."""
    first, second = peft_folder(tmp_path / "first", 1), lycoris_file(tmp_path / "x.safetensors")
    model = net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    live = sl.attach(model, sl.lotr(2), ["a", "b"], name="style", dtype=torch.float64, seed=0)
    perturb(live)
    own = {name: live.delta(name).detach().numpy() for name in live.targets}
    found = sl.combine({"style": 1.0, tmp_path / "first": 0.5, str(tmp_path / "x.safetensors"): -2.0}, model=model)
    expected = added((1.0, own), (0.5, first), (-2.0, second))
    assert found.deltas().keys() == expected.keys()
    for name, delta in found.deltas().items():
        np.testing.assert_allclose(delta.numpy(), expected[name], atol=1e-12)
    assert set(sl.tuned(model, "style").targets) == {"a", "b"}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    with pytest.raises(sl.CheckpointError, match="the modules are known only with the base model"):
        sl.combine({tmp_path / "first": 0.5, tmp_path / "x.safetensors": 1.0})
    with pytest.raises(sl.AttachError, match="carries no adapter named 'nowhere', and no file is there"):
        sl.combine({"nowhere": 1.0}, model=model)


def in_two_orders(spec: sl.AdapterSpec, folder: Path) -> list[sl.Tuned]:
    """Adapters of one declaration that list their weights as a, b and b, a; saved in folders of these names."""
    found = []
    for k, names in enumerate(("ab", "ba")):
        model = nn.ModuleDict({n: nn.Linear(10, 12) for n in names}).double()
        found.append(sl.attach(model, spec, list(names), dtype=torch.float64, seed=k))
        perturb(found[-1], seed=k)
        assert list(found[-1].targets) == list(names)
        found[-1].save(folder / names)
    return found


@pytest.mark.parametrize("spec", [sl.lora(2), sl.lotr(2), sl.lorta(2, groups=2)], ids=["lora", "lotr", "flat"])
def test_the_order_of_the_weights_does_not_matter(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    first, second = in_two_orders(spec, tmp_path)
    found = sl.combine({tmp_path / "ab": 2.0, tmp_path / "ba": -1.0}).deltas()
    for name in "ab":
        wanted_ = 2.0 * first.delta(name).detach() - second.delta(name).detach()
        np.testing.assert_allclose(found[name].numpy(), wanted_.numpy(), atol=1e-12)


def test_nodes_are_merged_weight_by_weight_whatever_their_order(tmp_path: Path) -> None:
    """B and A of each weight added with the roots of the weights, as PEFT's "linear" does; LoTR has common nodes."""
    handles = in_two_orders(sl.lora(2), tmp_path)
    found = sl.combine({tmp_path / "ab": 2.0, tmp_path / "ba": 3.0}, "linear", on="nodes").deltas()
    for name in "ab":
        own = [[p.detach().numpy() for p in a.parameters()] for h in handles for a in h.adapters if name in a.members]
        b, a = (2.0**0.5 * one + 3.0**0.5 * two for one, two in zip(*own, strict=True))
        np.testing.assert_allclose(found[name].numpy(), b @ a.T, atol=1e-12)
    in_two_orders(sl.lotr(2), tmp_path)
    with pytest.raises(sl.SpecError, match="number their weights in one order"):
        sl.combine({tmp_path / "ab": 2.0, tmp_path / "ba": 3.0}, "linear", on="nodes")


@pytest.mark.parametrize("to", [sl.krona(), sl.conv_lokr()], ids=["krona", "conv_lokr"])
def test_a_sum_over_kernels_is_fitted_with_the_kernels_whole(to: sl.AdapterSpec, tmp_path: Path) -> None:
    """Twice a Kronecker product of channels is one; files tell their kernels, the model those of a LoRA."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv1d(8, 4, 5), nn.Linear(8, 6)).double()
    tuned = sl.attach(model, sl.krona(), ["0", "1", "2"], name="style", dtype=torch.float64, seed=0)
    perturb(tuned)
    tuned.save(tmp_path / "style")
    for found in (sl.combine({tmp_path / "style": 2.0}, "svd", to=to), sl.combine({"style": 2.0}, "svd", to=to, model=model)):
        assert found.error < EXACT
        assert {entry.spec.fold.kernel for entry in found.entries} >= {(3, 3), (5,)}
        for name, delta in found.deltas().items():
            np.testing.assert_allclose(delta.numpy(), 2 * tuned.delta(name).detach().numpy(), rtol=1e-9, atol=1e-11)
    both = found.attach(model, "both", torch.float64)
    for name in both.targets:
        np.testing.assert_allclose(both.delta(name).detach(), 2 * tuned.delta(name).detach(), rtol=1e-9, atol=1e-11)
    other = sl.attach(model, sl.lora(1), ["0"], name="low", dtype=torch.float64, seed=1)
    perturb(other)
    found = sl.combine({"low": 1.0}, "svd", to=sl.conv_lora(1), model=model)
    assert found.entries[0].spec.fold.kernel == (3, 3)
    np.testing.assert_allclose(found.deltas()["0"], other.delta("0").detach(), rtol=1e-9, atol=1e-11)


def test_a_model_without_the_adapters_layers_tells_no_kernels(tmp_path: Path) -> None:
    for seed in (0, 1):
        tuned = sl.attach(nn.Sequential(nn.Linear(8, 6)), sl.lora(2), ["0"], seed=seed)
        perturb(tuned, seed)
        tuned.save(tmp_path / f"{seed}")
    parts = {tmp_path / "0": 0.5, tmp_path / "1": 0.5}
    found = [
        sl.combine(parts, how="svd", to=sl.lokr(1), model=model) for model in (None, nn.ModuleDict({"x": nn.Linear(6, 6)}))
    ]
    assert found[0].errors == found[1].errors
