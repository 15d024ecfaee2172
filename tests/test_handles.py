"""Handles and the weights that they share: all or nothing, whatever breaks an operation off, and every bit back."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from models import noise, same_state
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.model.buffers import Kept
from superlora_tn.model.kinds import Linear
from superlora_tn.update.base import Adapter


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])


def adapted(model: nn.Module, spec: sl.AdapterSpec, targets: list[str], **options: object) -> sl.Tuned:
    tuned = sl.attach(model, spec, targets, seed=0, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for k, parameter in enumerate(tuned.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=k))
    return tuned


X = noise(2, 6)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums of six products, in another order


@pytest.mark.parametrize("name", ["merge", "unmerge", "detach", "bake"])
@pytest.mark.parametrize("spec", [sl.lora(2), sl.lorta(2)], ids=["lora", "lorta"])
def test_an_interrupt_at_any_write_can_be_repaired(spec: sl.AdapterSpec, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = net().state_dict()
    for at in itertools.count():
        model = net()
        tuned = adapted(model, spec, ["0", "1", "2"])
        want = model(X).detach()
        if name in ("unmerge", "detach"):
            tuned.merge()
        writes, write = itertools.count(), Linear.write

        def interrupted(self: Linear, layer: nn.Module, matrix: Tensor, at: int = at) -> None:
            if next(writes) == at:  # noqa: B023
                raise KeyboardInterrupt
            write(self, layer, matrix)  # noqa: B023

        with monkeypatch.context() as patched:
            patched.setattr(Linear, "write", interrupted)
            try:
                getattr(tuned, name)()
                done = True
            except KeyboardInterrupt:
                done = False
        if done:
            assert at >= 3
            return
        if name in ("merge", "bake"):
            torch.testing.assert_close(model(X), want, **CLOSE)
            assert not tuned.merged
        if tuned.merged:
            tuned.unmerge()
        tuned.detach()
        assert same_state(base, model.state_dict())


def _off_and_on(model: nn.Module, one: sl.Tuned) -> None:
    with one.disabled():
        model(X)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda model, one: sl.use(model, {"one": 1.0, "two": 0.5}),
        lambda model, one: sl.use(model, None),
        lambda model, one: setattr(one, "strength", 2.0),
        lambda model, one: one.unmerge(),
        _off_and_on,
    ],
    ids=["use", "none", "strength", "unmerge", "disabled"],
)
def test_what_is_broken_off_is_done_or_as_before(
    change: Callable[[nn.Module, sl.Tuned], object], merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write, switch or copy an interrupt meets."""

    def prepared() -> tuple[nn.Module, sl.Tuned]:
        model = net()
        one = adapted(model, sl.lora(2), ["0", "1"], name="one", also=["2.bias"])
        two = adapted(model, sl.lokr(2), ["1", "2"], name="two")
        with torch.no_grad():
            model[2].bias.add_(1.0)
        if merged:
            two.merge()
            one.merge()
        return model, one

    def seen(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}, model(X).detach()

    model, one = prepared()
    states = [seen(model)]
    try:
        change(model, one)
    except sl.AttachError:
        return
    states.append(seen(model))
    for at in itertools.count():
        model, one = prepared()
        calls = itertools.count()

        def broken(name: str, owner: Any, at: int = at) -> None:
            own = getattr(owner, name)

            def run(*args: Any) -> Any:
                if next(calls) == at:  # noqa: B023
                    raise KeyboardInterrupt
                return own(*args)

            patched.setattr(owner, name, run)

        with monkeypatch.context() as patched:
            broken("write", Linear)
            broken("strengthen", Adapter)
            broken("hide", Kept)
            broken("reveal", Kept)
            try:
                change(model, one)
                return
            except KeyboardInterrupt:
                pass
        found, y = seen(model)
        same = [same_state(found, state) and torch.allclose(y, out, **CLOSE) for state, out in states]
        assert any(same) or (merged and change is _off_and_on and not one.merged)
        if one.merged:
            one.unmerge()
        sl.tuned(model, "two").detach()
        one.detach()
        assert same_state(net().state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("name", "step"), [("attach", 7), ("load", 11), ("detach", 1), ("bake", 3), ("replace", 1), ("reset_parameters", 1)]
)
def test_an_interrupt_at_any_call_finds_it_done_or_not_begun(name: str, step: int, tmp_path: Path) -> None:
    """Python looks for interrupts where functions are entered: those (every `step`th) that an operation enters in `model`."""

    def prepared() -> tuple[nn.Module, sl.Tuned | None]:
        model = nn.Sequential(net(), nn.BatchNorm1d(6).eval())
        adapted(model, sl.lokr(2), ["0.1"], name="below")  # holds what is frozen, and the buffers, too
        if name in ("attach", "load"):
            return model, None
        tuned = adapted(model, sl.lora(2), ["0.0", "0.1"], name="one", also=["0.2.bias"])
        with torch.no_grad():
            model[0][2].bias.add_(1.0)
            model[1].running_mean.add_(1.0)
        return model, tuned

    def run(model: nn.Module, tuned: sl.Tuned | None) -> object:
        if name == "attach":
            return sl.attach(model, sl.lora(2), ["0.0"], name="one", also=["0.2.bias"], seed=0)
        if name == "load":
            return sl.load(model, tmp_path, name="one")
        options = {"replace": (tmp_path,), "reset_parameters": (1,)}
        return getattr(tuned, name)(*options.get(name, ()))

    def seen(model: nn.Module) -> tuple[Any, ...]:
        parameters = {name: (p.requires_grad, p.tolist()) for name, p in model.named_parameters()}
        buffers = {name: b.tolist() for name, b in model.named_buffers()}
        kept = {
            (name, key): len(m.__dict__[key]) for name, m in model.named_modules() for key in m.__dict__ if "superlora" in key
        }
        with torch.no_grad():
            return parameters, buffers, kept, model(X).tolist()

    def left(tuned: sl.Tuned | None) -> list[bytes]:
        if tuned is None or name != "detach":
            return []
        tuned.save(tmp_path / "left")  # with what trained beside it, as it was
        return [file.read_bytes() for file in sorted((tmp_path / "left").iterdir())]

    filled = sl.attach(model := nn.Sequential(net(), nn.BatchNorm1d(6).eval()), sl.lora(2), ["0.0", "0.1"], also=["0.2.bias"])
    with torch.no_grad():
        for k, parameter in enumerate(filled.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=9 + k))
        model[0][2].bias.add_(2.0)
    filled.save(tmp_path)

    model, tuned = prepared()
    before = seen(model)
    run(model, tuned)
    after, saved = seen(model), left(tuned)
    outcomes = set[str]()
    for at in itertools.count(0, step):
        model, tuned = prepared()
        assert seen(model) == before
        calls = itertools.count()

        def enter(frame: FrameType, event: str, value: object, at: int = at) -> None:
            ours = "superlora_tn/model/" in frame.f_code.co_filename.replace("\\", "/")
            # A generator that is thrown away is entered once more, where nothing can be raised.
            if ours and not frame.f_code.co_flags & inspect.CO_GENERATOR and next(calls) == at:  # noqa: B023
                sys.settrace(None)
                raise KeyboardInterrupt

        traced = sys.gettrace()
        sys.settrace(enter)
        try:
            run(model, tuned)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(traced)
        found = seen(model)
        goes_on = found == before or (name == "bake" and tuned is not None and tuned.merged)
        outcomes.add("done" if found == after else "not begun" if goes_on else f"half at call {at}")
        if goes_on:
            run(model, tuned)
            assert seen(model) == after
        assert left(tuned) == saved
    assert "not begun" in outcomes
    assert outcomes <= {"done", "not begun"}


def test_a_state_dict_that_is_taken_while_merged_never_counts_twice() -> None:
    one, two = net(), net()
    tuned, _ = adapted(one, sl.lora(2), ["0"]), adapted(two, sl.lora(2), ["0"])
    want = one(X)
    tuned.merge()
    assert set(one.state_dict()) == set(net().state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        two.load_state_dict(one.state_dict())
    plain = net()
    plain.load_state_dict(one.state_dict())
    torch.testing.assert_close(plain(X), want, **CLOSE)


def test_a_weight_changed_while_merged_is_not_thrown_away() -> None:
    model = net()
    tuned = adapted(model, sl.lora(2), ["0", "1"])
    tuned.merge()
    with torch.no_grad():
        model[1].weight.data.add_(1.0)
    new = model[1].weight.clone()
    for leave in (tuned.unmerge, tuned.detach):
        with pytest.raises(sl.AttachError, match="the weight of '1' was changed while dW was merged into it"):
            leave()
        assert torch.equal(model[1].weight, new)
    tuned.unmerge(force=True)
    assert same_state(net().state_dict(), {k: v for k, v in model.state_dict().items() if "superlora" not in k})


def test_merging_within_disabled_counts_dw_once() -> None:
    model = net()
    tuned = adapted(model, sl.lora(2), ["0"])
    want = model(X).detach()
    with tuned.disabled():
        tuned.merge()
    torch.testing.assert_close(model(X), want, **CLOSE)
    tuned.unmerge()
    assert torch.equal(model(X), want)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_detaching_in_any_order_gives_requires_grad_back_at_the_end_alone(order: tuple[str, ...]) -> None:
    inner = net()
    model = nn.ModuleDict({"inner": inner, "head": nn.Linear(6, 2)})
    model["head"].bias.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    handles = {
        "a": sl.attach(inner, sl.lora(1), ["0"], name="a"),
        "b": sl.attach(model, sl.lora(1), ["head"], name="b"),
        "c": sl.attach(inner[1:2], sl.lora(1), ["1"], name="c"),
    }
    for name in order[:2]:
        handles[name].detach()
    left = [n for n, p in handles[order[2]]._model[0].named_parameters() if p.requires_grad and f"{order[2]}." not in n]  # type: ignore[index]
    assert not left
    handles[order[2]].detach()
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}


def tied() -> nn.Module:
    model = net()
    model[1].weight = model[0].weight
    return model


def replaced(model: nn.Module) -> None:
    model[0] = nn.Linear(6, 6)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "after", "words"),
    [
        (tied, None, "is shared with '1.weight'"),
        (net, replaced, "the module '0' is another one now"),
        (net, lambda m: nn.utils.parametrizations.weight_norm(m[0]), "computed from others"),
    ],
    ids=["tied", "replaced", "computed"],
)
def test_what_cannot_hold_dw_is_refused_by_name(
    make: Callable[[], nn.Module], after: Callable[[nn.Module], object] | None, words: str
) -> None:
    model = make()
    tuned = adapted(model, sl.lora(2), ["0", "2"])
    if after is not None:
        after(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for ask in (tuned.check_mergeable, tuned.merge):
        with pytest.raises(sl.AttachError, match=words):
            ask()
    assert same_state(before, model.state_dict())
    assert not tuned.merged


def test_whether_a_merge_will_do_is_asked_without_merging() -> None:
    model = net()
    tuned = adapted(model, sl.lora(2), ["0", "2"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned.check_mergeable()
    assert not tuned.merged
    assert same_state(before, model.state_dict())
    tuned.merge()
    with pytest.raises(sl.AttachError, match="merged already"):
        tuned.check_mergeable()


def test_views_of_one_storage_that_do_not_overlap_merge() -> None:
    model = net()
    nn.utils.vector_to_parameters(torch.randn(126), model.parameters())
    adapted(model, sl.lora(2), ["0", "1"]).merge()


def test_copies_of_a_merged_model_unmerge_by_themselves() -> None:
    model = net()
    tuned = adapted(model, sl.lora(2), ["0"])
    tuned.merge()
    twin = copy.deepcopy(model)
    sl.tuned(twin).detach()
    assert same_state(net().state_dict(), twin.state_dict())
    assert tuned.merged


@pytest.mark.parametrize(
    ("base", "dtype"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.bfloat16, torch.float16)]
)
def test_an_adapter_of_zero_changes_no_bit_of_a_wider_base(base: torch.dtype, dtype: torch.dtype) -> None:
    model = net().to(base)
    before = copy.deepcopy(model.state_dict())
    sl.attach(model, sl.lora(2), ["0"], dtype=dtype).merge()
    assert torch.equal(model[0].weight, before["0.weight"])


def requires_grad(model: nn.Module) -> set[bool]:
    return {p.requires_grad for n, p in model.named_parameters() if "superlora" not in n and ".adapters." not in n}


@pytest.mark.parametrize("leave", ["detach", "bake"])
def test_a_copy_holds_what_it_froze(leave: str) -> None:
    model = net()
    adapted(model, sl.lora(1), ["0"], name="a")
    adapted(model, sl.lora(1), ["1"], name="b")
    other = copy.deepcopy(model)
    getattr(sl.tuned(other, "a"), leave)()
    assert requires_grad(other) == {False}  # b is still there
    getattr(sl.tuned(other, "b"), leave)()
    assert requires_grad(other) == {True}
    assert requires_grad(model) == {False}


def test_what_is_attached_to_a_copy_gives_requires_grad_back() -> None:
    model = net()
    adapted(model, sl.lora(1), ["0"], name="a")
    other = copy.deepcopy(model)
    adapted(other, sl.lora(1), ["1"], name="b")
    sl.tuned(other, "a").detach()
    assert requires_grad(other) == {False}
    sl.tuned(other, "b").detach()
    assert requires_grad(other) == {True}


def test_a_copy_of_a_switched_off_model_can_be_switched_on() -> None:
    model = net()
    base = model(X).detach()
    tuned = adapted(model, sl.lora(2), ["0"])
    want = model(X).detach()
    with tuned.disabled():
        other = copy.deepcopy(model)
    assert torch.equal(other(X), base)
    sl.use(other, "superlora")
    assert torch.equal(other(X), want)


def test_a_state_dict_of_a_merged_model_goes_back_into_it() -> None:
    model = net()
    tuned = adapted(model, sl.lora(2), ["0"])
    want, nodes = model(X).detach(), [p.detach().clone() for p in tuned.parameters()]
    tuned.merge()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(nodes, tuned.parameters(), strict=True))
    tuned.unmerge()
    assert torch.equal(model(X), want)


def test_what_is_switched_off_is_not_merged() -> None:
    model = net()
    base = model(X).detach()
    tuned = adapted(model, sl.lora(2), ["0"])
    sl.use(model, None)
    for leave in (tuned.check_mergeable, tuned.merge, tuned.bake):
        with pytest.raises(sl.AttachError, match="is switched off, so merging it would change what the model computes"):
            leave()
    assert torch.equal(model(X), base)


BASED = {"hira": sl.hira(1), "lora_xs": sl.lora_xs(2), "svft": sl.svft(2), "dora": sl.dora(sl.lora(1))}


@pytest.mark.parametrize("name", BASED)
def test_first_values_are_not_found_from_a_weight_that_holds_an_adapter(name: str) -> None:
    model = net()
    tuned = adapted(model, BASED[name], ["0"], name="own")
    others = [] if name == "dora" else [adapted(model, sl.lora(1), ["0"], name="other")]  # DoRA shares no weight
    before = [t.clone() for t in (*tuned.parameters(), *tuned.buffers())]
    for merged in (tuned, *others):
        merged.merge()
        with pytest.raises(sl.AttachError, match=r"holds a merged adapter now; unmerge\(\) first"):
            tuned.reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, (*tuned.parameters(), *tuned.buffers()), strict=True))
        merged.unmerge()
    tuned.reset_parameters()


def test_scales_are_reset_while_merged() -> None:
    model = net()
    base = model(X).detach()
    tuned = adapted(model, sl.boft(2, 1, scaled=True), ["0"])
    tuned.merge()
    tuned.reset_parameters()
    tuned.unmerge()
    torch.testing.assert_close(model(X), base, **CLOSE)


@pytest.mark.parametrize("at", ["output", "weight"])
def test_copies_for_several_devices_are_refused_in_words(at: str) -> None:
    """`nn.DataParallel` ended in torch's error of two devices, or of a property that cannot be set."""
    model = net()
    tuned = adapted(model, sl.lora(2), ["0", "2"], at=at)

    def replicate() -> list[object]:
        return [module._replicate_for_data_parallel() for module in model.modules()]

    with pytest.raises(sl.AttachError, match="take DistributedDataParallel"):
        replicate()
    if at == "output":
        tuned.merge()
        replicate()
        tuned.unmerge()
    tuned.detach()
    replicate()
