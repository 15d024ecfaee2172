"""Weights that are no layer's: stacks of experts' matrices, bilinear forms, recurrent weights, plain parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from models import noise, perturb
from optional import library
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import superlora_tn as sl
from superlora_tn.declare.fold import split_expert
from superlora_tn.model import shown
from superlora_tn.model.stacks import Stack
from superlora_tn.update.physical import PhysicalAdapter

EXPERTS, DIM, HIDDEN = 3, 6, 8
SPECS = {
    "lora": sl.lora(2, alpha=3),
    "lokr": sl.lokr(1),
    "lotr": sl.lotr(2),
    "vera": sl.vera(3),
    "dense": sl.dense(),
    "lorta": sl.lorta(2, groups=2),
    "fastfood": sl.lorta(2, projection=sl.Fastfood(0.5, seed=1)),
    "experts share": sl.AdapterSpec(sl.CP(3), sl.PhysicalFold("expert out in"), alpha=3),
    "experts of all layers": sl.AdapterSpec(sl.Tucker(2), sl.PhysicalFold("layer expert out in")),
    "a pair each": sl.AdapterSpec(
        sl.Network("e o i", {"r": 2}, B=sl.Node("e o r", init="zeros"), A="e r i"), sl.PhysicalFold("expert out in")
    ),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class MyExperts(nn.Module):
    """Experts in two stacks, (which, out, in) or transposed, all of them on each token."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed, self.num_experts = transposed, EXPERTS
        up, down = (DIM, HIDDEN), (HIDDEN, DIM)
        shapes = (up, down) if transposed else (up[::-1], down[::-1])
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(EXPERTS, *shape) / 3) for shape in shapes)
        self.bias = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return mixed(x, *(w.mT if self.is_transposed else w for w in (self.up_proj, self.down_proj)), self.bias)


def mixed(x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    outs = [F.linear(torch.tanh(F.linear(x, up[k])), down[k], bias[k]) for k in range(EXPERTS)]
    return sum(out * (k + 1) for k, out in enumerate(outs))


class Mixture(nn.Module):
    """Two layers of experts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": MyExperts(transposed)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["experts"](x)
        return x


def attached(
    spec: sl.AdapterSpec, transposed: bool = False, targets: Any = ("up_proj", "down_proj")
) -> tuple[nn.Module, sl.Tuned]:
    torch.manual_seed(1)
    model = Mixture(transposed).double()
    tuned = sl.attach(model, spec, targets if isinstance(targets, str) else list(targets), seed=0, dtype=torch.float64)
    perturb(tuned)
    return model, tuned


def expected(model: nn.Module, tuned: sl.Tuned, x: Tensor) -> Tensor:
    """All experts with W + dW, from the stored numbers."""
    stored = model.state_dict()
    for k, layer in enumerate(model.layers):
        pair = []
        for own in ("up_proj", "down_proj"):
            name = f"layers.{k}.experts.{own}"
            stack = stored[name].mT if layer["experts"].is_transposed else stored[name]
            rows = [w + tuned.delta(f"{name}.{e}") if f"{name}.{e}" in tuned.targets else w for e, w in enumerate(stack)]
            pair.append(torch.stack(rows))
        x = mixed(x, *pair, stored[f"layers.{k}.experts.bias"])
    return x


@each_spec
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_compute_with_their_own_dw(spec: sl.AdapterSpec, transposed: bool) -> None:
    model, tuned = attached(spec, transposed)
    names = {
        f"layers.{k}.experts.{own}.{e}": shape
        for k in range(2)
        for own, shape in (("up_proj", (8, 6)), ("down_proj", (6, 8)))
        for e in range(3)
    }
    assert tuned.targets == names
    x = noise(4, DIM, dtype=torch.float64).requires_grad_()
    y, other = model(x), expected(model, tuned, x)
    torch.testing.assert_close(y, other)
    g, wanted = noise(4, DIM, seed=3, dtype=torch.float64), [x, *tuned.parameters()]
    for found, right in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(other, wanted, g), strict=True):
        torch.testing.assert_close(found, right)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other)
    with tuned.disabled():
        assert not torch.allclose(model(x), other, atol=1e-3)


@each_spec
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_save_and_load(spec: sl.AdapterSpec, transposed: bool, tmp_path: Path) -> None:
    model, tuned = attached(spec, transposed)
    before = {k: v.clone() for k, v in model.state_dict().items() if "superlora" not in k}
    x = noise(4, DIM, dtype=torch.float64)
    y = model(x)
    tuned.save(tmp_path)
    torch.manual_seed(1)
    other = Mixture(transposed).double()
    again = sl.load(other, tmp_path)
    torch.testing.assert_close(other(x), y)
    assert again.num_parameters == spec.count(tuned.targets) == sum(p.numel() for p in again.parameters())
    tuned.merge()
    torch.testing.assert_close(model(x), y)
    tuned.unmerge()
    torch.testing.assert_close(model(x), y)
    tuned.bake()
    torch.testing.assert_close(model(x), y)
    assert type(model.layers[0]["experts"]) is MyExperts
    again.detach()
    assert all(torch.equal(other.state_dict()[k], v) for k, v in before.items())


def test_experts_that_share_factors_are_one_network() -> None:
    """dW[e o i] = sum_r E[e r] O[o r] I[i r], by the oracle."""
    _, tuned = attached(SPECS["experts share"])
    assert len(tuned.adapters) == 4
    for adapter in tuned.adapters:
        factors = [p.detach().numpy() for p in adapter.parameters()]
        tensor = oracle.cp(factors)
        for e, name in enumerate(adapter.group.members):
            np.testing.assert_allclose(tuned.delta(name).detach().numpy(), tensor[e], rtol=1e-12, atol=1e-12)
    _, layers = attached(SPECS["experts of all layers"])
    assert [len(adapter.group.members) for adapter in layers.adapters] == [6, 6]


def test_experts_that_share_a_network_are_built_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = attached(SPECS["experts share"])
    built = []
    monkeypatch.setattr(PhysicalAdapter, "current", lambda self, member: built.append(member))
    model(noise(4, DIM, dtype=torch.float64))
    assert not built


@pytest.mark.parametrize(
    ("name", "rest", "number"),
    [
        ("layers.0.mlp.experts.gate_up_proj.3", "layers.0.mlp.experts.gate_up_proj", "3"),
        ("layers.0.moe.experts.3.w1", "layers.0.moe.experts.w1", "3"),
        ("layers.0.moe.experts.3.w1.7", "layers.0.moe.experts.w1.7", "3"),
        ("mixer.weight.12", "mixer.weight", "12"),
    ],
)
def test_the_experts_number_is_split_off(name: str, rest: str, number: str) -> None:
    assert split_expert(name) == (rest, number)


def test_the_mode_expert_needs_experts() -> None:
    with pytest.raises(sl.SpecError, match=r"has the mode 'expert', but 'layers.0.q_proj' is no expert's weight"):
        SPECS["experts share"].count({"layers.0.q_proj": (4, 4)})
    with pytest.raises(sl.SpecError, match="'member' beside 'layer', 'type' or 'expert'"):
        sl.PhysicalFold("member expert out in")
    spec = sl.AdapterSpec(sl.CP(2), sl.PhysicalFold("layer type expert out in"))
    with pytest.raises(sl.SpecError, match=r"fill 1 layers x 2 types x 2 experts \(4 cells\)"):
        spec.lay_out(dict.fromkeys(["l.0.experts.a.0", "l.0.experts.a.1", "l.0.experts.b.0"], (4, 4)))


def test_a_module_list_of_experts_shares_by_the_same_mode() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 5)}) for _ in range(3))
    tuned = sl.attach(model, SPECS["experts share"], ["w1"])
    assert list(tuned.adapters[0].group.members) == [f"experts.{k}.w1" for k in range(3)]


def test_some_experts_alone() -> None:
    model, tuned = attached(SPECS["lora"], targets=["up_proj.1", "layers.1.experts.down_proj.2"])
    assert list(tuned.targets) == ["layers.0.experts.up_proj.1", "layers.1.experts.up_proj.1", "layers.1.experts.down_proj.2"]
    x = noise(4, DIM, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(model, tuned, x))
    before = model.state_dict()["layers.0.experts.up_proj"].clone()
    tuned.merge()
    after = model.state_dict()["layers.0.experts.up_proj"]
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, False, True]


def test_names_patterns_and_exclusions_of_stacks() -> None:
    model = Mixture()
    assert len(sl.match(model, r".*experts\.(up|down)_proj")) == 12
    assert sl.match(model, r".*0\.experts\.up_proj\.\d") == [f"layers.0.experts.up_proj.{e}" for e in range(3)]
    assert sl.match(model, ["up_proj"], exclude=["up_proj.1"], only_layers=[1]) == [
        f"layers.1.experts.up_proj.{e}" for e in (0, 2)
    ]
    with pytest.raises(sl.AttachError, match="the target 'gate_proj' matches no module"):
        sl.match(model, ["gate_proj"])
    with pytest.raises(sl.AttachError, match="dropout"):
        sl.attach(model, sl.lora(2, dropout=0.1), ["up_proj"])


def test_compiled_copied_and_checkpointed() -> None:
    for name in ("lora", "experts share", "lorta"):
        model, tuned = attached(SPECS[name])
        x = noise(4, DIM, dtype=torch.float64)
        y = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
        torch.testing.assert_close(copy.deepcopy(model)(x), y)
        torch.testing.assert_close(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), y)
        y.sum().backward()
        assert all(p.grad is not None for p in tuned.parameters())


# --- transformers' mixtures of experts -------------------------------------------------------------------------------


def moe(name: str) -> Any:
    transformers = library("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    few = {"moe_intermediate_size": 12, "num_experts_per_tok": 2, "num_experts": 4}
    torch.manual_seed(0)
    if name == "Mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **sizes))
    if name == "Qwen2-MoE":
        return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(shared_expert_intermediate_size=12, **few, **sizes))
    if name == "Qwen3-MoE":
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(head_dim=4, **few, **sizes))
    config = transformers.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=4, **sizes)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "gpt-oss"])
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("spec", ["lora", "experts share", "a pair each"])
def test_transformers_experts(name: str, way: str, spec: str, tmp_path: Path) -> None:
    model = moe(name).eval()
    model.set_experts_implementation(way)
    tuned = sl.attach(model, SPECS[spec], r".*experts\.(gate_up_proj|down_proj)", seed=0)
    perturb(tuned)
    assert len(tuned.targets) == 16
    assert all(re.fullmatch(r"model\.layers\.\d\.mlp\.experts\.(gate_up|down)_proj\.\d", target) for target in tuned.targets)
    gate_up = {shape for target, shape in tuned.targets.items() if "gate_up" in target}
    assert gate_up == {(48, 16)} or gate_up == {(24, 16)}  # (2 x intermediate, hidden), however it is stored
    x = torch.arange(3, 12)[None]
    out = model(input_ids=x, labels=x)
    out.loss.backward()
    assert all(p.grad is not None for p in tuned.parameters())
    tuned.save(tmp_path)
    other = moe(name).eval()
    other.set_experts_implementation(way)
    sl.load(other, tmp_path)
    torch.testing.assert_close(other(input_ids=x).logits, out.logits)
    tuned.merge()
    torch.testing.assert_close(model(input_ids=x).logits, out.logits, rtol=1e-4, atol=1e-5)
    tuned.detach()
    torch.testing.assert_close(model(input_ids=x).logits, moe(name).eval()(input_ids=x).logits, rtol=1e-4, atol=1e-5)


# --- W + dW of a stack that is not built -------------------------------------------------------------------------------

ALL, EACH, ROWS = 4, 5, 3  # experts, in and rows of each
OUT = 6
RUNS = torch.tensor([2, 2, 7, 9], dtype=torch.int32)  # where the rows of each expert end; the second has none
CHOICE = torch.tensor([3, 0, 3])


# Ways to call torch's grouped product: with its last arguments by name, by their places, and all by name.
GROUPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "public": lambda x, w: F.grouped_mm(x, w, offs=RUNS),
    "by place": lambda x, w: torch._grouped_mm(x, w, RUNS, None),
    "by name": lambda x, w: torch._grouped_mm(offs=RUNS, mat2=w, input=x, out_dtype=None),
}


# What a module does with its stack (which, out, in), seen so, and the shape of x.
READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda x, w: sum(F.linear(x, w[e]) * (e + 1) for e in range(ALL)), (ROWS, EACH)),
    "linear, bias, number as a tensor": (lambda x, w: F.linear(x, w[torch.tensor(2)], x.new_ones(OUT)), (2, ROWS, EACH)),
    "from behind, transposed": (lambda x, w: x @ w[-1].t() + torch.mm(x, w.mT[0]), (ROWS, EACH)),
    "bmm": (lambda x, w: torch.bmm(x, w.transpose(1, 2)), (ALL, ROWS, EACH)),
    "matmul": (lambda x, w: x @ w.mT, (ALL, ROWS, EACH)),
    "bmm of columns": (lambda x, w: w.bmm(x.mT), (ALL, ROWS, EACH)),
    "chosen": (lambda x, w: torch.bmm(w[CHOICE], x[:3].unsqueeze(-1)).squeeze(-1), (ROWS, EACH)),
    "chosen, transposed": (lambda x, w: torch.bmm(x[:3].unsqueeze(1), w.mT[CHOICE]).squeeze(1), (ROWS, EACH)),
}
# The same by names, in any order.
READS |= {
    "linear by names": (
        lambda x, w: F.linear(weight=w[0], input=x) + F.linear(x, bias=x.new_ones(OUT), weight=w[1]),
        (ROWS, EACH),
    ),
    "products by names": (
        lambda x, w: torch.matmul(other=w[0].t(), input=x) + torch.mm(x, mat2=torch.t(input=w[1])) + x.matmul(other=w[2].T),
        (ROWS, EACH),
    ),
    "bmm by names": (lambda x, w: torch.bmm(input=x, mat2=torch.transpose(w, dim1=1, dim0=2), out=None), (ALL, ROWS, EACH)),
    "transposed by names": (lambda x, w: x.bmm(mat2=w.transpose(dim0=-1, dim1=-2)), (ALL, ROWS, EACH)),
}
# And what is done with W + dW itself.
BUILDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "einsum": (lambda x, w: torch.einsum("eti,eoi->eto", x, w), (ALL, ROWS, EACH)),
    "the whole": (lambda x, w: x.sum() * w, (1,)),
    "unbound": (lambda x, w: sum(x @ one.T for one in w), (ROWS, EACH)),
    "joined": (lambda x, w: x.sum() * torch.cat([w, w[:1]]), (1,)),
    "not its product": (lambda x, w: F.linear(x, w[1].T), (ROWS, OUT)),
    "all axes turned": (lambda x, w: w.permute(2, 1, 0) * x.sum() + w.transpose(0, 2), (1,)),
    "a run": (lambda x, w: x.sum() * w[1:3], (1,)),
    "by numpy's names": (lambda x, w: torch.matmul(x1=x, x2=w.mT), (ALL, ROWS, EACH)),
    "written over": (lambda x, w: (w * 1).mul_(x.sum()), (1,)),
}


class Reading(nn.Module):
    """Reads its stack in one of the ways."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], transposed: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.read, self.is_transposed, self.num_experts = read, transposed, ALL
        shape = (ALL, EACH, OUT) if transposed else (ALL, OUT, EACH)
        self.stack = nn.Parameter(noise(*shape, seed=5, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.stack.mT if self.is_transposed else self.stack)


@pytest.mark.parametrize("way", {**READS, **BUILDS})
@pytest.mark.parametrize(
    ("spec", "transposed"), [("lora", False), ("experts share", True), ("a pair each", True), ("lokr", False)]
)
def test_what_a_module_computes_with_a_stack(way: str, spec: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters on every matrix; values and gradients are those of the sum of all that is stored."""
    read, shape = {**READS, **BUILDS}[way]
    model = Reading(read, transposed)
    tuned = [sl.attach(model, SPECS[spec], ["stack"], name=n, route="apply", dtype=torch.float64) for n in ("one", "two")]
    for k, handle in enumerate(tuned):
        perturb(handle, seed=k)
    weight = model.state_dict()["stack"].mT if transposed else model.state_dict()["stack"]
    deltas = [torch.stack([handle.delta(f"stack.{e}") for e in range(ALL)]) for handle in tuned]
    x = noise(*shape, dtype=torch.float64).requires_grad_()
    other = read(x, weight + sum(deltas))
    if way in READS and (spec != "lokr" or "linear" in way or "behind" in way):
        monkeypatch.setattr(shown, "_whole", None)  # nothing is built
    y = model(x)
    torch.testing.assert_close(y, other)
    g, wanted = noise(*y.shape, seed=3, dtype=torch.float64), [x, *tuned[0].parameters(), *tuned[1].parameters()]
    found = torch.autograd.grad(y, wanted, g, allow_unused=True, materialize_grads=True)  # some experts are not met
    for own, right in zip(found, torch.autograd.grad(other, wanted, g), strict=True):
        torch.testing.assert_close(own, right)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other)


@pytest.mark.parametrize("way", GROUPED)
@pytest.mark.parametrize("spec", ["lora", "experts share", "a pair each"])
def test_a_grouped_product_of_a_stack(spec: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product takes rows of whole 16 bytes and no float64, so the bound is float32's."""
    monkeypatch.setattr("test_stacked.OUT", 8)
    monkeypatch.setattr("test_stacked.EACH", 12)
    model = Reading(lambda x, w: GROUPED[way](x, w.mT), False, torch.float32)
    tuned = sl.attach(model, SPECS[spec], ["stack"], route="apply")
    perturb(tuned)
    weight = model.state_dict()["stack"] + torch.stack([tuned.delta(f"stack.{e}") for e in range(ALL)])
    monkeypatch.setattr(shown, "_whole", None)
    x = noise(9, EACH).requires_grad_()
    y, ends = model(x), [0, *RUNS.tolist()]
    other = torch.cat([x[a:b] @ w.T for a, b, w in zip(ends, RUNS, weight, strict=False)])
    torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-5)
    g, wanted = noise(*y.shape, seed=3), [x, *tuned.parameters()]
    for found, right in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(other, wanted, g), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_call_that_torch_refuses_is_refused_in_its_words() -> None:
    model = Reading(lambda x, w: w, False)
    sl.attach(model, SPECS["lora"], ["stack"], dtype=torch.float64)
    x = noise(ROWS, EACH, dtype=torch.float64)
    for call in (
        lambda w: F.linear(weight=w[0]),
        lambda w: torch.matmul(x, other=None),
        lambda w: torch.bmm(w, x, x, x),
        lambda w: F.linear(x, w[0], wieght=w[1]),
    ):
        texts = []
        for weight in (model.stack, model.state_dict()["stack"]):
            with pytest.raises(TypeError) as caught:
                call(weight)
            texts.append(str(caught.value).replace("Parameter", "Tensor"))
        assert texts[0] == texts[1]


def test_the_stand_in_says_what_the_tensor_is() -> None:
    model = Reading(lambda x, w: w, True, torch.float32)
    sl.attach(model, SPECS["lora"], ["stack"])
    stack = model.stack
    assert isinstance(stack, Stack)
    assert (stack.shape, stack.dtype, stack.device.type) == ((ALL, EACH, OUT), torch.float32, "cpu")
    assert (stack.mT.shape, stack[1].shape, stack[CHOICE].shape) == ((ALL, OUT, EACH), (EACH, OUT), (3, EACH, OUT))
    assert (len(stack), stack.dim(), stack.size(-1), stack.requires_grad) == (ALL, 3, OUT, True)
    with torch.no_grad():
        assert not model.stack.requires_grad
    assert repr(stack).startswith("tensor(")
    built = Reading(lambda x, w: w, True, torch.float32)
    sl.attach(built, SPECS["lora"], ["stack"], at="weight")
    assert type(built.stack) is Tensor


class Past(torch.autograd.Function):
    """Autograd sees no function of torch between the weight and what it gives."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.expand(ALL, OUT, EACH)


def test_a_stack_whose_updates_are_not_added_is_built() -> None:
    model = Reading(READS["bmm"][0], False)
    tuned = sl.attach(model, sl.dora(SPECS["lora"]), ["stack"], dtype=torch.float64)
    perturb(tuned)
    assert type(model.stack) is Tensor
    stack, x = model.stack.detach(), noise(ALL, ROWS, EACH, dtype=torch.float64)
    tuned.merge()
    torch.testing.assert_close(model.state_dict()["stack"], stack)
    torch.testing.assert_close(model(x), x @ stack.mT)


def test_in_ddp_every_expert_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for all parameters, and an expert may meet no token."""
    model = Reading(READS["from behind, transposed"][0], False)
    tuned = sl.attach(model, SPECS["lora"], ["stack"], dtype=torch.float64)
    model.static_graph = True  # as the module around it would say
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda: model)
    model(noise(ROWS, EACH, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_what_reads_a_stack_past_torch_is_told_so_and_can_have_it_built() -> None:
    """Never W in the place of W + dW, and never a gradient that is lost."""
    model = Reading(lambda x, w: Past.apply(w), False)
    tuned = sl.attach(model, SPECS["lora"], ["stack"], dtype=torch.float64)
    perturb(tuned)
    with pytest.raises(sl.LayerError, match=r"differentiated .* attach with at='weight'"):
        model(None).backward()
    with pytest.raises(sl.LayerError, match="was read by"), torch._C.DisableTorchFunctionSubclass():
        torch.ops.aten.sum(model.stack)
    tuned.detach()
    tuned = sl.attach(model, SPECS["lora"], ["stack"], at="weight", dtype=torch.float64)
    perturb(tuned)
    model(None).backward()
    assert all(p.grad is not None for p in tuned.parameters())


# --- other modules ---------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[tuple[int, ...], ...]]] = {
    "Bilinear": (lambda: nn.Bilinear(3, 4, 5), ["layer"], ((2, 3), (2, 4))),
    "LSTM": (lambda: nn.LSTM(3, 4, 2, batch_first=True), ["weight_ih_l0", "weight_hh_l1"], ((2, 5, 3),)),
    "LSTM both ways": (
        lambda: nn.LSTM(3, 4, bidirectional=True, proj_size=2),
        ["layer.weight_ih_l0_reverse", "layer.weight_hr_l0"],
        ((5, 2, 3),),
    ),
    "GRU": (lambda: nn.GRU(3, 4), ["weight_hh_l0"], ((5, 2, 3),)),
    "RNN": (lambda: nn.RNN(3, 4, bias=False), ["weight_ih_l0", "weight_hh_l0"], ((5, 2, 3),)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"], ((2, 3),)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), ["weight_ih"], ((2, 3),)),
}


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", ["lora", "lotr", "lorta", "dense"])
def test_bilinear_and_recurrent_weights(case: Any, name: str, tmp_path: Path) -> None:
    make, targets, shapes = case
    torch.manual_seed(1)
    model = nn.ModuleDict({"layer": make().double()})
    plain = copy.deepcopy(model)
    tuned = sl.attach(model, SPECS[name], targets, seed=0, dtype=torch.float64)
    perturb(tuned)
    inputs = [noise(*shape, seed=k, dtype=torch.float64).requires_grad_() for k, shape in enumerate(shapes)]
    stored = {k: v.clone() for k, v in plain["layer"].state_dict().items()}
    weights = dict(stored)
    for target in tuned.targets:
        own = "weight" if target == "layer" else target.removeprefix("layer.")
        weights[own] = stored[own] + tuned.delta(target).reshape(stored[own].shape)
    y, other = first(model["layer"](*inputs)), first(torch.func.functional_call(plain["layer"], weights, tuple(inputs)))
    torch.testing.assert_close(y, other)
    g, wanted = noise(*y.shape, seed=7, dtype=torch.float64), [*inputs, *tuned.parameters()]
    for found, right in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(other, wanted, g), strict=True):
        torch.testing.assert_close(found, right)
    tuned.save(tmp_path)
    loaded = copy.deepcopy(plain)
    sl.load(loaded, tmp_path)
    torch.testing.assert_close(first(loaded["layer"](*inputs)), y)
    torch.testing.assert_close(first(copy.deepcopy(model)["layer"](*inputs)), y)
    model.float().double()
    torch.testing.assert_close(first(model["layer"](*inputs)), y, rtol=1e-5, atol=1e-5)
    tuned.merge()
    torch.testing.assert_close(first(model["layer"](*inputs)), y, rtol=1e-5, atol=1e-5)
    tuned.detach()
    assert type(model["layer"]) is type(plain["layer"])
    model["layer"].load_state_dict(stored)
    torch.testing.assert_close(first(model["layer"](*inputs)), first(plain["layer"](*inputs)))


def test_plain_parameters_are_meant_by_name_alone() -> None:
    """A router that reads its own weight, a stack of positions: named, not met by a pattern."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, DIM, dtype=torch.float64))
            self.positions = nn.Parameter(torch.randn(1, 5, DIM, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    model = nn.ModuleDict({"gate": Router(), "head": nn.Linear(4, 4).double()})
    assert sl.match(model, r".*(weight|head)") == ["head"]
    tuned = sl.attach(model, SPECS["lora"], ["gate.weight"], seed=0, dtype=torch.float64)
    perturb(tuned)
    x = noise(2, DIM, dtype=torch.float64)
    weight = model.state_dict()["gate.weight"] + tuned.delta("gate.weight")
    torch.testing.assert_close(model["gate"](x), F.linear(x, weight))
    with pytest.raises(sl.AttachError, match="matches no module"):
        sl.match(model, ["gate.positions"])
