"""Starts from the weights or the data: the output stays, the start is what its paper and PEFT say, the rest goes on."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import noise, perturb
from optional import library
from saved import body_of, edit_json
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.network.sums import blocks, summed

RANK, ALPHA = 4, 6.0


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12)).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [noise(40, 12, seed=k, dtype=dtype) + 0.3 for k in range(3)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def starts(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "pissa": sl.pissa(),
        "olora": sl.olora(),
        "orthogonal": sl.orthogonal(3),
        "eva": sl.eva(batches(dtype)),
        "corda": sl.corda(batches(dtype)),
        "lora_ga": sl.lora_ga(batches(dtype), loss),
    }


def attached(model: nn.Module, spec: sl.AdapterSpec | None = None, **more: Any) -> sl.Tuned:
    spec = sl.lora(RANK, alpha=ALPHA) if spec is None else spec
    return sl.attach(model, spec, ["0", "2"], dtype=next(model.parameters()).dtype, seed=1, **more)


def pairs(tuned: sl.Tuned) -> list[tuple[Tensor, Tensor]]:
    """B (out, r) and A (r, in) of each weight that train."""
    nodes = [p.detach() for p in tuned.parameters()]
    return [(b, a.T) for b, a in zip(nodes[::2], nodes[1::2], strict=True)]


@pytest.mark.parametrize("name", starts())
def test_the_output_stays_and_everything_is_as_before(name: str, tmp_path: Path) -> None:
    model = net()
    x, weights = noise(5, 12, seed=9, dtype=torch.float64), copy.deepcopy(model.state_dict())
    before = model(x)
    tuned = attached(model)
    count = tuned.num_parameters
    assert sl.start(tuned, starts()[name]) is tuned
    torch.testing.assert_close(model(x), before)
    assert tuned.num_parameters == count == sum(p.numel() for p in tuned.parameters())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())

    # It trains, and forward, dW, merge and files are one thing.
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for batch in batches():
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-4)
    functional = copy.deepcopy(weights)
    for target in ("0", "2"):
        functional[f"{target}.weight"] += tuned.delta(target).detach()
    torch.testing.assert_close(torch.func.functional_call(net(), functional, x), after)
    tuned.merge()
    torch.testing.assert_close(model(x), after)
    tuned.unmerge()
    tuned.save(tmp_path / "own")
    tuned.save(tmp_path / "peft", format="peft")
    tuned.replace(tmp_path / "own")
    torch.testing.assert_close(model(x), after)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), after)
    tuned.detach()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    for folder in ("own", "peft"):
        again = sl.load(model, tmp_path / folder)
        torch.testing.assert_close(model(x), after)
        # PEFT's format has no half that does not train.
        assert again.num_parameters == (count if folder == "own" or name in ("orthogonal", "eva") else 2 * count)
        again.detach()


@pytest.mark.parametrize("name", starts())
def test_a_state_dict_goes_on_where_it_stopped(name: str) -> None:
    model = net()
    perturb(sl.start(attached(model), starts()[name]))
    again = net()
    sl.start(attached(again), starts()[name])
    again.load_state_dict(model.state_dict())
    x = noise(5, 12, seed=9, dtype=torch.float64)
    assert torch.equal(again(x), model(x))


def train(tuned: sl.Tuned, model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
    for k in range(steps):
        optimizer.zero_grad()
        loss(model, batches(next(model.parameters()).dtype)[k % 3]).backward()
        optimizer.step()


SAVED = {
    "lora": (sl.lora(RANK, alpha=ALPHA), sl.pissa(), torch.float64),
    "lora in float32": (sl.lora(RANK, alpha=ALPHA, rslora=True), sl.olora(), torch.float32),
    "lotr": (sl.lotr(3), sl.pissa(), torch.float64),
    "flat": (sl.lorta(2, groups=2), sl.pissa(), torch.float64),
    "no departure": (sl.lora(RANK), sl.orthogonal(2), torch.float64),
    "the base's vectors": (sl.lora_xs(RANK), sl.pissa(), torch.float64),
    "the base's values too": (sl.svft(RANK), sl.pissa(), torch.float32),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_loaded_start_trains_on_as_if_it_had_not_been_saved(case: str, tmp_path: Path) -> None:
    """Bit for bit: the same half trains, and the other is the start still."""
    spec, how, dtype = SAVED[case]
    model = net(dtype)
    tuned = sl.start(attached(model, spec), how)
    first = [p.detach().clone() for p in tuned.parameters()]
    train(tuned, model, 3)
    tuned.save(tmp_path)
    other = net(dtype)
    again = sl.load(other, tmp_path)
    assert again.num_parameters == tuned.num_parameters == sum(p.numel() for p in again.parameters())
    assert again.entries == tuned.entries
    for own, handle in ((model, tuned), (other, again)):
        train(handle, own, 4)
        handle.save(tmp_path / f"{id(handle)}")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), tuned.parameters(), strict=True))
    assert all(torch.equal(again.delta(n), tuned.delta(n)) for n in tuned.targets)
    assert (tmp_path / f"{id(tuned)}" / "adapter.json").read_bytes() == (
        tmp_path / f"{id(again)}" / "adapter.json"
    ).read_bytes()
    again.replace(tmp_path)
    tuned.replace(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), tuned.parameters(), strict=True))
    if how.departs:
        again.reset_parameters()
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), first, strict=True))


def test_only_a_departure_needs_a_newer_reader(tmp_path: Path) -> None:
    """Everything else is written as before; in an older schema the new field is none."""
    attached(net()).save(tmp_path / "plain")
    sl.start(attached(net()), sl.orthogonal(1)).save(tmp_path / "orthogonal")
    sl.start(attached(net()), sl.pissa()).save(tmp_path / "pissa")
    assert [body_of(tmp_path / n)["schema"] for n in ("plain", "orthogonal", "pissa")] == [2, 2, 3]
    for change, words in (
        (lambda body: body.update(schema=2), "expected a list of dicts of spec and targets"),
        (lambda body: body["entries"][0].update(trains=sl.lora(3).to_dict()), "the sum of two of these is not"),
        (lambda body: body["entries"][0].update(trains=sl.lokr(3).to_dict()), "no network of their form"),
        (lambda body: body["entries"][0].update(trains=None), "expected"),
        (lambda body: body["entries"][0].update(trains=[1]), "expected"),
    ):
        folder = Path(shutil.copytree(tmp_path / "pissa", tmp_path / f"changed {words[:9]}", dirs_exist_ok=True))
        edit_json(folder, change)
        model = net()
        with pytest.raises(sl.CheckpointError, match=words):
            sl.load(model, folder)
        assert all(torch.equal(v, w) for v, w in zip(model.state_dict().values(), net().state_dict().values(), strict=True))


def test_reset_goes_back_to_the_start() -> None:
    model = net()
    tuned = sl.start(attached(model), sl.pissa())
    first = [p.detach().clone() for p in tuned.parameters()]
    perturb(tuned)
    tuned.reset_parameters()
    assert all(torch.equal(p, value) for p, value in zip(tuned.parameters(), first, strict=True))


def test_pissa_is_the_nearest_of_its_rank() -> None:
    model = net()
    tuned = sl.start(attached(model), sl.pissa())
    for (b, a), layer in zip(pairs(tuned), (model[0], model[2]), strict=True):
        u, s, v = np.linalg.svd(layer.weight.detach().numpy())
        np.testing.assert_allclose(ALPHA / RANK * (b @ a).numpy(), u[:, :RANK] * s[:RANK] @ v[:RANK], atol=1e-12)
        # Balanced: B'B = AA'.
        np.testing.assert_allclose((b.T @ b).numpy(), (a @ a.T).numpy(), atol=1e-12)


def test_olora_is_a_part_of_qr() -> None:
    model = net()
    tuned = sl.start(attached(model), sl.olora())
    for (b, a), layer in zip(pairs(tuned), (model[0], model[2]), strict=True):
        np.testing.assert_allclose((b.T @ b).numpy(), np.eye(RANK), atol=1e-12)
        np.testing.assert_allclose(a.numpy(), (b.T @ layer.weight.detach()).numpy(), atol=1e-12)


def test_orthogonal_halves() -> None:
    for b, a in pairs(sl.start(attached(net()), sl.orthogonal(5))):
        assert min(float(b.norm()), float(a.norm())) > 0.1
        assert float((b @ a).norm()) < 1e-14
    with pytest.raises(sl.SpecError, match="choose an even one"):
        sl.start(attached(net(), sl.lora(3)), sl.orthogonal())
    with pytest.raises(sl.SpecError, match="orthogonal was given seed='a'"):
        sl.orthogonal("a")


@pytest.mark.parametrize("start", [sl.eva, sl.corda, lambda batches: sl.lora_ga(batches, torch.sum)])
def test_batches_and_losses_of_a_wrong_kind_are_refused(start: Callable[[Any], Any]) -> None:
    with pytest.raises(sl.SpecError, match="batches=3; give a list of inputs"):
        start(3)
    with pytest.raises(sl.SpecError, match="loss=None; give a function"):
        sl.lora_ga([], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("whiten", [False, True])
def test_eva_is_a_principal_component_analysis(whiten: bool) -> None:
    model = net()
    inputs = {0: torch.cat(batches()), 1: model[:2](torch.cat(batches())).detach()}
    tuned = sl.start(attached(model), sl.eva(batches(), whiten))
    for k, (b, a) in enumerate(pairs(tuned)):
        x = inputs[k].numpy()
        _, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
        expected = v[:RANK] / (np.sqrt(s[:RANK, None]) if whiten else 1)
        # A vector's sign is free.
        np.testing.assert_allclose(np.abs(a.numpy()), np.abs(expected), atol=1e-9)
        assert not b.any()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_of_the_weight_on_its_inputs(method: str) -> None:
    model = net()
    inputs = (torch.cat(batches()), model[:2](torch.cat(batches())).detach())
    tuned = sl.start(attached(model), sl.corda(batches(), method))
    for (b, a), x, layer in zip(pairs(tuned), inputs, (model[0], model[2]), strict=True):
        moments = (x.T @ x / len(x)).numpy()
        moments += 0.01 * np.diag(moments).mean() * np.eye(len(moments))
        u, s, v = np.linalg.svd(layer.weight.detach().numpy() @ moments, full_matrices=False)
        own = slice(0, RANK) if method == "ipm" else slice(len(s) - RANK, None)
        expected = u[:, own] * s[own] @ v[own] @ np.linalg.inv(moments)
        np.testing.assert_allclose(ALPHA / RANK * (b @ a).numpy(), expected, atol=1e-10)
    with pytest.raises(sl.SpecError, match="choose 'ipm' or 'kpm'"):
        sl.corda([], "up")


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_is_from_the_gradient(direction: str, scale: str) -> None:
    model, plain = net(), net()
    for batch in batches():
        loss(plain, batch).backward()
    tuned = sl.start(attached(model), sl.lora_ga(batches(), loss, direction, scale))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "superlora" not in n)
    for (b, a), layer in zip(pairs(tuned), (plain[0], plain[2]), strict=True):
        gradient, weight = layer.weight.grad.numpy(), layer.weight.detach().numpy()
        u, s, v = np.linalg.svd(gradient)
        numbers = np.arange(2 * RANK)
        of_b, of_a = {
            "ArB2r": (numbers[RANK:], numbers[:RANK]),
            "A2rBr": (numbers[:RANK], numbers[RANK:]),
            "ArBr": (numbers[::2], numbers[1::2]),
        }[direction]
        b_scale, a_scale = {
            "stable": (len(weight) ** 0.25 / 4, 1),
            "weight_svd": (np.linalg.norm(weight, 2) / s[of_b[0]], 1),
            "gd_scale": (RANK / ALPHA, RANK / ALPHA),
            "unit": (1, 1),
        }[scale]
        # The sign of a pair of vectors is free, and B and A take theirs from different pairs.
        bound = 1e-9 * float(b.abs().max())
        np.testing.assert_allclose(np.abs(b.numpy()), np.abs(b_scale * u[:, of_b] * s[of_b]), atol=bound)
        np.testing.assert_allclose(np.abs(a.numpy()), np.abs(a_scale * v[of_a]), atol=1e-9)


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "eva"])
def test_the_starts_are_pefts(name: str) -> None:
    peft = library("peft")
    model = net(torch.float32)
    more: dict[str, Any] = {}
    theirs = copy.deepcopy(model)
    if name == "lora_ga":
        more["lora_ga_config"] = peft.LoraGAConfig()
    if name == "corda":
        more["corda_config"] = library("peft.tuners.lora.config").CordaConfig(corda_method="ipm")
    if name == "eva":
        more["eva_config"] = peft.EvaConfig(rho=1.0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0", "2"], init_lora_weights=name, **more)
    # Directions that stand apart: PEFT's incremental decomposition forgets a little of the others.
    data = torch.cat(batches(torch.float32)) * 0.4 ** torch.arange(12)
    if name == "lora_ga":
        peft.preprocess_loraga(theirs, config, lambda: loss(theirs, data.clone().requires_grad_()).backward())
    if name == "corda":
        library("peft.tuners.lora.corda").preprocess_corda(theirs, config, run_model=lambda: theirs(data))
    wrapped = peft.get_peft_model(theirs, config, low_cpu_mem_usage=name == "eva")
    if name == "eva":
        run: dict[str, Any] = {
            "forward_fn": lambda m, b: m(b),
            "prepare_model_inputs_fn": None,
            "prepare_layer_inputs_fn": None,
        }
        peft.initialize_lora_eva_weights(wrapped, [data, data], show_progress_bar=False, **run)
    how = {"eva": sl.eva([data]), "corda": sl.corda([data]), "lora_ga": sl.lora_ga([data], loss)}.get(name) or starts()[name]
    tuned = sl.start(attached(model), how)
    for (b, a), target in zip(pairs(tuned), ("0", "2"), strict=True):
        own = wrapped.base_model.model.get_submodule(target)
        peft_a = own.lora_A["default"].weight.detach()
        if name == "eva":
            # The same space; PEFT's vectors come from a randomised decomposition in float32.
            torch.testing.assert_close(a.T @ a, peft_a.T @ peft_a, rtol=1e-3, atol=1e-3)
            continue
        if name == "lora_ga":  # signs are free, as above
            peft_b = own.lora_B["default"].weight.detach()
            torch.testing.assert_close(b.abs(), peft_b.abs(), rtol=1e-2, atol=1e-4)
            torch.testing.assert_close(a.abs(), peft_a.abs(), rtol=1e-2, atol=2e-3)
            continue
        # PEFT computes in float32; for CorDA it also inverts second moments of condition 1e3.
        bound = 1e-4 if name == "corda" else 2e-5
        torch.testing.assert_close(ALPHA / RANK * b @ a, own.get_delta_weight("default").detach(), rtol=1e-4, atol=bound)


NETWORKS = {
    "lora of rank 1": sl.lora(1, alpha=2),
    "rslora": sl.lora(4, alpha=3, rslora=True),
    "lora, nodes": sl.AdapterSpec(sl.Network("o i", {"r": 3}, A="r i", B=sl.Node("o r", init="zeros")), alpha=0.5),
    "lotr": sl.AdapterSpec(sl.Tucker(3, factors="out in"), sl.PhysicalFold("member out in"), alpha=2),
    "train": sl.AdapterSpec(sl.TensorTrain(3), sl.PhysicalFold("out member in")),
    "tucker": sl.AdapterSpec(sl.Tucker((2, 3, 2)), sl.PhysicalFold("member out in"), alpha=-1),
    "two bonds": sl.AdapterSpec(sl.Network("o i", {"r": 2, "s": 3}, B="o r", C="r s", A=sl.Node("s i", init="zeros"))),
    "dense": sl.dense(),
    "flat": sl.AdapterSpec(sl.Tucker(2), sl.FlatFold(3, groups=2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pissa_of_other_networks_starts_nearest_to_the_weights(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    x = noise(5, 8, dtype=torch.float64)
    before, weights = model(x), [model[k].weight.detach().clone() for k in (0, 2)]
    tuned = attached(model, NETWORKS[name])
    trained = tuned.num_parameters
    sl.start(tuned, sl.pissa())
    assert tuned.num_parameters == trained
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for adapter in tuned.adapters:
            for buffer in adapter.buffers():
                buffer.zero_()
    # Without what is taken off, dW is dW0: nearer to W than nothing is.
    for k, weight in zip(("0", "2"), weights, strict=True):
        assert float((tuned.delta(k).detach() - weight).norm()) < float(weight.norm())


@pytest.mark.parametrize("spec", [sl.lora_xs(3, alpha=2), sl.svft(3)], ids=["lora_xs", "svft"])
def test_pissa_of_nodes_of_the_base_keeps_them(spec: sl.AdapterSpec) -> None:
    """The nearest to W has its largest singular values between its own vectors; LoRA-XS holds these frozen too, U S R V^T."""
    model, x = net(), noise(5, 12, seed=9, dtype=torch.float64)
    before = model(x)
    tuned = sl.start(attached(model, spec), sl.pissa())
    torch.testing.assert_close(model(x), before)
    for k, (name, own) in zip((0, 2), tuned.adapters.named_parameters(), strict=True):
        values = np.linalg.svd(model[k].weight.detach().numpy())[1][:3]
        wanted = np.eye(3) if name.endswith("node_R") else values
        np.testing.assert_allclose(own.detach().numpy() * spec.scale, wanted, rtol=1e-9, atol=1e-12)
    perturb(tuned)
    trained = [p.detach().clone() for p in tuned.parameters()]
    assert float(tuned.delta("0").detach().norm()) > 1e-3
    tuned.reset_parameters()
    torch.testing.assert_close(model(x), before)
    assert not any(torch.equal(p, q) for p, q in zip(tuned.parameters(), trained, strict=True))


@pytest.mark.parametrize("spec", [sl.lokr(2), sl.loha(2), sl.vera(2), sl.hira(2)], ids=["lokr", "loha", "vera", "hira"])
def test_products_have_no_such_start(spec: sl.AdapterSpec) -> None:
    tuned = attached(net(), spec)
    with pytest.raises(sl.SpecError, match=r"pissa\(\) takes its dW0 off .*(of their form|into products).* Attach a network"):
        sl.start(tuned, sl.pissa())
    assert not [n for n, _ in tuned.named_buffers() if "origin" in n]


def test_what_cannot_start_says_why() -> None:
    tuned = attached(net())
    sl.start(tuned, sl.pissa())
    with pytest.raises(sl.AttachError, match="departs from a start already"):
        sl.start(tuned, sl.pissa())
    for given in ("pissa", sl.pissa):
        with pytest.raises(sl.SpecError, match=r"start was given how=.*pissa.*; give pissa\(\), called"):
            sl.start(attached(net()), given)
    with pytest.raises(sl.SpecError, match=r"how='zero'; give one of pissa\(\), olora\(\)"):
        sl.start(attached(net()), "zero")
    with pytest.raises(sl.AttachError, match="start was given a Sequential; give the handle"):
        sl.start(nn.Sequential(), sl.pissa())
    with pytest.raises(sl.AttachError, match="no batch reached '0'"):
        sl.start(attached(net()), sl.eva([]))
    with pytest.raises(sl.AttachError, match="given no batch"):
        sl.start(attached(net()), sl.lora_ga([], loss))
    with pytest.raises(sl.SpecError, match="choose a lower rank"):
        sl.start(attached(net(), sl.lora(8)), sl.lora_ga(batches(), loss))
    with pytest.raises(sl.SpecError, match=r"plain low-rank pairs.* or pissa\(\), which starts nearest"):
        sl.start(attached(net(), sl.AdapterSpec(sl.Tucker(2))), sl.olora())
    twice = sl.AdapterSpec(sl.Sum(sl.Dense(), sl.Dense()))
    with pytest.raises(sl.SpecError, match=r"'out in -> out in \+ out in -> out in' is another. Use lora\(rank\)\.$"):
        sl.start(attached(net(), twice), sl.eva(batches()))
    with pytest.raises(sl.SpecError, match="choose of ArBr"):
        sl.lora_ga([], loss, direction="up")
    held = sl.attach(net(), sl.lora(2), ["0"], at="weight", dtype=torch.float64)
    with pytest.raises(sl.AttachError, match="whose inputs alone"):
        sl.start(held, sl.eva(batches()))


def test_a_sum_of_networks_is_one_of_larger_bonds() -> None:
    for spec in (one for name, one in NETWORKS.items() if name != "dense"):
        other = summed([spec, spec, spec])
        assert other.scale == pytest.approx(spec.scale)
        shapes = {"a": (8, 8), "b": (8, 8)}
        for (_, big), (_, small) in zip(other.lay_out(shapes), spec.lay_out(shapes), strict=True):
            found = blocks(big, [[n.shape for n in small.nodes]] * 3)
            for k, node in enumerate(big.nodes):
                taken = torch.zeros(node.shape)
                for own in found:
                    taken[own[k]] += 1
                assert taken.max() == 1  # no two lie on one another
    with pytest.raises(sl.SpecError, match="different folds"):
        summed([sl.lora(2), sl.lotr(2)])
    with pytest.raises(sl.SpecError, match="no network of their form"):
        summed([sl.lora(2), sl.dense()])


@pytest.mark.parametrize("spec", [sl.lora(2), sl.conv_lora(2), sl.conv_lora(2, tucker=True)], ids=["lora", "conv", "tucker"])
def test_convolutions_start_from_their_kernels(spec: sl.AdapterSpec) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)).double()
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    before = model(x)
    tuned = sl.start(attached(model, spec), sl.pissa())
    torch.testing.assert_close(model(x), before)
    perturb(tuned)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    tuned.merge()
    torch.testing.assert_close(model(x), after)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 8, 3, padding=1), (6, 4, 6, 7)),
    "strided": (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), dilation=(1, 2)), (6, 4, 9, 7)),
    "around": (nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"), (6, 4, 6, 7)),
    "in one dimension": (nn.Conv1d(4, 8, 3, padding=2, dilation=2), (6, 4, 9)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("spec", [sl.lora(2), sl.conv_lora(2)], ids=["lora", "conv"])
def test_convolutions_start_from_what_flows_into_them(name: str, spec: sl.AdapterSpec) -> None:
    """Of the inputs that B A can tell apart, EVA's A keeps as much as any two directions do, by the patches' own SVD."""
    layer, shape = CONVOLUTIONS[name]
    x = noise(*shape, dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(layer)).double()
    # All patches, each read off by a kernel of a single one.
    size = layer.weight[0].numel()
    probe = copy.deepcopy(layer).double().requires_grad_(False)
    probe.weight, probe.bias = nn.Parameter(torch.eye(size, dtype=torch.float64).reshape(size, *layer.weight.shape[1:])), None
    patches = probe(x).movedim(1, -1).reshape(-1, size)
    right = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)[2][:2]
    tuned = sl.start(sl.attach(model, spec, ["0"], dtype=torch.float64), sl.eva([x]))
    a = tuned.adapters[0].get_parameter("node_factor_in" if spec == sl.lora(2) else "node_core").detach()
    a = a.T if spec == sl.lora(2) else a.flatten(1)
    torch.testing.assert_close(a.T @ a, right.T @ right)


def test_patches_of_grouped_convolutions_are_not_looked_at() -> None:
    tuned = sl.attach(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).double(), sl.lora(2), ["0"])
    with pytest.raises(sl.AttachError, match="without groups"):
        sl.start(tuned, sl.corda([noise(2, 4, 6, 6, dtype=torch.float64)]))
