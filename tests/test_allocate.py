"""Ranks moved between weights while training, beside PEFT's allocator on PEFT's AdaLoRA layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import seeded
from optional import library
from torch import Tensor, nn

import superlora_tn as sl

IN, WIDTH, OUT, R = 6, 8, 5, 4


def model_of() -> nn.Sequential:
    return seeded(0, lambda: nn.Sequential(nn.Linear(IN, WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUT)).double())


def ours(spec: sl.AdapterSpec) -> tuple[nn.Module, sl.Tuned]:
    model = model_of()
    return model, sl.attach(model, spec, ["0", "2"], dtype=torch.float64, seed=3)


def lam(tuned: sl.Tuned) -> list[Tensor]:
    return [p for name, p in tuned.named_parameters() if name.endswith("node_lam")]


def test_it_prunes_what_pefts_allocator_does_step_by_step() -> None:
    steps, warm, last, every = 14, 3, 4, 2
    config = library("peft").AdaLoraConfig(
        init_r=R, target_r=2, tinit=warm, tfinal=last, deltaT=every, total_step=steps, lora_alpha=8, target_modules=["0", "2"]
    )
    theirs = library("peft").get_peft_model(model_of(), config).double()
    model, tuned = ours(sl.adalora(R, alpha=8 / (R + 1e-5)))  # PEFT's division
    pairs: list[tuple[Tensor, Tensor, Any]] = []
    for k in ("0", "2"):
        layer, adapter = theirs.base_model.model.get_submodule(k), tuned._members[k].adapter
        named = {"P": (layer.lora_B, Tensor.clone), "lam": (layer.lora_E, Tensor.flatten), "Q": (layer.lora_A, Tensor.clone)}
        for name, (given, turn) in named.items():
            own, other = adapter._parameters[f"node_{name}"], given["default"]
            with torch.no_grad():
                other.normal_(std=0.3)
                own.copy_(turn(other))
            pairs.append((own, other, turn))
    allocator = sl.RankAllocator(tuned, 4, steps, warm=warm, last=last, every=every)
    peer = theirs.base_model.rankallocator
    optimizers = [torch.optim.SGD([pair[side] for pair in pairs], 0.05) for side in (0, 1)]
    pruned = []
    for now in range(1, steps - last + 1):
        x, wanted = torch.randn(7, IN, dtype=torch.float64), torch.randn(7, OUT, dtype=torch.float64)
        for one, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (one(x) - wanted).square().mean().backward()
            optimizer.step()
        allocator.step()
        budget, _ = peer.update_and_allocate(theirs, now, force_mask=now == steps - last)
        assert allocator.budget == budget
        for own, other, turn in pairs:
            # float64 through some ten steps; where theirs is masked ours is, as zeros are exact.
            torch.testing.assert_close(own, turn(other), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-7, atol=1e-7)  # PEFT keeps its division in float32
        pruned.append(sum(int((v == 0).sum()) for v in lam(tuned)))
    assert pruned[:warm] == [0] * warm
    assert 0 < pruned[3] < pruned[-1] == 4
    assert sum(allocator.kept.values()) == 4


def trained(allocator: sl.RankAllocator, model: nn.Module, tuned: sl.Tuned, steps: int) -> None:
    optimizer = torch.optim.Adam(tuned.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(7, IN, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        allocator.step()


def test_the_last_choice_stands_and_is_saved(tmp_path: Any) -> None:
    model, tuned = ours(sl.adalora(R))
    with torch.no_grad():
        for values in lam(tuned):
            values.normal_()
    allocator = sl.RankAllocator(tuned, 3, 10, last=4)
    trained(allocator, model, tuned, 6)
    zeros = [v == 0 for v in lam(tuned)]
    assert sum(int((~z).sum()) for z in zeros) == 3
    trained(allocator, model, tuned, 4)
    assert all(torch.equal(v == 0, z) for v, z in zip(lam(tuned), zeros, strict=True))
    x = torch.randn(3, IN, dtype=torch.float64)
    y = model(x)
    tuned.save(tmp_path)
    again = model_of()
    assert torch.equal(sl.load(again, tmp_path).delta("0"), tuned.delta("0"))
    assert torch.equal(again(x), y)


def importances(seen: list[list[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """Equations 8 to 11 by themselves, from (numbers, gradients) of each node of each finite step."""
    found = []
    for node in zip(*seen, strict=True):
        mean, spread = torch.zeros_like(node[0][0]), torch.zeros_like(node[0][0])
        for own, slope in node:
            mean = 0.85 * mean + 0.15 * (own * slope).abs()
            spread = 0.85 * spread + 0.15 * ((own * slope).abs() - mean).abs()
        found.append(mean * spread)
    return found


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("skipped", [{0}, {0, 1, 2}, {3}, {0, 4, 7}], ids=str)
def test_a_step_without_finite_gradients_leaves_the_importances(bad: float, skipped: set[int]) -> None:
    """What GradScaler skips; the last choice is that of the finite steps alone."""
    model, tuned = ours(sl.adalora(R))
    nodes = [[tuned._members[k].adapter._parameters[f"node_{n}"] for n in ("P", "lam", "Q")] for k in ("0", "2")]
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_(std=0.3)
    allocator, optimizer = sl.RankAllocator(tuned, 3, 12, last=3), torch.optim.SGD(tuned.parameters(), 0.05)
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for now in range(12):
        optimizer.zero_grad()
        model(torch.randn(7, IN, dtype=torch.float64)).square().mean().backward()
        if now in skipped:
            nodes[1][2].grad[0, 0] = bad  # one number of all
        else:
            optimizer.step()
        if now not in skipped and now < 8:
            seen.append([(p.detach().clone(), p.grad.clone()) for own in nodes for p in own])
        before = [p.detach().clone() for p in tuned.parameters()]
        allocator.step()
        if not seen:  # nothing is known: nothing goes
            assert all(torch.equal(p, q) for p, q in zip(tuned.parameters(), before, strict=True))
    known = importances(seen)
    scores = torch.cat([known[k + 1] + known[k].mean(0) + known[k + 2].mean(1) for k in (0, 3)])
    wanted = scores >= scores.sort().values[-3]
    assert torch.equal(torch.cat([v != 0 for v in lam(tuned)]), wanted)
    assert sum(allocator.kept.values()) == 3


def test_where_all_steps_but_one_have_the_last_choice_that_one_is_measured() -> None:
    model, tuned = ours(sl.adalora(R))
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    trained(sl.RankAllocator(tuned, 3, 4, last=3), model, tuned, 4)
    assert sum(int((v != 0).sum()) for v in lam(tuned)) == 3


@pytest.mark.parametrize("stop", [2, 5, 8], ids=["measuring", "pruning", "chosen"])
def test_a_resumed_training_is_the_uninterrupted_one(stop: int, tmp_path: Any) -> None:
    """Bit for bit, through a file: weights, optimizer and allocator."""

    def fresh() -> tuple[nn.Module, sl.Tuned, sl.RankAllocator, torch.optim.Optimizer]:
        model, tuned = ours(sl.adalora(R))
        return model, tuned, sl.RankAllocator(tuned, 3, 10, warm=3, last=3), torch.optim.Adam(tuned.parameters(), 0.05)

    def run(one: tuple[nn.Module, sl.Tuned, sl.RankAllocator, torch.optim.Optimizer], first: int, last: int) -> None:
        model, _, allocator, optimizer = one
        for now in range(first, last):
            optimizer.zero_grad()
            x = torch.randn(7, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(now))
            (model(x) - 1).square().sum().backward()
            optimizer.step()
            allocator.step()

    whole, part, again = fresh(), fresh(), fresh()
    run(whole, 0, 10)
    run(part, 0, stop)
    torch.save([one.state_dict() for one in part[1:]], tmp_path / "state.pt")
    for one, state in zip(again[1:], torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        one.load_state_dict(state)
    run(again, stop, 10)
    assert 0 < sum(whole[2].kept.values()) <= 3
    assert whole[2].kept == again[2].kept
    for own, other in zip(whole[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(own, other)


def test_the_state_of_another_adapter_is_refused() -> None:
    model, tuned = ours(sl.adalora(R))
    allocator, other = sl.RankAllocator(tuned, 3, 10), sl.RankAllocator(ours(sl.adalora(R - 1))[1], 3, 10)
    trained(allocator, model, tuned, 2)
    with pytest.raises(sl.SpecError, match="state of another adapter"):
        other.load_state_dict(allocator.state_dict())
    for wrong in ({}, sl.RankAllocator(tuned, 2, 10).state_dict()):
        with pytest.raises(sl.SpecError, match="resume with the same settings"):
            other.load_state_dict(wrong)
    assert other.now == 0


def test_a_copy_goes_on_as_the_first_and_a_refused_step_is_none() -> None:
    model, tuned = ours(sl.adalora(R))
    allocator = sl.RankAllocator(tuned, 3, 10)
    trained(allocator, model, tuned, 3)
    for p in tuned.parameters():
        p.grad = None
    with pytest.raises(sl.SpecError, match="before zero_grad"):
        allocator.step()
    assert allocator.now == 3
    other, twin = copy.deepcopy((tuned, allocator))
    for p in [*tuned.parameters(), *other.parameters()]:
        p.grad = torch.ones_like(p)
    allocator.step()
    twin.step()
    for own, same in zip(tuned.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, same)


def test_the_least_important_goes_first() -> None:
    """One rank of each weight is of no size, so that the loss does not feel it."""
    model, tuned = ours(sl.adalora(R))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p.normal_()
            if name.endswith("node_P"):
                p[:, 1] *= 1e-6
            if name.endswith("node_Q"):
                p[1] *= 1e-6
    allocator = sl.RankAllocator(tuned, 6, 3, last=1)
    trained(allocator, model, tuned, 3)
    assert [(v == 0).tolist() for v in lam(tuned)] == [[False, True, False, False]] * 2
    assert list(allocator.kept.values()) == [3, 3]


def test_terms_of_a_sum_and_shared_networks_have_ranks_too() -> None:
    shared = sl.Network("m o i", {"r": 3}, B="m o r", lam=sl.Node("r", "zeros"), A="r i")
    model = nn.Sequential(*[nn.Linear(4, 4).double() for _ in range(2)])
    tuned = sl.attach(model, sl.AdapterSpec(shared, sl.PhysicalFold("member out in")), ["0", "1"], dtype=torch.float64)
    assert sl.RankAllocator(tuned, 1, 5).total == 3
    _, tuned = ours(sl.AdapterSpec(sl.Sum(sl.adalora(2).network, sl.adalora(3).network)))
    allocator = sl.RankAllocator(tuned, 4, 5)
    assert allocator.total == 2 * (2 + 3)
    with torch.no_grad():
        for p in tuned.parameters():
            p.fill_(1.0)
    assert sum(allocator.kept.values()) == 2 * (2 + 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ranks": 0}, "ranks=0"),
        ({"ranks": 9}, "ranks=9"),
        ({"warm": 3, "last": 2}, "fewer steps than all"),
        ({"smooth": (1.0, 0.5)}, "between 0 and 1"),
        ({"smooth": 0.5}, "between 0 and 1"),
        ({"smooth": (0.5,)}, "between 0 and 1"),
        ({"warm": "a"}, "warm=a"),
        ({"warm": 1.5}, "warm=1.5"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_words(given: dict[str, Any], words: str) -> None:
    _, tuned = ours(sl.adalora(R))
    with pytest.raises(sl.SpecError, match=words):
        sl.RankAllocator(tuned, **{"ranks": 4, "steps": 5, **given})


def test_an_adapter_without_ranks_and_a_step_without_gradients_are_refused() -> None:
    with pytest.raises(sl.SpecError, match="no bond has values of its own"):
        sl.RankAllocator(ours(sl.lora(2))[1], 1, 5)
    with pytest.raises(sl.SpecError, match="was given a NoneType; give the handle"):
        sl.RankAllocator(None, 1, 5)  # type: ignore[arg-type]
    with pytest.raises(sl.SpecError, match="before zero_grad"):
        sl.RankAllocator(ours(sl.adalora(2))[1], 1, 5).step()
