"""Blocks of the rows of one weight: each is adapted as a weight of its own, and the other rows stay what they are."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import noise, perturb
from optional import library
from torch import Tensor, nn
from torch.nn import functional as F

import superlora_tn as sl
from superlora_tn.declare.rows import Span

DIM, HEADS = 8, 2
SPECS = {
    "lora": sl.lora(2, alpha=3),
    "lokr": sl.lokr(1),
    "lotr": sl.lotr(2),
    "vera": sl.vera(3),
    "dense": sl.dense(),
    "lorta": sl.lorta(2, groups=2),
    "fastfood": sl.lorta(2, projection=sl.Fastfood(0.5, seed=1)),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
LAYOUTS: dict[str, tuple[sl.Rows, dict[str, list[int]]]] = {
    "thirds": (sl.Rows("qkv", ("q", "k", "v"), use=("q", "v")), {"q": [*range(8)], "v": [*range(16, 24)]}),
    "all": (
        sl.Rows("qkv", ("q", "k", "v")),
        {"q": [*range(8)], "k": [*range(8, 16)], "v": [*range(16, 24)]},
    ),
    "grouped heads": (
        sl.Rows("qkv", ("q", "k", "v"), use=("q", "v"), sizes=(4, 1, 1)),
        {"q": [*range(16)], "v": [*range(20, 24)]},
    ),
    "by head": (
        sl.Rows("qkv", ("q", "k", "v"), use=("q", "v"), heads=HEADS),
        {"q": [*range(4), *range(12, 16)], "v": [*range(8, 12), *range(20, 24)]},
    ),
    "grouped by head": (
        sl.Rows("qkv", ("q", "k", "v"), use=("k",), sizes=(2, 1, 1), heads=3),
        {"k": [4, 5, 12, 13, 20, 21]},
    ),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Fused(nn.Module):
    """A fused layer, plain or GPT-2's, and one behind it."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        make = library("transformers.pytorch_utils").Conv1D if transposed else lambda out, width: nn.Linear(width, out)
        self.qkv, self.out = make(24, DIM), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.qkv(x)))


def attached(layout: sl.Rows, spec: sl.AdapterSpec, transposed: bool = False, **options: Any) -> tuple[nn.Module, sl.Tuned]:
    torch.manual_seed(1)
    model = Fused(transposed).double()
    tuned = sl.attach(model, spec, [layout, "out"], seed=0, dtype=torch.float64, **options)
    perturb(tuned)
    return model, tuned


def whole(model: nn.Module, tuned: sl.Tuned, blocks: dict[str, list[int]], transposed: bool) -> Tensor:
    """W of the fused layer with each block's dW on its rows, as a matrix (out, in)."""
    weight = model.state_dict()["qkv.weight"].clone()
    weight = weight.t() if transposed else weight
    update = torch.zeros_like(weight)
    for part, rows in blocks.items():
        update = update.index_add(0, torch.tensor(rows), tuned.delta(f"qkv.{part}"))
    return weight + update


def expected(model: nn.Module, tuned: sl.Tuned, x: Tensor, weight: Tensor) -> Tensor:
    stored = model.state_dict()
    middle = torch.tanh(F.linear(x, weight, stored["qkv.bias"]))
    return F.linear(middle, stored["out.weight"] + tuned.delta("out"), stored["out.bias"])


@each_spec
@each_layout
@pytest.mark.parametrize("at", [None, "weight"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_outputs_and_gradients_are_those_of_the_whole_weight(
    spec: sl.AdapterSpec, layout: tuple[sl.Rows, dict[str, list[int]]], at: str | None, transposed: bool
) -> None:
    rows, blocks = layout
    model, tuned = attached(rows, spec, transposed, at=at)
    assert {name: shape[0] for name, shape in tuned.targets.items()} == {f"qkv.{p}": len(r) for p, r in blocks.items()} | {
        "out": 5
    }
    for x in (noise(7, DIM, dtype=torch.float64), noise(2, 3, DIM, dtype=torch.float64), noise(DIM, dtype=torch.float64)):
        x.requires_grad_()
        y, other = model(x), expected(model, tuned, x, whole(model, tuned, blocks, transposed))
        torch.testing.assert_close(y, other)
        with torch.no_grad():
            torch.testing.assert_close(model(x), other)
        g, wanted = noise(*y.shape, seed=3, dtype=torch.float64), [x, *tuned.parameters()]
        for found, right in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(other, wanted, g), strict=True):
            torch.testing.assert_close(found, right)


@each_spec
@each_layout
@pytest.mark.parametrize("at", [None, "weight"])
def test_merging_writes_the_blocks_rows_alone(
    spec: sl.AdapterSpec, layout: tuple[sl.Rows, dict[str, list[int]]], at: str | None
) -> None:
    rows, blocks = layout
    model, tuned = attached(rows, spec, at=at)
    before, x = model.state_dict()["qkv.weight"].clone(), noise(5, DIM, dtype=torch.float64)
    y, weight = model(x), whole(model, tuned, blocks, False)
    tuned.merge()
    stored = model.state_dict()["qkv.weight"]
    torch.testing.assert_close(stored, weight)
    rest = sorted(set(range(24)) - {row for own in blocks.values() for row in own})
    assert torch.equal(stored[rest], before[rest])
    torch.testing.assert_close(model(x), y)
    tuned.unmerge()
    assert torch.equal(model.state_dict()["qkv.weight"], before)
    torch.testing.assert_close(model(x), y)
    tuned.bake()
    assert type(model.qkv) is nn.Linear
    assert not model.qkv._forward_hooks
    torch.testing.assert_close(model(x), y)


@each_spec
@each_layout
def test_a_saved_adapter_knows_its_rows(
    spec: sl.AdapterSpec, layout: tuple[sl.Rows, dict[str, list[int]]], tmp_path: Path
) -> None:
    model, tuned = attached(layout[0], spec)
    tuned.save(tmp_path)
    torch.manual_seed(1)
    other = Fused().double()
    again = sl.load(other, tmp_path)
    assert again.targets == tuned.targets
    x = noise(5, DIM, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x))
    assert again.num_parameters == tuned.num_parameters == spec.count(tuned.targets)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "adapter.json").read_text() == (tmp_path / "adapter.json").read_text()


def test_other_bases_are_refused(tmp_path: Path) -> None:
    attached(LAYOUTS["by head"][0], SPECS["lora"])[1].save(tmp_path)
    model = Fused()
    model.qkv = nn.Linear(DIM, 20)
    with pytest.raises(sl.CheckpointError, match=r"'qkv.q' a block repeats every 12 rows, which do not divide the 20 rows"):
        sl.load(model, tmp_path)
    with pytest.raises(
        sl.CheckpointError, match=r"'qkv.q' is a block of a layer's rows or a tied table, for which peft has no name"
    ):
        attached(LAYOUTS["thirds"][0], SPECS["lora"])[1].save(tmp_path / "peft", format="peft")


def test_the_layers_output_is_written_to_in_place_where_it_is_nobody_elses() -> None:
    """No tensor of the whole output's size is made beside it: its memory is the layer's own."""
    model, _ = attached(LAYOUTS["thirds"][0], SPECS["lora"])
    kept: list[Tensor] = []
    hooks = list(model.qkv._forward_hooks.values())
    first = hooks[0]
    plain = type(first).__call__
    pointers: list[tuple[int, int]] = []

    def watch(self: Any, layer: nn.Module, args: Any, *rest: Any) -> Any:
        found = plain(self, layer, args, *rest)
        if layer is model.qkv:
            pointers.append((rest[-1].data_ptr(), found.data_ptr()))
        return found

    type(first).__call__ = watch
    try:
        model(noise(5, DIM, dtype=torch.float64))
        assert len(pointers) == 2
        assert len({p for pair in pointers for p in pair}) == 1
        pointers.clear()
        model.qkv.register_forward_hook(lambda module, args, y: kept.append(y) or None, prepend=True)
        x = noise(5, DIM, dtype=torch.float64)
        model(x)
        torch.testing.assert_close(kept[0], F.linear(x, model.qkv.weight, model.qkv.bias))
    finally:
        type(first).__call__ = plain


def test_shared_factors_carry_x_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """q and v of one layer read the same x, so what they share next to it is contracted once a call."""
    model, _ = attached(LAYOUTS["thirds"][0], sl.vera(3))
    from superlora_tn.update.physical import PhysicalAdapter

    made, carry = [], PhysicalAdapter._carry

    def count(self: Any, *given: Any) -> Any:
        found = carry(self, *given)
        made.append(id(found))
        return found

    monkeypatch.setattr(PhysicalAdapter, "_carry", count)
    model(noise(5, DIM, dtype=torch.float64))
    if len(made) == 2:  # where the plan has nothing in common there is nothing to carry
        assert len(set(made)) == 1


@each_layout
def test_second_derivatives_checkpointing_and_compiling(layout: tuple[sl.Rows, dict[str, list[int]]]) -> None:
    model, _ = attached(layout[0], SPECS["lora"])
    x = noise(3, DIM, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(model.qkv, (x,))
    y = model(x)
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
        jvp = torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(jvp, torch.autograd.functional.jvp(model, x.detach(), torch.ones_like(x))[1])


def test_autocast_half_and_dropout() -> None:
    torch.manual_seed(1)
    model = Fused()
    tuned = sl.attach(model, sl.lora(2), [LAYOUTS["thirds"][0]], seed=0)
    perturb(tuned)
    x = noise(5, DIM)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
    torch.testing.assert_close(z.float(), y, rtol=0.05, atol=0.05)
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), y, rtol=0.05, atol=0.05)
    tuned.detach()
    dropped = sl.attach(model, sl.lora(2, dropout=0.5), [LAYOUTS["thirds"][0]], seed=0)
    perturb(dropped)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_blocks_of_a_quantised_layer() -> None:
    quantization = library("torchao.quantization")
    torch.manual_seed(1)
    model = nn.ModuleDict({"qkv": nn.Linear(32, 96)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = noise(3, 32)
    base = model["qkv"](x).detach()
    tuned = sl.attach(model, sl.lora(2), [sl.Rows("qkv", ("q", "k", "v"), use=("k",))], seed=0)
    perturb(tuned)
    update = x @ tuned.delta("qkv.k").T
    torch.testing.assert_close(model["qkv"](x), base + F.pad(update, (32, 32)), rtol=1e-4, atol=1e-4)
    with pytest.raises(sl.AttachError, match=r"'qkv.k' .* is quantised or packed"):
        tuned.merge()


def test_two_adapters_on_blocks_and_on_the_whole() -> None:
    model, first = attached(LAYOUTS["thirds"][0], SPECS["lora"])
    x = noise(5, DIM, dtype=torch.float64)
    second = sl.attach(model, sl.lora(2), ["qkv"], seed=3, dtype=torch.float64, name="second")
    perturb(second, seed=5)
    weight = whole(model, first, LAYOUTS["thirds"][1], False) + second.delta("qkv")
    torch.testing.assert_close(model(x), expected(model, first, x, weight))
    first.merge()
    with pytest.raises(sl.AttachError, match="rows of the weight of 'qkv' are merged with another adapter's dW already"):
        second.merge()
    first.unmerge()
    second.merge()
    with pytest.raises(sl.AttachError, match=r"rows of the weight of 'qkv.q' are merged"):
        first.merge()
    second.detach()
    torch.testing.assert_close(model(x), expected(model, first, x, whole(model, first, LAYOUTS["thirds"][1], False)))


ROWS = {
    "whole": ("qkv", {"qkv": [*range(24)]}),
    "thirds": (LAYOUTS["thirds"][0], {"qkv.q": [*range(8)], "qkv.v": [*range(16, 24)]}),
    "halves": (sl.Rows("qkv", ("a", "b"), use=("b",)), {"qkv.b": [*range(12, 24)]}),
    "by head": (sl.Rows("qkv", ("s", "t"), use=("s",), heads=6), {"qkv.s": [r for r in range(24) if r % 4 < 2]}),
}


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(ROWS, 2), ("thirds", "thirds")])
def test_adapters_at_a_weight_add_up_in_the_rows_that_they_have_in_common(one: str, other: str) -> None:
    torch.manual_seed(1)
    model = nn.ModuleDict({"qkv": nn.Linear(DIM, 24)})
    weight = model["qkv"].weight.detach().double()
    trained: list[Tensor] = []
    for k, name in enumerate((one, other)):
        target, places = ROWS[name]
        tuned = sl.attach(model, sl.lora(2), [target], name=f"adapter{k}", at="weight", dtype=torch.float64, seed=k)
        perturb(tuned, seed=k)
        for part, rows in places.items():
            weight = weight.index_add(0, torch.tensor(rows), tuned.delta(part))
        trained += tuned.parameters()
    assert torch.equal(model["qkv"].weight, weight.float())  # rounded once
    grad = noise(24, DIM, dtype=torch.float64)
    found = torch.autograd.grad((model["qkv"].weight.double() * grad).sum(), trained)
    torch.testing.assert_close(found, torch.autograd.grad((weight * grad.float()).sum(), trained))


def test_what_does_not_divide_or_is_not_there_is_said() -> None:
    model = Fused()
    for rows, words in (
        (sl.Rows("qkv", ("q", "k", "v"), sizes=(3, 1, 1)), "'qkv' 24 rows of 'qkv' do not divide into 1 x 3 .* equal shares"),
        (sl.Rows("kqv", ("q", "k")), "the layer 'kqv' of .* is no module; near names are 'qkv'"),
    ):
        with pytest.raises(sl.AttachError, match=words):
            sl.attach(model, sl.lora(1), [rows])
    with pytest.raises(sl.AttachError, match=r"'qkv' and 'qkv.q' have rows of one weight in common; name one of them"):
        sl.attach(model, sl.lora(1), ["qkv", sl.Rows("qkv", ("q", "k"), use=("q",))])
    assert not model._modules.get("superlora")
    for wrong, words in (
        ({"parts": ("q", "q")}, "parts="),
        ({"use": ("z",)}, "use="),
        ({"sizes": (1, 2)}, "sizes="),
        ({"heads": 0}, "heads="),
        ({"layer": ""}, "layer="),
    ):
        given: dict[str, Any] = {"layer": "qkv", "parts": ("q", "k", "v"), **wrong}
        with pytest.raises(sl.SpecError, match=words):
            sl.Rows(**given)
    for text in ("1:0/4", "0:5/4", "a", None, "-1:2/4"):
        with pytest.raises(sl.SpecError):
            Span.from_text(text)
    with pytest.raises(sl.AttachError, match=r"the target 'qkv.q' matches no module"):
        sl.attach(model, sl.lora(1), ["qkv.q"])


@pytest.mark.parametrize("patterns", [("q", "v|out"), ("qkv.q", "qkv|out"), ("(q|out)", ".*")], ids=str)
@pytest.mark.parametrize("at", [None, "weight"])
def test_several_declarations_share_the_blocks_among_them(patterns: tuple[str, str], at: str | None, tmp_path: Path) -> None:
    """A declaration for each pattern; a pattern for the whole layer means those of its blocks that are left."""
    torch.manual_seed(1)
    model, rows = Fused().double(), sl.Rows("qkv", ("q", "k", "v"), use=("q", "v"))
    specs = dict(zip(patterns, (sl.lora(2), sl.lokr(1)), strict=True))
    tuned = sl.attach(model, specs, [rows, "out"], seed=0, dtype=torch.float64, at=at)
    perturb(tuned)
    last = "out" if "out" in patterns[0] else ""
    found = [(entry.spec, list(entry.targets)) for entry in tuned.entries]
    want = ["qkv.q", *([last] if last else [])], ["qkv.v", *([] if last else ["out"])]
    assert found == list(zip(specs.values(), want, strict=True))
    x, weight = noise(3, DIM, dtype=torch.float64), whole(model, tuned, {"q": [*range(8)], "v": [*range(16, 24)]}, False)
    y = model(x)
    torch.testing.assert_close(y, expected(model, tuned, x, weight))
    tuned.save(tmp_path)
    other = Fused().double()
    other.load_state_dict(sl.tuned(model).detach().state_dict())
    torch.testing.assert_close(sl.load(other, tmp_path).forward(other)(x), y)


NONE = "matches none of the weights that targets= leaves"
BLOCKS = [sl.Rows("qkv", ("q", "k", "v"))]
REFUSED: dict[str, tuple[Any, str]] = {
    "quux": (BLOCKS, f"{NONE} (3); near names are 'q'"),
    "out": (BLOCKS, NONE),
    "q": (["qkv"], f"{NONE} (1); near names are 'qkv'"),
    "k": (None, "matches no module's name or the end of one; near names are "),
    "q(": (BLOCKS, "is not a regular expression"),
    "a)|(b": (None, "is not a regular expression"),
    "(?i)Q": (BLOCKS, "is not a regular expression"),
}


def test_a_pattern_that_fits_nothing_is_told_in_the_users_words() -> None:
    for pattern, (targets, words) in REFUSED.items():
        with pytest.raises(sl.AttachError, match=re.escape(f"the pattern '{pattern}' {words}")):
            sl.attach(Fused(), {pattern: sl.lora(1)}, targets)
    with pytest.raises(sl.AttachError, match=r"the pattern 'qkv.q' leaves no layer to adapt: the patterns before it"):
        sl.attach(Fused(), {"q": sl.lora(1), "qkv.q": sl.lora(1)}, BLOCKS)
    for exclude, words in (
        ("ou", "exclude='ou' matches no module's whole name"),
        (["ou"], "the entry of exclude= 'ou' matches"),
    ):
        with pytest.raises(sl.AttachError, match=words):
            sl.attach(Fused(), sl.lora(1), ["out"], exclude=exclude)


def test_excluded_blocks_and_patterns() -> None:
    model = Fused()
    rows = sl.Rows("qkv", ("q", "k", "v"))
    assert sl.match(model, [rows], exclude=["qkv.k"]) == ["qkv.q", "qkv.v"]
    assert sl.match(model, [rows, "out"], exclude=[sl.Rows("qkv", ("q", "k", "v"), use=("q", "k"))]) == ["qkv.v", "out"]


# --- models that are known ------------------------------------------------------------------------------------------


def known(name: str) -> tuple[Any, str, dict[str, list[int]]]:
    """A tiny model, its fused layer, and the rows of its blocks as the model's own code cuts them."""
    transformers = library("transformers")
    sizes = {"vocab_size": 31, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    if name == "Phi-3":
        config = transformers.Phi3Config(
            hidden_size=16, intermediate_size=24, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64, **sizes
        )
        rows = {"q": [*range(16)], "k": [*range(16, 24)], "v": [*range(24, 32)]}
        return transformers.Phi3ForCausalLM(config), "qkv_proj", rows
    if name == "Phi-3 MLP":
        return known("Phi-3")[0], "gate_up_proj", {"gate": [*range(24)], "up": [*range(24, 48)]}
    if name == "GPT-2":
        config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=4, n_positions=64)
        rows = {part: [*range(16 * k, 16 * k + 16)] for k, part in enumerate("qkv")}
        return transformers.GPT2LMHeadModel(config), "c_attn", rows
    heads = {part: [12 * h + 4 * k + r for h in range(4) for r in range(4)] for k, part in enumerate("qkv")}
    if name == "GPT-NeoX":
        config = transformers.GPTNeoXConfig(hidden_size=16, intermediate_size=24, **sizes)
        return transformers.GPTNeoXForCausalLM(config), "query_key_value", heads
    if name == "BLOOM":
        config = transformers.BloomConfig(vocab_size=31, hidden_size=16, n_layer=1, n_head=4)
        return transformers.BloomForCausalLM(config), "query_key_value", heads
    new, many = name == "Falcon grouped", name == "Falcon"
    config = transformers.FalconConfig(
        hidden_size=16, new_decoder_architecture=new, multi_query=many, num_kv_heads=2 if new else 4, alibi=False, **sizes
    )
    rows = heads
    if new:  # two groups, each of two heads of q, one of k and one of v
        cut = {"q": (0, 8), "k": (8, 12), "v": (12, 16)}
        rows = {part: [16 * g + r for g in range(2) for r in range(*ends)] for part, ends in cut.items()}
    elif many:
        rows = {"q": [*range(16)], "k": [*range(16, 20)], "v": [*range(20, 24)]}
    return transformers.FalconForCausalLM(config), "query_key_value", rows


MODELS = ["Phi-3", "Phi-3 MLP", "GPT-2", "GPT-NeoX", "BLOOM", "Falcon", "Falcon grouped", "Falcon by head"]


@pytest.mark.parametrize("name", MODELS)
def test_known_models_know_their_blocks(name: str, tmp_path: Path) -> None:
    model, layer, rows = known(name)
    model.eval()
    x = torch.arange(3, 12)[None]
    use = [part for part in rows if part != "k"]
    tuned = sl.attach(model, sl.lora(2), [f"{layer}.{part}" for part in use], seed=0)
    perturb(tuned)
    targets = {target.rpartition(".")[2]: target for target in tuned.targets}
    assert {part: tuned.targets[targets[part]][0] for part in use} == {part: len(rows[part]) for part in use}
    y = model(input_ids=x).logits
    plain, _, _ = known(name)
    plain.load_state_dict(model.state_dict(), strict=False)
    home = next(iter(targets.values())).rpartition(".")[0]
    weight = plain.eval().get_submodule(home).weight
    for part in use:
        matrix = weight.t() if name == "GPT-2" else weight
        matrix.data[rows[part]] += tuned.delta(targets[part])
    torch.testing.assert_close(y, plain(input_ids=x).logits, rtol=1e-4, atol=1e-5)
    tuned.save(tmp_path)
    other, _, _ = known(name)
    other.load_state_dict(plain.state_dict())
    matrix = other.get_submodule(home).weight.t() if name == "GPT-2" else other.get_submodule(home).weight
    for part in use:
        matrix.data[rows[part]] -= tuned.delta(targets[part])
    sl.load(other.eval(), tmp_path)
    torch.testing.assert_close(other(input_ids=x).logits, y, rtol=1e-4, atol=1e-5)
    tuned.bake()
    torch.testing.assert_close(model(input_ids=x).logits, y, rtol=1e-4, atol=1e-5)


def effect(model: Any, layer: str, rows: list[int]) -> tuple[float, float]:
    """What changing these rows of a fused layer does to the keys and values that the model caches."""
    home = next(name for name, _ in model.eval().named_modules() if name.endswith(layer))
    x = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(input_ids=x, use_cache=True).past_key_values.layers[0]
        weight = model.get_submodule(home).weight
        matrix = weight.t() if "c_attn" in layer else weight
        matrix[rows] += noise(len(rows), matrix.shape[1])
        after = model(input_ids=x, use_cache=True).past_key_values.layers[0]
    return float((before.keys - after.keys).abs().max()), float((before.values - after.values).abs().max())


@pytest.mark.parametrize("name", [n for n in MODELS if n != "Phi-3 MLP"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_the_rows_are_those_that_the_models_code_takes(name: str, part: str) -> None:
    """Of one layer, k alone moves the keys of the cache, v alone its values, q neither."""
    model, layer, rows = known(name)
    keys, values = effect(model, layer, rows[part])
    assert (keys > 1e-4) == (part == "k")
    assert (values > 1e-4) == (part == "v")


class Windows(nn.Module):
    """Stands for timm's classes, which read ``x.qkv`` as (3, heads, rest)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 24)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("timm.models.swin_transformer", "WindowAttention"),
        ("timm.layers.attention", "Attention"),
        ("torchvision.models.swin_transformer", "ShiftedWindowAttention"),
    ],
)
def test_timms_and_torchvisions_fused_layers_are_known_by_their_classes(module: str, name: str) -> None:
    model = nn.ModuleDict({"attn": type(name, (Windows,), {"__module__": module})()})
    assert sl.match(model, ["qkv.q", "qkv.v"]) == ["attn.qkv.q", "attn.qkv.v"]
    assert sl.match(model, r".*qkv.*") == ["attn.qkv"]
    assert sl.match(model, r".*qkv\.[qv]") == ["attn.qkv.q", "attn.qkv.v"]
    assert sl.match(model, "all-linear") == ["attn.qkv"]
