"""Bases that are offloaded, on the meta device or loaded later: nodes are real where their layers compute, never garbage."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Tiny, noise, perturb, seeded
from optional import library
from torch import Tensor, nn

import superlora_tn as sl

CPU = torch.device("cpu")
TARGETS = ["q_proj", "v_proj", "up"]
SPECS = {
    "lora": sl.lora(2, alpha=3),
    "lotr": sl.lotr(2),
    "vera": sl.vera(3),
    "lorta": sl.lorta(2, groups=2),
    "fastfood": sl.lorta(2, projection=sl.Fastfood(0.5, seed=1)),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
MAP = {"layers.0": "disk", "layers.1": "cpu", "head": "cpu", "superlora": "cpu"}


def cpu_offload(model: nn.Module, folder: Path) -> None:
    library("accelerate").cpu_offload(model, execution_device=CPU)


def disk_offload(model: nn.Module, folder: Path) -> None:
    library("accelerate").disk_offload(model, str(folder / "weights"), execution_device=CPU)


def dispatched(model: nn.Module, folder: Path) -> None:
    weights = str(folder / "weights")
    places = {name: device for name, device in MAP.items() if name in dict(model.named_modules())}
    library("accelerate").dispatch_model(model, places, main_device="cpu", offload_dir=weights, force_hooks=True)


OFFLOADS = {"cpu": cpu_offload, "disk": disk_offload, "device map": dispatched}
each_offload = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


def trained(spec: sl.AdapterSpec, folder: Path) -> tuple[nn.Module, sl.Tuned]:
    """A model with a trained adapter, saved in the folder."""
    model = seeded(0, Tiny)
    tuned = sl.attach(model, spec, TARGETS, seed=1)
    perturb(tuned)
    tuned.save(folder / "adapter")
    return model, tuned


def gradients(model: nn.Module, tuned: sl.Tuned, x: Tensor) -> list[Tensor]:
    tuned.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in tuned.parameters()]


@each_spec
@each_offload
@pytest.mark.parametrize("first", ["offload", "attach"])
@pytest.mark.parametrize("at", [None, "weight"])
def test_an_offloaded_base_computes_and_trains_as_one_in_memory(
    spec: sl.AdapterSpec, offload: Callable[[nn.Module, Path], None], first: str, at: str | None, tmp_path: Path
) -> None:
    whole, own = trained(spec, tmp_path)
    x, model = noise(2, 3, 12), seeded(0, Tiny)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    if first == "offload":
        offload(model, tmp_path)
        tuned = sl.load(model, tmp_path / "adapter", at=at)
    else:
        tuned = sl.load(model, tmp_path / "adapter", at=at)
        before = list(tuned.parameters())
        offload(model, tmp_path)
        assert all(one is other for one, other in zip(tuned.parameters(), before, strict=True))  # an optimizer holds them
    assert {p.device.type for p in [*tuned.parameters(), *tuned.buffers()]} == {"cpu"}
    torch.testing.assert_close(model(x), whole(x))
    for found, expected in zip(gradients(model, tuned, x), gradients(whole, own, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert {p.requires_grad for n, p in model.named_parameters() if "superlora" not in n} == {False}
    with pytest.raises(sl.AttachError, match=r"q_proj' is on the meta device \(offloaded, or not loaded yet\)"):
        tuned.merge()
    tuned.save(tmp_path / "again")
    again = seeded(0, Tiny)
    sl.load(again, tmp_path / "again")
    torch.testing.assert_close(again(x), whole(x))
    tuned.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    torch.testing.assert_close(model(x), seeded(0, Tiny)(x))


@each_spec
@each_offload
def test_training_an_offloaded_base_with_an_optimizer_made_before(
    spec: sl.AdapterSpec, offload: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    results = []
    for away in (False, True):
        model = seeded(0, Tiny)
        tuned = sl.attach(model, spec, TARGETS, seed=1)
        optimizer = torch.optim.SGD(tuned.parameters(), 0.05)
        if away:
            offload(model, tmp_path)
        for step in range(3):
            optimizer.zero_grad()
            model(noise(2, 3, 12, seed=step)).square().mean().backward()
            optimizer.step()
        results.append(model(noise(2, 3, 12)))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], seeded(0, Tiny)(noise(2, 3, 12)), atol=1e-5)


def empty() -> nn.Module:
    """The model without memory."""
    with library("accelerate").init_empty_weights(include_buffers=True):
        return Tiny()


@each_spec
@pytest.mark.parametrize("way", ["to_empty", "assign", "load and dispatch"])
@pytest.mark.parametrize("first", ["attach", "load"])
def test_an_adapter_put_on_the_meta_device_is_real_when_the_base_is(
    spec: sl.AdapterSpec, way: str, first: str, tmp_path: Path
) -> None:
    """Attached, it has the seed's first values then; loaded, those of the file."""
    whole, _ = trained(spec, tmp_path)
    base, x, model = seeded(0, Tiny), noise(2, 3, 12), empty()
    if first == "load":
        tuned = sl.load(model, tmp_path / "adapter")
        assert not any(p.is_meta for p in tuned.parameters())
    else:
        tuned = sl.attach(model, spec, TARGETS, seed=1)
        assert all(p.is_meta for p in tuned.parameters())
    if way == "to_empty":
        model.to_empty(device="cpu")
        model.load_state_dict(base.state_dict(), strict=False)
    elif way == "assign":
        model.load_state_dict(base.state_dict(), strict=False, assign=True)
        model.to("cpu")
    else:
        accelerate = library("accelerate")
        library("safetensors.torch").save_file(base.state_dict(), tmp_path / "base.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the checkpoint has no adapter
            weights = str(tmp_path / "weights")
            accelerate.load_checkpoint_and_dispatch(
                model, str(tmp_path / "base.safetensors"), dict(MAP), offload_folder=weights, force_hooks=True
            )
    if first == "load":
        torch.testing.assert_close(model(x), whole(x))
        return
    torch.testing.assert_close(model(x), base(x))
    fresh = sl.attach(seeded(0, Tiny), spec, TARGETS, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(tuned.state_dict().values(), fresh.state_dict().values(), strict=True))
    tuned.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(tuned.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_to_empty_keeps_the_values_that_an_adapter_has(tmp_path: Path) -> None:
    model, tuned = trained(SPECS["lotr"], tmp_path)
    before = [p.clone() for p in tuned.parameters()]
    model.to_empty(device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), before, strict=True))


def test_a_call_before_there_are_values_says_so() -> None:
    with torch.device("meta"):
        model = Tiny()
    sl.attach(model, sl.lora(2), TARGETS)
    model(torch.empty(1, 2, 12, device="meta"))  # shapes alone: fine
    with torch.device("meta"):
        model = Tiny()
    sl.attach(model, sl.lora(2), TARGETS)
    model.load_state_dict(seeded(0, Tiny).state_dict(), strict=False, assign=True)
    with pytest.raises(sl.LayerError, match=r"the adapter of 'layers.0.attn.q_proj' has no values yet.*to_empty"):
        model(noise(1, 2, 12))


def test_a_device_map_without_the_adapter_is_refused_by_accelerate(tmp_path: Path) -> None:
    model, _ = trained(SPECS["lora"], tmp_path)
    without = {name: device for name, device in MAP.items() if name != "superlora"}
    with pytest.raises(ValueError, match="superlora"):
        library("accelerate").dispatch_model(model, without, main_device="cpu", offload_dir=str(tmp_path / "weights"))


def test_lazy_layers_are_adapted_once_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(sl.AttachError, match="'0' is a LazyLinear that has no shape yet; run the model once"):
        sl.attach(model, sl.lora(2), ["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(noise(2, 6))
    tuned = sl.attach(model, sl.lora(2), ["0"])
    assert tuned.targets == {"0": (4, 6)}


@each_offload
def test_copies_of_an_offloaded_model_hold_their_own_adapters(
    offload: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    model, tuned = trained(SPECS["lotr"], tmp_path)
    offload(model, tmp_path)
    x = noise(2, 3, 12)
    copied = copy.deepcopy(tuned)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), tuned.parameters(), strict=True))
    library("accelerate.hooks").remove_hook_from_submodules(model)
    torch.testing.assert_close(model(x), trained(SPECS["lotr"], tmp_path)[0](x))
