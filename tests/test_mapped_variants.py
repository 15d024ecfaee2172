"""Variants by name whose nodes have maps, beside PEFT's layers at the same numbers, and beside their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import seeded
from optional import library
from torch import Tensor, nn

import superlora_tn as sl

OUT, IN = 12, 8
Named = dict[str, Tensor]


def pair(spec: sl.AdapterSpec, config: Any) -> tuple[nn.Module, sl.Tuned, nn.Module]:
    """Two equal layers: with our adapter (and its handle), and with PEFT's."""
    ours, theirs = (seeded(0, lambda: nn.Sequential(nn.Linear(IN, OUT))) for _ in range(2))
    return ours, sl.attach(ours, spec, targets=["0"], seed=0), library("peft").get_peft_model(theirs, config)


def tensors(tuned: sl.Tuned) -> Named:
    """Our nodes by name, frozen ones too."""
    named = {**dict(tuned.named_parameters()), **dict(tuned.named_buffers())}
    return {name.rpartition("node_")[2]: tensor for name, tensor in named.items()}


def trained(model: nn.Module) -> Named:
    """PEFT's parameters, by the part of the name before the adapter's."""
    found = [(n.split("."), p) for n, p in model.named_parameters() if p.requires_grad]
    return {next(part for part in reversed(parts) if part not in ("default", "0", "weight")): p for parts, p in found}


def compare(ours: nn.Module, theirs: nn.Module, back: Callable[[], list[tuple[Tensor, Tensor]]]) -> None:
    """Equal outputs and gradients; `back` gives ours and theirs, in our terms."""
    x = seeded(1, lambda: torch.randn(5, IN))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found = [model(own) for model, own in zip((ours, theirs), inputs, strict=True)]
    base = seeded(0, lambda: nn.Sequential(nn.Linear(IN, OUT)))(x)
    assert not torch.allclose(found[0], base, atol=1e-2)
    for y in found:
        y.square().sum().backward()
    # float32 through an SVD's vectors or a solver, of at most 96 numbers
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    for one, other in [(inputs[0].grad, inputs[1].grad), *back()]:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_one_factor_of_a_butterfly_is_pefts_boft(monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    library("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)  # it would try to build an extension
    config = library("peft").BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    ours, tuned, theirs = pair(sl.boft(4, 1, scaled), config)
    (own, *scales), other, scale = tuned.parameters(), trained(theirs)["boft_R"], trained(theirs)["boft_s"]
    assert len(scales) == scaled
    assert sl.boft(4, 1, scaled).count([(OUT, IN)]) == own.numel() + OUT * scaled
    above = torch.triu_indices(4, 4, 1)
    with torch.no_grad():
        own.copy_(torch.randn(own.shape) / 3)
        skew = torch.zeros_like(other)
        skew[0, :, above[0], above[1]] = own
        other.copy_(skew - skew.mT)
        for s in scales:
            assert torch.equal(s, torch.ones(OUT))
            s.copy_(torch.rand(OUT) + 0.5)
            scale.copy_(s[:, None])

    def back() -> list[tuple[Tensor, Tensor]]:
        grad = other.grad[0] - other.grad[0].mT
        return [(own.grad, grad[:, above[0], above[1]]), *((s.grad, scale.grad[:, 0]) for s in scales)]

    compare(ours, theirs, back)


def test_psoft_is_pefts() -> None:
    config = library("peft").PsoftConfig(r=3, psoft_alpha=6, psoft_svd="full", ab_svd_init="psoft_init", target_modules=["0"])
    ours, tuned, theirs = pair(sl.psoft(3), config)
    own, layer = tensors(tuned), theirs.base_model.model[0]
    turn = layer.psoft_R["default"]
    given = torch.randn(9) / 3
    with torch.no_grad():
        # Singular vectors are known up to a sign, which R does not leave alone.
        a, b = layer._get_psoft_ab_cache_buffers("default")
        own["V"].copy_(a)
        own["U"].copy_(b / b.norm(dim=0))
        own["R"].copy_(given)
        turn.weight.copy_(-given[:3])  # theirs is Cayley's transform of -S
        turn.vector_b.copy_(1 + given[3:6])
        turn.vector_a.copy_(1 + given[6:])
    assert own["R"].numel() == 9 == sl.psoft(3).count([(OUT, IN)])
    compare(
        ours,
        theirs,
        lambda: [(own["R"].grad, torch.cat([-turn.weight.grad, turn.vector_b.grad, turn.vector_a.grad]))],
    )


def test_delora_is_pefts() -> None:
    config = library("peft").DeloraConfig(r=3, delora_lambda=15, target_modules=["0"])
    ours, tuned, theirs = pair(sl.delora(3, 15.0), config)
    own, other = tensors(tuned), trained(theirs)
    torch.testing.assert_close(own["W"], ours[0].weight.norm(dim=0).detach())
    with torch.no_grad():
        own["B"].copy_(torch.randn(3, OUT))
        own["lam"].fill_(0.7)
        other["delora_B"].copy_(own["B"].t())
        other["delora_A"].copy_(own["A"])
        other["delora_lambda"].fill_(0.7 * 15)
    assert tuned.num_parameters == sum(p.numel() for p in other.values())
    compare(
        ours,
        theirs,
        lambda: [
            (own["B"].grad, other["delora_B"].grad.t()),
            (own["A"].grad, other["delora_A"].grad),
            (own["lam"].grad, other["delora_lambda"].grad[0] * 15),
        ],
    )


def test_waveft_is_pefts() -> None:
    config = library("peft").WaveFTConfig(n_frequency=20, scaling=25.0, wavelet_family="db1", target_modules=["0"])
    ours, tuned, theirs = pair(sl.waveft(20), config)
    (own,), other = tuned.parameters(), trained(theirs)["waveft_spectrum"]
    with torch.no_grad():
        own.copy_(torch.randn(20) / 10)
        other.copy_(own)
    compare(ours, theirs, lambda: [(own.grad, other.grad)])


def test_tiny_lora_is_pefts() -> None:
    """Which puts the roots of the singular values on both sides of its random matrices."""
    config = library("peft").TinyLoraConfig(r=2, u=5, target_modules=["0"])
    ours, tuned, theirs = pair(sl.tiny_lora(5, 2), config)
    own, layer, (other,) = tensors(tuned), theirs.base_model.model[0], trained(theirs).values()
    with torch.no_grad():
        a, b, p = (getattr(layer, f"tinylora_{name}")["default"] for name in "ABP")
        root = b.norm(dim=0)
        own["U"].copy_((b / root)[None])
        own["V"].copy_((a / root[:, None])[None])
        torch.testing.assert_close(own["S"][0], root**2, rtol=1e-4, atol=1e-5)
        own["P"].copy_((p / root[:, None] * root)[None])
        own["v"].copy_(torch.randn(5))
        other.copy_(own["v"])
    compare(ours, theirs, lambda: [(own["v"].grad, other.grad)])


def test_vb_lora_is_pefts_times_g() -> None:
    config = library("peft").VBLoRAConfig(r=2, num_vectors=6, vector_length=4, topk=2, target_modules=["0"])
    ours, tuned, theirs = pair(sl.vb_lora(2, 6, 4), config)
    own, other = tensors(tuned), trained(theirs)
    with torch.no_grad():
        own["g"].fill_(1.0)
        for name in ("a", "b", "bank"):
            own[name].normal_()
        other["vblora_logits_A"].copy_(own["a"][0])
        other["vblora_logits_B"].copy_(own["b"][0])
        other["vblora_vector_bank"].copy_(own["bank"])
    assert tuned.num_parameters == sum(p.numel() for p in other.values()) + 1
    compare(
        ours,
        theirs,
        lambda: [
            (own["a"].grad[0], other["vblora_logits_A"].grad),
            (own["b"].grad[0], other["vblora_logits_B"].grad),
            (own["bank"].grad, other["vblora_vector_bank"].grad),
        ],
    )


def test_uni_lora_is_pefts_times_g() -> None:
    """At its scales and its choice of numbers, which ours are told."""
    config = library("peft").UniLoraConfig(r=2, theta_d_length=7, target_modules=["0"])
    ours, tuned, theirs = pair(sl.uni_lora(7, 2), config)
    own, layer, (other,) = tensors(tuned), theirs.base_model.model[0], trained(theirs).values()
    adapter = tuned._members["0"].adapter
    places = [layer.unilora_indices_B["default"], layer.unilora_indices_A["default"]]
    adapter._maps._tables[1:] = [p.reshape(-1) for p in places]
    with torch.no_grad():
        own["g"].fill_(1.0)
        own["A"].normal_()
        other.copy_(own["A"])
        for which, place in zip("BA", places, strict=True):  # ours counts in each of the two, PEFT in both together
            often = torch.bincount(place.reshape(-1), minlength=7).clamp_min(1).rsqrt()
            getattr(layer, f"unilora_scales_{which}")["default"].copy_(often[place])
    compare(ours, theirs, lambda: [(own["A"].grad, other.grad)])


def rotation(skew: np.ndarray) -> np.ndarray:
    """Cayley's transform of the numbers above the diagonal."""
    size = next(n for n in range(2, 99) if n * (n - 1) // 2 == len(skew))
    whole = np.zeros((size, size))
    whole[np.triu_indices(size, 1)] = skew
    whole -= whole.T
    return (np.eye(size) - whole) @ np.linalg.inv(np.eye(size) + whole)


@pytest.mark.parametrize(("size", "factors", "inward"), [(2, 3, 24), (3, 2, 9), (2, 2, 4)])
@pytest.mark.parametrize("route", ["apply", "delta"])
def test_a_butterfly_rotates_along_one_digit_after_the_other(size: int, factors: int, inward: int, route: str) -> None:
    model = nn.Sequential(nn.Linear(inward, 5).double())
    tuned = sl.attach(model, sl.boft(size, factors), targets=["0"], route=route).to(torch.float64)
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    x = torch.randn(3, inward, dtype=torch.float64)
    turned = x.numpy().copy()
    for k in range(factors):
        stored = tensors(tuned)[f"R{k + 1}"].detach().reshape(-1, size * (size - 1) // 2).numpy()
        used = set()
        for first in range(inward):  # the inputs whose numbers differ in digit k alone
            if first // size**k % size:
                continue
            group = [first + d * size**k for d in range(size)]
            # A factor's rotations are numbered by the block, the digits that are rotated already, and those to come.
            digits = [first // size**j % size for j in range(factors) if j != k]
            number = first // size**factors
            for digit in digits:
                number = number * size + digit
            used.add(number)
            turned[:, group] = turned[:, group] @ rotation(stored[number])
        assert used == set(range(len(stored)))
    y = turned @ model[0].weight.detach().numpy().T + model[0].bias.detach().numpy()
    np.testing.assert_allclose(model(x).detach().numpy(), y, rtol=0, atol=1e-12)  # float64 through solvers of 3 x 3


def test_givens_layers_are_a_butterfly_of_pairs() -> None:
    assert sl.goft(3) == sl.boft(2, 3)
    assert sl.goft(3).count([(5, 24)]) == 3 * 12
    with pytest.raises(sl.SpecError, match="boft was given size=1"):
        sl.boft(1)


NAMED = {
    "boft": sl.boft(2, 2),
    "boft, scaled": sl.boft(2, 2, scaled=True),
    "goft": sl.goft(3),
    "psoft": sl.psoft(3),
    "delora": sl.delora(2),
    "waveft": sl.waveft(9),
    "tiny_lora": sl.tiny_lora(5, 2),
    "uni_lora": sl.uni_lora(9, 2),
    "vb_lora": sl.vb_lora(2, 6, 4),
    "moka": sl.moka(3),
}


@pytest.mark.parametrize("size", [-1, 2])
def test_moka_is_a_mixture_of_kronecker_products(size: int) -> None:
    spec = sl.moka(3, size, alpha=2.0)
    first = (3, 2) if size == -1 else (2, 2)  # of 12 x 8
    assert spec.count([(OUT, IN)]) == 3 * (1 + first[0] * first[1] + OUT * IN // (first[0] * first[1]))
    tuned = sl.attach(nn.Sequential(nn.Linear(IN, OUT)).double(), spec, targets=["0"], dtype=torch.float64)
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    v = {name: t.detach().numpy() for name, t in tensors(tuned).items()}
    assert v["A"].shape == (3, *first)
    gate = np.exp(v["g"]) / np.exp(v["g"]).sum()
    expected = 2.0 * sum(g * np.kron(a, b) for g, a, b in zip(gate, v["A"], v["B"], strict=True))
    np.testing.assert_allclose(tuned.delta("0").detach().numpy(), expected, rtol=1e-12, atol=1e-13)  # sums of 3 products


@pytest.mark.parametrize("name", NAMED)
def test_w_is_whole_at_the_start_then_everything_trains_and_merges(name: str) -> None:
    model, base = (seeded(0, lambda: nn.Sequential(nn.Linear(IN, OUT))) for _ in range(2))
    tuned = sl.attach(model, NAMED[name], targets=["0"], seed=0)
    x = seeded(1, lambda: torch.randn(5, IN))
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
    assert tuned.num_parameters == NAMED[name].count([(OUT, IN)])
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).pow(3).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in tuned.named_parameters())
    y = model(x)
    tuned.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)  # float32: dW in W and through x round apart
    tuned.unmerge()
    assert sl.AdapterSpec.from_dict(NAMED[name].to_dict()) == NAMED[name]


def test_what_is_shared_is_refused_in_words() -> None:
    def count(**nodes: sl.Node | str) -> None:
        sl.AdapterSpec(sl.Network("o i", {"r": 2}, **nodes)).count([(12, 8)])

    with pytest.raises(sl.SpecError, match=r"'b' of shape .* is made of 'c', which is no such node"):
        count(a="o r", b=sl.Node("r i", trainable=False, map=sl.Same("c")))
    with pytest.raises(sl.SpecError, match=r"of its shape that has no map"):
        count(a="o r", b=sl.Node("r i", trainable=False, map=sl.Same("a")))
    with pytest.raises(sl.SpecError, match="a Spread of as many numbers"):
        count(a=sl.Node("o r", map=sl.Spread(5)), b=sl.Node("r i", trainable=False, map=sl.Spread(6, of="a")))
    with pytest.raises(sl.SpecError, match="nothing of its own to train"):
        sl.Node("r i", map=sl.Same("a"))
    with pytest.raises(sl.SpecError, match="give the name of the node"):
        sl.Same()
    for wrong, words in (
        (lambda: sl.hra("8"), "hra was given rank='8'"),
        (lambda: sl.delora(2, strength=None), "delora was given strength=None"),
        (lambda: sl.uni_lora(seed="a"), "seed='a'"),
    ):
        with pytest.raises(sl.SpecError, match=words):
            wrong()
    with pytest.raises(sl.SpecError, match="have to be even"):
        sl.waveft(5).count([(9, 8)])
    with pytest.raises(sl.SpecError, match="choose at most those"):
        sl.vb_lora(2, 3, 4, top=5).count([(12, 8)])
