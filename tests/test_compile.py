"""An attached model under torch.compile, torch.export, vmap, torch.func and autocast."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import DIM, HIDDEN, TARGETS, VARIANTS, ConvNet, Tiny, noise, perturb, seeded
from torch import Tensor, nn

import superlora_tn as sl

# The apply route, with and without a member mode; the delta route forced; flat folds with and without a map.
ROUTES = {
    "lora": {},
    "lotr": {},
    "lokr": {},
    "loha": {},
    "cp layers": {"route": "delta"},
    "lorta groups": {},
    "lorta fastfood": {},
    "stacked": {},
}
each_route = pytest.mark.parametrize("variant", ROUTES)


class Mlp(nn.Module):
    """Two layers alone, (batch, tokens, DIM) -> the same: the compiler takes seconds for each layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def attached(variant: str, make: type[nn.Module] = Tiny) -> tuple[nn.Module, sl.Tuned]:
    model = seeded(0, make)
    tuned = sl.attach(model, VARIANTS[variant], TARGETS if make is Tiny else ["up", "down"], seed=0, **ROUTES.get(variant, {}))
    perturb(tuned)
    return model, tuned


@contextmanager
def compiling() -> Iterator[None]:
    """A fresh compiler, whose own warnings (torch's, of torch) are not ours to answer for."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
    torch._dynamo.reset()


def gradients(model: nn.Module, y: Tensor, tuned: sl.Tuned) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(tuned.parameters())))


@each_route
def test_compiling_in_one_graph_changes_no_output_and_no_gradient(variant: str) -> None:
    model, tuned = attached(variant, Mlp)
    x = noise(2, 3, DIM)
    with compiling():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        for ours, theirs in zip(gradients(model, y, tuned), gradients(model, model(x), tuned), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "lotr", "lorta groups"])
def test_a_dynamic_batch_compiles_once(variant: str) -> None:
    model, _ = attached(variant, Mlp)
    with compiling():
        graphs = []

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
        for batch in (2, 3, 5, 7):
            x = noise(batch, 4, DIM, seed=batch)
            torch.testing.assert_close(compiled(x), model(x))
        assert len(graphs) == 1


def test_convolutions_compile() -> None:
    model = seeded(0, ConvNet)
    tuned = sl.attach(model, sl.lora(2), ["grouped"], seed=0)
    perturb(tuned)
    x = noise(2, 4, 8, 8)
    with compiling():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_training_through_the_compiler_moves_the_adapter() -> None:
    model, tuned = attached("lotr", Mlp)
    before = [p.detach().clone() for p in tuned.parameters()]
    with compiling():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = compiled(noise(4, 3, DIM)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, b) for p, b in zip(tuned.parameters(), before, strict=True))


def test_merging_after_compiling_is_noticed() -> None:
    model, tuned = attached("lora", Mlp)
    x = noise(2, 3, DIM)
    with compiling():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        tuned.merge()
        torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-5)
        with tuned.disabled():
            torch.testing.assert_close(compiled(x), seeded(0, Mlp)(x))


@pytest.mark.parametrize("inside", [False, True])
def test_an_adapter_that_comes_or_goes_after_compiling_is_noticed(inside: bool) -> None:
    """On a base that was frozen before, so that nothing but hooks changes; compiled as a model, or within a function."""
    model, x = seeded(0, Mlp).requires_grad_(False), noise(2, 3, DIM)
    with compiling():
        called = torch.compile((lambda x: model(x)) if inside else model, fullgraph=True, backend="eager")
        plain = called(x)
        handles = []
        for name, target in (("first", "up"), ("second", "down")):
            handles.append(sl.attach(model, VARIANTS["lora"], [target], seed=0, name=name))
            perturb(handles[-1])
            torch.testing.assert_close(called(x), model(x), rtol=1e-4, atol=1e-5)
        for handle in handles:
            handle.detach()
            torch.testing.assert_close(called(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(called(x), plain)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("variant", ["lotr"])
def test_inductor_runs(variant: str) -> None:
    model, _ = attached(variant, Mlp)
    x = noise(2, 3, DIM)
    with compiling(), torch.no_grad():
        # Inductor sums in an order of its own.
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@each_route
def test_strict_export_computes_the_same(variant: str) -> None:
    model, tuned = attached(variant, Mlp)
    x = noise(2, 3, DIM)
    with compiling():
        exported = torch.export.export(model.eval(), (x,), strict=True)
    torch.testing.assert_close(exported.module()(x), model(x))
    assert {f"superlora.{n}" for n, _ in tuned.named_parameters()} <= set(exported.state_dict)


def test_export_with_a_dynamic_batch() -> None:
    model, _ = attached("lotr", Mlp)
    batch = torch.export.Dim("batch", min=2, max=64)
    with compiling():
        exported = torch.export.export(model.eval(), (noise(4, 3, DIM),), dynamic_shapes=({0: batch},), strict=True)
    x = noise(9, 3, DIM, seed=1)
    torch.testing.assert_close(exported.module()(x), model(x))


# --- torch.jit.trace and ONNX ---------------------------------------------------------------------------------------

# jit is deprecated; a TracerWarning (a branch on what the program is run with) stays an error.
tracing = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def saved_and_loaded(model: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    loaded: nn.Module = torch.jit.load(file)
    return loaded


@tracing
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_traced_model_is_saved_and_loaded_for_any_batch(variant: str) -> None:
    model, _ = attached(variant, Mlp)
    loaded = saved_and_loaded(model.eval(), noise(2, 3, DIM))
    for batch in (1, 2, 700):  # many tokens would take other plans
        x = noise(batch, 3, DIM, seed=batch).requires_grad_()
        y, expected = loaded(x), model(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        grads = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@tracing
@pytest.mark.parametrize(
    "spec", [sl.lora(2), sl.lokr(1), sl.lorta(2, 3, 2, sl.Fastfood(0.5))], ids=["lora", "lokr", "fastfood"]
)
def test_traced_convolutions_are_for_any_batch(spec: sl.AdapterSpec) -> None:
    model = seeded(0, ConvNet)
    perturb(sl.attach(model, spec, ["first", "grouped", "strided", "line"], seed=0))
    loaded = saved_and_loaded(model, noise(2, 4, 8, 8))
    for batch in (1, 5):
        x = noise(batch, 4, 8, 8, seed=batch)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@tracing
def test_a_traced_model_leaves_the_live_one_as_it_was() -> None:
    model, tuned = attached("lotr", Mlp)
    x = noise(2, 3, DIM)
    before, grads = model(x), gradients(model, model(x), tuned)
    saved_and_loaded(model, x)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model, model(x), tuned), grads, rtol=0, atol=0)


@each_route
def test_export_without_strict_computes_the_same(variant: str) -> None:
    model, _ = attached(variant, Mlp)
    x = noise(2, 3, DIM)
    with compiling():
        exported = torch.export.export(model.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("variant", ["lora", "lotr", "loha", "lorta groups", "lorta fastfood"])
def test_onnx_computes_the_same(variant: str, dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, _ = attached(variant, Mlp)
    file, batch = io.BytesIO(), noise(2, 3, DIM)
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    with compiling():
        program = torch.onnx.export(
            model.eval(), (batch,), None if dynamo else file, input_names=["x"], dynamo=dynamo, **shapes
        )
    if dynamo:
        program.save(file)
    run = reference.ReferenceEvaluator(onnx.load_model_from_string(file.getvalue()))
    for size in (2, 5):
        x = noise(size, 3, DIM, seed=size)
        [found] = run.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


# --- torch.func -----------------------------------------------------------------------------------------------------


@each_route
def test_vmap_over_inputs(variant: str) -> None:
    model, _ = attached(variant)
    x = noise(4, 3, DIM)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))


@each_route
def test_func_grad_equals_autograd(variant: str) -> None:
    model, tuned = attached(variant)
    x = noise(2, 3, DIM)
    values = {f"superlora.{n}": p.detach() for n, p in tuned.named_parameters()}

    def loss(adapter: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, adapter, (x,)).square().sum()

    found = torch.func.grad(loss)(values)
    expected = gradients(model, model(x), tuned)
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("variant", ["lora", "lotr", "lorta groups"])
def test_gradients_of_each_sample(variant: str) -> None:
    """vmap over grad: per-sample gradients add up to the gradient of the batch."""
    model, tuned = attached(variant)
    x = noise(4, 3, DIM)
    values = {f"superlora.{n}": p.detach() for n, p in tuned.named_parameters()}

    def loss(adapter: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, adapter, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for ours, theirs in zip(each.values(), gradients(model, model(x), tuned), strict=True):
        torch.testing.assert_close(ours.sum(0), theirs, rtol=1e-4, atol=1e-5)


@each_route
def test_vmap_over_many_adapters_of_one_base(variant: str) -> None:
    """A fleet of adapters on one base in one call: stacked parameters, one slice a user."""
    model, tuned = attached(variant)
    x = noise(2, 3, DIM)
    fleet = []
    for seed in range(3):
        perturb(tuned, seed)
        fleet.append(({f"superlora.{n}": p.detach().clone() for n, p in tuned.named_parameters()}, model(x)))
    stacked = {name: torch.stack([values[name] for values, _ in fleet]) for name in fleet[0][0]}
    outputs = torch.func.vmap(lambda values: torch.func.functional_call(model, values, (x,)))(stacked)
    torch.testing.assert_close(outputs, torch.stack([y for _, y in fleet]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "lorta fastfood"])
def test_vmap_over_models_whose_buffers_are_stacked_too(variant: str) -> None:
    """As `torch.func.stack_module_state` does: a map's tables then have a batch axis."""
    models = [attached(variant)[0] for _ in range(3)]
    for seed, model in enumerate(models):
        perturb(sl.tuned(model), seed)
    state = torch.func.stack_module_state(models)
    x = noise(2, 3, DIM)
    found = torch.func.vmap(lambda *values: torch.func.functional_call(models[0], values, (x,)))(*state)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_projection_compiles_in_any_dtype(dtype: torch.dtype) -> None:
    model, tuned = attached("lorta fastfood", Mlp)
    model.to(dtype)
    x = noise(2, 3, DIM).to(dtype)
    with compiling():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        found = [y.detach(), *gradients(model, y, tuned)]
        expected = [model(x).detach(), *gradients(model, model(x), tuned)]
    for ours, theirs in zip(found, expected, strict=True):
        # Sums of up to twenty terms through two layers, in their dtype and another order: some ten roundings of the largest.
        size = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * torch.finfo(dtype).eps * size)


@each_route
def test_autocast_computes_in_bfloat16(variant: str) -> None:
    model, tuned = attached(variant)
    x = noise(2, 3, DIM)
    full = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), full, rtol=0.1, atol=0.1)  # eight bits, through two blocks
    y.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in tuned.parameters()
    )


def test_autocast_of_convolutions() -> None:
    model = seeded(0, ConvNet)
    tuned = sl.attach(model, sl.lora(2), ["first", "grouped", "strided"], seed=0)
    perturb(tuned)
    x = noise(2, 4, 8, 8)
    full = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), full, rtol=0.1, atol=0.1)


@each_route
def test_gradcheck_in_float64(variant: str) -> None:
    model = seeded(0, Tiny).double()
    tuned = sl.attach(model, VARIANTS[variant], ["layers.0.up"], seed=0, dtype=torch.float64)
    perturb(tuned)
    names = [f"superlora.{n}" for n, _ in tuned.named_parameters()]
    x = noise(1, 2, DIM, dtype=torch.float64)

    def forward(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, tuple(p.detach().requires_grad_() for p in tuned.parameters()), fast_mode=True)


def test_a_graph_break_would_be_seen() -> None:
    """A graph break is an error under fullgraph: the guard that the tests above rely on."""

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    with compiling(), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Breaks(), fullgraph=True, backend="aot_eager")(noise(2))
