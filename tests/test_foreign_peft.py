"""Folders that PEFT itself wrote are read as what PEFT itself computes."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import CONVOLUTIONS, LINEAR, Net, close, deltas, fit, inputs, parsed, shapes, shuffle
from safetensors.torch import load_file, save_file
from torch import nn

import superlora_tn as sl
from superlora_tn.files.errors import CheckpointError

peft = pytest.importorskip("peft")

# PEFT computes dW in float32: relative to the largest number of it, a few roundings of 6e-8 for sums of some ten terms.
ROUNDING = 2e-6


def saved(model: nn.Module, config: Any, folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Adapt, fill with random values and save by PEFT; dW of each adapted weight as PEFT merges it, in float64."""
    base = {n: m.weight.detach().double().flatten(1).numpy() for n, m in model.named_modules() if n in shapes(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on layers it will not convert and the like
        tuned = peft.get_peft_model(copy.deepcopy(model), config)
        shuffle([p for n, p in tuned.named_parameters() if p.requires_grad and "magnitude" not in n], seed)
        tuned.save_pretrained(str(folder))
        merged = tuned.double().merge_and_unload()
    after = {n: m.weight.detach().double().flatten(1).numpy() for n, m in merged.named_modules() if n in base}
    return {n: after[n] - w for n, w in base.items() if np.abs(after[n] - w).max() > 0}


def config(kind: str, **more: Any) -> Any:
    """PEFT's configuration of a method."""
    return getattr(peft, f"{kind}Config")(target_modules=[*LINEAR, *CONVOLUTIONS], **more)


CASES = {
    "lora": lambda: config("Lora", r=4, lora_alpha=12),
    "lora with one rank": lambda: config("Lora", r=1, lora_alpha=3),
    "rslora": lambda: config("Lora", r=4, lora_alpha=12, use_rslora=True),
    "lora with patterns": lambda: config(
        "Lora", r=4, lora_alpha=12, rank_pattern={"to_q": 2, r"ff\.\d+": 6}, alpha_pattern={"attn_1.to_q": 5, "^conv_in": 7}
    ),
    "lora of rank above a layer's": lambda: config("Lora", r=64, lora_alpha=8),
    "loha": lambda: config("LoHa", r=3, alpha=6),
    "loha with kernels": lambda: config("LoHa", r=3, alpha=6, use_effective_conv2d=True),
    "loha with patterns": lambda: config("LoHa", r=3, alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 1}),
    "lokr": lambda: config("LoKr", r=2, alpha=5),
    "lokr with both of low rank": lambda: config("LoKr", r=1, alpha=5, decompose_both=True),
    "lokr of a factor": lambda: config("LoKr", r=2, alpha=5, decompose_factor=8),
    "lokr with kernels": lambda: config("LoKr", r=1, alpha=5, use_effective_conv2d=True),
    "lokr, both dense": lambda: config("LoKr", r=32, alpha=16, alpha_pattern={"to_q": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    model = Net()
    wanted = saved(model, CASES[case](), tmp_path)
    assert len(wanted) == 9
    close(deltas(fit(tmp_path, model)), wanted, ROUNDING)


LINEAR_ONLY = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=LINEAR, init_r=4, target_r=2, lora_alpha=12, total_step=10),
    "vera": lambda: peft.VeraConfig(target_modules=LINEAR, r=6),
    "vera without its projections": lambda: peft.VeraConfig(target_modules=LINEAR, r=6, save_projection=False),
    "gralora": lambda: peft.GraloraConfig(target_modules=LINEAR, r=4, alpha=6, gralora_k=2),
    "randlora": lambda: peft.RandLoraConfig(target_modules=LINEAR, r=6, randlora_alpha=9),
    "miss": lambda: peft.MissConfig(target_modules=LINEAR, r=4),
    "c3a": lambda: peft.C3AConfig(target_modules=LINEAR, block_size=8),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=LINEAR, n_frequency=50, scaling=20.0, random_loc_seed=3),
    "fourierft with a pattern": lambda: peft.FourierFTConfig(
        target_modules=LINEAR, n_frequency=50, scaling=20.0, n_frequency_pattern={"to_q": 576}
    ),
    "delora": lambda: peft.DeloraConfig(target_modules=LINEAR, r=4, delora_lambda=5),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=LINEAR, r=3, num_vectors=7, vector_length=4, topk=3),
    "hira": lambda: peft.HiraConfig(target_modules=LINEAR, r=4),
    "dora": lambda: peft.LoraConfig(target_modules=LINEAR, r=4, lora_alpha=12, use_dora=True),
}


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("case", LINEAR_ONLY)
def test_methods_for_linear_layers(case: str, tmp_path: Path) -> None:
    model = Net()
    wanted = saved(model, LINEAR_ONLY[case](), tmp_path)
    base = {n: m.weight.detach().flatten(1) for n, m in model.named_modules() if n in shapes(model)}
    found = deltas(fit(tmp_path, model, weights=base.__getitem__))
    # A DoRA's dW is the difference of two weights, so it has the rounding of W and not of dW.
    close(found, wanted, 2e-5 if case == "dora" else ROUNDING)


def test_dora_on_convolutions(tmp_path: Path) -> None:
    model = Net()
    wanted = saved(model, peft.LoraConfig(target_modules=CONVOLUTIONS, r=4, lora_alpha=12, use_dora=True), tmp_path)
    base = {n: m.weight.detach().flatten(1) for n, m in model.named_modules() if n in shapes(model)}
    close(deltas(fit(tmp_path, model, weights=base.__getitem__)), wanted, 2e-5)


def test_hira_is_the_librarys_own(tmp_path: Path) -> None:
    """W is a frozen node, as in `sl.hira`, on convolutions too; without PEFT's settings a file is no LoRA."""
    model = Net()
    wanted = saved(model, peft.HiraConfig(target_modules=[*LINEAR, *CONVOLUTIONS], r=4), tmp_path)
    base = {n: m.weight.detach().flatten(1) for n, m in model.named_modules() if n in shapes(model)}
    fitted = fit(tmp_path, model, weights=base.__getitem__)
    close(deltas(fitted), wanted, ROUNDING)
    sizes = fitted.targets
    assert sum(e.spec.count(e.targets) for e in fitted.entries) == sl.hira(4).count(sizes)
    with pytest.raises(CheckpointError, match="is a HiRA, whose update follows from the base weight"):
        fit(tmp_path, model)
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "adapter_model.safetensors").rename(alone / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"hira of .* needs PEFT's adapter_config\.json"):
        parsed(alone / "x.safetensors")


def test_hira_on_a_fused_projection(tmp_path: Path) -> None:
    """q, k and v of the file are rows of one weight of the model, times its own rows."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    base = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    wanted = np.zeros((30, 8))
    for k, name in enumerate("qkv"):
        a, b = (torch.randn(s, generator=generator) for s in ((2, 8), (10, 2)))
        tensors |= {f"base_model.model.attn.{name}_proj.hira_A": a, f"base_model.model.attn.{name}_proj.hira_B": b}
        rows = slice(10 * k, 10 * k + 10)
        wanted[rows] = base[rows].numpy() * (b.double() @ a.double()).numpy()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 2}))
    fitted = parsed(tmp_path).fitted({"attn.qkv_proj": (30, 8)}, weights=lambda _: base)
    close(deltas(fitted), {"attn.qkv_proj": wanted}, ROUNDING)


def test_vblora_without_its_logits_is_refused(tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(target_modules=LINEAR, num_vectors=7, vector_length=4, save_only_topk_weights=True)
    saved(Net(), config, tmp_path)
    with pytest.raises(CheckpointError, match="save_only_topk_weights"):
        fit(tmp_path, Net())


@pytest.mark.parametrize("targets", [["to_q", "to_k", "ff.0"], ["conv_in", "down_blocks.1"]], ids=["linear", "convolutions"])
def test_a_loaded_dora_trains_on_as_pefts_does(targets: list[str], tmp_path: Path) -> None:
    """Its magnitudes and factors, not dW, get the gradients: one step of both libraries from the file gives equal outputs."""
    model = Net().double()
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=12, use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(copy.deepcopy(model), config)
        shuffle([p for n, p in tuned.named_parameters() if p.requires_grad and "magnitude" not in n])
        tuned.save_pretrained(str(tmp_path))
        tuned.double()
    own = sl.load(model, tmp_path, dtype=torch.float64)
    assert {str(entry.spec.join) for entry in own.entries} == {"rows scaled to trained magnitudes (DoRA)"}
    x = inputs().double()
    before = tuned(x).detach()
    # The same float32 numbers in float64 on both sides.
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    for net in (model, tuned):
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        net(x).square().sum().backward()
        optimizer.step()
    assert (model(x) - before).abs().max() > 1e-3
    torch.testing.assert_close(model(x), tuned(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("up", "down"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_factors_of_two_dtypes_are_merged(up: torch.dtype, down: torch.dtype, tmp_path: Path) -> None:
    model = Net()
    saved(model, peft.LoraConfig(target_modules=["to_q", "conv_in"], r=4, lora_alpha=12), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name: tensor.to(down if "lora_A" in name else up) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = {name: model.get_submodule(name).weight.detach().double() for name in ("attn_1.to_q", "conv_in")}  # type: ignore[union-attr]
    loaded = sl.load(model, tmp_path)
    deltas_ = {name: loaded.delta(name).detach().double() for name in before}
    loaded.bake()
    for name, weight in before.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double().flatten(1) for x in "AB")
        wanted = 12 / 4 * b @ a
        # A product in float32, and a sum rounded to it.
        torch.testing.assert_close(deltas_[name], wanted, rtol=1e-5, atol=1e-6)
        after = model.get_submodule(name).weight.detach().double()  # type: ignore[union-attr]
        torch.testing.assert_close(after, weight + wanted.reshape(weight.shape), rtol=1e-5, atol=1e-6)


def test_dora_needs_the_base(tmp_path: Path) -> None:
    saved(Net(), peft.LoraConfig(target_modules=LINEAR, r=4, use_dora=True), tmp_path)
    with pytest.raises(CheckpointError, match="DoRA, whose update follows from the base weight"):
        fit(tmp_path, Net())


def test_adalora_after_its_pruning(tmp_path: Path) -> None:
    """Pruned triplets are out of the file, one weight has none left, and the scale stays by the first rank."""
    model = Net()
    saved(model, LINEAR_ONLY["adalora"](), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = sorted({k.partition(".lora_")[0] for k in tensors})
    kept = {name: [True, False, True, False] for name in names} | {names[0]: [False] * 4}
    oracle = {}
    for name, rows in kept.items():
        for part, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"].index_select(axis, torch.tensor(rows).nonzero()[:, 0])
        a, e, b = (tensors[f"{name}.{part}"].double().numpy() for part in ("lora_A", "lora_E", "lora_B"))
        oracle[name.removeprefix("base_model.model.")] = 12 / (4 + 1e-5) * b @ (a * e)
    del oracle[names[0].removeprefix("base_model.model.")]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["rank_pattern"] = {f"{n.removeprefix('base_model.model.')}.lora_E": rows for n, rows in kept.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    # The same float32 numbers multiplied in float64 on both sides.
    close(deltas(fit(tmp_path, model)), oracle, 1e-12)


class Words(nn.Module):
    """An embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.body = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 3)


def test_embeddings_and_whole_modules(tmp_path: Path) -> None:
    model = Words()
    setting = peft.LoraConfig(target_modules=["words", "body"], modules_to_save=["classifier"], r=4, lora_alpha=8)
    wanted = saved(model, setting, tmp_path)
    fitted = fit(tmp_path, model)
    del wanted["classifier"]
    close(deltas(fitted), wanted, ROUNDING)
    assert fitted.replaced.keys() == {"classifier.weight", "classifier.bias"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in fitted.replaced.items():
        assert torch.equal(value, tensors[f"base_model.model.{name}"])


def test_an_embedding_may_be_held_as_out_in(tmp_path: Path) -> None:
    model = Words()
    wanted = saved(model, peft.LoraConfig(target_modules=["words"], r=4, lora_alpha=8), tmp_path)
    fitted = parsed(tmp_path).fitted({"words": (16, 50)})
    close(deltas(fitted), {"words": wanted["words"].T}, ROUNDING)


def test_biases(tmp_path: Path) -> None:
    model = Words()
    saved(model, peft.LoraConfig(target_modules=["body"], bias="lora_only", r=4), tmp_path)
    fitted = fit(tmp_path, model)
    assert fitted.replaced.keys() == {"body.bias"}
    saved(model, peft.LoraConfig(target_modules=["body"], lora_bias=True, r=4, lora_alpha=8), tmp_path)
    fitted = fit(tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert fitted.added.keys() == {"body.bias"}
    assert torch.equal(fitted.added["body.bias"], 2.0 * tensors["base_model.model.body.lora_B.bias"])


def test_values_need_the_parameters_names(tmp_path: Path) -> None:
    saved(Words(), peft.LoraConfig(target_modules=["body"], modules_to_save=["classifier"]), tmp_path)
    with pytest.raises(CheckpointError, match="also holds values of 2 parameters"):
        parsed(tmp_path).fitted(shapes(Words()))


def test_attention_modules(tmp_path: Path) -> None:
    """PEFT adapts in_proj_weight as one and out_proj below a wrapper; here they are four weights."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2)

    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"], r=2, lora_alpha=6))
        shuffle([p for p in tuned.parameters() if p.requires_grad])
        tuned.save_pretrained(str(tmp_path))
    tensors = {k: t.double().numpy() for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    fused = 3 * tensors["base_model.model.attention.lora_B.weight"] @ tensors["base_model.model.attention.lora_A.weight"]
    inner = "base_model.model.attention.base_layer.out_proj"
    wanted = {f"attention.{n}_proj": block for n, block in zip("qkv", np.split(fused, 3), strict=True)}
    wanted["attention.out_proj"] = 3 * tensors[f"{inner}.lora_B.weight"] @ tensors[f"{inner}.lora_A.weight"]
    sizes = dict.fromkeys(wanted, (12, 12))
    close(deltas(parsed(tmp_path).fitted(sizes)), wanted, 1e-12)


def test_gpt2s_transposed_layers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(target_modules=["c_attn", "c_proj"], r=2, lora_alpha=6)
        )
        shuffle([p for p in tuned.parameters() if p.requires_grad])
        tuned.save_pretrained(str(tmp_path))
        merged = dict(tuned.double().merge_and_unload().named_modules())
    layers = {n: m for n, m in model.named_modules() if n.endswith(("c_attn", "c_proj"))}
    wanted = {n: (merged[n].weight - m.weight.double()).detach().T.numpy() for n, m in layers.items()}
    sizes = {n: tuple(m.weight.T.shape) for n, m in layers.items()}
    close(deltas(parsed(tmp_path).fitted(sizes)), wanted, ROUNDING)


def test_the_old_bin(tmp_path: Path) -> None:
    model = Net()
    wanted = saved(model, CASES["lora"](), tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    close(deltas(fit(tmp_path, model)), wanted, ROUNDING)


class Bomb:
    """A pickle that would write a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (open, (str(self.place), "w"))


def test_a_pickle_never_runs(tmp_path: Path) -> None:
    saved(Net(), CASES["lora"](), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="not a file of tensors alone"):
        fit(tmp_path, Net())
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "another method": ({"peft_type": "BOFT"}, "not among the methods"),
    "a moved base": ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
    "activated by tokens": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replicated layers": ({"layer_replication": [[0, 4], [2, 6]]}, "layer_replication"),
    "raw parameters": ({"target_parameters": ["experts.w"]}, "target_parameters"),
    "an unknown setting": ({"scale_by_norm": True}, "scale_by_norm"),
    "an endless pattern": ({"rank_pattern": {"(a+)+b": 4}}, "more than a module's name"),
    "a rank that is none": ({"r": "8"}, "a rank is a whole number"),
    "an alpha that is none": ({"lora_alpha": "x"}, "alpha is a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_would_change_the_numbers_are_refused(case: str, tmp_path: Path) -> None:
    saved(Net(), CASES["lora"](), tmp_path)
    change, words = REFUSED[case]
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(CheckpointError, match=words):
        fit(tmp_path, Net())


def test_every_key_is_used_or_named(tmp_path: Path) -> None:
    saved(Net(), CASES["lora"](), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in ("base_model.model.attn_1.to_q.lora_C.weight", "base_model.model.nowhere.lora_A.weight"):
        save_file(tensors | {key: torch.zeros(4, 24)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"lora_C|nowhere"):
            fit(tmp_path, Net())


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved(Net(), CASES["lora"](), tmp_path)
    other = Net()
    other.ff[0] = nn.Linear(24, 44)
    with pytest.raises(CheckpointError, match=r"'ff.0' is \(44, 24\) in this model and \(40, 24\)"):
        fit(tmp_path, other)
    del other.attn_1
    with pytest.raises(CheckpointError, match="are no module of this model"):
        fit(tmp_path, other)


def test_a_folder_without_its_settings(tmp_path: Path) -> None:
    saved(Net(), CASES["lora"](), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks adapter_config\.json"):
        parsed(tmp_path)


def test_a_part_of_the_model_is_enough(tmp_path: Path) -> None:
    """An adapter of a whole model fits the module inside that it adapts."""
    wanted = saved(Net(), CASES["lora"](), tmp_path)
    wrapped = nn.ModuleDict({"unet": Net()})
    close(deltas(fit(tmp_path, wrapped)), {f"unet.{n}": d for n, d in wanted.items()}, ROUNDING)
    twins = nn.ModuleDict({"student": Net(), "teacher": Net()})
    with pytest.raises(CheckpointError, match="'student' and 'teacher' of this model alike"):
        fit(tmp_path, twins)
