"""The projections inside nn.MultiheadAttention: an adapted attention is the attention whose weights are W + dW.

The oracle is F.multi_head_attention_forward with the sums written out, in float64.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_untouched, noise, perturb, same_state, seeded, snapshot
from test_compile import compiling
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl
from superlora_tn.update.flat import FlatAdapter

E, HEADS = 8, 2
PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]
# One graph a weight, one of all weights with shared factors, one vector of all weights, and the weight itself.
SPECS = {"lora": sl.lora(2, alpha=3), "lotr": sl.lotr(2), "lorta": sl.lorta(2, groups=2), "dense": sl.dense()}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
ATTENTIONS: Mapping[str, dict[str, object]] = {
    "fused": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias of k and v": {"add_bias_kv": True, "add_zero_attn": True},
    "k and v of other widths": {"kdim": 6, "vdim": 5, "batch_first": True},
    "k alone of another width": {"kdim": 6},
}
each_attention = pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)


def attention(**options: object) -> nn.MultiheadAttention:
    """Frozen, as attach leaves it: torch picks other kernels for weights that train."""
    return seeded(0, lambda: nn.MultiheadAttention(E, HEADS, **options).double()).requires_grad_(False)


def adapted(module: nn.Module, spec: sl.AdapterSpec, targets: object, **options: object) -> sl.Tuned:
    tuned = sl.attach(module, spec, targets, seed=0, dtype=torch.float64, **options)
    perturb(tuned)
    return tuned


def inputs(module: nn.MultiheadAttention, same: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value with 3 sequences, 4 tokens to 5."""
    if same:
        x = noise(3, 4, E, dtype=torch.float64) if module.batch_first else noise(4, 3, E, dtype=torch.float64)
        return x, x, x
    shapes = [(3, 4, E), (3, 5, module.kdim), (3, 5, module.vdim)]
    tensors = [noise(*shape, seed=k, dtype=torch.float64) for k, shape in enumerate(shapes)]
    return tuple(x if module.batch_first else x.transpose(0, 1) for x in tensors)  # type: ignore[return-value]


def written_out(module: nn.MultiheadAttention, deltas: Mapping[str, Tensor], x: tuple[Tensor, ...], **rest: object) -> Tensor:
    """The attention's output as the functional form gives it, of weights W + dW. Of a part without dW, W."""
    q, k, v, o = (deltas.get(part, torch.zeros((), dtype=torch.float64)) for part in PARTS)
    stored = module._parameters
    if stored["in_proj_weight"] is not None:
        weights = {"in_proj_weight": stored["in_proj_weight"] + torch.cat([d.expand(E, E) for d in (q, k, v)])}
    else:
        separate = {f"{n}_proj_weight": stored[f"{n}_proj_weight"] + d for n, d in zip("qkv", (q, k, v), strict=True)}
        weights = {"in_proj_weight": None, "use_separate_proj_weight": True, **separate}
    x = tuple(t.transpose(0, 1) for t in x) if module.batch_first else x
    y, _ = F.multi_head_attention_forward(
        *x,
        E,
        HEADS,
        in_proj_bias=module.in_proj_bias,
        bias_k=module.bias_k,
        bias_v=module.bias_v,
        add_zero_attn=module.add_zero_attn,
        dropout_p=0.0,
        out_proj_weight=module.out_proj._parameters["weight"] + o,
        out_proj_bias=module.out_proj.bias,
        **weights,
        **rest,
    )
    return y.transpose(0, 1) if module.batch_first else y


def encoder(layers: int = 2, **options: object) -> nn.TransformerEncoder:
    def make() -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(E, HEADS, 12, batch_first=True, dropout=0.0, **options)
        return nn.TransformerEncoder(layer, layers).double()

    return seeded(0, make).requires_grad_(False)


def with_deltas(plain: nn.Module, tuned: sl.Tuned) -> nn.Module:
    """A plain model whose own weights are W + dW."""
    plain = copy.deepcopy(plain)
    for target, (rows, _) in tuned.targets.items():
        home, _, part = target.rpartition(".")
        module = plain.get_submodule(home)
        weight = module.out_proj.weight if part == "out_proj" else module.in_proj_weight
        first = 0 if part == "out_proj" else PARTS.index(part) * rows
        weight.data[first : first + rows] += tuned.delta(target).detach()
    return plain


@each_spec
@each_attention
@pytest.mark.parametrize("parts", [["q_proj"], ["v_proj", "out_proj"], PARTS], ids="+".join)
def test_outputs_and_gradients_are_those_of_the_sum(spec: sl.AdapterSpec, options: dict[str, object], parts: list[str]) -> None:
    module = attention(**options)
    model = nn.ModuleDict({"attn": module})
    parameters = dict(model.named_parameters())
    tuned = adapted(model, spec, parts)
    x = inputs(module)
    for _ in range(2):
        y = module(*x)[0]
        expected = written_out(module, {p: tuned.delta(f"attn.{p}") for p in parts}, x)
        torch.testing.assert_close(y, expected)
        wanted = list(tuned.parameters())
        ours = torch.autograd.grad(y.pow(3).sum(), wanted)
        for left, right in zip(ours, torch.autograd.grad(expected.pow(3).sum(), wanted), strict=True):
            torch.testing.assert_close(left, right)
    # The parameters are the same objects with the same bytes, seen under the same names.
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    own = {k.removeprefix("attn."): v for k, v in model.state_dict().items() if not k.startswith("superlora.")}
    assert same_state(attention(**options).state_dict(), own)
    assert "in_proj_weight" not in vars(module)
    assert "weight" not in vars(module.out_proj)
    with tuned.disabled():
        assert torch.equal(module(*x)[0], attention(**options)(*x)[0])


@pytest.mark.parametrize("train", [True, False])
def test_masks_and_weights_are_the_attentions_own(train: bool) -> None:
    module = attention(batch_first=True)
    tuned = adapted(nn.ModuleDict({"attn": module}), sl.lora(2), ["q_proj", "k_proj"])
    plain = with_deltas(nn.ModuleDict({"attn": attention(batch_first=True)}), tuned)["attn"].train(train)
    x, padding = inputs(module), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    causal = torch.ones(4, 5, dtype=torch.bool).triu(1)
    for average in (True, False):
        rest = {"key_padding_mask": padding, "attn_mask": causal, "average_attn_weights": average}
        for ours, theirs in zip(module.train(train)(*x, **rest), plain(*x, **rest), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert module(*x, need_weights=False)[1] is None
    one = tuple(t[0] for t in x)  # without a batch
    torch.testing.assert_close(module(*one)[0], plain(*one)[0])
    named = dict(zip(["query", "key", "value"], x, strict=True))
    torch.testing.assert_close(module(**named)[0], plain(**named)[0])


@each_spec
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["out_proj"], ["linear1", "k_proj", "linear2"]], ids="+".join)
def test_eval_without_gradients_sees_the_adapter(
    spec: sl.AdapterSpec, padded: bool, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused encoder layer and fused attention both read W + dW; hooks on linear layers keep the former off."""
    model = encoder().eval()
    tuned = adapted(model, spec, [t for t in targets if t.endswith("proj")])
    plain = with_deltas(encoder(), tuned).eval()
    if "linear1" in targets:  # nested tensors through linear layers
        more = adapted(model, spec, ["linear1", "linear2"], name="more")
        for target in more.targets:
            plain.get_submodule(target).weight.data += more.delta(target).detach()
    calls: list[bool] = []

    def counted(name: str, fused: Callable[..., Any]) -> None:
        monkeypatch.setattr(torch, name, lambda *a: calls.append(a[0].is_nested) or fused(*a))

    name = "_native_multi_head_attention" if "linear1" in targets else "_transformer_encoder_layer_fwd"
    counted(name, getattr(torch, name))
    mask = torch.tensor([[False] * 4, [False, False, True, True]]) if padded else None
    x = noise(2, 4, E, dtype=torch.float64)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
        assert calls == [padded, padded]
        torch.testing.assert_close(y, plain(x, src_key_padding_mask=mask))
        assert not torch.allclose(y, encoder().eval()(x, src_key_padding_mask=mask), atol=1e-3)
    if not padded:
        torch.testing.assert_close(model(x), y)


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_unmerge_and_detach_are_bit_for_bit(spec: sl.AdapterSpec, dtype: torch.dtype) -> None:
    model, base = encoder().to(dtype), encoder().to(dtype)
    before = snapshot(model)
    tuned = sl.attach(model, spec, ["k_proj", "out_proj"], seed=0)
    perturb(tuned)
    own = base.state_dict()
    x = noise(2, 4, E, dtype=dtype)
    attached = model(x)
    tuned.merge()
    merged = model(x)
    # Sums of 8 terms in another order, and in bfloat16 the sum is rounded once here and twice there.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, attached, rtol=tolerance, atol=tolerance)
    for k in range(2):
        weight = model.layers[k].self_attn.in_proj_weight
        with torch.no_grad(), tuned._passes.opened():  # with all others at once, as merge() builds it, bit for bit
            delta = tuned.delta(f"layers.{k}.self_attn.k_proj")
        kept = base.layers[k].self_attn.in_proj_weight
        assert torch.equal(weight[:E], kept[:E])
        assert torch.equal(weight[2 * E :], kept[2 * E :])
        assert torch.equal(weight[E : 2 * E], (kept[E : 2 * E].float() + delta).to(dtype))
    plain = encoder().to(dtype)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    assert torch.equal(plain(x), merged)
    tuned.unmerge()
    assert same_state(own, {k: model.state_dict()[k] for k in own})
    assert torch.equal(model(x), attached)
    tuned.merge()
    with tuned.disabled():
        assert torch.equal(model(x), base(x))
    tuned.detach()
    assert_untouched(model, before)
    assert torch.equal(model(x), base(x))


@each_spec
def test_saved_and_loaded(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    model = encoder()
    tuned = adapted(model, spec, ["q_proj", "out_proj"])
    tuned.save(tmp_path)
    fresh, x = encoder(), noise(2, 4, E, dtype=torch.float64)
    loaded = sl.load(fresh, tmp_path)
    assert loaded.targets == tuned.targets
    assert torch.equal(fresh(x), model(x))
    other = encoder(layers=1)
    with pytest.raises(sl.CheckpointError, match=r"no module 'layers.1.self_attn.q_proj'"):
        sl.load(other, tmp_path)


@each_spec
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_train_and_merge_apart(spec: sl.AdapterSpec, twin_of: Callable[[nn.Module], nn.Module]) -> None:
    model, x = encoder(), noise(2, 4, E, dtype=torch.float64)
    tuned = adapted(model, spec, ["q_proj", "v_proj"])
    y = model(x)
    twin = twin_of(model)
    assert torch.equal(twin(x), y)
    optimizer = torch.optim.SGD(sl.tuned(twin).parameters(), lr=0.1)
    twin(x).pow(3).sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in tuned.parameters())
    assert not torch.equal(twin(x), y)
    sl.tuned(twin).merge()
    assert torch.equal(model(x), y)
    sl.tuned(twin).detach()
    assert same_state(twin.state_dict(), encoder().state_dict())
    assert torch.equal(model(x), y)


@each_spec
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}], ids=["fused", "separate"])
def test_compiled_in_one_graph(spec: sl.AdapterSpec, options: dict[str, object]) -> None:
    module = attention(batch_first=True, **options)
    model = nn.ModuleDict({"attn": module})
    tuned = adapted(model, spec, ["k_proj", "v_proj"])
    second = adapted(model, sl.lora(1), ["out_proj", "q_proj"], name="second")
    x, wanted = inputs(module), [*tuned.parameters(), *second.parameters()]
    with compiling():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            y, expected = compiled(*x)[0], module(*x)[0]
            torch.testing.assert_close(y, expected)
            ours = torch.autograd.grad(y.pow(3).sum(), wanted)
            for left, right in zip(ours, torch.autograd.grad(expected.pow(3).sum(), wanted), strict=True):
                torch.testing.assert_close(left, right)
            perturb(tuned, seed=1)
        assert "in_proj_weight" not in vars(module)


@each_spec
def test_exported_and_under_vmap(spec: sl.AdapterSpec) -> None:
    model, x = encoder(layers=1), noise(3, 4, E, dtype=torch.float64)
    adapted(model, spec, ["q_proj", "out_proj"])
    y = model(x)
    with compiling():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
        torch.testing.assert_close(torch.vmap(model)(x.unsqueeze(1)).squeeze(1), y)


class Stack(nn.Module):
    """An encoder's layers one by one, by `run(layer, x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder().layers
        self.run: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x)
        return x


@each_spec
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(spec: sl.AdapterSpec, reentrant: bool) -> None:
    model = Stack()
    tuned = adapted(model, spec, ["q_proj", "v_proj", "out_proj"])
    x = noise(2, 4, E, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(model(x).pow(3).sum(), list(tuned.parameters()))
    model.run = lambda layer, z: checkpoint(layer, z, use_reentrant=reentrant)
    model(x).pow(3).sum().backward()  # autograd.grad does not go through the re-entrant kind
    for parameter, right in zip(tuned.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, right)


def test_flat_folds_build_dw_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built = encoder(layers=3), []
    adapted(model, sl.lorta(2), PARTS)
    elements = FlatAdapter._elements
    monkeypatch.setattr(FlatAdapter, "_elements", lambda self, *given: built.append(1) or elements(self, *given))
    model(noise(2, 4, E, dtype=torch.float64)).sum().backward()
    assert len(built) == 1


def test_an_attention_alone_is_a_model() -> None:
    module = attention()
    tuned = adapted(module, sl.lorta(2), PARTS)
    assert list(tuned.targets) == PARTS
    x = inputs(module)
    first, second = module(*x)[0], module(*x)[0]
    for y in (first, second):  # two passes before their gradients: each has a dW of its own
        y.sum().backward()
    expected = written_out(module, {part: tuned.delta(part) for part in PARTS}, x)
    torch.testing.assert_close(first, expected)
    for parameter, grad in zip(tuned.parameters(), torch.autograd.grad(expected.sum(), list(tuned.parameters())), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)
    tuned.merge()
    torch.testing.assert_close(module(*x)[0], expected)


def test_a_call_that_raises_or_is_broken_off_leaves_the_parameters_in_sight() -> None:
    module = attention()
    model = nn.ModuleDict({"attn": module})
    tuned = adapted(model, sl.lora(2), ["q_proj"])
    second = adapted(model, sl.lora(2), ["v_proj", "out_proj"], name="second")
    x = inputs(module)
    y = module(*x)[0]
    with pytest.raises(AssertionError):
        module(x[0][..., :3], x[1], x[2])
    assert "in_proj_weight" not in vars(module)
    assert "weight" not in vars(module.out_proj)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt  # torch runs no hook after that one

    handle = module.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(*x)
    handle.remove()
    assert torch.equal(module(*x)[0], y)
    handle = module.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(*x)
    handle.remove()
    for one in (tuned, second):
        one.detach()
    assert torch.equal(module(*x)[0], attention()(*x)[0])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_handles_on_one_attention(order: tuple[int, int]) -> None:
    module = attention()
    model = nn.ModuleDict({"attn": module})
    handles = [adapted(model, sl.lora(2), ["q_proj"]), adapted(model, sl.lotr(2), ["v_proj", "out_proj"], name="second")]
    x = inputs(module)
    deltas = {n.rpartition(".")[2]: h.delta(n).detach() for h in handles for n in h.targets}
    expected = written_out(attention(), deltas, x)
    torch.testing.assert_close(module(*x)[0], expected)
    for k in order:
        handles[k].merge()
        torch.testing.assert_close(module(*x)[0], expected)
    for k in order:
        handles[k].detach()
    assert torch.equal(module(*x)[0], attention()(*x)[0])


def test_a_decoder_layer_has_two_attentions() -> None:
    def make() -> nn.TransformerDecoderLayer:
        return seeded(0, lambda: nn.TransformerDecoderLayer(E, HEADS, 12, dropout=0.0, batch_first=True).double())

    model = make()
    tuned = adapted(model, sl.lokr(1), ["q_proj", "v_proj"])
    names = [f"{a}.{p}" for a in ("self_attn", "multihead_attn") for p in ("q_proj", "v_proj")]
    assert list(tuned.targets) == names
    x, memory = noise(2, 4, E, dtype=torch.float64), noise(2, 3, E, seed=1, dtype=torch.float64)
    expected = with_deltas(make(), tuned)(x, memory)
    torch.testing.assert_close(model(x, memory), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, memory), expected)


def test_targets_match_by_the_same_rules() -> None:
    model = encoder()
    every = [f"layers.{k}.self_attn.{part}" for k in range(2) for part in PARTS]
    assert sl.match(model, PARTS) == every
    assert sl.match(model, r"layers\.\d\.self_attn\..*") == every
    assert sl.match(model, PARTS, exclude=["k_proj", "out_proj"], only_layers=[1]) == [every[4], every[6]]
    assert sl.match(model, ["layers.0.self_attn.v_proj"]) == [every[2]]
    linear = [f"layers.{k}.{n}" for k in range(2) for n in ("self_attn.out_proj", "linear1", "linear2")]
    assert sl.match(model, "all-linear") == linear
    with pytest.raises(sl.AttachError, match="'qproj' matches no module; near names are 'q_proj'"):
        sl.match(model, ["qproj"])
    with pytest.raises(sl.AttachError, match=r"is a MultiheadAttention, .* Name its q_proj, k_proj, v_proj, out_proj"):
        sl.match(model, ["self_attn"])


def test_budgets_plans_and_shapes() -> None:
    model = attention(kdim=6, vdim=5)
    tuned = sl.attach(model, sl.superlora(order=2, budget=60), PARTS)
    assert tuned.targets == {"q_proj": (E, E), "k_proj": (E, 6), "v_proj": (E, 5), "out_proj": (E, E)}
    assert 0 < tuned.num_parameters <= 60
    assert "delta" in str(tuned.plan("k_proj", 16))


def test_a_base_that_trains_too_gets_its_gradient() -> None:
    module = attention()
    tuned = adapted(nn.ModuleDict({"attn": module}), sl.lora(2), ["q_proj"])
    weight = module._parameters["in_proj_weight"].requires_grad_(True)
    x = inputs(module)
    found = torch.autograd.grad(module(*x)[0].pow(3).sum(), weight)[0]
    expected = written_out(module, {"q_proj": tuned.delta("attn.q_proj")}, x).pow(3).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0])


def test_autocast() -> None:
    module = attention(batch_first=True).float()
    tuned = sl.attach(nn.ModuleDict({"attn": module}), sl.lora(2), ["q_proj", "out_proj"], seed=0)
    perturb(tuned)
    x = tuple(t.float() for t in inputs(module))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(*x)[0]
    assert y.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of values of order 1.
    torch.testing.assert_close(y.float(), module(*x)[0], rtol=0.05, atol=0.05)


def refused(model: nn.Module, spec: sl.AdapterSpec, targets: object, words: str) -> None:
    before = snapshot(model)
    with pytest.raises(sl.AttachError, match=words):
        sl.attach(model, spec, targets)
    assert_untouched(model, before)


def test_what_the_attention_cannot_show_is_refused() -> None:
    spec = sl.lora(2, dropout=0.1)
    refused(encoder(), spec, ["linear1", "q_proj"], r"dropout=0.1 drops the adapter's input.*'layers.0.self_attn.q_proj'")
    sl.attach(encoder(), spec, ["linear1"])
    model = encoder()
    nn.utils.parametrizations.weight_norm(model.layers[0].self_attn, "in_proj_weight")
    refused(model, sl.lora(2), ["q_proj"], r"'layers.0.self_attn.q_proj' is computed from others .*bake that in first")
    model = encoder()
    nn.utils.parametrizations.weight_norm(model.layers[0].self_attn.out_proj)
    refused(model, sl.lora(2), ["out_proj"], "'layers.0.self_attn.out_proj' is computed from others")
    sl.attach(model, sl.lora(2), ["q_proj"])

    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return x


def test_an_attention_with_a_forward_of_its_own_reads_what_the_merged_one_does() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.in_proj_weight.T * 3

    module = Own(4, 2).double()
    tuned = adapted(nn.ModuleDict({"attn": module}), sl.lora(2), ["q_proj"])
    x = noise(3, 4, dtype=torch.float64)
    y = module(x)
    expected = 3 * x @ (module._parameters["in_proj_weight"][:4] + tuned.delta("attn.q_proj")).T
    torch.testing.assert_close(y[:, :4], expected)
    tuned.merge()
    torch.testing.assert_close(module(x), y)


def test_a_weight_that_shows_an_adapter_cannot_become_computed() -> None:
    model = encoder(layers=1)
    adapted(model, sl.lora(2), ["q_proj"])
    with pytest.raises(AssertionError, match="already has an attribute named 'in_proj_weight'"):  # torch's own words
        nn.utils.parametrizations.weight_norm(model.layers[0].self_attn, "in_proj_weight")


def test_tied_weights_are_not_merged() -> None:
    model = encoder()
    model.layers[1].self_attn.in_proj_weight = model.layers[0].self_attn.in_proj_weight
    tuned = adapted(model, sl.lora(2), ["layers.0.self_attn.q_proj"])
    with pytest.raises(sl.AttachError, match=r"is shared with 'layers.1.self_attn.in_proj_weight'"):
        tuned.merge()
    module = attention(kdim=6, vdim=6)
    module.v_proj_weight = module.k_proj_weight
    tuned = adapted(module, sl.lora(2), ["q_proj", "k_proj"])
    before = module.k_proj_weight.detach().clone()
    with pytest.raises(sl.AttachError, match="weight of 'k_proj' is shared with 'v_proj_weight'"):
        tuned.merge()
    assert torch.equal(module.k_proj_weight, before)
    tuned.detach()
    adapted(module, sl.lora(2), ["q_proj"]).merge()  # its own weight is nobody else's
