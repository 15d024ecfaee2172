"""The plug-in for PEFT holds what PEFT's own tests ask of a method, and computes what `attach` computes."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DIM, TARGETS, ConvNet, Tiny, noise, seeded
from optional import library
from packaging.version import Version
from torch import Tensor, nn

import superlora_tn as sl

library("transformers")
peft = library("peft")
plugin = library("superlora_tn.peft")

Config = plugin.SuperLoraConfig
SPECS = {
    "lora": sl.lora(4, alpha=8),
    "lokr": sl.lokr(2),
    "lotr": sl.lotr(3),
    "lorta": sl.lorta(2, order=3, groups=2),
    "declared": sl.AdapterSpec(sl.CP(3), sl.PhysicalFold("layer out in")),
}
# Sums of some hundred float32 terms of size 1 in two orders.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What PEFT itself meets: a base of no name that is not on the hub, and what newer releases of transformers rename."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated")
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield


def tiny() -> tuple[nn.Module, list[str], tuple[Any, ...]]:
    """A small model, its targets and an input."""
    return seeded(0, Tiny).eval(), TARGETS, (noise(2, 3, DIM),)


def llama() -> tuple[nn.Module, list[str], tuple[Any, ...]]:
    """A small Llama of transformers."""
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, initializer_range=0.3
    )
    return transformers.LlamaForCausalLM(config).eval(), ["q_proj", "v_proj"], (torch.arange(10).reshape(2, 5),)


BASES: dict[str, Callable[[], tuple[nn.Module, list[str], tuple[Any, ...]]]] = {"tiny": tiny, "llama": llama}
both = pytest.mark.parametrize("base", BASES)
RELEASE = Version(peft.__version__)
each = pytest.mark.parametrize("name", SPECS)


def out(model: nn.Module, given: tuple[Any, ...], **more: Any) -> Tensor:
    found = model(*given, **more)
    return found if isinstance(found, Tensor) else found.logits


def config(name: str, targets: list[str], **more: Any) -> Any:
    return Config(spec=SPECS[name], target_modules=targets, **more)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@each
@both
def test_starts_as_the_identity_and_trains_only_the_adapter(name: str, base: str) -> None:
    model, targets, given = BASES[base]()
    before = out(model, given).detach()
    model = peft.get_peft_model(model, config(name, targets, seed=3))
    torch.testing.assert_close(out(model, given), before, rtol=0, atol=0)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = trained_values(model)
    assert trained
    assert all(".superlora_" in n for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        out(model, given).square().sum().backward()
        optimizer.step()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in trained)
        assert ((p - values[n]).abs().max() > 1e-4) == (n in trained), n


@each
@both
def test_forward_is_the_merged_models_and_comes_back(name: str, base: str) -> None:
    model, targets, given = BASES[base]()
    before = out(model, given).detach()
    bytes_before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = peft.get_peft_model(model, config(name, targets, init_weights=False, seed=3))
    adapted = out(model, given).detach()
    assert not torch.allclose(adapted, before, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(out(model, given), adapted, **ROUNDING)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    torch.testing.assert_close(out(model, given), adapted, **ROUNDING)
    model.unmerge_adapter()
    torch.testing.assert_close(out(model, given), adapted, rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(out(model, given), before, rtol=0, atol=0)
    torch.testing.assert_close(out(model, given), adapted, rtol=0, atol=0)
    whole = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(out(whole, given), adapted, **ROUNDING)
    assert not any("superlora" in n for n, _ in whole.named_modules())
    plain = model.unload()
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in bytes_before.items()}
    assert all(torch.equal(p, bytes_before[n]) for n, p in plain.named_parameters())
    assert not plain._forward_hooks
    assert not plain._forward_pre_hooks


@each
@both
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_under_another_seed(name: str, base: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, targets, given = BASES[base]()
    model = peft.get_peft_model(model, config(name, targets, init_weights=False))
    adapted = out(model, given).detach()
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    again = peft.PeftModel.from_pretrained(BASES[base]()[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    # Loaded nodes do not train, and what saves nothing for backward may sum in another order.
    torch.testing.assert_close(out(again, given), adapted, **ROUNDING)
    assert not trained_values(again)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(read) is Config
    assert read.adapter_spec == SPECS[name]


@pytest.mark.parametrize("spec", [sl.lora_xs(2), sl.boft(4, 2), sl.hira(2), sl.tiny_lora(2), sl.randlora(2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_nodes_are_loaded_where_little_memory_is_used(spec: sl.AdapterSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT makes an adapter's parameters without memory, but not its buffers; the first adapter and the next."""
    names, (x,) = ["q_proj", "o_proj"], llama()[2]
    given = Config(spec=spec, target_modules=names, init_weights=False)
    model = peft.get_peft_model(llama()[0].to(dtype), given).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama()[0].to(dtype), tmp_path, low_cpu_mem_usage=True).eval()
    again.load_adapter(tmp_path, adapter_name="next", low_cpu_mem_usage=True)
    for name in ("default", "next"):
        again.set_adapter(name)
        torch.testing.assert_close(out(again, (x,)), out(model, (x,)), **(ROUNDING if dtype == torch.float32 else {}))
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))


@each
@both
def test_computes_what_attach_computes(name: str, base: str) -> None:
    model, targets, given = BASES[base]()
    plain = copy.deepcopy(model)
    model = peft.get_peft_model(model, config(name, targets, init_weights=False, seed=5))
    handle = sl.attach(plain, SPECS[name], targets)
    values = {tuple(a.group.members): a for a in handle.adapters}
    for own in model.base_model._adapters("default"):
        other = values[tuple(own.group.members)]
        with torch.no_grad():
            for mine, theirs in zip(own.tensors(), other.tensors(), strict=True):
                theirs.copy_(mine)
    torch.testing.assert_close(out(model, given), out(plain, given), rtol=0, atol=0)


def close(found: Tensor, expected: Tensor) -> None:
    """The same products of the same float32 numbers, which a BLAS may sum otherwise where they lie elsewhere in memory."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@each
def test_two_adapters_of_names_that_contain_one_another(name: str, tmp_path: Path) -> None:
    model, targets, given = tiny()
    before = out(model, given).detach()
    model = peft.get_peft_model(model, config(name, targets, init_weights=False, seed=1), adapter_name="style")
    first = out(model, given).detach()
    model.add_adapter("style2", config("lora", ["up", "o_proj"], init_weights=False, seed=2))
    torch.testing.assert_close(out(model, given), first, rtol=0, atol=0)
    assert all(".style." in n for n in trained_values(model))
    model.set_adapter("style2")
    second = out(model, given).detach()
    assert not torch.allclose(first, second, atol=1e-3)
    assert all(".style2." in n for n in trained_values(model))
    model.base_model.set_adapter(["style", "style2"])
    together = out(model, given).detach()
    model.merge_adapter()
    torch.testing.assert_close(out(model, given), together, **ROUNDING)
    model.unmerge_adapter()
    model.set_adapter("style")
    model.save_pretrained(tmp_path)
    keys = {f: set(peft.utils.load_peft_weights(str(tmp_path / f))) for f in ("style", "style2")}
    if Version("0.20") <= RELEASE:  # before, PEFT saves keys of names that contain the adapter's
        assert not any("style" in key for found in keys.values() for key in found)
    again = peft.PeftModel.from_pretrained(tiny()[0], tmp_path / "style", adapter_name="one")
    again.load_adapter(tmp_path / "style2", adapter_name="two")
    close(out(again, given), first)
    again.set_adapter("two")
    close(out(again, given), second)
    mixed = again.eval()(given[0].repeat(2, 1, 1), adapter_names=["one", "two", "__base__", "two"])
    expected = torch.stack([first[0], second[1], before[0], second[1]])
    torch.testing.assert_close(mixed, expected, **ROUNDING)
    with pytest.warns(UserWarning, match="Setting active adapter to style2"):
        model.delete_adapter("style")
    assert not any(".style." in key for key in model.state_dict())
    assert "style" not in model.peft_config
    torch.testing.assert_close(out(model, given), second, rtol=0, atol=0)


@each
def test_merging_some_of_several_and_deleting_merged_ones(name: str) -> None:
    model, targets, given = tiny()
    model = peft.get_peft_model(model, config(name, targets, init_weights=False, seed=1), adapter_name="one")
    model.add_adapter("two", config(name, targets, init_weights=False, seed=2))
    model.set_adapter("two")
    second = out(model, given).detach()
    model.merge_adapter(["two"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("two")
    assert "two" in model.peft_config
    torch.testing.assert_close(out(model, given), second, **ROUNDING)
    with model.disable_adapter():
        torch.testing.assert_close(out(model, given), out(tiny()[0], given), rtol=0, atol=0)


@each
def test_copies_are_copies(name: str) -> None:
    model, targets, given = tiny()
    model = peft.get_peft_model(model, config(name, targets, init_weights=False))
    adapted = out(model, given).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(out(other, given), adapted, rtol=0, atol=0)
        with torch.no_grad():
            for p in trained_values(other).values():
                p.add_(0.1)
        assert not torch.allclose(out(other, given), adapted, atol=1e-3)
        torch.testing.assert_close(out(model, given), adapted, rtol=0, atol=0)


@each
def test_broken_values_are_not_merged_and_nothing_is_changed(name: str) -> None:
    model, targets, _ = tiny()
    model = peft.get_peft_model(model, config(name, targets, init_weights=False))
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    last = list(trained_values(model).values())[-1]
    with torch.no_grad():
        last.view(-1)[0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


@each
def test_config_comes_back_from_everything(name: str, tmp_path: Path) -> None:
    given = config(name, TARGETS, exclude_modules=["head"], seed=7, task_type="CAUSAL_LM")
    given.save_pretrained(tmp_path)
    others = [
        Config(**given.to_dict()),
        Config.from_pretrained(tmp_path),
        peft.PeftConfig.from_pretrained(tmp_path),
        copy.deepcopy(given),
        pickle.loads(pickle.dumps(given)),
    ]
    for other in others:
        assert other.adapter_spec == SPECS[name]
        assert {**other.to_dict(), "spec": None} == {**given.to_dict(), "spec": None}


def test_config_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    config("lora", TARGETS).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    for change, words in (
        ({"rank_pattern": {}}, "'rank_pattern', which it does not know"),
        ({"schema": 2}, "has schema 2, and this release reads 1"),
        ({"spec": {**saved["spec"], "twist": 1}}, "a spec has no field 'twist'"),
    ):
        file.write_text(json.dumps({**saved, **change}))
        with pytest.raises(ValueError, match=words):
            peft.PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'target_module', which it does not know; near names are target_modules"):
        Config(spec="lora", settings={"rank": 2}, target_module=["up"])
    with pytest.raises(sl.SpecError, match="SuperLoraConfig was given seed='a'"):
        config("lora", TARGETS, seed="a")
    with pytest.raises(sl.SpecError, match=r"or one of .*lokr"):
        Config(spec="lowkr", settings={"rank": 2})
    with pytest.raises(sl.SpecError, match=r"for lora.*missing a required argument"):
        Config(spec="lora")
    assert Config(spec="lora", settings={"rank": 4, "alpha": 8}).adapter_spec == SPECS["lora"]


@pytest.mark.skipif(Version("0.21") > RELEASE, reason="PEFT asks a method about a file's keys from 0.21 on")
def test_a_file_that_does_not_fit_raises(tmp_path: Path) -> None:
    safetensors = library("safetensors.torch")
    model, targets, _ = tiny()
    peft.get_peft_model(model, config("lora", targets)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = safetensors.load_file(file)
    for changed in (dict(list(values.items())[1:]), {**values, "base_model.superlora_99.node_a": torch.ones(1)}):
        safetensors.save_file(changed, file)
        with pytest.raises(ValueError, match="the file does not fit its config"):
            peft.PeftModel.from_pretrained(tiny()[0], tmp_path)


def test_a_failed_injection_leaves_the_model_as_it_was() -> None:
    model, _, given = tiny()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"names 'u_proj'.*near names are"):
        peft.get_peft_model(model, config("lora", ["q_proj", "u_proj"]))
    uneven = sl.AdapterSpec(sl.CP(3), sl.PhysicalFold("layer head out in", heads=5))
    with pytest.raises(sl.SpecError):
        peft.get_peft_model(model, Config(spec=uneven, target_modules=["up", "q_proj"]))
    assert names == [n for n, _ in model.named_modules()]
    assert out(model, given).isfinite().all()


@pytest.mark.skipif(Version("0.21") > RELEASE, reason="PEFT finds layers at the top of a model from 0.21 on")
@pytest.mark.filterwarnings("ignore:.*PEFT for a second time|Already found a `peft_config`")
def test_a_base_that_is_adapted_twice() -> None:
    """As a notebook's cell does that is run again: with the base, or with the model that came of it; also where it fails."""
    base, targets, (x,) = tiny()
    first = peft.get_peft_model(base, config("lokr", targets, init_weights=False, seed=0)).eval()
    adapted = out(first, (x,)).detach()
    for wrong in (
        {"spec": SPECS["lora"], "target_modules": [*targets, "none"]},
        {"spec": sl.c3a(7), "target_modules": targets},
    ):
        with pytest.raises(ValueError, match=r"."):
            peft.get_peft_model(base, Config(**wrong))
        close(out(first, (x,)), adapted)
    again = peft.get_peft_model(first, config("lora", targets, init_weights=False, seed=1)).eval()
    plain = peft.get_peft_model(tiny()[0], config("lora", targets, init_weights=False, seed=1)).eval()
    close(out(again, (x,)), out(plain, (x,)))


def test_a_batch_of_no_names_is_refused() -> None:
    model, targets, (x,) = tiny()
    model = peft.get_peft_model(model, config("lora", targets)).eval()
    with pytest.raises(ValueError, match=r"adapter_names is empty; give one name for each row"):
        out(model, (x,), adapter_names=[])


def test_selection_as_peft_does_it() -> None:
    model, _, _ = tiny()
    found = peft.get_peft_model(
        model, config("lora", TARGETS, layers_to_transform=[1], layers_pattern="layers", exclude_modules=["up"])
    )
    assert found.targeted_module_names == ["layers.1.attn.q_proj", "layers.1.attn.v_proj", "layers.1.down"]
    found.add_adapter("all", Config(spec=sl.lora(2), target_modules="all-linear"))
    assert len(found.base_model._adapters("all")) == 13  # six linear layers a block, and the head


def test_modules_to_save_train_and_are_saved(tmp_path: Path) -> None:
    model, targets, given = tiny()
    model = peft.get_peft_model(model, config("lokr", targets, modules_to_save=["head"], init_weights=False))
    assert any("head" in n for n in trained_values(model))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1.0)
    adapted = out(model, given).detach()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny()[0], tmp_path)
    close(out(again, given), adapted)


def test_rows_of_a_batch_meet_what_was_saved_beside_their_adapter() -> None:
    """Also where an adapter saved nothing, and where the first axis is longer than the names, as under beam search."""
    model, targets, (x,) = tiny()
    model = peft.get_peft_model(model, config("lokr", targets, modules_to_save=["head"], init_weights=False, seed=0)).eval()
    model.add_adapter("other", config("lora", targets, modules_to_save=["head"], init_weights=False, seed=1))
    model.add_adapter("bare", config("lora", targets, init_weights=False, seed=2))
    with torch.no_grad():
        for k, head in enumerate(model.base_model.model.head.modules_to_save.values()):
            head.weight.add_(1.0 + k)
    with model.disable_adapter():
        expected = {"__base__": out(model, (x,)).detach()}
    for name in ("default", "other", "bare"):
        model.set_adapter(name)
        expected[name] = out(model, (x,)).detach()
    model.set_adapter("default")
    names = ["other", "default", "__base__", "bare"]
    rows = x[:1].expand(4, -1, -1)
    mixed = out(model, (rows,), adapter_names=names)
    for row, name in zip(mixed, names, strict=True):
        close(row, expected[name][0])
    twice = out(model, (rows.repeat_interleave(2, 0),), adapter_names=names)
    close(twice, mixed.repeat_interleave(2, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_half_bases(dtype: torch.dtype, wide: bool) -> None:
    model, targets, given = tiny()
    model = peft.get_peft_model(model.to(dtype), config("lokr", targets), autocast_adapter_dtype=wide)
    assert {p.dtype for p in trained_values(model).values()} == {torch.float32 if wide else dtype}
    assert out(model, (given[0].to(dtype),)).dtype == dtype


@each
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(name: str, use_reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model, targets, given = llama()
        model = peft.get_peft_model(model, config(name, targets, init_weights=False, seed=1)).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        out(model, given, use_cache=False).square().sum().backward()
        found.append({n: p.grad for n, p in trained_values(model).items()})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-5)  # sums over layers in two orders


def test_a_convolution_and_generation() -> None:
    model = seeded(0, ConvNet).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    before = dict(model.named_modules())
    assert names
    tuned = peft.get_peft_model(model, Config(spec=sl.lora(2), target_modules=names, init_weights=False))
    assert {type(tuned.base_model.model.get_submodule(n)) for n in names} == {plugin.SuperLoraLayer}
    assert all(tuned.base_model.model.get_submodule(n).base_layer is before[n] for n in names)
    text, targets, given = llama()
    text = peft.get_peft_model(text, config("lotr", targets, init_weights=False))
    written = text.generate(input_ids=given[0] + 1, max_new_tokens=3, do_sample=False)
    assert written.shape == (2, 8)


def test_an_attention_that_reads_its_weights_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(sl.AttachError, match=r"superlora_tn\.attach"):
        peft.get_peft_model(model, Config(spec=sl.lora(2), target_modules=["0.out_proj"]))


@each
def test_an_adapter_becomes_plain_lora_of_enough_rank(name: str) -> None:
    model, targets, given = tiny()
    model = peft.get_peft_model(model, config(name, targets, init_weights=False))
    adapted = out(model, given).detach()
    converted, values = peft.convert_to_lora(model, rank=DIM)  # no target has a higher rank
    plain = peft.get_peft_model(tiny()[0], converted)
    peft.set_peft_model_state_dict(plain, values)
    torch.testing.assert_close(out(plain, given), adapted, rtol=1e-4, atol=1e-4)  # a float32 SVD lies between


def test_a_weight_that_changed_while_merged_is_not_thrown_away() -> None:
    model, targets, _ = tiny()
    model = peft.get_peft_model(model, config("lora", targets, init_weights=False))
    model.merge_adapter()
    with torch.no_grad():
        model.base_model.model.layers[0].up.base_layer.weight.add_(1.0)
    with pytest.raises(ValueError, match="changed while adapters were merged"):
        model.unmerge_adapter()


CONVOLVED = {"lokr": sl.lokr(2), "krona": sl.krona(), "conv_lokr": sl.conv_lokr(2), "conv_lora": sl.conv_lora(2, tucker=True)}


def convolutions() -> nn.Module:
    """A kernel of 3 x 3, one of a single position, and a linear layer behind."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 8, 1), nn.Flatten(), nn.Linear(8 * 9, 16)).eval()


@pytest.mark.parametrize("name", CONVOLVED)
def test_convolutions_get_the_network_that_attach_gives_them(name: str, tmp_path: Path) -> None:
    """The same nodes under a seed, the same numbers from one step to the next, and files that come back."""
    plain, given = convolutions(), noise(2, 64, 5, 5)
    handle = sl.attach(plain, CONVOLVED[name], ["0", "1", "3"], seed=5)
    model = peft.get_peft_model(convolutions(), Config(spec=CONVOLVED[name], target_modules=["0", "1", "3"], seed=5))
    own = {tuple(a.group.members): a for a in model.base_model._adapters("default")}
    assert list(own) == [("0",), ("1",), ("3",)]  # numbered as the model has them, which older files rely on
    for theirs in handle.adapters:
        mine = own[tuple(theirs.group.members)]
        assert mine.spec == theirs.spec
        for k, (one, other) in enumerate(zip(mine.tensors(), theirs.tensors(), strict=True)):
            assert torch.equal(one, other)
            with torch.no_grad():
                one.copy_(noise(*one.shape, seed=k))
                other.copy_(one)
    expected = plain(given)
    close(model(given), expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(convolutions(), tmp_path)
    torch.testing.assert_close(again(given), expected, **ROUNDING)
    torch.testing.assert_close(again.merge_and_unload()(given), expected, rtol=1e-4, atol=1e-4)  # dW is rounded with W


def test_a_kernel_is_left_whole_as_pefts_own_lokr_leaves_it() -> None:
    """dW = W1 (x) W2 over channels, the kernel behind, in float64; as many numbers as PEFT's LoKr of the same rank."""
    layer = nn.Sequential(nn.Conv2d(64, 64, 3)).double()
    theirs = peft.get_peft_model(copy.deepcopy(layer), peft.LoKrConfig(r=2, target_modules=["0"]))
    ours = peft.get_peft_model(copy.deepcopy(layer), Config(spec=sl.lokr(2), target_modules=["0"]))
    assert sum(map(Tensor.numel, trained_values(theirs).values())) == 64 + 2 * 8 + 2 * 72
    assert sum(map(Tensor.numel, trained_values(ours).values())) == 64 + 2 * 8 + 2 * 72
    model = peft.get_peft_model(layer, Config(spec=sl.krona(), target_modules=["0"], init_weights=False, seed=3))
    one, two = (p.detach().double() for p in trained_values(model).values())
    assert (one.shape, two.shape) == ((8, 8), (8, 72))
    delta = torch.einsum("ab,cdk->acbdk", one, two.reshape(8, 8, 9)).reshape(64, 64, 3, 3)
    conv = model.base_model.model[0]
    torch.testing.assert_close(conv.get_delta_weight("default").double(), delta, rtol=1e-12, atol=1e-14)
    x, base = noise(2, 64, 5, 5, dtype=torch.float64), conv.base_layer
    wanted = nn.functional.conv2d(x, base.weight + delta, base.bias)
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(Version("0.21") > RELEASE, reason="PEFT asks a method about a file's keys from 0.21 on")
def test_a_file_of_split_kernels_is_refused(tmp_path: Path) -> None:
    """As they were saved once: krona's 8 x 24 and 8 x 24 of (64, 576)."""
    safetensors = library("safetensors.torch")
    peft.get_peft_model(convolutions(), Config(spec=sl.krona(), target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    first, second = sorted(safetensors.load_file(file))
    safetensors.save_file({first: torch.ones(8, 24), second: torch.ones(8, 24)}, file)
    for more in ({}, {"low_cpu_mem_usage": True}):
        with pytest.raises(ValueError, match=r"of shape \(8, 24\) in it, and \(8, 8\) by the config .* kernels were split"):
            peft.PeftModel.from_pretrained(convolutions(), tmp_path, **more)


def test_a_layer_that_peft_wraps_is_named_as_such() -> None:
    model = peft.get_peft_model(seeded(0, Tiny), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(sl.AttachError, match=r"layers.0.up' is PEFT's wrapper of a layer .* model.merge_and_unload\(\)"):
        sl.attach(model, sl.lora(2), ["up"])
    assert len(sl.attach(model.merge_and_unload(), sl.lora(2), ["up"]).targets) == 2


def test_a_config_of_before_in_which_rslora_did_nothing_still_loads() -> None:
    """As this library's own files of before do; the declaration means the same without it."""
    for spec in (sl.lora(2), sl.dense(alpha=2.0)):
        assert Config(spec={**spec.to_dict(), "rslora": True}).adapter_spec == spec


def test_pefts_status_says_what_trains_and_where() -> None:
    model, targets, _ = tiny()
    made = peft.get_peft_model(model, config("lotr", targets))
    made.add_adapter("other", config("lora", [targets[0]]))
    before = set(made.state_dict())
    status = made.get_model_status()
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.available_adapters == ["default", "other"]
    made.set_requires_grad("other")
    assert made.get_model_status().requires_grad == {"default": True, "other": True}
    made.set_adapter("other")
    assert made.get_model_status().requires_grad == {"default": False, "other": True}
    with made.disable_adapter():
        assert made.get_model_status().requires_grad == {"default": False, "other": False}
    assert made.get_model_status().requires_grad == {"default": False, "other": True}
    assert {len(layer.requires_grad) for layer in made.get_layer_status()} <= {1, 2}
    assert set(made.state_dict()) == before
