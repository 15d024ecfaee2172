"""What a call computes depends on its arguments, its parameters and its mode, and on nothing that an earlier call left."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from models import noise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl

WIDTH = 8
SPECS = {
    "lora": sl.lora(2),
    "lotr": sl.lotr(2),
    "vera": sl.vera(2),
    "tucker": sl.AdapterSpec(sl.Tucker(2), sl.PhysicalFold("member out in")),
    "lorta": sl.lorta(2, groups=2),
    "projected": sl.lorta(2, projection=sl.Fastfood(0.5)),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Net(nn.Module):
    """Two siblings that read one x; `inside` runs between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inside: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x)
        if self.inside is not None:
            self.inside()
        return q, self.v(x)


def adapted(spec: sl.AdapterSpec) -> tuple[Net, sl.Tuned]:
    net = Net().double()
    tuned = sl.attach(net, spec, ["q", "v"], dtype=torch.float64, seed=0)
    with torch.no_grad():
        for k, parameter in enumerate(tuned.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=k, dtype=torch.float64))
    return net, tuned


def written_out(net: Net, tuned: sl.Tuned, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs by W + dW, dW built from the nodes by itself."""
    deltas = [tuned._members[name].delta() for name in "qv"]
    layers = (net.q, net.v)
    return tuple(  # type: ignore[return-value]
        nn.functional.linear(x, layer.weight.detach() + delta, layer.bias) for layer, delta in zip(layers, deltas, strict=True)
    )


def check(net: Net, tuned: sl.Tuned, x: Tensor) -> None:
    """Outputs and gradients of a whole call are the oracle's."""
    z = x.detach().clone().requires_grad_()
    x = x.detach().clone().requires_grad_()
    wanted = list(tuned.parameters())
    ours, theirs = net(x), written_out(net, tuned, z)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)
    found = torch.autograd.grad(sum(y.pow(2).sum() for y in ours), [x, *wanted])
    expected = torch.autograd.grad(sum(y.pow(2).sum() for y in theirs), [z, *wanted])
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


X = noise(3, WIDTH, dtype=torch.float64)


@each_spec
def test_an_evaluation_before_changes_nothing(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            net(X)
        net.q(X)
        check(net, tuned, X)


@each_spec
def test_a_call_without_gradients_inside_a_call_takes_none_from_it(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    depth: list[int] = []

    def again() -> None:
        if len(depth) < 2:
            depth.append(1)
            with torch.no_grad() if len(depth) == 1 else torch.inference_mode():
                net(X)

    net.inside = again
    check(net, tuned, X)
    assert depth


@each_spec
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_is_broken_off_leaves_nothing(spec: sl.AdapterSpec, error: type[BaseException]) -> None:
    net, tuned = adapted(spec)

    def stop() -> None:
        raise error

    net.inside = stop
    with pytest.raises(error):
        net(X)
    assert tuned._passes.current() is None
    net.inside = None
    vector = torch.nn.utils.parameters_to_vector(tuned.parameters())
    torch.nn.utils.vector_to_parameters(2 * vector.detach(), tuned.parameters())  # by .data, which nothing counts
    torch.testing.assert_close(net.q(X), written_out(net, tuned, X)[0])
    check(net, tuned, X)


@each_spec
def test_two_losses_of_one_call_come_back_one_after_the_other(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    q, v = net(X)
    q.pow(2).sum().backward()
    v.pow(2).sum().backward()
    found = [p.grad.clone() for p in tuned.parameters()]
    wanted = list(tuned.parameters())
    expected = torch.autograd.grad(sum(y.pow(2).sum() for y in written_out(net, tuned, X)), wanted)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


@each_spec
def test_a_later_loss_comes_back_for_many_cotangents_at_once(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    wanted, ways = list(tuned.parameters()), noise(3, *X.shape, dtype=torch.float64)

    def jacobian(y: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vmap(
            lambda way: torch.autograd.grad(y, wanted, way, retain_graph=True, allow_unused=True, materialize_grads=True)
        )(ways)

    q, v = net(X)
    q.pow(2).sum().backward()  # with which goes what the two have in common
    for left, right in zip(jacobian(v), jacobian(written_out(net, tuned, X)[1]), strict=True):
        torch.testing.assert_close(left, right)


@each_spec
def test_x_may_want_its_gradient_from_its_second_use_on(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    x = X.clone()
    net.inside = lambda: x.requires_grad_()
    net(x)[1].sum().backward()
    expected = (net.v.weight + tuned._members["v"].delta()).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected)


@each_spec
def test_gradients_asked_for_inside_no_grad_are_right(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    with torch.no_grad():
        net(X)
        with torch.enable_grad():
            check(net, tuned, X)


@each_spec
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_is_the_same(spec: sl.AdapterSpec, reentrant: bool) -> None:
    net, tuned = adapted(spec)
    x, z = (X.clone().requires_grad_() for _ in range(2))
    y = checkpoint(lambda t: sum(net(t)), x, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    found = [x.grad, *(p.grad.clone() for p in tuned.parameters())]
    loss = sum(written_out(net, tuned, z)).pow(2).sum()
    for left, right in zip(found, torch.autograd.grad(loss, [z, *tuned.parameters()]), strict=True):
        torch.testing.assert_close(left, right)


@each_spec
def test_a_reader_in_another_thread_does_not_touch_a_training_call(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    inside, go, out = threading.Event(), threading.Event(), list[Tensor]()
    trainer = threading.get_ident()

    def meet() -> None:
        if threading.get_ident() == trainer:
            if not reader.is_alive() and not inside.is_set():
                reader.start()
                assert inside.wait(20)
        else:
            inside.set()
            go.wait(20)

    def read() -> None:
        with torch.no_grad():
            out.extend(net(X))

    reader = threading.Thread(target=read)
    net.inside = meet
    ours = net(X)
    go.set()
    reader.join()
    wanted = list(tuned.parameters())
    theirs = written_out(net, tuned, X)
    for left, middle, right in zip(ours, out, theirs, strict=True):
        torch.testing.assert_close(left, right)
        torch.testing.assert_close(middle, right.detach())
    found = torch.autograd.grad(sum(y.sum() for y in ours), wanted)
    for left, right in zip(found, torch.autograd.grad(sum(y.sum() for y in theirs), wanted), strict=True):
        torch.testing.assert_close(left, right)


@each_spec
def test_a_call_without_a_backward_leaks_nothing(spec: sl.AdapterSpec) -> None:
    net, tuned = adapted(spec)
    net(X)
    node = weakref.ref(next(tuned.parameters()))
    tuned.detach()
    del net, tuned
    gc.collect()
    assert node() is None


def test_dropout_asks_the_layers_own_mode() -> None:
    net = Net()
    tuned = sl.attach(net, sl.lora(2, dropout=0.5), ["q"])
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.fill_(1.0)
    net.q.eval()
    x = torch.ones(2, WIDTH)
    assert torch.equal(net.q(x), net.q(x))
    net.q.train()
    assert len({net.q(x).sum().item() for _ in range(8)}) > 1
