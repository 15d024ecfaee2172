"""Several adapters on one weight, and what trains beside one: sums and rows against dense weights written out in float64."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TARGETS, Tied, Tiny, assert_untouched, noise, perturb, same_state, seeded, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import superlora_tn as sl
from superlora_tn.model.saved import At
from superlora_tn.model.site import UpdateHook

SPECS = {"style": sl.lora(2, alpha=3), "subject": sl.lokr(1), "both": sl.lotr(2)}


def model_with(*names: str) -> tuple[nn.Module, dict[str, sl.Tuned]]:
    model = seeded(0, Tiny).double()
    made = {n: sl.attach(model, SPECS[n], TARGETS, name=n, dtype=torch.float64, seed=k) for k, n in enumerate(names)}
    for handle in made.values():
        perturb(handle)
    return model, made


def dense(handles: dict[str, sl.Tuned], strengths: dict[str, float]) -> nn.Module:
    """The base with the weighted sum of all dW in its weights."""
    plain = seeded(0, Tiny).double()
    for name, strength in strengths.items():
        for target in handles[name].targets:
            plain.get_submodule(target).weight.data += strength * handles[name].delta(target).detach()
    return plain


X = noise(3, 4, 12, dtype=torch.float64)


def test_outputs_and_gradients_of_two_adapters_are_those_of_the_sum() -> None:
    model, handles = model_with("style", "subject", "both")
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    y = model(x)
    plain = dense(handles, dict.fromkeys(handles, 1.0))
    torch.testing.assert_close(y, plain(z))
    y.pow(2).sum().backward()
    plain(z).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    weight_grads = {n: plain.get_submodule(n).weight.grad for n in handles["style"].targets}
    for handle in handles.values():
        wanted = list(handle.parameters())
        # dL/dnode through dW: the chain rule from the dense model's gradients of its weights.
        loss = sum((handle.delta(n) * g).sum() for n, g in weight_grads.items())
        for parameter, found in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
            torch.testing.assert_close(parameter.grad, found)


@pytest.mark.parametrize(
    "names",
    [{"style": 0.7, "subject": -1.5}, ["subject", "both"], "both", None, [], {"style": 0.0}],
    ids=["weights", "list", "one", "none", "empty", "zero"],
)
def test_use_gives_the_weighted_sum_and_as_a_context_goes_back(names: object) -> None:
    model, handles = model_with("style", "subject", "both")
    before = model(X)
    weights = names if isinstance(names, dict) else dict.fromkeys([names] if isinstance(names, str) else names or [], 1.0)
    with sl.use(model, names):  # type: ignore[arg-type]
        torch.testing.assert_close(model(X), dense_unit(model, handles, weights)(X))
    assert torch.equal(model(X), before)
    sl.use(model, names)  # type: ignore[arg-type]
    torch.testing.assert_close(model(X), dense_unit(model, handles, weights)(X))


def dense_unit(model: nn.Module, handles: dict[str, sl.Tuned], weights: dict[str, float]) -> nn.Module:
    """As `dense`, from dW at strength 1, whatever is in use."""
    with sl.use(model, list(handles)):
        return dense(handles, weights)


def test_a_strength_scales_dw_forward_and_merged() -> None:
    model, handles = model_with("style")
    handles["style"].strength = 0.25
    expected = dense(handles, {"style": 1.0})  # delta() holds the strength
    torch.testing.assert_close(model(X), expected(X))
    handles["style"].merge()
    torch.testing.assert_close(model(X), expected(X))
    with pytest.raises(sl.AttachError, match=r"'style' is merged, so its strength is in the weights"):
        handles["style"].strength = 1.0
    with pytest.raises(sl.SpecError, match="strength is a finite number"):
        handles["style"].strength = float("nan")


def test_each_row_of_a_batch_meets_its_own_adapter() -> None:
    model, handles = model_with("style", "subject")
    with sl.rows(model, ["subject", None, "style"]):
        y = model(X)
    for k, name in enumerate(["subject", None, "style"]):
        plain = dense(handles, {name: 1.0} if name else {})
        torch.testing.assert_close(y[k], plain(X)[k])
    twice = X.repeat_interleave(2, 0)
    with sl.rows(model, ["subject", None, "style"]):
        torch.testing.assert_close(model(twice), y.repeat_interleave(2, 0))
        with pytest.raises(sl.LayerError, match=r"first axis of 4, and 3 rows of a batch were named"):
            model(noise(4, 4, 12, dtype=torch.float64))
    torch.testing.assert_close(model(X), dense(handles, {"style": 1.0, "subject": 1.0})(X))


def test_gradients_of_rows_reach_their_own_adapter_alone() -> None:
    model, handles = model_with("style", "subject")
    with sl.rows(model, ["subject", None, None]):
        model(X).pow(2).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in handles["style"].parameters())
    alone = {"subject": handles["subject"]}
    grads = [p.grad.clone() for p in handles["subject"].parameters()]
    handles["subject"].zero_grad()
    with sl.use(model, "subject"):
        model(X)[:1].pow(2).sum().backward()
    for ours, parameter in zip(grads, alone["subject"].parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


ALIKE = {
    "lora": sl.lora(2, alpha=3),
    "loha": sl.loha(2),
    "vera": sl.vera(3),
    "lokr": sl.lokr(2),
    "dropped": sl.lora(2, dropout=0.5),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("names", [["c", None, "a", "a"], ["a", "b", "c", "b"], ["b", "b", None, None]])
def test_rows_of_alike_networks_run_as_one(name: str, names: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of one declaration and different strengths, values and gradients row by row against dense weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 24)).double().eval()
    more = {"route": "apply", "dtype": torch.float64}
    handles = {n: sl.attach(model, ALIKE[name], ["0", "2"], name=n, seed=k, **more) for k, n in enumerate("abc")}
    for k, handle in enumerate(handles.values()):
        perturb(handle, seed=k)
        handle.strength = 0.5 + k
    x = noise(8, 5, 24, dtype=torch.float64).requires_grad_()  # twice as many rows as names
    if name in ("lora", "loha", "vera"):
        # Rows are in no adapter's own hands.
        monkeypatch.setattr(UpdateHook, "_on_own_rows", None) if len({*names} - {None}) > 1 else None
    with sl.rows(model, names):
        y = model(x)
        assert model(x[:0]).shape == (0, 5, 24)
    rows = []
    for k, own in enumerate(x):
        n = names[k // 2]
        for layer in ("0", "2"):
            delta = handles[n].delta(layer) if n else 0
            own = own @ (model[int(layer)].weight + delta).T + model[int(layer)].bias
            own = torch.tanh(own) if layer == "0" else own
        rows.append(own)
    other = torch.stack(rows)
    torch.testing.assert_close(y, other)
    g, wanted = (
        noise(*y.shape, seed=3, dtype=torch.float64),
        [x, *(p for n in {*names} - {None} for p in handles[n].parameters())],
    )
    for found, right in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(other, wanted, g), strict=True):
        torch.testing.assert_close(found, right)


def test_wrong_names_say_what_is_there() -> None:
    model, handles = model_with("style")
    for call in (lambda: sl.use(model, "stile"), lambda: sl.rows(model, ["stile"]).__enter__()):
        with pytest.raises(sl.AttachError, match=r"no adapter named 'stile'; near names are 'style'"):
            call()
    handles["style"].merge()
    with pytest.raises(sl.AttachError, match="'style' is merged"):
        sl.use(model, None)
    with pytest.raises(sl.AttachError, match="'style' is merged"), sl.rows(model, ["style"]):
        pass
    with pytest.raises(sl.AttachError, match=r"is adapted already under the name 'style'"):
        sl.attach(nn.ModuleDict({"part": model.layers[0]}), sl.lora(1), ["up"], name="style")


@pytest.mark.parametrize("order", list(itertools.permutations(["style", "subject", "both"])), ids="-".join)
def test_merging_and_leaving_in_any_order_gives_back_every_bit(order: tuple[str, ...]) -> None:
    model, handles = model_with("style", "subject", "both")
    own = seeded(0, Tiny).double().state_dict()
    for name in ("both", "style", "subject"):
        handles[name].merge()
    torch.testing.assert_close(model(X), dense(handles, dict.fromkeys(handles, 1.0))(X))
    left = dict.fromkeys(handles, 1.0)
    for name in order:
        handles[name].unmerge()
        with sl.use(nn.ModuleDict({name: handles[name]}), None):
            del left[name]
            torch.testing.assert_close(model(X), dense(handles, left)(X) if left else seeded(0, Tiny).double()(X))
        handles[name].detach()
    assert same_state(own, model.state_dict())


def test_replace_takes_the_values_of_a_saved_adapter_in_place(tmp_path: Path) -> None:
    model, handles = model_with("style")
    handles["style"].save(tmp_path)
    kept = list(handles["style"].parameters())
    want = model(X)
    perturb(handles["style"], seed=9)
    assert not torch.allclose(model(X), want)
    handles["style"].replace(tmp_path)
    assert torch.equal(model(X), want)
    assert all(a is b for a, b in zip(kept, handles["style"].parameters(), strict=True))
    _, more = model_with("subject")
    with pytest.raises(sl.CheckpointError, match="another declaration or other targets"):
        more["subject"].replace(tmp_path)


def test_several_declarations_in_one_handle_are_saved_and_loaded_as_one(tmp_path: Path) -> None:
    model = seeded(0, Tiny).double()
    tuned = sl.attach(model, {"q_proj|v_proj": sl.lora(2), "up": sl.lokr(1)}, dtype=torch.float64)
    perturb(tuned)
    assert [len(entry.targets) for entry in tuned.entries] == [4, 2]
    tuned.save(tmp_path)
    other = seeded(0, Tiny).double()
    loaded = sl.load(other, tmp_path)
    assert loaded.entries == tuned.entries
    assert torch.equal(other(X), model(X))
    with pytest.raises(sl.AttachError, match=r"2 declarations; look at .entries"):
        _ = tuned.spec
    assert "spec" not in dir(tuned)
    with pytest.raises(sl.AttachError, match="matches no module"):
        sl.attach(seeded(0, Tiny), {"up": sl.lora(1), "nothing": sl.lora(1)})
    with pytest.raises(sl.AttachError, match=r"the pattern 'layers.0.up' leaves no layer to adapt"):
        sl.attach(seeded(0, Tiny), {"up": sl.lora(1), "layers.0.up": sl.lora(1)})


def test_what_trains_beside_is_saved_loaded_and_put_back(tmp_path: Path) -> None:
    model = seeded(0, Tiny).double()
    base = copy.deepcopy(model.state_dict())
    tuned = sl.attach(model, sl.lora(2), TARGETS, dtype=torch.float64, also=["head", "*norm.bias"])
    beside = ["layers.0.norm.bias", "layers.1.norm.bias", "head.weight", "head.bias"]
    assert [n for n, p in model.named_parameters() if p.requires_grad and "superlora" not in n] == beside
    assert "of the base's own" in str(tuned)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).pow(2).sum().backward()
        optimizer.step()
    want = model(X)
    tuned.save(tmp_path)
    other = seeded(0, Tiny).double()
    loaded = sl.load(other, tmp_path)
    assert torch.equal(other(X), want)
    assert [n for n, p in other.named_parameters() if p.requires_grad and "superlora" not in n] == beside
    for adapted, handle in ((model, tuned), (other, loaded)):
        handle.detach()
        assert all(torch.equal(v, base[k]) for k, v in adapted.state_dict().items())
        assert all(p.requires_grad for p in adapted.parameters())


def test_patterns_choose_among_the_targets_that_were_named() -> None:
    """Stacks of matrices by their own names, and tied weights by both of theirs."""
    model = seeded(0, Tied)
    for targets in ("all-linear", r".*(embed|body|lm_head)"):
        tuned = sl.attach(model, {"body": sl.lora(1)}, targets)
        assert list(tuned.targets) == ["body"]
        tuned.detach()
    for pattern in ("embed|lm_head", r"embed\+lm_head"):
        tuned = sl.attach(model, {"body": sl.lora(1), pattern: sl.lora(2)}, ["embed", "lm_head", "body"])
        assert [list(entry.targets) for entry in tuned.entries] == [["body"], ["embed+lm_head"]]
        tuned.detach()
    with pytest.raises(
        sl.AttachError, match=r"the pattern 'embed' matches none of the weights that targets= leaves .* 'embed\+lm_head'"
    ):
        sl.attach(model, {"embed": sl.lora(1)}, ["embed", "lm_head", "body"])
    experts = nn.ModuleDict({"inner": nn.Module()})
    experts["inner"].register_parameter("stack", nn.Parameter(torch.zeros(3, 4, 5)))
    tuned = sl.attach(experts, {"stack.1": sl.lora(1), "stack": sl.lora(2)}, ["stack"])
    assert [list(entry.targets) for entry in tuned.entries] == [["inner.stack.1"], ["inner.stack.0", "inner.stack.2"]]


@pytest.mark.parametrize("also", [["lm_head"], ["lm_head.weight"], ["lm*.weight"], ["embed"], ["embed", "lm_head"]], ids=str)
def test_a_tied_parameter_trains_beside_by_each_of_its_names(also: list[str], tmp_path: Path) -> None:
    """Once, with the gradient of both its uses, as in the plain base; saved once, and put back."""
    x, model, plain = torch.tensor([[1, 4, 8], [5, 0, 1]]), seeded(0, Tied).double(), seeded(0, Tied).double()
    before = copy.deepcopy(model.state_dict())
    tuned = sl.attach(model, sl.lora(2), ["body"], dtype=torch.float64, also=also)
    assert model.embed.weight.requires_grad
    assert model.lm_head.weight is model.embed.weight
    model(x).square().sum().backward()  # dW is still zero
    plain(x).square().sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, plain.embed.weight.grad)
    perturb(tuned)
    with torch.no_grad():
        model.embed.weight.add_(noise(9, model.embed.embedding_dim, dtype=torch.float64))
    want = model(x)
    tuned.save(tmp_path)
    other = seeded(0, Tied).double()
    loaded = sl.load(other, tmp_path)
    assert torch.equal(other(x), want)
    assert other.lm_head.weight.requires_grad
    for adapted, handle in ((model, tuned), (other, loaded)):
        handle.detach()
        assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
        assert adapted.lm_head.weight is adapted.embed.weight


def test_a_head_of_another_shape_than_was_saved_raises_and_leaves_the_model(tmp_path: Path) -> None:
    model = seeded(0, Tiny)
    sl.attach(model, sl.lora(2), TARGETS, also=["head"]).save(tmp_path)
    other = seeded(0, Tiny)
    other.head = nn.Linear(12, 7)
    before = snapshot(other)
    with pytest.raises(sl.CheckpointError, match=r"no 'head.weight' of shape \(5, 12\)"):
        sl.load(other, tmp_path)
    assert_untouched(other, before)


def test_an_entry_of_also_that_matches_nothing_raises() -> None:
    with pytest.raises(sl.AttachError, match=r"also names 'classifier', which matches no parameter"):
        sl.attach(Tiny(), sl.lora(2), TARGETS, also=["classifier"])
    with pytest.raises(sl.AttachError, match=r"give a list, such as"):
        sl.attach(Tiny(), sl.lora(2), TARGETS, also="head")


def test_baking_keeps_what_trained_beside() -> None:
    model = seeded(0, Tiny)
    tuned = sl.attach(model, sl.lora(2), TARGETS, also=["head"])
    perturb(tuned)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    want: Tensor = model(X.float())
    plain = tuned.bake()
    # Sums of 12 and 20 float32 terms in another order.
    torch.testing.assert_close(plain(X.float()), want, rtol=1e-4, atol=1e-4)
    assert not [m for m in plain.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert set(plain.state_dict()) == set(Tiny().state_dict())


def test_a_complex_adapter_on_a_real_weight_is_refused() -> None:
    model = seeded(0, Tiny)
    before = snapshot(model)
    with pytest.raises(sl.AttachError, match="complex64 is complex, and the weight of 'layers\\.0\\.attn\\.q_proj' is real"):
        sl.attach(model, sl.lora(2), TARGETS, dtype=torch.complex64)
    assert_untouched(model, before)


def layer_of(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer in float64, and an input of it."""
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(3), "dtype": torch.float64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "linear":
            return nn.Linear(16, 12).double(), torch.randn(3, 16, **draw)
        if kind == "convolution":
            return nn.Conv2d(4, 6, 3).double(), torch.randn(2, 4, 5, 5, **draw)
        return nn.Embedding(10, 8).double(), torch.tensor([[1, 9, 1], [0, 4, 3]])


def with_added(kind: str, *deltas: Tensor) -> Tensor:
    """What the layer gives with dW (out, in) of these in its weight."""
    layer, x = layer_of(kind)
    with torch.no_grad():
        for delta in deltas:
            layer.weight += (delta.T if kind == "table" else delta).reshape(layer.weight.shape)
    found: Tensor = layer(x)
    return found


@pytest.mark.parametrize("kind", ["linear", "convolution", "table"])
@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize("order", [("output", "weight"), ("weight", "output")])
def test_an_adapter_at_the_output_merges_beside_one_at_the_weight(kind: str, bake: bool, order: tuple[At, At]) -> None:
    """What is merged is written into W itself, not into the W + dW that the other shows."""
    layer, x = layer_of(kind)
    model = nn.Sequential(layer)
    known = {at: sl.attach(model, sl.lora(2), ["0"], name=f"at_{at}", at=at, dtype=torch.float64) for at in order}
    for handle in known.values():
        perturb(handle)
    own, other = (known[at].delta("0").detach().clone() for at in ("output", "weight"))
    stored = layer._parameters["weight"]
    assert stored is not None
    before = stored.detach().clone()
    torch.testing.assert_close(model(x), with_added(kind, own, other))
    (known["output"].bake if bake else known["output"].merge)()
    torch.testing.assert_close(model(x), with_added(kind, own, other))
    with known["weight"].disabled():
        torch.testing.assert_close(model(x), with_added(kind, own))
    if not bake:
        known["output"].unmerge()
        assert torch.equal(stored, before)
        torch.testing.assert_close(model(x), with_added(kind, own, other))


def test_nodes_of_the_base_hold_w_itself_where_another_adapter_shows_more() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).double()
    weight = model[0].weight.detach().clone()
    perturb(sl.attach(model, sl.shira(20), ["0"], name="shown", at="weight"))
    tuned = sl.attach(model, sl.hira(1), ["0"], name="based", dtype=torch.float64)
    assert torch.equal(dict(tuned.named_buffers())["adapters.0.node_W"].reshape(16, 16), weight)
    perturb(tuned)
    first, second = (p.detach() for p in tuned.parameters())
    product = first @ second if first.shape[1] == second.shape[0] else second @ first
    torch.testing.assert_close(tuned.delta("0").detach(), tuned.spec.scale * weight * product)


def test_rows_refuse_what_acts_on_all_rows_at_the_weight() -> None:
    model, _ = model_with("style")
    sl.attach(model, sl.lora(1), TARGETS[:1], name="shown", at="weight", dtype=torch.float64)
    with pytest.raises(sl.AttachError, match=r"'shown' is where .* one for all rows; .* or switch it off"):
        sl.rows(model, ["style"]).__enter__()
    sl.use(model, "style")
    want = model(X[:1])
    with sl.rows(model, ["style", None, "style"]):
        torch.testing.assert_close(model(X)[:1], want)


def test_rows_meet_what_multiplies_the_input_all_or_none() -> None:
    model = nn.Sequential(nn.Linear(12, 4)).double()
    plain = model(X).detach()
    turning = sl.attach(model, sl.oft(2), ["0"], name="turning", dtype=torch.float64)
    perturb(turning)
    turned = model(X).detach()
    assert not torch.allclose(turned, plain)
    with sl.rows(model, [None, None, None]):
        torch.testing.assert_close(model(X), plain)
    with sl.rows(model, ["turning"] * 3):
        torch.testing.assert_close(model(X), turned)
    with sl.rows(model, ["turning", None, None]), pytest.raises(TypeError, match="for all rows or for none"):
        model(X)


# --- regions that are computed again in backward --------------------------------------------------------------------------

ROOTS = ("0", "2", "4")
AGAIN: dict[str, tuple[sl.AdapterSpec, dict[str, Any]]] = {
    "lora": (sl.lora(2, alpha=3), {}),
    "lora at the weight": (sl.lora(2, alpha=3), {"at": "weight"}),
    "lotr": (sl.lotr(2), {}),
    "lorta": (sl.lorta(2, groups=2), {}),
    "lorta, built again": (sl.lorta(2, groups=2), {"recompute": True}),
    "sum": (sl.AdapterSpec(sl.Sum(sl.CP(1), sl.Kronecker(sl.Dense(), sl.Dense()))), {}),
    "dora": (sl.dora(sl.lora(2)), {}),
    "left, alone": (sl.AdapterSpec(sl.CP(2), join=sl.Multiply("left", residual=False)), {}),
}


class Checkpointed(nn.Sequential):
    """Layers in two regions of a checkpoint, or all in one, within the model or around it."""

    def __init__(self, where: str) -> None:
        torch.manual_seed(2)
        layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid()]
        super().__init__(*layers)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        for first, last in {"two": ((0, 3), (3, 6))}.get(self.where, ((0, 6),)):
            part = nn.Sequential(*(self[k] for k in range(first, last)))
            x = checkpoint(part, x, use_reentrant=False) if self.where in ("one", "two") else part(x)
        return x

    def run(self, x: Tensor, call: Any = None) -> Tensor:
        call = self if call is None else call
        return checkpoint(call, x, use_reentrant=False) if self.where == "around" else call(x)


def with_strengths(model: nn.Module, handle: sl.Tuned, x: Tensor, strength: float) -> Tensor:
    """The plain layers with dW, or what else the join makes of it, of this strength, from the nodes."""
    before, handle.strength = handle.strength, strength
    weights = {f"{n}.weight": model[int(n)]._parameters["weight"] + handle.delta(n) for n in handle.targets}
    handle.strength = before
    plain = Checkpointed("plain").double()
    return torch.func.functional_call(plain, weights, (x,))


@pytest.mark.parametrize("where", ["two", "one", "around"])
@pytest.mark.parametrize("name", AGAIN)
def test_what_is_computed_again_has_the_strength_of_its_call(name: str, where: str) -> None:
    """Two calls of other strengths, and a backward pass of both when neither is in use any more."""
    spec, more = AGAIN[name]
    model, x = Checkpointed(where).double(), noise(5, 6, dtype=torch.float64).requires_grad_()
    handle = sl.attach(model, spec, list(ROOTS), dtype=torch.float64, seed=0, **more)
    perturb(handle)
    with sl.use(model, {"superlora": 0.5}):
        first = model.run(x)
    handle.strength = -1.5
    second = model.run(x)
    with handle.disabled():
        third = model.run(x)
    handle.strength = 1.0
    expected = [with_strengths(model, handle, x, strength) for strength in (0.5, -1.5)]
    expected.append(Checkpointed("plain").double()(x))
    wanted, g = [x, *handle.parameters()], noise(5, 4, dtype=torch.float64)
    for own, right in zip((first, second, third), expected, strict=True):
        torch.testing.assert_close(own, right)
    found = torch.autograd.grad((first + second.square() + third) * g, wanted, torch.ones_like(g), retain_graph=True)
    right = torch.autograd.grad((expected[0] + expected[1].square() + expected[2]) * g, wanted, torch.ones_like(g))
    for own, other in zip(found, right, strict=True):
        torch.testing.assert_close(own, other)
    handle.strength = 2.0
    again = torch.autograd.grad((first + second.square() + third) * g, wanted, torch.ones_like(g))
    for own, other in zip(again, right, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("where", ["two", "one", "around"])
def test_what_is_computed_again_has_the_rows_of_its_call(where: str) -> None:
    model, x = Checkpointed(where).double(), noise(4, 6, dtype=torch.float64).requires_grad_()
    handles = [sl.attach(model, sl.lora(2), list(ROOTS), dtype=torch.float64, seed=k, name=f"n{k}") for k in range(2)]
    for k, handle in enumerate(handles):
        perturb(handle, seed=k)
    names = ["n0", None, "n1", "n0"]
    with sl.rows(model, names):
        y = model.run(x)
    sl.use(model, None)
    plain = Checkpointed("plain").double()
    each = [plain(x[k]) if n is None else with_strengths(model, sl.tuned(model, n), x[k], 1.0) for k, n in enumerate(names)]
    wanted = [x, *handles[0].parameters(), *handles[1].parameters()]
    torch.testing.assert_close(y, torch.stack(each))
    found = torch.autograd.grad(y.square().sum(), wanted)
    for own, other in zip(found, torch.autograd.grad(torch.stack(each).square().sum(), wanted), strict=True):
        torch.testing.assert_close(own, other)


def test_a_region_that_changes_strengths_itself_changes_them_again() -> None:
    model, x = Checkpointed("around").double(), noise(5, 6, dtype=torch.float64).requires_grad_()
    handle = sl.attach(model, sl.lora(2), list(ROOTS), dtype=torch.float64, seed=0)
    perturb(handle)

    def call(z: Tensor) -> Tensor:
        total = model(z)
        for strength in (0.5, 2.0, 0.5):
            with sl.use(model, {"superlora": strength}):
                total = torch.sin(total) @ torch.ones(4, 4, dtype=z.dtype) * model(z)
            total = torch.sin(total) + torch.exp(model(z))
        return total

    handle.strength = 0.25
    wanted, g = [x, *handle.parameters()], noise(5, 4, dtype=torch.float64)
    right = torch.autograd.grad(call(x), wanted, g)
    y = model.run(x, call)
    handle.strength = 2.0
    for own, other in zip(torch.autograd.grad(y, wanted, g), right, strict=True):
        torch.testing.assert_close(own, other)


def test_what_is_computed_again_on_a_merged_weight_does_not_count_dw_twice() -> None:
    """torch notices that other tensors are saved, or the gradient of x is right: W holds dW now."""
    model, x = Checkpointed("one").double(), noise(5, 6, dtype=torch.float64).requires_grad_()
    handle = sl.attach(model, sl.lora(2), list(ROOTS), dtype=torch.float64, seed=0)
    perturb(handle)
    (right,) = torch.autograd.grad(model(x).sum(), x)
    y = model(x)
    handle.merge()
    try:
        (found,) = torch.autograd.grad(y.sum(), x)
    except CheckpointError:
        return
    torch.testing.assert_close(found, right)


def test_a_merge_within_use_neither_hides_an_error_nor_leaves_the_others_off() -> None:
    model, handles = model_with(*SPECS)
    halves = dict.fromkeys(SPECS, 0.5)
    after = [(True, 1.0 if name == "subject" else 0.5) for name in SPECS]
    sl.use(model, halves)
    used = sl.use(model, "subject")
    handles["subject"].merge()
    used.__exit__(KeyError, KeyError(), None)  # the error goes on
    assert [(h._enabled, h.strength) for h in handles.values()] == after
    handles["subject"].unmerge()
    sl.use(model, halves)
    used = sl.use(model, "subject")
    handles["subject"].merge()
    with pytest.raises(sl.AttachError, match=r"'subject' was merged within use\(\)"):
        used.__exit__(None, None, None)
    assert [(h._enabled, h.strength) for h in handles.values()] == after
