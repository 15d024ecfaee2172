"""On a CUDA device (`pytest -m gpu`): the same numbers as on the CPU in float64, and CUDA graphs of a training step."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Tiny, noise, perturb, seeded
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.update.base import Adapter
from superlora_tn.update.fixed_maps import fixed_map
from superlora_tn.update.walsh import hadamard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
TARGETS = ["q_proj", "k_proj", "v_proj", "up", "down"]
SPECS = {
    "lora": sl.lora(4, alpha=8),
    "loha": sl.loha(2),
    "lokr": sl.lokr(2),
    "lotr": sl.lotr(3),
    "vera": sl.vera(4),
    "lorta": sl.lorta(2, 3, 2),
    "superlora": sl.superlora(2, 3, 2, 2, sl.Fastfood(0.5, tanh=True)),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def pair(spec: sl.AdapterSpec, dtype: torch.dtype, **options: bool) -> tuple[nn.Module, nn.Module]:
    """The adapted model in float64 on the CPU, and its copy on the device in another dtype."""
    model = seeded(0, Tiny).double()
    perturb(sl.attach(model, spec, TARGETS, dtype=torch.float64, seed=0, **options), size=0.1)
    return model, copy.deepcopy(model).to("cuda", dtype)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in sl.tuned(model).parameters() if p.requires_grad)]


def agree(exact: Tensor, found: Tensor, roundings: float, eps: float) -> None:
    """Within so many roundings of the largest number."""
    error = (found.double().cpu() - exact).abs().max()
    assert error <= roundings * eps * exact.abs().max().clamp_min(1e-6), f"{error:.2e}"


def test_tables_of_maps_are_on_the_device_before_a_call() -> None:
    """So that a recorded program, or a CUDA graph, moves none of them."""
    made, moved = seeded(0, Tiny).cuda(), seeded(0, Tiny)
    for model in (made, moved):
        sl.attach(model, sl.fourier_ft(9), TARGETS)
    for model in (made, moved.cuda()):
        maps = [m for m in model.modules() if isinstance(m, Adapter)]
        tables = [table for adapter in maps for table in adapter._maps._tables if table is not None]
        assert tables
        assert all(table.device.type == "cuda" for table in tables)


@each_spec
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_gradients_in_float32(spec: sl.AdapterSpec, recompute: bool) -> None:
    # TF32 is off by torch's default for matmul. Two blocks of sums up to 20 long, squared: a few hundred roundings.
    assert not torch.backends.cuda.matmul.allow_tf32
    reference, model = pair(spec, torch.float32, recompute=recompute)
    x = noise(3, 7, 12, dtype=torch.float64)
    for exact, found in zip(gradients(reference, x), gradients(model, x.float().cuda()), strict=True):
        agree(exact, found, 500, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("spec", [sl.lora(2), sl.loha(2)], ids=["lora", "loha"])
def test_a_convolution_through_its_halves(spec: sl.AdapterSpec) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, groups=2)).double()
    perturb(sl.attach(model, spec, ["0"], dtype=torch.float64, route="apply"))
    copied, x = copy.deepcopy(model).to("cuda", torch.float32), noise(2, 6, 9, 9, dtype=torch.float64)
    # Sums of up to 2 * 8 * 81 terms.
    with torch.backends.cudnn.flags(allow_tf32=False):
        for exact, found in zip(gradients(model, x), gradients(copied, x.float().cuda()), strict=True):
            agree(exact, found, 1500, torch.finfo(torch.float32).eps)


@each_spec
def test_forward_under_bfloat16_autocast(spec: sl.AdapterSpec) -> None:
    reference, model = pair(spec, torch.float32)
    x = noise(3, 7, 12, dtype=torch.float64)
    with torch.autocast("cuda", torch.bfloat16):
        found = model(x.float().cuda())
    # bfloat16 products through two blocks: each layer rounds to 8 bits once or twice.
    agree(reference(x).detach(), found, 30, torch.finfo(torch.bfloat16).eps)


def test_an_adapter_made_on_the_device_is_planned_for_it() -> None:
    tuned = sl.attach(seeded(0, Tiny).cuda(), sl.lotr(3), TARGETS)
    assert all(p.is_cuda for p in tuned.parameters())
    assert tuned.plan("layers.0.up", 64).delta.device.name == "h200"


@pytest.mark.parametrize("kind", [sl.Shuffle(3), sl.Fastfood(0.5, 3)], ids=["shuffle", "fastfood"])
def test_fixed_maps_have_the_same_tables_and_values(kind: sl.Shuffle | sl.Fastfood) -> None:
    length = 1000
    mapped = fixed_map(kind, int(length * kind.ratio), length)
    assert mapped is not None
    moved = copy.deepcopy(mapped).cuda()
    for one, other in zip(mapped.buffers(), moved.buffers(), strict=True):
        assert torch.equal(one, other.cpu())
    x = noise(2, mapped.size_in, dtype=torch.float64)
    # Two transforms of 1024 elements: 20 additions each, in another order.
    torch.testing.assert_close(moved(x.cuda()).cpu(), mapped(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hadamard_on_the_device(dtype: torch.dtype) -> None:
    x = noise(2, 1 << 12, dtype=torch.float64)
    # log2 of the length additions, each rounded once.
    agree(hadamard(x), hadamard(x.to("cuda", dtype)), 24, torch.finfo(dtype).eps)


@each_spec
def test_a_training_step_in_a_cuda_graph(spec: sl.AdapterSpec) -> None:
    model = pair(spec, torch.float32)[1]
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(sl.tuned(m).parameters(), lr=1e-3) for m in (model, plain)]
    static = noise(3, 7, 12).cuda()

    def step(own: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = own(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizers[0], static)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        step(plain, optimizers[1], static)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured = step(model, optimizers[0], static)
    for seed in range(3):
        fresh = noise(3, 7, 12, seed=seed).cuda()
        static.copy_(fresh)
        graph.replay()
        # Replays the same kernels on the same numbers; eager may choose other ones, so a few hundred roundings.
        torch.testing.assert_close(captured, step(plain, optimizers[1], fresh).detach(), rtol=1e-4, atol=1e-6)
    for one, other in zip(sl.tuned(model).parameters(), sl.tuned(plain).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_compiled_on_the_device() -> None:
    reference, model = pair(sl.lotr(3), torch.float32)
    x = noise(3, 7, 12, dtype=torch.float64)
    found = torch.compile(model, fullgraph=True)(x.float().cuda())
    agree(reference(x).detach(), found, 500, torch.finfo(torch.float32).eps)
