"""Files that LyCORIS wrote are read as what LyCORIS computes, and the real one of Stable Diffusion 1.5 as its formula."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import DATA, Net, close, deltas, fit, inputs, parsed, shapes, shuffle, write
from oracle import lokr
from safetensors.torch import load_file
from torch import Tensor, nn

from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Fitted
from superlora_tn.files.record import Entry, tensor_name
from superlora_tn.verification.references.peers import quiet

lycoris = pytest.importorskip("lycoris")

REAL = DATA / "adapter_files" / "sd15_lycoris_lokr_rank4.safetensors"
# Outputs of some size 1 through nine layers in float32.
OUTPUTS = 2e-5


def network(model: nn.Module, algo: str, **more: Any) -> Any:
    """A LyCORIS network on a model, filled with random values."""
    ranks = {"linear_dim": 3, "linear_alpha": 2, "conv_dim": 3, "conv_alpha": 2}
    with quiet():
        lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d", "LayerNorm"], "lora_prefix": "lycoris"})
        made = lycoris.create_lycoris(model, 1.0, algo=algo, **ranks | more)
        made.apply_to()
    shuffle([p for n, p in made.named_parameters() if "dora" not in n], by=0.6)
    return made


def changed(model: nn.Module, fitted: Fitted) -> nn.Module:
    """A copy of a model with everything that was read in its parameters."""
    copied = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in deltas(fitted).items():
            weight = copied.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight += torch.from_numpy(delta).reshape(weight.shape)
        for name, value in fitted.added.items():
            copied.get_parameter(name).add_(value)
        for name, value in fitted.replaced.items():
            copied.get_parameter(name).copy_(value)
    return copied


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "rank 1": ("lora", {"linear_dim": 1, "conv_dim": 1}),
    "no alpha": ("lora", {"linear_alpha": 0, "conv_alpha": 0}),
    "rslora": ("lora", {"rs_lora": True}),
    "lora with kernels": ("lora", {"use_tucker": True}),
    "loha": ("loha", {}),
    "loha with kernels": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {}),
    "lokr with both of low rank": ("lokr", {"decompose_both": True, "linear_dim": 1, "conv_dim": 1}),
    "lokr with kernels": ("lokr", {"use_tucker": True, "linear_dim": 1, "conv_dim": 1}),
    "lokr, both dense": ("lokr", {"full_matrix": True}),
    "lokr of a factor": ("lokr", {"factor": 4}),
    "full": ("full", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_what_lycoris_computes(case: str, tmp_path: Path) -> None:
    algo, more = CASES[case]
    torch.manual_seed(0)
    model = Net()
    bare, x = copy.deepcopy(model), inputs()
    made = network(model, algo, **more)
    write(tmp_path / "x.safetensors", made.state_dict())
    with torch.no_grad():
        wanted, before = model(x), bare(x)
        found = changed(bare, fit(tmp_path / "x.safetensors", bare))(x.double())
    # An error of a hundredth of the adapter would be seen.
    assert (wanted - before).abs().max() > 100 * OUTPUTS
    torch.testing.assert_close(found, wanted.double(), atol=OUTPUTS, rtol=OUTPUTS)


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_dora(algo: str, on_out: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    bare, x = copy.deepcopy(model), inputs()
    made = network(model, algo, dora_wd=True, wd_on_output=on_out)
    write(tmp_path / "x.safetensors", made.state_dict())
    base = {n: m.weight.detach().flatten(1) for n, m in bare.named_modules() if n in shapes(bare)}
    with torch.no_grad():
        found = changed(bare, fit(tmp_path / "x.safetensors", bare, weights=base.__getitem__))(x.double())
        torch.testing.assert_close(found, model(x).double(), atol=OUTPUTS, rtol=OUTPUTS)


class Normed(nn.Module):
    """A norm beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(12)
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 12) to (n, 12)."""
        y: Tensor = self.fc(self.layer_norm(x))
        return y


def test_norms(tmp_path: Path) -> None:
    model = Normed()
    bare, x = copy.deepcopy(model), torch.randn(4, 12)
    made = network(model, "lora", train_norm=True)
    write(tmp_path / "x.safetensors", made.state_dict())
    fitted = fit(tmp_path / "x.safetensors", bare)
    assert fitted.added.keys() == {"layer_norm.weight", "layer_norm.bias"}
    with torch.no_grad():
        torch.testing.assert_close(changed(bare, fitted)(x.double()), model(x).double(), atol=OUTPUTS, rtol=OUTPUTS)


@pytest.mark.parametrize("algo", ["diag-oft", "glora", "ia3"])
def test_what_is_no_sum_with_a_network_is_refused(algo: str, tmp_path: Path) -> None:
    model = Normed()
    write(tmp_path / "x.safetensors", network(model, algo).state_dict())
    with pytest.raises(CheckpointError, match=r"no sum with a network|of no method that is known"):
        parsed(tmp_path / "x.safetensors")


def test_two_ranks_and_one_alpha(tmp_path: Path) -> None:
    tensors = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 3)}
    keys = {f"lycoris_fc.{n}": torch.ones(s) for n, s in tensors.items()}
    write(tmp_path / "x.safetensors", keys)
    assert parsed(tmp_path / "x.safetensors").weights[0].scale == 1.0
    write(tmp_path / "x.safetensors", keys | {"lycoris_fc.alpha": torch.tensor(2.0)})
    with pytest.raises(CheckpointError, match=r"ranks \[1, 2\] and an alpha of 2: of which rank"):
        parsed(tmp_path / "x.safetensors")


@pytest.mark.skipif(not REAL.exists(), reason="the real file lies beside the repository")
def test_the_real_lokr_of_stable_diffusion() -> None:
    """350 modules; shapes come from the file, in which w1 is the larger factor of some."""
    tensors = {k: t.double().numpy() for k, t in load_file(REAL).items()}
    found = parsed(REAL)
    assert (found.origin, found.parts, len(found.weights)) == ("lycoris", ("text_encoder", "unet"), 350)
    assert {(w.kind, w.scale, w.ranks) for w in found.weights} == {("lokr", 1.0, (4, 4))}
    factors = {
        name: [tensors[f"{name}.lokr_w{k}_a"] @ tensors[f"{name}.lokr_w{k}_b"] for k in (1, 2)]
        for name in {k.partition(".")[0] for k in tensors}
    }
    sizes = {n: (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]) for n, (w1, w2) in factors.items()}
    assert {w.name: w.shape for w in found.weights} == sizes
    assert any(w1.size > w2.size for w1, w2 in factors.values())
    some = sorted(sizes)[::12]
    close(_some(found.fitted(sizes), some), {n: lokr(*factors[n]) for n in some}, 1e-12)


def _some(fitted: Fitted, names: list[str]) -> dict[str, np.ndarray]:
    """dW of some targets; all together would take some 6 GB in float64."""
    entries, tensors, k, j = [], {}, 0, 0
    for entry in fitted.entries:
        chosen = {n: s for n, s in entry.targets.items() if n in names}
        for group, graph in entry.spec.lay_out(entry.targets):
            if set(group.members) <= set(chosen):
                tensors |= {tensor_name(j, node): fitted.tensors[tensor_name(k, node)] for node in graph.nodes}
                j += 1
            k += 1
        entries += [Entry(entry.spec, chosen)] if chosen else []
    return deltas(Fitted(tuple(entries), tensors))


@pytest.mark.skipif(not REAL.exists(), reason="the real file lies beside the repository")
def test_the_real_lokr_fits_the_real_model() -> None:
    """diffusers' U-Net and transformers' CLIP at their published sizes, on the meta device."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
    found = parsed(REAL)
    both = nn.ModuleDict({"unet": unet, "text_encoder": text})
    fitted = found.fitted(shapes(both))
    assert len(fitted.targets) == 350
    assert len(found.fitted(shapes(unet), part="unet").targets) == sum(n.startswith("unet.") for n in fitted.targets) == 278
    assert len(found.fitted(shapes(text), part="text_encoder").targets) == 72
