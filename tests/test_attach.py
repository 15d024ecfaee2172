"""What attaching does to a model, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import (
    DIM,
    HIDDEN,
    TARGETS,
    VARIANTS,
    ConvNet,
    Tied,
    Tiny,
    assert_untouched,
    noise,
    perturb,
    same_state,
    seeded,
    snapshot,
)
from optional import library
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl

every_variant = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)


def attached(spec: sl.AdapterSpec, seed: int = 0, **options: object) -> tuple[nn.Module, sl.Tuned]:
    model = seeded(seed, Tiny)
    return model, sl.attach(model, spec, TARGETS, seed=seed, **options)


def steps(model: nn.Module, x: Tensor, count: int = 3) -> None:
    """A few steps of gradient descent on whatever is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    forward().square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_variant
def test_base_keys_and_values_stay(spec: sl.AdapterSpec) -> None:
    before = seeded(0, Tiny).state_dict()
    model, _ = attached(spec)
    after = model.state_dict()
    assert same_state(before, {k: after[k] for k in before})
    extra = [k for k in after if k not in before]
    assert extra
    assert all(k.startswith("superlora.") for k in extra)


@every_variant
def test_only_the_adapter_requires_grad(spec: sl.AdapterSpec) -> None:
    model, tuned = attached(spec)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"superlora.{n}" for n, _ in tuned.named_parameters()}
    assert sum(p.numel() for p in tuned.parameters()) == tuned.num_parameters == spec.count(tuned.targets) > 0


@every_variant
def test_output_at_start_is_the_base_bit_for_bit(spec: sl.AdapterSpec) -> None:
    model, _ = attached(spec)
    x = noise(2, 3, DIM)
    assert torch.equal(model(x), seeded(0, Tiny)(x))


@every_variant
def test_training_moves_every_adapter_parameter_and_nothing_else(spec: sl.AdapterSpec) -> None:
    model, tuned = attached(spec)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    steps(model, noise(4, 3, DIM))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"superlora.{n}" for n, _ in tuned.named_parameters()}


@every_variant
def test_adapters_are_float32_on_a_bfloat16_base(spec: sl.AdapterSpec) -> None:
    model = seeded(0, Tiny).to(torch.bfloat16)
    tuned = sl.attach(model, spec, TARGETS, seed=0)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    perturb(tuned, size=1.0)  # large enough to show in eight bits
    x = noise(2, 3, DIM, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    with tuned.disabled():
        assert not torch.equal(y, model(x))
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in tuned.parameters()} == {torch.float32}


@every_variant
def test_gradient_reaches_the_input(spec: sl.AdapterSpec) -> None:
    model, tuned = attached(spec)
    perturb(tuned, size=0.1)
    plain = seeded(0, Tiny)
    for name in tuned.targets:
        plain.get_submodule(name).weight.data += tuned.delta(name).detach()
    x, z = noise(2, 3, DIM).requires_grad_(), noise(2, 3, DIM).requires_grad_()
    model(x).square().sum().backward()
    plain(z).square().sum().backward()
    # float32 sums in another order: some tens of roundings of values of order 1.
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)


@every_variant
def test_a_copy_owns_its_adapters(spec: sl.AdapterSpec) -> None:
    model, tuned = attached(spec)
    perturb(tuned)
    x = noise(2, 3, DIM)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        handle = sl.tuned(twin)
        assert handle is not tuned
        perturb(handle, seed=1)
        assert not torch.equal(twin(x), y)
        assert torch.equal(model(x), y)
        assert same_state(seeded(0, Tiny).state_dict(), handle.detach().state_dict())
        assert torch.equal(model(x), y)


@every_variant
def test_state_dict_of_one_attached_model_loads_into_another(spec: sl.AdapterSpec) -> None:
    source, tuned = attached(spec)
    perturb(tuned)
    target, _ = attached(spec, seed=1)
    target.load_state_dict(source.state_dict(), strict=True)
    x = noise(2, 3, DIM)
    assert torch.equal(source(x), target(x))


@every_variant
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(spec: sl.AdapterSpec, reentrant: bool) -> None:
    model, tuned = attached(spec)
    perturb(tuned)
    x = noise(2, 3, DIM).requires_grad_()

    def saved() -> Tensor:
        y = x
        for layer in model.layers:
            y = checkpoint(layer, y, use_reentrant=reentrant)
        return model.head(y)

    plain, recomputed = gradients(model, lambda: model(x)), gradients(model, saved)
    assert plain.keys() == recomputed.keys() == {f"superlora.{n}" for n, _ in tuned.named_parameters()}
    for name in plain:
        # float32 sums of order 10 in another order.
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-5)


@every_variant
def test_functional_call_takes_other_adapter_values(spec: sl.AdapterSpec) -> None:
    model, tuned = attached(spec)
    other, handle = attached(spec)
    perturb(handle)
    x, before = noise(2, 3, DIM), {n: p.clone() for n, p in tuned.named_parameters()}
    values = {f"superlora.{n}": p for n, p in handle.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, values, (x,)), other(x))
    assert all(torch.equal(p, before[n]) for n, p in tuned.named_parameters())


# --- which modules -------------------------------------------------------------------------------------------------


NAMES = [
    "first",
    "layers.0.attn.q_proj",
    "layers.0.attn.eq_proj",
    "layers.1.attn.q_proj",
    "layers.1.mlp.up",
    "layers.10.attn.q_proj",
    "head",
]


def named_model() -> nn.Module:
    """A model whose linear layers carry exactly NAMES."""
    root = nn.Module()
    for name in NAMES:
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if parent not in dict(place.named_children()):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, nn.Linear(2, 2))
    root.add_module("norm", nn.LayerNorm(2))
    return root


@pytest.mark.parametrize(
    ("targets", "exclude", "only", "expected"),
    [
        ("head", (), None, ["head"]),
        (r".*\.q_proj", (), None, [NAMES[1], NAMES[3], NAMES[5]]),
        (r".*q_proj", (), None, [NAMES[1], NAMES[2], NAMES[3], NAMES[5]]),
        (["q_proj"], (), None, [NAMES[1], NAMES[3], NAMES[5]]),
        (["layers.1.attn.q_proj"], (), None, [NAMES[3]]),
        (["attn.q_proj", "first"], (), None, [NAMES[0], NAMES[1], NAMES[3], NAMES[5]]),
        ("all-linear", (), None, NAMES),
        ("all-linear", ["head", "q_proj"], None, [NAMES[0], NAMES[2], NAMES[4]]),
        ("all-linear", r"layers\.1\..*", None, [n for n in NAMES if not n.startswith("layers.1.")]),
        (["q_proj"], (), [1], [NAMES[3]]),
        (["q_proj"], (), [0, 10], [NAMES[1], NAMES[5]]),
        ("all-linear", ["up"], [1], [NAMES[3]]),
    ],
)
def test_matching_follows_peft(targets: object, exclude: object, only: object, expected: list[str]) -> None:
    assert sl.match(named_model(), targets, exclude=exclude, only_layers=only) == expected


@pytest.mark.parametrize(
    "targets",
    [r".*q_proj", r"layers\.1.*proj", "head", ["q_proj"], ["proj", "first"], ["attn.q_proj"], ["layers.0.attn.q_proj", "up"]],
)
def test_peft_itself_matches_the_same(targets: str | list[str]) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils", reason="peft is not installed", exc_type=ImportError)
    peft = pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)
    config = peft.LoraConfig(target_modules=targets)
    model = named_model()
    theirs = [n for n in NAMES if tuners.check_target_module_exists(config, n)]
    if isinstance(targets, list) and "proj" in targets:  # PEFT ignores the entry that matches nothing; here it raises
        assert theirs == ["first"]
        with pytest.raises(sl.AttachError, match="'proj' matches no module"):
            sl.match(model, targets)
        return
    assert sorted(sl.match(model, targets)) == sorted(theirs) != []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["q_porj", "v_proj"]}, ["'q_porj'", "matches no module", "near names", "'q_proj'"]),
        ({"targets": r".*\.q_porj"}, ["q_porj", "matches no module's whole name", "near names"]),
        ({"targets": "q_proj"}, ["matches no module's whole name", "a list takes endings, targets=['q_proj']"]),
        ({"targets": ["q_proj"], "exclude": ["kproj"]}, ["'kproj'", "matches no module", "'k_proj'"]),
        ({"targets": ["q_proj"], "only_layers": [0, 7]}, ["only_layers=[0, 7]", "has the number 7; there are 0, 1."]),
        ({"targets": ["q_proj"], "only_layers": [-1]}, ["has the number -1; there are 0, 1."]),
        ({"targets": ["head"], "only_layers": [0]}, ["leaves no layer", "only_layers=[0]"]),
        ({"targets": ["q_proj"], "exclude": ["attn.q_proj"]}, ["leaves no layer", "exclude=['attn.q_proj']"]),
        ({"targets": []}, ["leaves no layer", "targets=[]"]),
        ({"targets": 3}, ["targets were given as 3", "give a list of names"]),
        ({"targets": [None]}, ["targets were given as [None]", "give a list of names"]),
        ({"targets": (name for name in ["up"])}, ["targets were given as <generator", "give a list of names"]),
        ({"targets": ["up"], "exclude": 3}, ["targets were given as 3"]),
        ({"targets": ["up"], "only_layers": 0}, ["only_layers=0 is no list of numbers", "only_layers=[0, 1]"]),
        ({"targets": ["up"], "only_layers": ["0"]}, ["only_layers=['0'] is no list of numbers"]),
        ({"targets": ["up"], "also": None}, ["also=None", "give a list"]),
        ({"targets": "(up"}, ["'(up'", "not a regular expression"]),
        ({"targets": ["norm"]}, ["'layers.0.norm'", "LayerNorm", "cannot be adapted", "Linear"]),
        ({"targets": ["attn"]}, ["'layers.0.attn'", "Attention", "Name the layers inside it"]),
        ({"targets": ["all-linear"]}, ["'all-linear' is no entry of a list", "targets='all-linear'"]),
        ({"targets": ["up"], "name": "head"}, ["named 'head' already", "name="]),
        ({"targets": ["up"], "backend": "tensorly_torhc"}, ["no backend 'tensorly_torhc'", "tensorly_torch"]),
        ({"targets": ["up"], "optimize": None}, ["optimize=None is no optimizer", "give 'dp'"]),
        ({"targets": ["up"], "recompute": 1}, ["recompute=1", "True or False"]),
        ({"targets": ["up"], "seed": True}, ["seed=True is no whole number"]),
        ({"targets": ["up"], "seed": 1 << 64}, ["is no whole number of 64 bits"]),
        ({"spec": {}}, ["spec={}", "give an AdapterSpec"]),
    ],
)
def test_what_does_not_fit_raises_and_changes_nothing(options: dict[str, object], words: list[str]) -> None:
    model = seeded(0, Tiny)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises((sl.AttachError, sl.BackendError, sl.PlanError, sl.SpecError)) as caught:
        sl.attach(model, **{"spec": sl.lora(2), **options})
    for word in words:
        assert word in str(caught.value)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_model_is_refused() -> None:
    calls = [lambda: sl.attach("m", sl.lora(2), ["up"]), lambda: sl.load("m", "x"), lambda: sl.tuned("m")]
    for call in [*calls, lambda: sl.use("m", None), lambda: sl.match("m", ["up"])]:
        with pytest.raises(sl.AttachError, match="the model was given as 'm'; give a torch module"):
            call()


def test_a_seed_may_be_numpys() -> None:
    first, second = (sl.attach(seeded(0, Tiny), sl.lora(2), ["up"], seed=seed) for seed in (3, np.int64(3)))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.reset_parameters(np.int64(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(sl.AttachError, match="seed='a' is no whole number"):
        second.reset_parameters("a")


def test_a_spec_that_does_not_fit_the_shapes_changes_nothing() -> None:
    model = seeded(0, Tiny)
    before = snapshot(model)
    with pytest.raises(sl.SpecError, match="rank=13"):
        sl.attach(model, sl.AdapterSpec(sl.CP(13)), TARGETS)  # a preset would cap it
    with pytest.raises(sl.SpecError, match="no apply route"):
        sl.attach(model, sl.lorta(2), TARGETS, route="apply")
    with pytest.raises(sl.AttachError, match="AdapterSpec"):
        sl.attach(model, "lora", TARGETS)
    assert_untouched(model, before)


def test_adapting_a_target_twice_raises() -> None:
    model, _ = attached(sl.lora(2))
    before = snapshot(model)
    part = nn.ModuleDict({"block": model.layers[0]})
    with pytest.raises(sl.AttachError, match=r"'block\.up' is adapted already under the name 'superlora'; detach\(\)"):
        sl.attach(part, sl.lora(2), ["up"])
    assert_untouched(model, before)
    sl.attach(part, sl.lora(2), ["up"], name="second").detach()
    assert_untouched(model, before)


def test_a_name_in_use_raises() -> None:
    model, _ = attached(sl.lora(2))
    with pytest.raises(sl.AttachError, match="'superlora' already"):
        sl.attach(model, sl.lora(2), ["k_proj"])


@pytest.mark.parametrize("name", ["forward", "training", "layers.0", ""])
def test_a_name_that_torch_refuses_raises_before_anything_changes(name: str) -> None:
    model = seeded(0, Tiny)
    before = snapshot(model)
    with pytest.raises((sl.AttachError, KeyError)):
        sl.attach(model, sl.lora(2), ["up"], name=name)
    assert_untouched(model, before)


def test_two_handles_on_disjoint_targets() -> None:
    model = seeded(0, Tiny)
    one = sl.attach(model, sl.lora(2), ["q_proj"], seed=0)
    two = sl.attach(model, sl.lotr(2), ["up", "down"], name="second", seed=1)
    x = noise(2, 3, DIM)
    perturb(one)
    perturb(two, seed=1)
    both = model(x)
    plain = seeded(0, Tiny)
    for handle in (one, two):
        for name in handle.targets:
            plain.get_submodule(name).weight.data += handle.delta(name).detach()
    torch.testing.assert_close(both, plain(x), rtol=1e-4, atol=1e-4)
    trainable = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"superlora", "second"}
    two.detach()
    assert not torch.equal(model(x), both)
    assert sl.tuned(model) is one
    with pytest.raises(sl.AttachError, match="no adapter named 'second'"):
        sl.tuned(model, "second")


# --- the handle ----------------------------------------------------------------------------------------------------


def test_printing_shows_groups_members_modes_ranks_parameters_route_and_cost() -> None:
    model, tuned = attached(sl.lotr(2, alpha=4))
    head, titles, *rows = str(tuned).splitlines()
    share = tuned.num_parameters / sum(p.numel() for p in model.parameters())
    assert head == f"8 weights, {tuned.num_parameters:,} trainable parameters, {share:.2%} of the model, scale 2, attached"
    assert all(w in titles for w in ("groups", "weights", "modes", "ranks", "parameters", "route", "price"))
    assert len(rows) == 3
    assert "4 (attn.q_proj, attn.v_proj)" in rows[0]
    assert f"member=4 out={DIM} in={DIM}" in rows[0]
    assert f"member=2 out={HIDDEN} in={DIM}" in rows[1]
    assert titles.endswith("price of one at 1024 tokens")
    assert all(row.endswith(" ms") for row in rows)
    assert repr(tuned) == str(tuned)
    tuned.merge()
    assert str(tuned).splitlines()[0].endswith("merged")
    tuned.detach()
    assert str(tuned).splitlines()[0].endswith("detached")


def test_plan_prints_both_routes_of_a_target() -> None:
    _, tuned = attached(sl.lokr(1))
    text = str(tuned.plan("layers.0.up", tokens=64))
    assert "apply" in text
    assert "delta" in text
    with pytest.raises(sl.AttachError, match=r"'layers\.0\.pu' is not adapted; near names"):
        tuned.plan("layers.0.pu", tokens=64)


def test_targets_and_delta_name_the_weights() -> None:
    _, tuned = attached(sl.lora(2))
    assert tuned.targets["layers.1.up"] == (HIDDEN, DIM)
    assert tuned.targets["layers.1.down"] == (DIM, HIDDEN)
    assert {n: tuple(tuned.delta(n).shape) for n in tuned.targets} == tuned.targets
    with pytest.raises(sl.AttachError, match="'head' is not adapted"):
        tuned.delta("head")


# --- kinds of models and modes of running --------------------------------------------------------------------------


def test_sequential_models_still_run() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = noise(3, 4)
    y = model(x)
    tuned = sl.attach(model, sl.lora(2), ["0", "2"], seed=0)
    assert torch.equal(model(x), y)
    perturb(tuned)
    changed = model(x)
    assert not torch.equal(changed, y)
    tuned.merge()
    torch.testing.assert_close(model(x), changed)
    tuned.detach()
    assert len(model) == 3
    assert torch.equal(model(x), y)


def test_a_layer_can_be_the_only_child_of_several_parents() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = noise(3, 4)
    tuned = sl.attach(model, sl.lora(2), "all-linear", seed=0)
    perturb(tuned)
    weight = shared.weight + tuned.delta("0")
    expected = torch.tanh(x @ weight.T + shared.bias) @ weight.T + shared.bias
    torch.testing.assert_close(model(x), expected)
    assert tuned.num_parameters == 2 * (4 + 4)


def test_convolutions_train() -> None:
    model = seeded(0, ConvNet)
    x = noise(2, 4, 8, 8)
    y = model(x)
    tuned = sl.attach(model, sl.lora(2), ["first", "grouped", "strided", "line", "head"], seed=0)
    assert torch.equal(model(x), y)
    before = {n: p.clone() for n, p in tuned.named_parameters()}
    steps(model, x)
    assert not any(torch.equal(p, before[n]) for n, p in tuned.named_parameters())


def test_keyword_input_is_adapted_too() -> None:
    layer = nn.Linear(4, 3)
    model = nn.ModuleDict({"layer": layer})
    tuned = sl.attach(model, sl.lora(2), ["layer"], seed=0)
    perturb(tuned)
    x = noise(5, 4)
    assert torch.equal(layer(input=x), layer(x))
    with tuned.disabled():
        assert not torch.allclose(layer(x), x @ (layer.weight + tuned.delta("layer")).T + layer.bias)


@pytest.mark.parametrize("shape", [(DIM,), (1, DIM), (0, DIM), (2, 0, DIM), (2, 3, 4, DIM)])
@pytest.mark.parametrize("variant", ["lora", "lokr", "lotr", "lorta groups", "notation", "loha"])
def test_inputs_of_any_leading_shape(variant: str, shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(DIM, HIDDEN)})
    tuned = sl.attach(model, VARIANTS[variant], ["layer"], seed=0)
    perturb(tuned)
    x = noise(*shape)
    expected = nn.functional.linear(x, model["layer"].weight + tuned.delta("layer"), model["layer"].bias)
    torch.testing.assert_close(model["layer"](x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "lotr", "lokr", "lorta fastfood"])
def test_inputs_that_are_not_contiguous(variant: str) -> None:
    model, tuned = attached(VARIANTS[variant])
    perturb(tuned)
    x = noise(3, 2, DIM)
    torch.testing.assert_close(model(x.transpose(0, 1)), model(x.transpose(0, 1).contiguous()))
    wide = noise(2, 3, 2 * DIM)[..., ::2]
    torch.testing.assert_close(model(wide), model(wide.contiguous()))
    row = noise(1, 1, DIM).expand(2, 3, DIM)
    torch.testing.assert_close(model(row), model(row.contiguous()))


def test_dropout_acts_only_in_training() -> None:
    model, tuned = attached(sl.lora(2, dropout=0.5))
    perturb(tuned)
    x = noise(2, 3, DIM)
    model.eval()
    expected, _ = attached(sl.lora(2))
    perturb(sl.tuned(expected))
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), expected(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(0)
    first = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("make", [lambda: nn.Linear(40, 3), lambda: nn.Conv1d(40, 3, 1)])
def test_dropout_drops_the_adapters_input_as_lora_does(make: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"layer": make()})
    tuned = sl.attach(model, sl.lora(2, dropout=0.25), ["layer"], seed=0)
    perturb(tuned)
    layer = model["layer"]
    x = noise(2000, 40, *([1] if isinstance(layer, nn.Conv1d) else []))
    with torch.no_grad():
        full = model.eval()["layer"](x)
        model.train()
        dropped = layer(x)
        mean = (dropped - full).reshape(2000, 3).mean(0)
        spread = (dropped - full).reshape(2000, 3).std(0)
    # Dropout is unbiased, so the mean deviation lies within five standard errors of nought.
    assert (mean.abs() < 5 * spread / 2000**0.5).all()
    assert (spread > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_follow_the_model_to_a_dtype(dtype: torch.dtype) -> None:
    model, tuned = attached(sl.lotr(2))
    perturb(tuned)
    x = noise(2, 3, DIM)
    y = model(x)
    model.to(dtype)
    assert {p.dtype for p in tuned.parameters()} == {dtype}
    # bfloat16 keeps 8 bits, through two blocks.
    tolerance = 1e-5 if dtype == torch.float64 else 0.15
    torch.testing.assert_close(model(x.to(dtype)).float(), y, rtol=tolerance, atol=tolerance)


def test_train_and_eval_reach_the_adapters() -> None:
    model, tuned = attached(sl.lora(2))
    model.eval()
    assert not any(m.training for m in tuned.modules())
    model.train()
    assert all(m.training for m in tuned.modules())


@pytest.mark.parametrize("variant", ["lora", "lorta groups"])
def test_the_transformer_fast_path_does_not_skip_the_adapter(variant: str) -> None:
    model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(DIM, 3, HIDDEN, dropout=0.0, batch_first=True)}).eval()
    layer, x = model["layer"], noise(2, 4, DIM)
    with torch.no_grad():
        base = layer(x)
    tuned = sl.attach(model, VARIANTS[variant], ["linear1", "linear2"], seed=0)
    perturb(tuned)
    slow = layer(x)
    with torch.no_grad(), torch.inference_mode():
        fast = layer(x)
    torch.testing.assert_close(fast, slow)
    assert not torch.allclose(fast, base, atol=1e-3)
    tuned.detach()
    with torch.no_grad():
        assert torch.equal(layer(x), base)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("variant", ["lora", "lotr", "lokr", "lorta groups"])
def test_switching_gradients_off_changes_no_output(variant: str, mode: Callable[[], object]) -> None:
    model, tuned = attached(VARIANTS[variant])
    perturb(tuned)
    x = noise(2, 3, DIM)
    y = model(x)
    with mode():
        torch.testing.assert_close(model(x), y)


def test_an_adapter_on_a_tied_weight_changes_its_own_module_only() -> None:
    model = seeded(0, Tied)
    tuned = sl.attach(model, sl.lora(2), ["lm_head"], seed=0)
    perturb(tuned)
    tokens = torch.tensor([[1, 2, 3]])
    hidden = torch.tanh(model.body(model.embed(tokens)))
    expected = hidden @ (model.embed.weight + tuned.delta("lm_head")).T
    torch.testing.assert_close(model(tokens), expected)


def test_the_seed_alone_fixes_the_first_values() -> None:
    torch.manual_seed(1)
    _, one = attached(sl.lotr(2))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    _, two = attached(sl.lotr(2))
    assert same_state(one.state_dict(), two.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert not same_state(attached(sl.lotr(2), seed=5)[1].state_dict(), two.state_dict())


def test_attaching_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Tiny()
    tuned = sl.attach(model, sl.lotr(2), TARGETS)
    assert {p.device.type for p in tuned.parameters()} == {"meta"}
    assert tuned.num_parameters == sl.lotr(2).count(tuned.targets)


def test_all_linear_of_a_model_in_peft_leaves_pefts_own_layers_out() -> None:
    peft = library("peft")
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=2))
    with torch.no_grad():
        wrapped.get_submodule("base_model.model.0.lora_B.default").weight.fill_(0.1)
    x = torch.randn(3, 4)
    before = wrapped(x)
    tuned = sl.attach(wrapped, sl.lora(1), "all-linear", seed=0)
    assert list(tuned.targets) == ["base_model.model.0.base_layer", "base_model.model.2"]
    assert torch.equal(wrapped(x), before)


class Closed(nn.Module):
    """An encoder that is a TorchScript program, and a head of plain layers."""

    def __init__(self, close: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.enc = close(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)))
        self.fc, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(self.enc(x))))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("close", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), noise(4, 8))], ids=["script", "trace"])
def test_the_layers_beside_a_torchscript_program_are_adapted_and_its_own_are_refused(
    close: Callable[[nn.Module], nn.Module],
) -> None:
    x = noise(5, 8)
    model = seeded(0, lambda: Closed(close))
    base, before = seeded(0, lambda: Closed(close)).eval()(x), copy.deepcopy(model.state_dict())
    for targets in (["enc.0"], ["enc"], r"enc.*"):
        with pytest.raises(
            sl.AttachError, match=r"'enc(\.0)?' is part of a TorchScript program, which is closed; adapt .* before"
        ):
            sl.attach(model, sl.lora(2), targets)
    with pytest.raises(sl.AttachError, match="near names are 'fc', 'out'"):  # what can be adapted
        sl.attach(model, sl.lora(2), ["enc.9"])
    tuned = sl.attach(model, sl.lora(2), "all-linear", also=["enc.1"])
    assert set(tuned.targets) == {"fc", "out"}
    steps(model.train(), x)
    y = model.eval()(x)
    changed = {name for name, value in before.items() if not torch.equal(model.state_dict()[name], value)}
    assert {"enc.1.weight", "enc.1.bias"} <= changed
    assert ("enc.1.running_mean" in changed) == (close is torch.jit.script)  # a trace is of a model that evaluates
    with tuned.disabled():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    tuned.detach()
    assert torch.equal(model(x), base)
    assert same_state(model.state_dict(), before)


def test_a_layer_whose_weight_is_computed_is_meant_by_its_number() -> None:
    """The modules that compute the weight are numbered, too, and are no layers."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    x = noise(3, 4)
    y = model[0](x)
    tuned = sl.attach(model, sl.lora(2), ["0"])
    assert set(tuned.targets) == {"0"}
    perturb(tuned)
    torch.testing.assert_close(model[0](x), y + x @ tuned.delta("0").T)


def test_a_model_with_a_part_that_has_no_shape_yet_is_left_as_it_was() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LazyBatchNorm1d()})
    with pytest.raises(sl.AttachError, match=r"'norm.weight' has no shape yet, as of a lazy module; run the model once before"):
        sl.attach(model, sl.lora(2), ["fc"])
    assert all(p.requires_grad for p in model.parameters())
    assert set(model) == {"fc", "norm"}
    model["norm"](noise(3, 4))
    assert set(sl.attach(model, sl.lora(2), ["fc"]).targets) == {"fc"}


class Graph(nn.Module):
    """A layer of a graph network: neighbours are averaged by a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("near", (torch.rand(6, 6) > 0.5).float().to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.near, self.fc(x))


def test_sparse_buffers_of_the_base_stay_as_they_are(tmp_path: Path) -> None:
    model, x = seeded(0, Graph), noise(6, 4)
    base = model(x)
    tuned = sl.attach(model, sl.lora(2), ["fc"])
    perturb(tuned)
    y = model(x)
    tuned.save(tmp_path / "adapter")
    again = seeded(0, Graph)
    sl.load(again, tmp_path / "adapter")
    assert torch.equal(again(x), y)
    with tuned.disabled():
        assert torch.equal(model(x), base)
    tuned.merge()
    torch.testing.assert_close(model(x), y)
    tuned.detach()
    assert torch.equal(model(x), base)


def test_a_base_that_was_made_in_inference_mode_serves_and_is_given_back() -> None:
    """Torch lets such weights be written, and requires_grad be set on them, in inference mode alone."""

    def served(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(noise(3, DIM))

    with torch.inference_mode():
        model = seeded(0, Tiny)
    base = served(model)
    tuned = sl.attach(model, sl.lora(2), TARGETS)
    perturb(tuned)
    y = served(model)
    assert not torch.allclose(y, base)
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        tuned.merge()
    assert not tuned.merged
    assert torch.equal(served(model), y)
    with torch.inference_mode():
        tuned.merge()
        torch.testing.assert_close(served(model), y)
        tuned.unmerge()
    tuned.detach()
    assert torch.equal(served(model), base)
    assert all(p.requires_grad for p in model.parameters())
