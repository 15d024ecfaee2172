"""What trains beside adapters (`also=`), and buffers of the base, whatever handles there are: read, switched and put back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import perturb, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl

X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6).sin()


def net() -> nn.Sequential:
    return seeded(0, lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double())


def normed() -> nn.Sequential:
    return seeded(0, lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double())


def attached(model: nn.Module, targets: list[str], **more: object) -> sl.Tuned:
    return sl.attach(model, sl.lora(2), targets, dtype=torch.float64, seed=0, **more)  # type: ignore[arg-type]


def moved(parameter: Tensor, by: float = 1.0) -> None:
    with torch.no_grad():
        parameter.add_(by)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_base(model: nn.Module, base: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == base.keys() and all(torch.equal(now[name], value) for name, value in base.items())


# --- merged values -------------------------------------------------------------------------------------------------


def test_a_merged_dw_is_no_part_of_what_trains_beside(tmp_path: Path) -> None:
    model = net()
    tuned = attached(model, ["0"], also=["0.weight"])
    perturb(tuned)
    moved(model[0].weight)
    want = model(X)
    tuned.merge()
    with pytest.raises(sl.AttachError, match=r"'0.weight' trains beside the adapter, and dW is merged into it"):
        tuned.save(tmp_path)
    assert not list(tmp_path.iterdir())
    tuned.unmerge()
    tuned.save(tmp_path)
    other = net()
    sl.load(other, tmp_path)
    torch.testing.assert_close(other(X), want)


def test_what_another_adapter_merged_is_neither_saved_nor_thrown_away(tmp_path: Path) -> None:
    model = net()
    base = state(model)
    first = attached(model, ["0"], also=["2.weight"], name="first")
    second = attached(model, ["2"], name="second")
    perturb(second)
    moved(model[2].weight)
    second.merge()
    held = model[2].weight.clone()
    for act in (
        lambda: first.save(tmp_path),
        first.detach,
        lambda: sl.use(model, "second"),
        lambda: first.disabled().__enter__(),
    ):
        with pytest.raises(sl.AttachError, match=r"'2.weight' trains beside the adapter, and dW is merged"):
            act()
    assert torch.equal(model[2].weight, held)
    second.unmerge()
    first.detach()
    second.detach()
    assert is_base(model, base)


# --- put back, whatever the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["first then second", "second then first"])
def test_running_means_are_the_bases_again_when_the_last_adapter_leaves(order: str) -> None:
    model = normed().train()
    base = state(model)
    first = attached(model, ["0"], name="first")
    model(X)
    between = model[1].running_mean.clone()
    second = attached(model, ["2"], name="second")
    model(X + 1)
    last = model[1].running_mean.clone()
    if order == "first then second":
        first.detach()
        assert torch.equal(model[1].running_mean, last)  # the second goes on with them
        second.detach()
    else:
        second.detach()
        assert torch.equal(model[1].running_mean, between)
        first.detach()
    assert is_base(model, base)


@pytest.mark.parametrize("baked", ["first", "second"])
def test_what_bake_keeps_stays_when_others_leave(baked: str) -> None:
    model = normed().train()
    handles = {"first": attached(model, ["0"], name="first")}
    model(X)
    between = model[1].running_mean.clone()
    handles["second"] = attached(model, ["2"], name="second")
    model(X + 1)
    last = model[1].running_mean.clone()
    handles.pop(baked).bake()
    assert torch.equal(model[1].running_mean, last)
    handles.popitem()[1].detach()
    assert torch.equal(model[1].running_mean, between if baked == "first" else last)


def test_a_parameter_trains_beside_one_adapter_at_a_time() -> None:
    model = net()
    base = state(model)
    first = attached(model, ["0"], name="first", also=["2.bias"])
    moved(model[2].bias)
    before = state(model)
    with pytest.raises(sl.AttachError, match=r"'2.bias' trains beside another adapter already; detach\(\) or bake\(\)"):
        attached(model, ["2"], name="second", also=["2.bias"])
    assert is_base(model, before)
    first.detach()
    attached(model, ["2"], name="second", also=["2.bias"]).detach()
    assert is_base(model, base)


def test_another_adapter_freezes_nothing_that_trains_beside_the_first() -> None:
    model = net()
    first = attached(model, ["0"], name="first", also=["2.bias"])
    second = attached(model, ["2"], name="second")
    assert model[2].bias.requires_grad
    assert not model[2].weight.requires_grad
    twin = copy.deepcopy(model)
    sl.tuned(twin, "second").detach()
    assert twin[2].bias.requires_grad
    assert not twin[2].weight.requires_grad
    first.detach()
    assert not model[2].bias.requires_grad  # the second keeps the base from training
    second.detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_is_assigned_in_place_of_a_parameter_is_held_as_that_was(order: tuple[int, int]) -> None:
    model = net()
    first = attached(model, ["0"], name="first", also=["2.bias"])
    model.load_state_dict(state(model), assign=True)
    with pytest.raises(sl.AttachError, match="trains beside another adapter already"):
        attached(model, ["2"], name="second", also=["2.bias"])
    moved(model[2].bias)
    with sl.use(model, None):  # the base's own stands in its place
        second = attached(model, ["2"], name="second")
        assert not model[2].bias.requires_grad
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(("first", "second"))]
    assert trained == ["2.bias"]
    handles = (first, second)
    handles[order[0]].detach()
    assert model[2].bias.requires_grad is (order[0] == 1)
    assert not model[0].weight.requires_grad
    handles[order[1]].detach()
    assert all(p.requires_grad for p in model.parameters())


def test_replace_leaves_nothing_of_the_adapter_before(tmp_path: Path) -> None:
    def saved(folder: str, also: list[str], train: bool) -> None:
        model = normed().train(train)
        tuned = attached(model, ["0"], also=also)
        perturb(tuned)
        for name in also:
            moved(model.get_parameter(name))
        model(X)
        tuned.save(tmp_path / folder)

    saved("with", ["2.bias"], True)
    saved("without", [], False)
    want = normed().eval()
    sl.load(want, tmp_path / "without")
    model = normed().eval()
    tuned = sl.load(model, tmp_path / "with")
    tuned.replace(tmp_path / "without")
    assert torch.equal(model(X), want(X))
    tuned.replace(tmp_path / "with")
    again = normed().eval()
    sl.load(again, tmp_path / "with")
    assert torch.equal(model(X), again(X))


def test_a_handle_saves_after_it_was_detached_what_it_would_have_before(tmp_path: Path) -> None:
    model = normed().train()
    tuned = attached(model, ["0"], also=["2"])
    perturb(tuned)
    moved(model[2].weight)
    model(X)
    tuned.save(tmp_path / "before")
    tuned.detach()
    tuned.save(tmp_path / "after")
    before, after = (sl.read(tmp_path / name) for name in ("before", "after"))
    assert before.buffers.keys() == after.buffers.keys() >= {"2.weight", "2.bias", "1.running_mean"}
    assert all(torch.equal(value, after.buffers[name]) for name, value in before.buffers.items())


# --- switched off --------------------------------------------------------------------------------------------------


def off(model: nn.Module, tuned: sl.Tuned) -> Iterator[None]:
    with tuned.disabled():
        yield
    with sl.use(model, None):
        yield


def test_a_model_whose_adapter_is_off_computes_as_its_base(tmp_path: Path) -> None:
    model = normed().train()
    tuned = attached(model, ["0"], also=["2"])
    perturb(tuned)
    moved(model[2].weight)
    model(X)
    model.eval()
    adapted, plain = model(X), normed().eval()(X)
    assert not torch.equal(adapted, plain)
    for _ in off(model, tuned):
        assert torch.equal(model(X), plain)
        tuned.save(tmp_path)  # of the adapter all the same
        with tuned.disabled():
            assert torch.equal(model(X), plain)
        other = normed().eval()
        sl.load(other, tmp_path)
        torch.testing.assert_close(other(X), adapted)
        twin: nn.Module
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            sl.use(twin, "superlora")
            assert torch.equal(twin(X), adapted)
            assert twin.get_parameter("2.weight").requires_grad
    assert torch.equal(model(X), adapted)


def test_the_base_can_be_asked_between_a_forward_and_its_backward() -> None:
    """As with a reference model: what trains beside is swapped, not written to."""
    model = net()
    tuned = attached(model, ["0"], also=["2"])
    perturb(tuned)
    moved(model[2].weight)
    parameters = [*tuned.parameters(), *model[2].parameters()]
    model(X).square().sum().backward()
    want = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    loss = model(X).square().sum()
    with torch.no_grad(), tuned.disabled():
        assert torch.equal(model(X), net()(X))
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, want, strict=True))


def test_a_model_that_is_moved_while_its_adapter_is_off_has_it_back() -> None:
    model = net()
    tuned = attached(model, ["0"], also=["2"])
    moved(model[2].weight)
    trained = model[2].weight
    with tuned.disabled():
        model.float()
    assert model[2].weight is trained
    assert trained.dtype == torch.float32
    assert torch.equal(trained.detach(), (net()[2].weight.detach() + 1).float())


def test_a_tied_parameter_is_the_bases_in_both_places_while_the_adapter_is_off() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.up, self.h = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.h.weight = self.e.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.h(self.up(self.e(x)))
            return out

    words = torch.arange(7)
    model: nn.Module = seeded(0, Tied).double()
    plain = model(words)
    tuned = attached(model, ["up"], also=["e.weight"])
    moved(model.get_parameter("e.weight"))
    adapted = model(words)
    with tuned.disabled():
        assert torch.equal(model(words), plain)
    assert torch.equal(model(words), adapted)
    assert model.get_submodule("h")._parameters["weight"] is model.get_submodule("e")._parameters["weight"]


def test_no_dw_is_merged_into_what_stands_in_for_a_while() -> None:
    model = net()
    first = attached(model, ["0"], also=["2.weight"], name="first")
    second = attached(model, ["2"], name="second")
    perturb(second)
    moved(model[2].weight)
    with first.disabled(), pytest.raises(sl.AttachError, match="trains beside an adapter that is switched off"):
        second.merge()
    second.merge()
    second.unmerge()


def test_rows_are_refused_where_not_all_meet_what_trains_beside() -> None:
    model = net()
    attached(model, ["0"], name="a", also=["2.bias"])
    attached(model, ["2"], name="b")
    sl.use(model, "a")
    with pytest.raises(sl.AttachError, match="'b' is switched off, so no row would meet it"), sl.rows(model, ["a", "b"]):
        pass
    sl.use(model, ["a", "b"])
    with pytest.raises(sl.AttachError, match=r"'2.bias' trains beside the adapter 'a' and is one for all rows"):
        sl.rows(model, ["a", None]).__enter__()
    with sl.rows(model, ["a"] * 5):
        model(X)
    sl.use(model, "b")
    with sl.rows(model, ["b", None, None, "b", "b"]):
        model(X)


# --- refused, and nothing changed ----------------------------------------------------------------------------------


def test_a_refused_bake_merges_nothing() -> None:
    model = net()
    first, second = (attached(model, ["0"], name=name) for name in ("first", "second"))
    perturb(first)
    perturb(second)
    second.merge()
    held = model[0].weight.clone()
    with pytest.raises(sl.AttachError, match="another adapter is merged into '0' too"):
        first.bake()
    assert not first.merged
    assert torch.equal(model[0].weight, held)
    second.bake()
    first.bake()


WRONG: list[tuple[dict[str, object], str]] = [
    ({"at": "weights"}, "at='weights' is neither"),
    ({"route": "Delta"}, "route='Delta' is neither"),
    ({"backend": "numpy_reference"}, "computes outside of torch"),
    ({"dtype": "float32"}, "dtype='float32' holds no trained numbers"),
    ({"dtype": torch.int32}, "dtype=torch.int32 holds no trained numbers"),
    ({"seed": "a"}, "seed='a' is no whole number"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_a_wrong_argument_is_refused(given: dict[str, object], said: str, tmp_path: Path) -> None:
    model = net()
    before = state(model)
    attached(model, ["0"]).save(tmp_path)
    sl.tuned(model).detach()
    with pytest.raises(sl.AttachError, match=said):
        sl.attach(model, sl.lora(2), ["0"], **given)  # type: ignore[arg-type]
    if "seed" not in given:
        with pytest.raises(sl.AttachError, match=said):
            sl.load(model, tmp_path, **given)  # type: ignore[arg-type]
    assert is_base(model, before)


def test_a_checkpointed_head_trains_beside_and_is_put_back() -> None:
    model = net()
    base = state(model)
    tuned = attached(model, ["0"], also=["2"])
    perturb(tuned)
    checkpoint(model, X, use_reentrant=False).square().sum().backward()  # type: ignore[no-untyped-call]
    assert model[2].weight.grad is not None
    tuned.detach()
    assert is_base(model, base)
