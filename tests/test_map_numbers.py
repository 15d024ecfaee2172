"""The fixed maps' numbers: float32 at least for any dtype, tables that no cast or mode touches, nothing left over of a mode."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_projections import allowed, dense, explicit, explicit_bound, linear_maps, made
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from superlora_tn.declare.maps import Compose, Fastfood, Projection, Shuffle
from superlora_tn.update import fixed_maps, walsh
from superlora_tn.update.fixed_maps import FixedMap
from superlora_tn.update.walsh import hadamard, transform

Run = Callable[[Tensor], Tensor]
# (dtype, its unit roundoff, its smallest number): results are rounded to it once.
NARROW = [(torch.float16, 2.0**-11, 2.0**-24), (torch.bfloat16, 2.0**-8, 2.0**-133), (torch.float32, 2.0**-24, 2.0**-149)]
each_dtype = pytest.mark.parametrize(("dtype", "unit", "least"), NARROW, ids=["fp16", "bf16", "fp32"])
MAPS = [
    Shuffle(2), Fastfood(0.5, 2), Fastfood(0.5, 2, tanh=True), Fastfood(0.5, 3, order="GHBHPB", scaling="none"),
    Compose(Fastfood(0.5, 1), Shuffle(2), Fastfood(0.5, 3)),
]  # fmt: skip
each_map = pytest.mark.parametrize("projection", MAPS, ids=repr)


def built(projection: Projection, size_in: int = 24) -> FixedMap:
    return made(projection, size_in, math.ceil(size_in / projection.ratio))


def tables(fixed: FixedMap) -> dict[str, Tensor]:
    return {name: table.clone() for name, table in fixed.named_buffers()}


def unchanged(fixed: FixedMap, before: dict[str, Tensor]) -> bool:
    now = dict(fixed.named_buffers())
    return now.keys() == before.keys() and all(t.dtype is before[n].dtype and torch.equal(t, before[n]) for n, t in now.items())


# --- float32 at least -----------------------------------------------------------------------------------------------


@each_dtype
@given(linear_maps(), st.floats(-4, 4))
def test_a_result_and_a_gradient_are_rounded_once(
    dtype: torch.dtype, unit: float, least: float, fixed: FixedMap, scale: float
) -> None:
    matrix = scale * dense(fixed)
    for size, way in ((fixed.size_in, matrix), (fixed.size_out, matrix.T)):
        given_ = torch.randn(3, size).to(dtype)
        if way is matrix:
            found = fixed(given_, scale)
        else:
            x = torch.zeros(3, fixed.size_in, dtype=dtype, requires_grad=True)
            [found] = torch.autograd.grad(fixed(x, scale), x, given_)
        exact = given_.double().numpy() @ way.T
        # `allowed` is the map's own bound in float64 (unit 2**-53); the scale rounds once more.
        inner = (abs(scale) * allowed(fixed, given_.double()) * 2.0**29) + 2 * 2.0**-24 * np.abs(exact)
        assert found.dtype is dtype
        assert (np.abs(found.double().numpy() - exact) <= unit * np.abs(exact) + (1 + unit) * inner + least).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_may_be_wanted_in_another_dtype(dtype: torch.dtype) -> None:
    fixed, x = built(MAPS[1]), torch.randn(2, 24).to(dtype)
    wide = fixed(x, 3.0, torch.float32)
    assert wide.dtype is torch.float32
    assert torch.equal(wide, fixed(x.float(), 3.0))
    assert torch.equal(fixed(x, 3.0), wide.to(dtype))


@each_map
def test_float64_stays_float64_and_complex_numbers_are_mapped_by_parts(projection: Projection) -> None:
    fixed, x = built(projection), torch.randn(2, 24, dtype=torch.complex128)
    assert fixed(x.real).dtype is torch.float64
    if projection.linear:
        # The same sums in the same order, but complex products may be fused with their sums otherwise.
        torch.testing.assert_close(fixed(x), torch.complex(fixed(x.real), fixed(x.imag)), rtol=1e-12, atol=1e-10)
        assert fixed(x.to(torch.complex64)).dtype is torch.complex64
        torch.testing.assert_close(fixed(x.conj()), fixed(x).conj(), rtol=1e-12, atol=1e-10)


@each_dtype
def test_a_long_vector_neither_overflows_nor_vanishes(dtype: torch.dtype, unit: float, least: float) -> None:
    fixed = made(Fastfood(0.5, 1), 1 << 17, 1 << 18)
    x = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, exact = fixed(x), fixed(wide)
    ones = torch.ones_like(y)
    [back], [exact_back] = torch.autograd.grad(y, x, ones), torch.autograd.grad(exact, wide, ones.double())
    for found, wanted in ((y.detach(), exact.detach()), (back, exact_back)):
        # Two transforms in float32 round some 20 times each, at random: below 2**-20 of the whole.
        size = float(wanted.norm()) / math.sqrt(wanted.numel())
        error = (found.double() - wanted).abs() - unit * wanted.abs() - least
        assert float(error.max()) <= 2.0**-20 * max(size, float(wanted.abs().max()) / 64)


@given(
    st.text("BHPG", min_size=1, max_size=8), st.sampled_from(["variance", "orthonormal"]),
    st.integers(1, 20), st.integers(0, 20), st.sampled_from([-100, -40, 40, 100]),
)  # fmt: skip
def test_any_order_keeps_small_and_large_numbers(order: str, scaling: str, size_in: int, more: int, exponent: int) -> None:
    """The scale is spread over the transforms, so that nothing on the way is much smaller or larger than the ends."""
    declared = Fastfood(0.5, 1, order=order, scaling=scaling)
    fixed, size_out = made(declared, size_in, size_in + more), size_in + more
    x = torch.randn(3, size_in)
    wanted = x.double().numpy() @ explicit(declared, size_in, size_out).T
    found = fixed(x * 2.0**exponent).double().numpy() * 2.0**-exponent
    worst = np.abs(x.double().numpy()) @ np.abs(explicit_bound(declared, size_in, size_out)).T
    assert (np.abs(found - wanted) <= 64 * 8 * 2.0**-24 * worst).all()  # as in float64, see test_projections
    grad = torch.zeros(size_in, requires_grad=True)
    [one], [many] = (torch.autograd.grad(fixed(grad), grad, torch.full((size_out,), s)) for s in (1.0, 2.0**exponent))
    assert torch.equal(many, one * 2.0**exponent)  # powers of two are exact while nothing leaves the range


@pytest.mark.parametrize("exponent", [-110, -60, 60, 110])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_orthonormal_transforms_undo_each_other_over_the_whole_range(count: int, exponent: int) -> None:
    """``(H / sqrt p)^2 = 1``. Scaled all at once, eight of size 4096 would pass through 2**-158."""
    fixed = made(Fastfood(0.5, 1, order="H" * count, scaling="orthonormal"), 4096, 4096)
    x = (torch.randn(4096) * 2.0**exponent).requires_grad_()
    y = fixed(x)
    [grad] = torch.autograd.grad(y, x, x.detach())
    for found in (y.detach(), grad):
        # Each transform's 12 additions round in turn, at random, on 4096 numbers of one size.
        assert float((found - x).detach().abs().max()) <= 12 * count * 2.0**-24 * 8 * 2.0**exponent


@given(st.integers(0, 9), st.integers(-5, 12))
def test_the_transform_takes_a_power_of_two_with_it(bits: int, shift: int) -> None:
    x = torch.randint(-8, 9, (2, 2**bits)).double()
    assert torch.equal(transform(x, bits, shift), hadamard(x) * 2.0**-shift)


# --- tables stay as they were made ----------------------------------------------------------------------------------

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "to another dtype": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "as another tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "emptied": lambda m: m.to_empty(device="cpu"),
    "through meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "shared": lambda m: m.share_memory(),
    "copied": copy.deepcopy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m.bfloat16())),
    "apply": lambda m: m._apply(lambda tensor: torch.full_like(tensor, 7)),
}


@each_map
@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_of_the_module_touches_the_tables(projection: Projection, cast: str) -> None:
    fixed = built(projection)
    before, x = tables(fixed), torch.randn(2, 24)
    y = fixed(x)
    holder = CASTS[cast](nn.Sequential(fixed, nn.Linear(2, 2)))
    changed = holder[0]
    assert unchanged(changed, before)
    assert torch.equal(changed(x), y)
    if cast == "shared":
        assert all(table.is_shared() for table in changed.buffers())


@each_map
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_that_others_cast_are_made_again(projection: Projection, dtype: torch.dtype) -> None:
    """As mixed precision wrappers do, which write to the buffers of a module themselves."""
    fixed = built(projection)
    before, x = tables(fixed), torch.randn(2, 24)
    y = fixed(x)
    for table in fixed.buffers():
        if table.is_floating_point():
            table.data = table.to(dtype)
    assert torch.equal(fixed(x), y)
    assert unchanged(fixed, before)


@each_map
def test_a_map_on_the_meta_device_is_made_without_numbers(projection: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = built(projection)
    with monkeypatch.context() as patch:
        patch.setattr(fixed_maps, "_raw", None)  # drawing a table would fail
        fixed = fixed_maps.fixed_map(projection, whole.size_in, whole.size_out, "meta")
        assert isinstance(fixed, FixedMap)
        assert all(table.is_meta for table in fixed.buffers())
        assert fixed(torch.randn(2, 24, device="meta")).shape == (2, whole.size_out)
        kinds = {name: (table.dtype, table.shape) for name, table in whole.named_buffers()}
        assert {name: (table.dtype, table.shape) for name, table in fixed.named_buffers()} == kinds
        with pytest.raises(NotImplementedError):
            fixed.to("cpu")  # torch's own answer for any module: use to_empty
    x = torch.randn(2, 24)
    for healed in (copy.deepcopy(fixed), copy.deepcopy(fixed).to_empty(device="cpu")):
        assert torch.equal(healed(x), whole(x))
        assert unchanged(healed, tables(whole))
    fixed.reset("cpu")
    assert unchanged(fixed, tables(whole))


@each_map
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_torchs_defaults_change_no_map(projection: Projection, dtype: torch.dtype) -> None:
    x, before = torch.randn(2, 24), tables(built(projection))
    y = built(projection)(x)
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    walsh._known.cache_clear()
    try:
        fixed = built(projection)
        assert unchanged(fixed, before)
        assert torch.equal(fixed(x), y)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        walsh._known.cache_clear()
    assert torch.equal(fixed(x), y)


# --- nothing of a mode is left over ---------------------------------------------------------------------------------


def inferred(run: Run, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return run(x)


def faked(run: Run, x: Tensor) -> Tensor:
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the tables are real
    with mode:
        shape = run(mode.from_tensor(x)).shape
    y = run(x)
    assert y.shape == shape
    return y


def traced(run: Run, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(run, x), file)
    file.seek(0)
    result: Tensor = torch.jit.load(file)(x)
    return result


def compiled(run: Run, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    y: Tensor = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    return y


def autocast(run: Run, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return run(x)


MODES: dict[str, Callable[[Run, Tensor], Tensor]] = {
    "inference": inferred,
    "fake tensors": faked,
    "vmap": lambda run, x: torch.func.vmap(run)(x),
    "grad": lambda run, x: torch.func.vjp(run, x)[0],
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),))[0],
    "jit.trace": traced,
    "compile": compiled,
    "make_fx": lambda run, x: make_fx(run)(x)(x),
    "autocast": autocast,
    "compile under autocast": lambda run, x: autocast(lambda x: compiled(run, x), x),
    "counted": lambda run, x: counted(run, x),
}


def counted(run: Run, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return run(x)


# torch's own warnings of torch: jit is deprecated, and Dynamo imports what warns.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("large", [False, True], ids=["plain", "in runs"])
@pytest.mark.parametrize("mode", MODES)
def test_a_map_is_right_in_every_mode_and_after_it(mode: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of the transform are kept for the process: those of a mode would break every later pass."""
    if large:
        monkeypatch.setattr(walsh, "PLAIN_BITS", 2)
        monkeypatch.setattr(walsh, "RUN_BITS", 5)
    fixed, x = built(Fastfood(0.5, 7), 100), torch.randn(3, 100, dtype=torch.float64)
    exact = torch.from_numpy(x.numpy() @ dense(fixed).T)
    walsh._known.cache_clear()
    y = MODES[mode](fixed, x)
    limit = allowed(fixed, x)
    assert float((y - exact).abs().max()) <= limit
    leaf = x.clone().requires_grad_()
    [grad] = torch.autograd.grad(fixed(leaf), leaf, torch.ones_like(exact))
    ones = torch.ones_like(exact)
    assert np.abs(grad.numpy() - ones.numpy() @ dense(fixed)).max() <= allowed(fixed, ones)
    for matrix in (walsh._known(bits, shift, x.dtype, x.device) for bits in (3, 6) for shift in (0, 4)):
        assert type(matrix) is Tensor
        assert not matrix.is_inference()
        assert not matrix.requires_grad
        bits = matrix.shape[0].bit_length() - 1
        assert np.array_equal(matrix.numpy() / abs(float(matrix[0, 0])), oracle.hadamard_matrix(2**bits))
    again = MODES[mode](fixed, x)  # with matrices that are known
    assert float((again - exact).abs().max()) <= limit


@pytest.mark.parametrize("make", [lambda fixed: fixed, copy.deepcopy, lambda fixed: pickle.loads(pickle.dumps(fixed))])
@pytest.mark.parametrize("projection", MAPS[1:], ids=repr)
def test_a_map_made_copied_or_moved_in_inference_mode_trains(
    projection: Projection, make: Callable[[FixedMap], FixedMap]
) -> None:
    walsh._known.cache_clear()
    with torch.inference_mode():
        fixed = make(built(projection))
        moved = make(fixed_maps.fixed_map(projection, 24, fixed.size_out, "meta")).to_empty(device="cpu")
        fixed(torch.randn(24))
    for own in (fixed, moved):
        x = torch.randn(24, requires_grad=True)
        own(x).square().sum().backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_changes_no_map_forward_or_backward(dtype: torch.dtype) -> None:
    fixed, x = built(Fastfood(0.5, 2)), torch.randn(2, 24).to(dtype).requires_grad_()
    y = fixed(x)
    way = torch.randn_like(y)
    [grad] = torch.autograd.grad(fixed(x), x, way)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fixed(x), y)
        [inside] = torch.autograd.grad(fixed(x), x, way)
    assert torch.equal(inside, grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_autocast_changes_no_transform_that_is_compiled() -> None:
    x = torch.randn(3, 64)
    assert torch.equal(autocast(lambda x: compiled(hadamard, x), x), hadamard(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("tanh", [False, True])
def test_derivatives_of_a_map_in_every_direction(tanh: bool) -> None:
    fixed = built(Fastfood(0.5, 2, tanh=tanh), 5)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(fixed, x, check_fwd_over_rev=True, check_rev_over_rev=True)
